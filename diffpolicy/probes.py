"""Does a policy do what the words say? The same scenes and noise played with other words, no words, half of its senses.

    asked        what the seed asks for, in wordings of the demonstrations: the reference of every comparison
    swapped      same scene, words of another goal
    empty        same scene, no words
    paraphrase   same scene and goal, in wordings that no demonstration used
    held_out     same seeds, a goal that no demonstration showed, made of parts that others did
    state_only   as asked, cameras hidden
    image_only   as asked, state hidden

Only what is asked or what the policy gets changes from row to row: an episode has the same seed, hence the same scene, and
the same noise in all of them. A score alone proves nothing: a policy that reads the task off the scene has a good one too,
and only `swapped` tells.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from diffpolicy.encoders.parts import part_of
from diffpolicy.envs import ENVIRONMENTS, make_env
from diffpolicy.envs.base import LanguageEnv
from diffpolicy.executors import RecedingHorizon
from diffpolicy.policies import DiffusionPolicy
from diffpolicy.rollout import Change, Episode, RolloutResult, rollout
from diffpolicy.spec import TASK, unknown_name


@dataclass(frozen=True)
class Probe:
    """One way to play the seeds."""

    about: str
    """What is done, for the legend."""
    options: tuple[tuple[str, object], ...] = ()
    """Options of the LanguageEnv with their values, over those of the rollout."""
    hides: str = ""
    """What the policy does not get: `words`, `cameras`, `state`, or nothing."""


PROBES = {
    "asked": Probe("the words ask for the seed's goal, in wordings of the demonstrations"),
    "swapped": Probe("same scene, words of another goal", (("swap", True),)),
    "empty": Probe("same scene, no words; what counts is the goal that the seed would ask", hides="words"),
    "paraphrase": Probe("same scene and goal, wordings that no demonstration used", (("wordings", "unseen"),)),
    "held_out": Probe(
        "goals that no demonstration showed; they may be harder in themselves too", (("goals", "held_out"),)
    ),
    "state_only": Probe("as asked, without cameras", hides="cameras"),
    "image_only": Probe("as asked, without state", hides="state"),
}


@dataclass
class Row:
    """A probe that was played."""

    name: str
    how: str
    """What the policy got instead, where something was taken away; empty otherwise."""
    result: RolloutResult

    @property
    def episodes(self) -> list[Episode]:
        return self.result.episodes

    @property
    def complete(self) -> bool:
        return len(self.episodes) == self.result.planned


@dataclass
class Probes:
    """All rows of one probing, and why others were not played."""

    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """name -> why, in words."""

    def __getitem__(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def __contains__(self, name: str) -> bool:
        return any(row.name == name for row in self.rows)


# ------------------------------------------------------------------------------------------ what the policy gets instead


def say(words: str | Callable[[str], str]) -> Change:
    """Puts other words in place of those of the environment: always these, or a function of them."""
    return lambda obs, _: obs | {TASK: [words(w) if callable(words) else words for w in obs[TASK]]}


def hide(keys: Collection[str]) -> Change:
    """Takes roles away; only for a policy that may miss them."""
    return lambda obs, _: {key: value for key, value in obs.items() if key not in keys}


def show_instead(keys: Collection[str], frames: dict[int, dict[str, np.ndarray]]) -> Change:
    """Puts fixed frames in place of what is seen at these roles.

    Args:
        frames: seed of the episode -> role -> one frame (...), shown at every step.
    """

    def change(obs: dict, seeds: Sequence[int]) -> dict:
        shown = {key: np.stack([frames[seed][key] for seed in seeds])[:, None] for key in keys}  # (B, 1, ...)
        return obs | {key: np.broadcast_to(frame, obs[key].shape) for key, frame in shown.items()}

    return change


def foreign_frames(env_name: str, env_choices: dict, keys: Sequence[str], seeds: Sequence[int]) -> dict[int, dict]:
    """What the roles show at the start of another scene, that of seed + 1: seed -> role -> frame (...)."""
    env = make_env(env_name, **env_choices)
    try:
        starts = {seed: env.reset(seed=seed + 1)[0] for seed in seeds}
        return {seed: {key: obs[key] for key in keys} for seed, obs in starts.items()}
    finally:
        env.close()


# ---------------------------------------------------------------------------------------------------------- playing


def parse_probes(text: str) -> list[str]:
    """`language` (all of them) or a comma list -> names, in the order of PROBES, `asked` always among them.

    Raises:
        ValueError: an unknown name, with the nearest right one.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in ("language", *PROBES):
            raise unknown_name("--probe", name, ("language", *PROBES))
    if not names:
        raise ValueError(f"--probe needs `language` or some of {list(PROBES)}, got {text!r}")
    return [name for name in PROBES if name == "asked" or name in names or "language" in names]


