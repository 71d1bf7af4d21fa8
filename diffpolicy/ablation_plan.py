"""What a sweep needs and what its results folder holds: cells -> runs with hashes; finished files -> AblationResult.

A hash covers everything that decides a result, so that what is there need not be done again and two cells that mean the
same are done once. Paths and the number of workers are not in it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffpolicy.ablation_cells import AblationResult, CellResult
from diffpolicy.ablation_jobs import BATCH_SIZE
from diffpolicy.ablation_table import ORACLE_COLUMNS
from diffpolicy.config import Config, DataConfig, build_policy, env_for
from diffpolicy.policies import DiffusionPolicy
from diffpolicy.replay import ReplayBuffer
from diffpolicy.rollout import check_fit
from diffpolicy.spec import DataSpec, Horizons
from diffpolicy.sweep import (
    Cell,
    SweepConfig,
    baseline_of,
    cell_config,
    cells_of,
    content_hash,
    shown,
    training_config,
    training_part,
)
from diffpolicy.windows import load_windows

SMOKE = "a short run to see that everything works: its numbers mean nothing"


@dataclass(frozen=True)
class Run:
    """One network of a cell, and its episodes."""

    cell: Cell
    seed: int
    train_hash: str
    hash: str
    oracle_hash: str
    training: Config | None = None
    """How the network is trained; None in a plan that was read back to be reported, not run."""
    config: Config | None = None
    """How it is used: sampler, guidance, horizons.act, env."""

    @property
    def label(self) -> str:
        return f"{self.cell.label}, seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """A sweep, resolved: what must be there in the end."""

    sweep: SweepConfig
    out: Path
    cells: tuple[Cell, ...]
    """Distinct cells."""
    runs: tuple[Run, ...]
    """Cells times training seeds, all seeds of a cell one after the other."""
    duplicates: dict[str, str]
    """Label of a cell that means the same as an earlier one -> label of that one."""
    baseline: str
    """Label of the cell that differences are taken to."""
    data: dict[str, str]
    """Store -> fingerprint."""
    command: str
    """What was typed to run it; a report that is written later still tells this."""

    def run_folder(self, run: Run) -> Path:
        return self.out / "train" / run.train_hash

    def file(self, run: Run) -> Path:
        return self.out / "cells" / f"{run.hash}.json"

    def oracle_file(self, run: Run) -> Path:
        return self.out / "cells" / f"oracle_{run.oracle_hash}.json"

    def to_dict(self) -> dict:
        """What a report needs to find every result, as plain data."""
        hashes = ("train_hash", "hash", "oracle_hash")
        return {
            "sweep": self.sweep.to_dict(),
            "cells": [{"label": cell.label, "axes": cell.axes} for cell in self.cells],
            "runs": [
                {"cell": run.cell.label, "seed": run.seed} | {name: getattr(run, name) for name in hashes}
                for run in self.runs
            ],
            "duplicates": self.duplicates,
            "baseline": self.baseline,
            "data": self.data,
            "command": self.command,
        }


def read_plan(plain: dict, out: Path) -> Plan:
    """The plan that Plan.to_dict wrote: results are found by it even where a later version would hash a cell otherwise."""
    sweep = SweepConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in plain["sweep"].items()})
    cells = {c["label"]: Cell(label=c["label"], axes=c["axes"], set={}) for c in plain["cells"]}
    runs = tuple(Run(**{**run, "cell": cells[run["cell"]]}) for run in plain["runs"])
    command = plain.get("command", typed())
    return Plan(sweep, out, tuple(cells.values()), runs, plain["duplicates"], plain["baseline"], plain["data"], command)


def typed() -> str:
    """The command line of this process."""
    return " ".join(["diffpolicy", *sys.argv[1:]])


class DataMissingError(FileNotFoundError):
    """The sweep's demonstrations are not there (yet)."""


def collected_store(out: Path) -> Path:
    """Where the demonstrations lie that a sweep collects for itself."""
    return out / "demonstrations.zarr"


