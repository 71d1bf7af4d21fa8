"""Environments: name -> (Config, Class). To add one, write a file and a line here."""

from __future__ import annotations

import dataclasses

from diffpolicy.envs.base import RobotEnv
from diffpolicy.envs.metaworld import MetaworldConfig, MetaworldEnv
from diffpolicy.envs.pusht import PushtConfig, PushtEnv
from diffpolicy.envs.pusht_language import PushtLanguageConfig, PushtLanguageEnv
from diffpolicy.envs.tabletop import TabletopConfig, TabletopEnv
from diffpolicy.envs.tabletop_language import TabletopLanguageConfig, TabletopLanguageEnv
from diffpolicy.spec import unknown_name

ENVIRONMENTS = {
    "metaworld": (MetaworldConfig, MetaworldEnv),
    "pusht": (PushtConfig, PushtEnv),
    "pusht_language": (PushtLanguageConfig, PushtLanguageEnv),
    "tabletop": (TabletopConfig, TabletopEnv),
    "tabletop_language": (TabletopLanguageConfig, TabletopLanguageEnv),
}


def make_env(name: str, **choices) -> RobotEnv:
    """Builds the environment `name`; choices are fields of its Config.

    Raises:
        ValueError: unknown name or choice, with the nearest right one.
        MissingExtraError: the simulator is not installed, with the pip command.
    """
    if name not in ENVIRONMENTS:
        raise unknown_name("environment", name, ENVIRONMENTS)
    config_class, env_class = ENVIRONMENTS[name]
    known = {f.name for f in dataclasses.fields(config_class)}
    for choice in choices:
        if choice not in known:
            raise unknown_name(f"option of environment {name!r}", choice, known)
    return env_class(config_class(**choices))


__all__ = ["ENVIRONMENTS", "RobotEnv", "make_env"]
