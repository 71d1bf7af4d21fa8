"""Whose results folder it is: one sweep's, one process's at a time; and the demonstrations that a sweep collects itself."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from diffpolicy import __version__
from diffpolicy.ablation_jobs import is_trained, write_json
from diffpolicy.ablation_plan import Plan, collected_store
from diffpolicy.quickstart import collect_demonstrations
from diffpolicy.sweep import SweepConfig, content_hash, identity

_CURE = "choose another --out, or --extend this one (finished cells are kept)"


def collect(sweep: SweepConfig, out: Path, console: Console) -> None:
    """Records the sweep's own demonstrations, once; an interrupted recording goes on."""
    if sweep.collect is None or collected_store(out).exists():
        return
    partial = out / ".demonstrations.partial.zarr"
    wanted = sweep.collect
    options = {"pixels": False, **wanted.get("options", {})}
    collect_demonstrations(
        wanted["env"],
        out=partial,
        episodes=wanted["episodes"],
        seed=wanted.get("seed", 0),
        options=options,
        console=console,
    )
    partial.rename(collected_store(out))


def read_sweep_file(out: Path) -> dict | None:
    """What sweep.json says of a results folder; None where there is none."""
    file = out / "sweep.json"
    try:
        recorded = json.loads(file.read_text())
        return {"sweep": dict(recorded["sweep"]), **recorded}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}); choose another --out, or remove it") from error


def check_folder(sweep: SweepConfig, out: Path, *, extend: bool) -> None:
    """Raises ValueError where a results folder is another sweep's, naming what differs."""
    recorded, mine = read_sweep_file(out), identity(sweep)
    if recorded is None:
        if any(p.name != "demonstrations.zarr" and not p.name.startswith(".") for p in out.iterdir()):
            raise ValueError(f"{out} exists and holds no sweep; choose another --out")
        return
    differing = [key for key in mine if recorded["sweep"].get(key) != mine[key]]
    if differing and not extend:
        raise ValueError(f"{out} holds another sweep: {', '.join(differing)} differ; {_CURE}")


def claim(plan: Plan, *, extend: bool) -> None:
    """Makes the results folder this plan's.

    Raises:
        ValueError: its cells were trained on other data.
    """
    recorded, data = read_sweep_file(plan.out), sorted(set(plan.data.values()))
    if recorded is not None and not extend and recorded.get("data", data) != data:
        raise ValueError(f"{plan.out} holds results of other demonstrations than these; {_CURE}")
    mine = identity(plan.sweep)
    write_json(
        plan.out / "sweep.json", {"sweep": mine, "hash": content_hash(mine), "data": data, "plan": plan.to_dict()}
    )


def take_over_networks(plan: Plan) -> int:
    """Copies networks that sweeps beside this one have trained already: same settings, seed and data. Gives how many."""
    taken = 0
    for run in {run.train_hash: run for run in plan.runs}.values():
        folder, steps = plan.run_folder(run), run.training.train.steps
        if folder.exists():  # trained here, or to be gone on with
            continue
        for other in sorted(plan.out.parent.glob(f"*/train/{run.train_hash}")):
            if is_trained(other, steps) and _version_of(other) == __version__:
                partial = folder.with_name(f".{folder.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                shutil.copytree(other, partial)
                partial.rename(folder)
                taken += 1
                break
    return taken


def _version_of(run: Path) -> str | None:
    """The version of diffpolicy that began a run."""
    try:
        return json.loads((run / "environment.json").read_text())["diffpolicy"]
    except (FileNotFoundError, ValueError, KeyError):
        return None


@contextmanager
def sole_user_of(out: Path) -> Iterator[None]:
    """Two processes in one results folder would do everything twice; the lock ends with its process."""
    import fcntl  # POSIX only

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out must be a folder that can be made or is there, got {out}: {error.strerror}") from error
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another `diffpolicy ablate` is at work in {out}; wait for it, or choose another --out"
            ) from None
        yield
    finally:
        os.close(folder)