# Planning ------------------------------------------------------------------------------------------------------------


def plan_sweep(sweep: SweepConfig, out: Path) -> Plan:
    """Builds every cell (configuration, network without memory, sampler, environment) and hashes it.

    Raises:
        ValueError: cells that cannot be built: all of them, each with its axis, value and reason.
        DataMissingError: no store where the sweep says.
    """
    if sweep.collect is not None:
        sweep = dataclasses.replace(sweep, set={**sweep.set, "data.path": str(collected_store(out))})
    cells, runs, bad = cells_of(sweep), [], defaultdict(list)
    baseline = cells[baseline_of(sweep, cells)].label
    bench, first_of, duplicates = _Bench(), {}, {}
    for cell in cells:
        try:
            resolved = _resolve(sweep, cell, bench)
        except DataMissingError:
            raise
        except (ValueError, ImportError, FileNotFoundError) as error:
            bad[" ".join(str(error).split())].append(cell)
            continue
        cell_hash = resolved[0].hash
        if cell_hash in first_of:
            duplicates[cell.label] = first_of[cell_hash]
        else:
            first_of[cell_hash] = cell.label
            runs += resolved
    if bad:
        labels = {cell.label for group in bad.values() for cell in group}
        raise ValueError(
            f"sweep {sweep.name}: {len(labels)} of {len(cells)} cells cannot run; mend or exclude them: "
            + "; ".join(f"[{_culprit(group, cells, labels)}] {reason}" for reason, group in bad.items())
        )
    distinct = tuple(cell for cell in cells if cell.label not in duplicates)
    baseline = duplicates.get(baseline, baseline)
    return Plan(sweep, out, distinct, tuple(runs), duplicates, baseline, bench.fingerprints(), typed())


class _Bench:
    """What several cells share while they are tried: data, networks without memory, environments that fit."""

    def __init__(self):
        self._data: dict[tuple[str, str], tuple[DataSpec, str]] = {}
        self._policies: dict[str, DiffusionPolicy] = {}
        self._fitting: set[str] = set()

    def data(self, config: DataConfig) -> tuple[DataSpec, str]:
        """Spec and fingerprint: what a network would see, byte for byte, wherever and in whatever format it lies."""
        path = Path(config.path).absolute()
        key = (str(path), json.dumps(config.keys, sort_keys=True))
        if key not in self._data:
            if not config.path or not path.exists():
                raise DataMissingError(
                    f"the sweep's demonstrations {config.path or '(data.path)'} are not there; "
                    "say where the zarr store is with --data PATH.zarr"
                )
            buffer = ReplayBuffer.open(path)
            (windows,), spec = load_windows(buffer, config.keys, Horizons(), [range(buffer.num_episodes)])
            parts = [("episode_ends", buffer.episode_ends), *((k, v.numpy()) for k, v in windows.arrays.items())]
            described = [[name, array.shape, str(array.dtype), _checksum(array)] for name, array in parts]
            self._data[key] = spec, content_hash([described, spec.fps, spec.tasks])
        return self._data[key]

    def fingerprints(self) -> dict[str, str]:
        return {path: fingerprint for (path, _), (_, fingerprint) in self._data.items()}

    def policy(self, training: Config, spec: DataSpec, key: str) -> DiffusionPolicy:
        if key not in self._policies:
            with torch.device("meta"):
                self._policies[key] = build_policy(training, spec)
        return self._policies[key]

    def check_env(self, config: Config, spec: DataSpec) -> None:
        if config.env is None:
            raise ValueError("a sweep plays in a simulator; name one, as in env: {name: pusht}")
        env = env_for(config.env, spec)
        key = content_hash([env.to_dict(), dataclasses.asdict(spec)])
        if key not in self._fitting:
            check_fit(spec, env.name, dataclasses.asdict(env.options))
            self._fitting.add(key)


