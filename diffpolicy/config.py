"""The Config tree, and load_config(): YAML files stacked left to right, then key=value.

Sections that choose from a family read `name: ...` and the options of that member's Config. A later file that changes the
name drops the options of the old member.
"""

from __future__ import annotations

import dataclasses
import types
import typing
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from diffpolicy.denoisers import DENOISERS
from diffpolicy.encoders import ENCODERS
from diffpolicy.envs import ENVIRONMENTS
from diffpolicy.guidance import GuidanceConfig
from diffpolicy.normalizer import Normalizer, NormalizerConfig
from diffpolicy.policies import POLICIES, DiffusionPolicy
from diffpolicy.processes import PROCESSES, SamplerConfig
from diffpolicy.spec import ACTION, DataSpec, Horizons, unknown_name
from diffpolicy.training import TrainConfig

FAMILIES = {"encoder": ENCODERS, "denoiser": DENOISERS, "process": PROCESSES, "env": ENVIRONMENTS}
"""Section -> {name: (Config, Class)}."""


@dataclass(frozen=True)
class Choice:
    """A member of a family with its options."""

    name: str
    options: Any

    def to_dict(self) -> dict:
        return {"name": self.name, **dataclasses.asdict(self.options)}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    path: str = ""
    """The zarr store; `diffpolicy train --data PATH` overrides it."""
    keys: dict[str, str] = field(default_factory=dict)
    """role -> key of the store or some of its dimensions, e.g. observation.state: state[0:2]."""
    val_ratio: float = 0.02
    """Share of the episodes held out for validation."""
    embedded: bool = False
    """Train on what a frozen image tower said of the frames (`diffpolicy data embed`) in place of pixels."""
    max_train_episodes: int | None = None
    split_seed: int = 42


@dataclass(frozen=True, kw_only=True)
class Config:
    task: str = "task"
    """Names the run folder: runs/<task>/<name>."""
    policy: str = "diffusion"
    data: DataConfig = field(default_factory=DataConfig)
    horizons: Horizons = field(default_factory=Horizons)
    normalizer: NormalizerConfig = field(default_factory=NormalizerConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    encoder: Choice
    denoiser: Choice
    process: Choice
    env: Choice | None = None
    """Where rollouts happen; null for data of a real robot."""
    seed: int = 42

    def to_dict(self) -> dict:
        """Plain data, as it would stand in one YAML file."""
        plain = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Choice):
                value = value.to_dict()
            elif dataclasses.is_dataclass(value):
                value = dataclasses.asdict(value)
            plain[f.name] = _without_tuples(value)
        return plain


DEFAULT_NAMES = {"encoder": "state", "denoiser": "mlp", "process": "flow"}


def load_config(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """Stacks YAML files left to right, then `key=value` overrides.

    Raises:
        FileNotFoundError: a file that is neither here nor among the shipped ones, with the nearest name.
        ValueError: a wrong key or value; says which, where it stood, and the nearest right one.
    """
    merged: dict = {}
    origin: dict[str, str] = {}
    for file in files:
        path = find_yaml(file)
        try:
            layer = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        except Exception as error:  # a YAML scanner's errors have no common base with OmegaConf's
            raise ValueError(f"{path} is not readable as YAML: {_one_line(error)}") from error
        if layer is None:
            layer = {}
        if not isinstance(layer, dict):
            raise ValueError(f"{path} must hold `key: value` lines, got a {type(layer).__name__}")
        _stack(merged, layer, str(path), origin)
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"an override must read key=value, got {override!r}")
        _stack(merged, _parsed(override), f"command line: {override}", origin)
    return config_from_dict(merged, origin)


def config_from_dict(plain: dict, origin: dict[str, str] | None = None) -> Config:
    """Plain data -> Config, every key and value checked."""
    origin = origin or {}
    plain = dict(plain)
    known = {f.name: f for f in dataclasses.fields(Config)}
    for key in plain:
        if key not in known:
            raise unknown_name(f"config key {key!r}{_where(key, origin)}", key, known)
    values: dict[str, Any] = {}
    for section, family in FAMILIES.items():
        given = plain.pop(section, None)
        if given is None and section == "env":
            continue
        given = {} if given is None else given
        if isinstance(given, str):
            given = {"name": given}
        if not isinstance(given, dict):
            raise ValueError(f"{section} must be a section with a name, got {given!r}{_where(section, origin)}")
        name = given.get("name", DEFAULT_NAMES.get(section))
        if name not in family:
            raise unknown_name(f"{section}.name{_where(section + '.name', origin)}", name, family)
        options = {k: v for k, v in given.items() if k != "name"}
        values[section] = Choice(name, _build(family[name][0], options, section, origin, extra_known=("name",)))
    for key, value in plain.items():
        section_class = known[key].default_factory
        if dataclasses.is_dataclass(section_class):
            if value is None:
                value = {}
            if not isinstance(value, dict):
                raise ValueError(f"{key} must be a section, got {value!r}{_where(key, origin)}")
            if key == "data" and isinstance(value.get("keys"), dict):
                # roles hold dots, nested sections mean the same; null takes back what an earlier file named
                keys = {role: selection for role, selection in _flat(value["keys"]).items() if selection is not None}
                value = {**value, "keys": keys}
            values[key] = _build(section_class, value, key, origin)
        else:
            kind = {"seed": int}.get(key, str)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"{key} must be {kind.__name__}, got {value!r}{_where(key, origin)}")
            values[key] = value
    config = Config(**values)
    if config.policy not in POLICIES:
        raise unknown_name("policy", config.policy, POLICIES)
    samplers = PROCESSES[config.process.name][1].samplers
    if config.sampler.name not in ("auto", *samplers):
        raise ValueError(
            f"sampler.name={config.sampler.name} cannot sample process.name={config.process.name}; "
            f"it takes auto or one of {list(samplers)}"
        )
    return config


