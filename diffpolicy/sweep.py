"""Sweep files: YAML -> cells. Pure: nothing here trains, rolls out or writes.

    axes:                                     cells = every combination of the axes, less what `exclude` names
      process.schedule: [cosine, linear]      a config key and its values
      steps:                                  or a name of your own with labelled settings, several keys at once
        4 calls: {sampler.num_inference_steps: 4}
        U-Net: conf/denoiser/unet_small.yaml  (a setting may also be a YAML file, or a list of them)

A cell's configuration is `base` (and the YAML files of its settings), stacked, then `set`, then its settings. Its training
part decides which network it needs; `sampler`, `guidance`, `horizons.act` and `env` are its inference part, tried on that
network.

The file is longer than most because it holds one thought: what a sweep file says, and what that means.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from diffpolicy.ablation_cells import AxisValue
from diffpolicy.config import FAMILIES, Config, find_yaml, load_config
from diffpolicy.mixture import PROBLEMS
from diffpolicy.spec import unknown_name

RUN_SETTINGS = ("seeds", "episodes", "first_env_seed", "sampling_seed")
"""Keys of a sweep that `key=value` on the command line may change; every other key=value is a config key."""
SPOKEN_ONLY = ("question", "expected_time", "compare")
"""Keys of a sweep that change no cell."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    name: str
    """Names the results folder: runs/ablations/<name>."""
    question: str = ""
    """What the sweep asks, in words; heads the report."""
    base: tuple[str, ...]
    """YAML files, stacked as for `diffpolicy train`."""
    set: dict[str, Any] = field(default_factory=dict)
    """Config key -> value, on every cell."""
    axes: dict[str, dict[Any, dict]]
    """Axis -> value or label -> what it sets: {"set": {key: value}} or {"files": [YAML, ...]}."""
    exclude: tuple[dict, ...] = ()
    """Combinations to leave out: axis (or config key) -> value or list of values; all must hold."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds: networks per cell."""
    episodes: int = 100
    """Episodes that each network plays, the same start states in every cell."""
    first_env_seed: int = 100_000
    sampling_seed: int = 0
    """Seed of the policies' noise: an episode starts from the same noise in every cell."""
    baseline: dict | None = None
    """axis -> value: the first cell of these is what differences are taken to; None takes the first of all."""
    compare: dict | None = None
    """axis -> value: a cell's difference is taken to the cell that has this value and else the same settings, as every sampler to
    DDIM at equal calls; to the baseline where there is no such cell."""
    oracle: dict | None = None
    """Keyword arguments of oracle.grade, as {problem: two_modes}; None leaves the exact test bench out."""
    collect: dict | None = None
    """{env, episodes, seed, options}: scripted demonstrations to record first, for sweeps that need no data at hand."""
    expected_time: str = ""
    """What to expect, in words: "3 h on 2 cores"."""
    is_smoke: bool = False
    """A short form to see that everything works; its numbers mean nothing."""

    def __post_init__(self):
        if not re.fullmatch(r"[\w.+-]+", self.name) or set(self.name) == {"."}:
            raise ValueError(f"name must be one folder name of letters, digits and _ . + -, got {self.name!r}")
        if not self.base:
            raise ValueError("base must name at least one YAML file, such as conf/task/tabletop.yaml")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds must be different numbers >= 0, at least one, got {list(self.seeds)}")
        if self.episodes < 1:
            raise ValueError(f"episodes must be at least 1, got {self.episodes}")
        for name in ("first_env_seed", "sampling_seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if "seed" in self.set or any(
            "seed" in setting["set"] for axis in self.axes.values() for setting in axis.values()
        ):
            raise ValueError("training seeds are no axis: write seeds: [0, 1, 2], and every cell is trained with each")
        for key in self.set:
            if key in self.axes:
                raise ValueError(f"{key} is set for every cell and is an axis too; take one of them away")

    @property
    def env_seeds(self) -> range:
        """Start states, the same in every cell."""
        return range(self.first_env_seed, self.first_env_seed + self.episodes)

    def to_dict(self) -> dict:
        """Plain data for sweep.json."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


@dataclass(frozen=True)
class Cell:
    """One combination of the axes; S networks of it are trained and rolled out."""

    label: str
    """Unique in its sweep."""
    axes: dict[str, AxisValue]
    """Axis -> value or label, in the sweep's order."""
    set: dict[str, Any]
    """Config key -> value, of all axes together."""
    files: tuple[str, ...] = ()
    """YAML files that its labelled settings name."""