def _checksum(array: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(array).data.cast("B"), digest_size=8).hexdigest()


def _resolve(sweep: SweepConfig, cell: Cell, bench: _Bench) -> list[Run]:
    """The runs of a cell; everything about it is tried on the way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says what is doubtful about a setting
        config, training = cell_config(sweep, cell, sweep.seeds[0]), training_config(sweep, cell, sweep.seeds[0])
        spec, fingerprint = bench.data(config.data)
        trained = training_part(training, fingerprint)
        policy = bench.policy(training, spec, content_hash(trained))
        sampler = policy.use_sampler(config.sampler).sampler  # `auto` has a name now
        policy.use_guidance(config.guidance)
    bench.check_env(config, spec)
    data = dataclasses.replace(config.data, path=str(Path(config.data.path).absolute()))
    config = dataclasses.replace(config, sampler=sampler, data=data)
    training = dataclasses.replace(training, sampler=sampler, data=data)
    used = {
        "sampler": dataclasses.asdict(sampler),
        "env": config.env.to_dict(),
        "act": config.horizons.act,
        "episodes": [sweep.first_env_seed, sweep.episodes, sweep.sampling_seed, BATCH_SIZE],
    }
    if config.guidance.parts:
        used["guidance"] = dataclasses.asdict(config.guidance)
    oracle_hash = content_hash([trained["process"], used["sampler"], sweep.oracle])
    return [
        Run(
            cell,
            seed,
            content_hash([trained, seed]),
            content_hash([trained, seed, used]),
            oracle_hash,
            dataclasses.replace(training, seed=seed),
            dataclasses.replace(config, seed=seed),
        )
        for seed in sweep.seeds
    ]


def _culprit(group: Sequence[Cell], cells: Sequence[Cell], bad: set[str]) -> str:
    """The axis and value that explain why the cells of a group fail: all of them have it, and no cell that is sound."""
    if len(group) == len(cells) > 1:
        return "every cell"
    common = {axis: v for axis, v in group[0].axes.items() if all(cell.axes[axis] == v for cell in group)}
    for axis, value in common.items():
        if all(cell.label in bad for cell in cells if cell.axes[axis] == value):
            return f"{axis}={value}"
    return ", ".join(f"{axis}={value}" for axis, value in common.items()) or f"{len(group)} cells"


# Reading what is there --------------------------------------------------------------------------------------------------


def read_cell(plan: Plan, run: Run) -> dict | None:
    """A finished run's file; None where there is none, or none that can be trusted (which is said aloud)."""
    file = plan.file(run)
    try:
        cell = json.loads(file.read_text())
        if cell["hash"] != run.hash or cell["env_seeds"] != list(plan.sweep.env_seeds):
            raise ValueError("it is another cell's")
        if not len(cell["scores"]) == len(cell["successes"]) == plan.sweep.episodes:
            raise ValueError("episodes are missing")
        return cell
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{file} is damaged and will be done again: {error!r}", stacklevel=2)
        return None