def choose(section: str, name: str, options: dict | Sequence[str] = ()) -> Choice:
    """A member of a family from a name and options, as a dict or as `key=value` texts; checked like a config file.

    Raises:
        ValueError: unknown name, key or a value of the wrong type, with the nearest right one.
    """
    if not isinstance(options, dict):
        texts, options = options, {}
        for text in texts:
            if "=" not in text:
                raise ValueError(f"an option of {section} must read key=value, got {text!r}")
            _merge(options, _parsed(text))
    if name not in FAMILIES[section]:
        raise unknown_name(section, name, FAMILIES[section])
    return Choice(name, _build(FAMILIES[section][name][0], options, section, {}))


def changed_sampler(sampler: SamplerConfig, options: Sequence[str]) -> SamplerConfig:
    """The sampler's config with `key=value` texts applied, checked like a config file.

    A new spacing or number of calls takes back an explicit list of times.

    Raises:
        ValueError: unknown key or a value of the wrong type, with the nearest right one; settings that contradict each other.
    """
    given: dict = {}
    for text in options:
        key, equals, _ = text.partition("=")
        if not equals:
            raise ValueError(f"an option of sampler must read key=value, got {text!r}")
        if key in given:
            raise ValueError(f"sampler.{key} is given twice: {given[key]} and {text}")
        _merge(given, _parsed(text))
    if grid := sorted({"spacing", "num_inference_steps"} & set(given)):
        if given.get("timesteps") is not None:
            raise ValueError(f"sampler.timesteps names every call: give it or sampler.{grid[0]}, not both")
        given["timesteps"] = None
    return _build(SamplerConfig, _without_tuples(dataclasses.asdict(sampler)) | given, "sampler", {})


def changed_guidance(guidance: GuidanceConfig, options: Sequence[str]) -> GuidanceConfig:
    """The guidance with `part=weight` texts applied (`task=2`), checked like a config file."""
    given: dict = {}
    for text in options:
        if "=" not in text:
            raise ValueError(f"guidance must read part=weight, as in task=2, got {text!r}")
        _merge(given, _parsed(text))
    return _build(GuidanceConfig, dataclasses.asdict(guidance) | given, "guidance", {})


def env_for(env: Choice, spec: DataSpec) -> Choice:
    """The environment with the pictures switched on that a policy of this spec looks at: cameras, a goal image."""
    wanted = {"pixels": bool(spec.image_keys), "goal_image": bool(spec.goal_keys)}
    shown = {name: True for name, needed in wanted.items() if needed and hasattr(env.options, name)}
    return Choice(env.name, dataclasses.replace(env.options, **shown)) if shown else env


def build_policy(config: Config, spec: DataSpec) -> DiffusionPolicy:
    """The policy that a config describes, for data of this spec; weights random, statistics missing."""
    encoder_class, denoiser_class, process_class = (
        FAMILIES[section][getattr(config, section).name][1] for section in ("encoder", "denoiser", "process")
    )
    encoder = encoder_class(config.encoder.options, spec=spec, obs_horizon=config.horizons.obs)
    denoiser = denoiser_class(
        config.denoiser.options, action_dim=spec.action_dim, pred_horizon=config.horizons.pred, cond=encoder.cond
    )
    _say_unseen_tokens(config, denoiser)
    shapes = {key: spec.fields[key].shape for key in (*spec.state_keys, ACTION)}
    modes = {key: config.normalizer.action if key == ACTION else config.normalizer.observation for key in shapes}
    return POLICIES[config.policy](
        encoder=encoder,
        denoiser=denoiser,
        process=process_class(config.process.options),
        normalizer=Normalizer(shapes, modes, range_floor=config.normalizer.range_floor),
        horizons=config.horizons,
        spec=spec,
        sampler=config.sampler,
        guidance=config.guidance,
    )