def load_sweep(
    file: str | Path, overrides: Sequence[str] = (), *, data: str | Path | None = None, smoke: bool = False
) -> SweepConfig:
    """Reads a sweep file; `key=value` overrides set config keys, or seeds, episodes, first_env_seed, sampling_seed.

    Args:
        data: the zarr store; replaces data.path, and what the sweep would collect.
        smoke: merge the file's `smoke` section: its `set` and `axes` key by key (a list of labels picks settings of a
            labelled axis), everything else whole. A baseline that it leaves out gives way to the first cell.
    Raises:
        FileNotFoundError: no such file, with the nearest shipped one.
        ValueError: a wrong key or value, with the nearest right one.
    """
    path = find_yaml(file)
    try:
        plain = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:  # a YAML scanner's errors have no common base with OmegaConf's
        raise ValueError(f"{path} is not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(plain, dict):
        raise ValueError(f"{path} must hold `key: value` lines, got a {type(plain).__name__}")
    short = plain.pop("smoke", None)
    try:
        sweep = sweep_from_dict(plain)
        if smoke:
            if not isinstance(short, dict):
                raise ValueError("--smoke needs a `smoke:` section: fewer steps, seeds and episodes to try it with")
            sweep = _smoke(sweep, short)
        return _override(sweep, overrides, data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def sweep_from_dict(plain: dict) -> SweepConfig:
    """Plain data, as it stands in a sweep file, -> SweepConfig, every key checked."""
    known = [f.name for f in dataclasses.fields(SweepConfig) if f.name != "is_smoke"]
    for key in plain:
        if key not in known:
            raise unknown_name(f"sweep key {key!r}", key, [*known, "smoke"])
    values = {key: value for key, value in plain.items() if value is not None}
    for key in ("name", "base", "axes"):
        if key not in values:
            raise ValueError(f"a sweep needs {key!r}, got only {sorted(values)}")
    for key in ("name", "question", "expected_time"):
        values[key] = str(values.get(key, ""))
    for key, kind in {
        "set": dict,
        "axes": dict,
        "baseline": dict,
        "compare": dict,
        "oracle": dict,
        "collect": dict,
    }.items():
        if key in values and not isinstance(values[key], kind):
            raise ValueError(f"{key} must be a section of `key: value` lines, got {values[key]!r}")
    values["base"] = tuple(map(str, _as_list(values["base"])))
    values["set"] = _flat(values.get("set", {}))
    values["axes"] = {str(axis): _settings(str(axis), given) for axis, given in values["axes"].items()}
    for key in ("episodes", "first_env_seed", "sampling_seed"):
        values[key] = _whole(key, values.get(key, getattr(SweepConfig, key)))
    values["seeds"] = tuple(_whole("seeds", seed) for seed in _as_list(values.get("seeds", [0])))
    values["exclude"] = tuple(_as_list(values.get("exclude", [])))
    if "collect" in values:
        _check_collect(values["collect"])
    if "oracle" in values:
        _check_oracle(values["oracle"])
    sweep = SweepConfig(**values)
    for rule in sweep.exclude:
        _check_rule("exclude", rule, sweep)
    if sweep.baseline is not None:
        _check_rule("baseline", sweep.baseline, sweep)
    if sweep.compare is not None:
        _check_rule("compare", sweep.compare, sweep)
        if wrong := [axis for axis in sweep.compare if axis not in sweep.axes]:
            raise ValueError(f"compare takes axes, got {wrong[0]!r}; one of {list(sweep.axes)}")
    return sweep


def cells_of(sweep: SweepConfig) -> tuple[Cell, ...]:
    """Every combination of the axes that is not excluded, the last axis running fastest."""
    cells = []
    for point in itertools.product(*(settings.items() for settings in sweep.axes.values())):
        axes = {axis: shown(value) for axis, (value, _) in zip(sweep.axes, point, strict=True)}
        merged: dict[str, Any] = {}
        files: list[str] = []
        for axis, (value, setting) in zip(sweep.axes, point, strict=True):
            for key, wanted in setting["set"].items():
                if key in merged:
                    raise ValueError(
                        f"axis {axis}={value} sets {key}, as another axis does; join the two into one axis"
                    )
                merged[key] = wanted
            files += setting["files"]
        if any(_holds(rule, axes, merged) for rule in sweep.exclude):
            continue
        label = ", ".join(_spoken(axis, value) for axis, value in axes.items()) or "base"
        cells.append(Cell(label=label, axes=axes, set=merged, files=tuple(files)))
    if not cells:
        raise ValueError(f"sweep {sweep.name}: `exclude` leaves no cell")
    labels = [cell.label for cell in cells]
    return tuple(  # two axes may share a word: then each is told in full
        dataclasses.replace(cell, label=", ".join(f"{axis} {_text(value)}" for axis, value in cell.axes.items()))
        if labels.count(cell.label) > 1
        else cell
        for cell in cells
    )


def baseline_of(sweep: SweepConfig, cells: Sequence[Cell]) -> int:
    """Index of the cell that differences are taken to."""
    if sweep.baseline is None:
        return 0
    for index, cell in enumerate(cells):
        if _holds(sweep.baseline, cell.axes, cell.set):
            return index
    if sweep.is_smoke:
        return 0
    raise ValueError(f"sweep {sweep.name}: baseline {sweep.baseline} is excluded; name a cell that is there")


def cell_config(sweep: SweepConfig, cell: Cell, seed: int) -> Config:
    """The configuration of a cell's network with this training seed.

    Raises:
        ValueError: a key that is none or a value that does not fit, with the nearest right one.
    """
    sections: dict[str, dict] = {}
    for settings in (sweep.set, cell.set, {"seed": seed}):
        # the choice of a member comes before its options, in whatever order they stand
        for key, value in sorted(settings.items(), key=lambda item: not _chooses(*item)):
            section, _, rest = key.partition(".")
            if _chooses(key, value):
                sections[section] = {"name": value} | _same_member(sections.get(section, {}), value)
            elif rest:
                if not isinstance(sections.get(section), dict):
                    sections[section] = {}
                sections[section][rest] = value
            else:
                sections[key] = value
    overrides = [f"{section}={json.dumps(_nested(value))}" for section, value in sections.items()]
    try:
        return load_config([*sweep.base, *cell.files], overrides)
    except ValueError as error:  # it names a command line, where there was none
        raise ValueError(re.sub(r" \(in [^()]*command line: [^()]*\)", "", str(error))) from error


def training_config(sweep: SweepConfig, cell: Cell, seed: int) -> Config:
    """The configuration that a cell's network is trained with.

    Training windows run up to horizons.act - 1 steps past an episode's end. Where horizons.act is an axis, its cells
    share one network, trained with the horizons.act of `base`, or the largest that fits a shorter prediction.
    """
    config = cell_config(sweep, cell, seed)
    if "horizons.act" not in cell.set:
        return config
    elsewhere = {key: value for key, value in cell.set.items() if not key.startswith("horizons.")}
    base = cell_config(sweep, dataclasses.replace(cell, set=elsewhere), seed).horizons
    act = min(base.act, config.horizons.pred - config.horizons.past)
    return dataclasses.replace(config, horizons=dataclasses.replace(config.horizons, act=act))


def training_part(config: Config, fingerprint: str) -> dict:
    """What decides a trained network, but for its seed: everything except how it is used, plus the data's fingerprint."""
    plain = config.to_dict()
    for key in ("task", "seed", "sampler", "guidance", "env"):  # task only names a folder
        del plain[key]
    return plain | {"data": {**plain["data"], "path": fingerprint}}


def content_hash(plain: Any) -> str:
    """12 hexadecimal digits that tell plain data apart; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def identity(sweep: SweepConfig) -> dict:
    """What makes a sweep this sweep: all that matters to its cells but where the data lie."""
    plain = {key: value for key, value in sweep.to_dict().items() if key not in SPOKEN_ONLY}
    return plain | {"set": {key: value for key, value in plain["set"].items() if key != "data.path"}}


def shown(value: Any) -> AxisValue:
    """An axis value as it stands in tables: numbers and words as they are, lists as text."""
    return value if isinstance(value, str | float | int | bool | None) else json.dumps(value)


def _settings(axis: str, given: Any) -> dict[Any, dict]:
    """An axis -> value or label -> {"set": ..., "files": ...}."""
    if isinstance(given, dict):
        settings = {}
        for label, setting in given.items():
            if isinstance(setting, str) or (isinstance(setting, list) and all(isinstance(s, str) for s in setting)):
                settings[label] = {"set": {}, "files": _as_list(setting)}
            elif isinstance(setting, dict):
                settings[label] = {"set": _flat(setting), "files": []}
            else:
                raise ValueError(
                    f"axes.{axis}.{label} must be `{{key: value, ...}}` or YAML files, got {setting!r}; "
                    f"for a config key write a list of values: {axis}: [...]"
                )
    elif isinstance(given, list):
        settings = {}
        for value in given:
            key = shown(value)
            if isinstance(value, dict):
                raise ValueError(f"axes.{axis}: a list holds values of a config key, got {value!r}; label it instead")
            if key in settings:
                raise ValueError(f"axes.{axis} holds {value!r} twice")
            settings[key] = {"set": {axis: value}, "files": []}
    else:
        raise ValueError(f"axes.{axis} must be a list of values, or labels with settings, got {given!r}")
    if not settings:
        raise ValueError(f"axes.{axis} must have at least one value")
    return settings


def _smoke(sweep: SweepConfig, short: dict) -> SweepConfig:
    allowed = ("base", "set", "axes", "exclude", "baseline", "oracle", "collect", "expected_time", *RUN_SETTINGS)
    for key in short:
        if key not in allowed:
            raise unknown_name(f"sweep key 'smoke.{key}'", key, allowed)
    axes: dict[str, Any] = dict(sweep.axes)
    for axis, wanted in (short.get("axes") or {}).items():
        if axis not in axes:
            raise unknown_name("axis in smoke.axes", axis, axes)
        labels = _as_list(wanted)
        if not isinstance(wanted, dict) and all(shown(label) in axes[axis] for label in labels):
            axes[axis] = {shown(label): axes[axis][shown(label)] for label in labels}
        elif not isinstance(wanted, dict) and axis not in next(iter(axes[axis].values()))["set"]:
            missing = next(label for label in labels if shown(label) not in axes[axis])
            raise unknown_name(f"smoke.axes.{axis}", missing, map(str, axes[axis]))
        else:
            axes[axis] = _settings(axis, wanted)
    rest = {key: value for key, value in short.items() if key not in ("axes", "set")}
    loose = {"name": sweep.name, "base": list(sweep.base), "axes": {"task": ["any"]}, **rest}
    for key in ("exclude", "baseline"):
        loose.pop(key, None)
    checked = sweep_from_dict(loose)  # types of what the section gives
    merged = {key: getattr(checked, key) for key in rest}
    merged |= {"exclude": tuple(_as_list(short["exclude"]))} if "exclude" in short else {}
    merged |= {"baseline": short["baseline"]} if "baseline" in short else {}
    merged["set"] = sweep.set | _flat(short.get("set") or {})
    return dataclasses.replace(sweep, **merged, axes=axes, is_smoke=True)


def _override(sweep: SweepConfig, overrides: Sequence[str], data: str | Path | None) -> SweepConfig:
    settings, change = dict(sweep.set), {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"an override must read key=value, got {override!r}")
        try:
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
        except Exception as error:  # as above: YAML's errors are of another family
            raise ValueError(f"{override!r} is not readable as key=value: {' '.join(str(error).split())}") from error
        if key in RUN_SETTINGS:
            change[key] = tuple(_whole(key, v) for v in _as_list(value)) if key == "seeds" else _whole(key, value)
        elif any(key in setting["set"] for axis in sweep.axes.values() for setting in axis.values()):
            raise ValueError(f"{override}: an axis sets {key} already; change the sweep file instead")
        else:
            settings[key] = value
    if data is not None:
        settings["data.path"] = str(data)
    if settings.get("data.path") != sweep.set.get("data.path"):
        change["collect"] = None  # these data instead
    return dataclasses.replace(sweep, set=settings, **change)


def _check_rule(what: str, rule: Any, sweep: SweepConfig) -> None:
    if not isinstance(rule, dict) or not rule:
        raise ValueError(f"{what} must read {{axis: value, ...}}, got {rule!r}")
    for key, wanted in rule.items():
        values = set(sweep.axes.get(key, ()))
        for settings in sweep.axes.values():
            values |= {shown(setting["set"][key]) for setting in settings.values() if key in setting["set"]}
        if not values:
            raise unknown_name(f"axis in {what}", key, sweep.axes)
        for value in _as_list(wanted):
            if shown(value) not in values:
                raise unknown_name(f"{what}: {key}", value, map(str, values))


def _holds(rule: dict, axes: dict, settings: dict) -> bool:
    for key, wanted in rule.items():
        if key not in axes and key not in settings:
            return False
        value = axes[key] if key in axes else shown(settings[key])
        if value not in [shown(v) for v in _as_list(wanted)]:
            return False
    return True


def _check_collect(collect: dict) -> None:
    known = ("env", "episodes", "seed", "options")
    for key in collect:
        if key not in known:
            raise unknown_name(f"sweep key 'collect.{key}'", key, known)
    for key in ("env", "episodes"):
        if key not in collect:
            raise ValueError(f"collect needs {key!r}, as in {{env: tabletop, episodes: 30}}, got {collect}")


def _check_oracle(oracle: dict) -> None:
    """The exact test bench is asked after the first training: a mistake must be told before."""
    known = {"problem": str, "num_samples": int, "seed": int, "error": int | float}
    for key, value in oracle.items():
        if key not in known:
            raise unknown_name(f"sweep key 'oracle.{key}'", key, known)
        if isinstance(value, bool) or not isinstance(value, known[key]):
            kind = {"problem": "a name", "error": "a number"}.get(key, "a whole number")
            raise ValueError(f"oracle.{key} must be {kind}, got {value!r}")
    if "problem" in oracle and oracle["problem"] not in PROBLEMS:
        raise unknown_name("oracle.problem", oracle["problem"], PROBLEMS)
    if oracle.get("num_samples", 2) < 2:
        raise ValueError(f"oracle.num_samples must be at least 2, got {oracle['num_samples']}")
    if oracle.get("error", 0) < 0:
        raise ValueError(f"oracle.error must not be negative, got {oracle['error']}")


def _chooses(key: str, value: Any) -> bool:
    """Whether a setting picks a member of a family: `denoiser.name: unet`, or `denoiser: unet`."""
    section, _, rest = key.partition(".")
    return section in FAMILIES and (rest == "name" or (not rest and isinstance(value, str)))


def _same_member(options: dict, name: str) -> dict:
    """Options that were set for a member of a family, unless another member was chosen meanwhile."""
    return {k: v for k, v in options.items() if k != "name"} if options.get("name", name) == name else {}


def _flat(nested: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _nested(flat: Any) -> Any:
    """{"a.b": 1} -> {"a": {"b": 1}}."""
    if not isinstance(flat, dict):
        return flat
    nested: dict = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return nested


def _as_list(value: Any) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]


def _whole(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{key} must be a whole number, got {value!r}")
    return value


def _spoken(axis: str, value: AxisValue) -> str:
    """`cosine`, but `pred 16` and `4 calls`."""
    if axis == "sampler.num_inference_steps":
        return f"{value} call{'' if value == 1 else 's'}"
    return value if isinstance(value, str) else f"{axis.rsplit('.', 1)[-1]} {_text(value)}"


def _text(value: AxisValue) -> str:
    return {None: "none", True: "on", False: "off"}[value] if value is None or isinstance(value, bool) else str(value)