def read_grade(plan: Plan, run: Run) -> dict[str, float] | None:
    """What the exact test bench says of a cell; None where it was not asked or has not answered."""
    if plan.sweep.oracle is None:
        return None
    try:
        grade = json.loads(plan.oracle_file(run).read_text())["grade"]
        return {key: float(grade[key]) for key in ORACLE_COLUMNS}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def collect_results(plan: Plan, failures: dict[str, str] | None = None) -> AblationResult | None:
    """What the results folder holds of a plan, as far as it got; None where no cell is finished.

    Args:
        failures: label of a run -> why it failed, as far as known.
    """
    failures, cells, missing, found = failures or {}, [], {}, []
    for cell in plan.cells:
        runs = [run for run in plan.runs if run.cell is cell]
        done = [(run, read) for run in runs if (read := read_cell(plan, run))]
        found += [read for _, read in done]
        missing |= {
            run.label: failures.get(run.label, "not run yet")
            for run in runs
            if run.seed not in [finished.seed for finished, _ in done]
        }
        if not done:
            continue
        cells.append(
            CellResult(
                label=cell.label,
                axes=cell.axes,
                train_seeds=tuple(run.seed for run, _ in done),
                env_seeds=tuple(plan.sweep.env_seeds),
                scores=np.array([read["scores"] for _, read in done]),
                successes=np.array([read["successes"] for _, read in done]),
                nfe=done[0][1]["nfe"],
                call_ms=float(np.median([read["call_ms"] for _, read in done])),
                labels=tuple(done[0][1]["labels"]),
                oracle=read_grade(plan, runs[0]),
                diversity=_of_all([(read.get("diversity") or {}).get("values") for _, read in done]),
                ignores=_of_all([read.get("ignores") for _, read in done]),
                guidance=done[0][1].get("guidance", {}),
                train={run.seed: read["train"] for run, read in done},
            )
        )
    if not cells:
        return None
    baseline = next((i for i, cell in enumerate(cells) if cell.label == plan.baseline), 0)
    references = references_of(cells, plan.sweep.compare or {})
    return AblationResult(
        name=plan.sweep.name + (" SMOKE" if plan.sweep.is_smoke else ""),
        question=plan.sweep.question,
        baseline=baseline,
        cells=tuple(cells),
        failed=missing,
        described=_describe(plan, found),
        duplicates=plan.duplicates,
        references=references,
    )


def _of_all(rows: Sequence[Sequence[Any] | None]) -> np.ndarray | None:
    """(S, ...) of what every network's file holds; None where one lacks it, as files of an earlier version do."""
    whole = all(row and None not in row and len(row) == len(rows[0]) for row in rows)
    return np.array(rows) if whole else None


def references_of(cells: Sequence[CellResult], compare: dict) -> dict[str, str]:
    """Label of a cell -> label of the cell that has the values of `compare` and else the same axes, where there is one."""
    place = {tuple(cell.axes.items()): cell.label for cell in cells}
    wanted = {axis: shown(value) for axis, value in compare.items()}
    found = {cell.label: place.get(tuple((cell.axes | wanted).items())) for cell in cells} if compare else {}
    return {label: other for label, other in found.items() if other is not None and other != label}


def _describe(plan: Plan, found: list[dict]) -> dict[str, Any]:
    """How the results came about; every value that differs between cells is told."""

    def all_of(*keys: str) -> str:
        values = []
        for cell in found:
            for key in keys:
                cell = cell[key]
            if str(cell) not in values:
                values.append(str(cell))
        return ", ".join(values)

    sampled = {
        f"{cell['diversity']['num_chunks']} chunks for each of the first {len(cell['diversity']['env_seeds'])} start states"
        for cell in found
        if "diversity" in cell
    }
    networks = {cell["train"]["hash"]: cell["train"]["minutes"] for cell in found}
    sweep = plan.sweep
    return {
        **({"SMOKE": SMOKE} if sweep.is_smoke else {}),
        "command": plan.command,
        "commit": all_of("commit"),
        "hardware": all_of("device"),
        "versions": ", ".join(f"{name} {all_of('versions', name)}" for name in found[0]["versions"]),
        "data": ", ".join(f"{Path(path).name} ({fingerprint})" for path, fingerprint in plan.data.items()),
        "env": all_of("env", "name"),
        "training seeds": ", ".join(map(str, sweep.seeds)),
        "episodes": f"{sweep.episodes} per network, environment seeds from {sweep.first_env_seed}, "
        f"sampling seed {sweep.sampling_seed}, batches of {BATCH_SIZE}",
        **({"diversity": ", ".join(sorted(sampled))} if sampled else {}),
        "set": json.dumps({k: v for k, v in sweep.set.items() if k != "data.path"}),
        "minutes": round(sum(networks.values()) + sum(cell["seconds"] for cell in found) / 60, 1),
        "networks": len(networks),
        "date": date.today().isoformat(),
    }