def check_can_be_probed(policy: DiffusionPolicy, env_name: str) -> None:
    """ValueError where there are no words to probe, in the environment or in the policy."""
    if not issubclass(ENVIRONMENTS[env_name][1], LanguageEnv):
        having = sorted(name for name, (_, env) in ENVIRONMENTS.items() if issubclass(env, LanguageEnv))
        raise ValueError(f"--probe needs an environment that asks in words, one of {having}; {env_name!r} has one goal")
    if "text" not in policy.encoder.cond.kinds:
        raise ValueError(
            "--probe needs a policy that reads words: this one was trained without (encoder.name=clip with "
            "encoder.text=pooled reads them)"
        )


def left_out_reasons(names: Collection[str], policy: DiffusionPolicy, env: LanguageEnv, choices: dict) -> dict:
    """Probes that say nothing here: name -> why."""
    both = bool(policy.spec.image_keys and policy.spec.state_keys)
    one_sense = "the policy has no camera" if not policy.spec.image_keys else "the policy has no state"
    held_out = {
        "the environment holds no goal out": not env.held_out,
        f"env.goal={choices.get('goal')!r} asks for one goal only": bool(choices.get("goal")),
        "env.goals=held_out: asked is it already": choices.get("goals") == "held_out",
    }
    reasons = {
        "empty": "" if TASK in policy.droppable else "not allowed: trained without encoder.task_dropout",
        "paraphrase": "" if any(w.unseen for w in env.wordings.values()) else "the environment has no unseen wordings",
        "held_out": next((why for why, applies in held_out.items() if applies), ""),
        "state_only": "" if both else one_sense,
        "image_only": "" if both else one_sense,
    }
    return {name: reasons[name] for name in names if reasons.get(name)}


def taken_away(
    probe: Probe, policy: DiffusionPolicy, env_name: str, env_choices: dict, seeds: Sequence[int]
) -> tuple[Change | None, str]:
    """What changes the observations of a probe, and how that is said."""
    if probe.hides == "words":
        return say(""), "words hidden (learned null)"
    if not probe.hides:
        return None, ""
    keys = policy.spec.image_keys if probe.hides == "cameras" else policy.spec.state_keys
    if all(part_of(key) in policy.droppable for key in keys):
        return hide(keys), f"{probe.hides} hidden (learned null)"
    frames = foreign_frames(env_name, env_choices, keys, seeds)
    return show_instead(keys, frames), f"{probe.hides} of another scene (trained without their dropout)"


def play_probes(
    executor: RecedingHorizon,
    env_name: str,
    env_choices: dict,
    names: Sequence[str],
    *,
    seeds: Sequence[int],
    on_row: Callable[[Row, Probes], None] | None = None,
    on_start: Callable[[str], Callable[[Episode], None] | None] | None = None,
    num_films: int = 0,
    num_pictures: int = 0,
    **how,
) -> Probes:
    """Plays the named probes one after the other on the same seeds, each with the same noise.

    Args:
        names: of PROBES, `asked` first.
        on_row: called when a probe is played, with all that there is so far; it may drop films and pictures.
        on_start: called with a probe's name; returns what rollout() calls after each episode.
        how: as rollout() takes it.
    Returns:
        What was played: all of it, or, after an interruption, what there was until then (the last row may be cut short).
    Raises:
        ValueError: no words in this environment or for this policy.
    """
    policy = executor.policy
    check_can_be_probed(policy, env_name)
    choices = dict(env_choices)
    if policy.spec.image_keys:
        choices["pixels"] = True
    for key, neutral in (("swap", False), ("wordings", "seen")):
        if choices.get(key, neutral) != neutral:
            warnings.warn(f"env.{key}={choices[key]} is ignored: every row of --probe has its own", stacklevel=2)
        choices[key] = neutral
    env = make_env(env_name, **choices)
    probes = Probes(left_out=left_out_reasons(names, policy, env, choices))
    env.close()
    for name in names:
        if name in probes.left_out:
            continue
        row_choices = choices | dict(PROBES[name].options)
        try:
            change, said = taken_away(PROBES[name], policy, env_name, row_choices, seeds)
            result = rollout(
                executor,
                env_name,
                row_choices,
                seeds=seeds,
                on_episode=on_start(name) if on_start else None,
                num_films=num_films,
                num_pictures=num_pictures,
                change=change,
                **how,
            )
        except KeyboardInterrupt:
            if not probes.rows:
                raise
            warnings.warn(f"interrupted: what was played before {name} is kept", stacklevel=2)
            break
        row = Row(name, said, result)
        probes.rows.append(row)
        if on_row:
            on_row(row, probes)
        if not row.complete:
            break
    for name in names:
        if name not in probes and name not in probes.left_out:
            probes.left_out[name] = "not played: interrupted"
    return probes