def _say_unseen_tokens(config: Config, denoiser: nn.Module) -> None:
    """Warns where an encoder is asked for tokens that the denoiser does not look at; a loaded policy said it in training."""
    options = config.encoder.options
    if getattr(denoiser, "looks_at_tokens", True) or getattr(options, "architecture", None) is not None:
        return
    for name, got in getattr(options, "for_tokens", {}).items():
        kind = getattr(config.denoiser.options, "fusion", "")
        chosen = f"denoiser.name={config.denoiser.name}" + (f" with denoiser.fusion={kind}" if kind else "")
        warnings.warn(
            f"encoder.{name}={got} is seen as pooled: {chosen} takes one vector and looks at no tokens; dit with "
            "denoiser.fusion=cross_attention, unified or readout does, and so does transformer",
            stacklevel=3,
        )


def shipped_conf() -> Path:
    """Folder of the YAML files that come with the package: inside it when installed, beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def find_yaml(file: str | Path) -> Path:
    """The file itself, or the shipped one of that name (`conf/task/tabletop.yaml` works from any folder)."""
    path = Path(file)
    if path.is_file():
        return path
    conf = shipped_conf()
    if not path.is_absolute():
        for candidate in (conf.parent / path, conf / path):
            if candidate.is_file():
                return candidate
    shipped = sorted("conf/" + p.relative_to(conf).as_posix() for p in conf.rglob("*.yaml"))
    raise FileNotFoundError(
        str(unknown_name(f"config file {str(file)!r} does not exist; a shipped one", str(file), shipped))
    )


def _parsed(override: str) -> dict:
    """`a.b=value` as nested dicts; the value is read as YAML."""
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([override]))
    except Exception as error:  # as above: YAML's errors are of another family
        raise ValueError(f"{override!r} is not readable as key=value: {_one_line(error)}") from error


def _stack(merged: dict, layer: dict, source: str, origin: dict[str, str]) -> None:
    for key, value in layer.items():
        if key in FAMILIES and isinstance(value, str):
            value = {"name": value}
        current = merged.get(key)
        renames = False
        if key in FAMILIES and isinstance(value, dict) and isinstance(current, dict) and "name" in value:
            chosen = current.get("name", DEFAULT_NAMES.get(key))
            renames = chosen is not None and value["name"] != chosen
        if isinstance(value, dict) and isinstance(current, dict) and not renames:
            _merge(current, value)
        else:
            merged[key] = value
        _remember(key, value, source, origin)


def _merge(current: dict, value: dict) -> None:
    for key, new in value.items():
        if isinstance(new, dict) and isinstance(current.get(key), dict):
            _merge(current[key], new)
        else:
            current[key] = new


def _remember(key: str, value: Any, source: str, origin: dict[str, str]) -> None:
    origin[key] = source
    if isinstance(value, dict):
        for k, v in value.items():
            _remember(f"{key}.{k}", v, source, origin)


def _where(key: str, origin: dict[str, str]) -> str:
    return f" (in {origin[key]})" if key in origin else ""


def _build(section_class: type, given: dict, section: str, origin: dict[str, str], extra_known: tuple = ()) -> Any:
    known = [f.name for f in dataclasses.fields(section_class)]
    for key in given:
        if key not in known:
            dotted = f"{section}.{key}"
            raise unknown_name(f"config key {dotted!r}{_where(dotted, origin)}", key, [*known, *extra_known])
    try:
        # numbers, text and lists are checked against the annotations by OmegaConf
        typed = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(section_class), OmegaConf.create(given)))
    except (OmegaConfBaseException, TypeError) as error:  # TypeError: a list where a section should be
        key = f"{section}.{error.full_key}" if getattr(error, "full_key", None) else section
        raise ValueError(f"{key}: {_one_line(error)}{_where(key, origin)}") from error
    hints = typing.get_type_hints(section_class)
    values = {k: _as_annotated(v, hints[k]) for k, v in typed.items()}
    try:
        return section_class(**values)
    except (TypeError, ValueError) as error:
        sources = sorted({origin[f"{section}.{k}"] for k in given if f"{section}.{k}" in origin})
        raise ValueError(f"{error}{' (in ' + ', '.join(sources) + ')' if sources else ''}") from error


def _flat(nested: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in nested.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _as_annotated(value: Any, hint: Any) -> Any:
    """Lists become tuples where the annotation says tuple."""
    options = (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else [hint]
    )
    wants_tuple = any(typing.get_origin(o) is tuple or o is tuple for o in options)
    return tuple(value) if wants_tuple and isinstance(value, list) else value


def _without_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_tuples(v) for k, v in value.items()}
    return [_without_tuples(v) for v in value] if isinstance(value, list | tuple) else value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split("full_key")[0].split())
