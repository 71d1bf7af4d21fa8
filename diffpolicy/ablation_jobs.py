"""The jobs of an ablation: train a network, roll it out, grade a sampler without any network.

A job is plain data and everything it makes is a file in the results folder, so that it may run in any process, on any
machine that sees the folder. One thread each, always: with another number a sum of floats comes out differently.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
import torch
from rich.console import Console

from diffpolicy import __version__
from diffpolicy.checkpoint import list_checkpoints, load_policy, read_description, resolve_device
from diffpolicy.config import FAMILIES, config_from_dict, env_for
from diffpolicy.diversity import start_diversity
from diffpolicy.executors import RecedingHorizon
from diffpolicy.policies import DiffusionPolicy
from diffpolicy.rollout import Episode, rollout
from diffpolicy.train import train

BATCH_SIZE = 16
"""Rows of one policy call, whatever the number of environments: an episode's result must not depend on its neighbours."""
MINUTES = "minutes.json"
"""In a run folder: how long it has been trained, over all sessions."""


def run_job(job: dict) -> dict:
    """Does one job; what it prints and warns of goes to its log file."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _logged(Path(job["log"])):
            return {"train": run_train, "rollout": run_rollout, "oracle": run_oracle}[job["kind"]](job)
    finally:
        torch.set_num_threads(threads)


def run_train(job: dict) -> dict:
    """Trains job["config"] in the folder job["run"], going on where an interrupted run stopped.

    Raises:
        KeyboardInterrupt: asked to stop; the state is saved.
    """
    config, run = config_from_dict(job["config"]), Path(job["run"])
    if run.exists() and not list_checkpoints(run):
        shutil.rmtree(run)  # killed before its first checkpoint: nothing to go on from
    began = time.perf_counter()
    common = {
        "device": job["device"],
        "keep_checkpoints": 1,
        "progress": False,
        "console": Console(file=sys.stdout, width=120),
    }  # the log's stdout, in a notebook too
    if run.exists():
        train(config, resume=run, **common)
    else:  # a run folder is <runs>/<task>/<name>
        train(dataclasses.replace(config, task=run.parent.name), runs=run.parent.parent, name=run.name, **common)
    minutes = (time.perf_counter() - began) / 60 + read_minutes(run)
    write_json(run / MINUTES, {"minutes": minutes})
    if not is_trained(run, config.train.steps):
        raise KeyboardInterrupt
    return {"minutes": minutes}


def is_trained(run: Path, steps: int) -> bool:
    """Whether a run folder holds a readable checkpoint of this step."""
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        return False
    try:
        return read_description(checkpoints[-1])["step"] >= steps
    except ValueError:
        return False


def run_rollout(job: dict) -> dict:
    """Plays a network on the job's start states and writes every episode to job["file"], at the end and at once."""
    config, run = config_from_dict(job["config"]), Path(job["run"])
    device = resolve_device(job["device"])
    policy = load_policy(run, device).use_sampler(config.sampler).use_guidance(config.guidance)
    policy.horizons = dataclasses.replace(policy.horizons, act=config.horizons.act)
    env = env_for(config.env, policy.spec)
    calls = _count_calls(policy)
    seeds = range(job["first_env_seed"], job["first_env_seed"] + job["episodes"])
    executor, options = RecedingHorizon(policy, batch_size=BATCH_SIZE), dataclasses.asdict(env.options)
    result = rollout(
        executor,
        env.name,
        options,
        seeds=seeds,
        num_envs=BATCH_SIZE,
        num_workers=0,
        sampling_seed=job["sampling_seed"],
    )
    if len(result.episodes) < len(seeds):
        raise KeyboardInterrupt
    num_calls = calls["denoiser"] // calls["encoder"]
    diversity = start_diversity(executor, env.name, options, seeds=seeds, sampling_seed=job["sampling_seed"])
    trained = json.loads((run / "environment.json").read_text())
    cell = {
        "hash": job["hash"],
        "label": job["label"],
        "axes": job["axes"],
        "train_seed": config.seed,
        "env_seeds": [e.seed for e in result.episodes],
        "scores": [float(e.score) for e in result.episodes],
        "successes": [bool(e.success) for e in result.episodes],
        "steps": [int(e.steps) for e in result.episodes],
        **_goals(result.episodes),
        "diversity": {
            "num_chunks": diversity.num_chunks,
            "env_seeds": list(diversity.seeds),
            "values": [float(value) if np.isfinite(value) else None for value in diversity.values],
            "seconds": diversity.seconds,
        },
        "nfe": num_calls,
        "call_ms": median(result.call_ms or [e.chunk_latency_ms for e in result.episodes]),
        "labels": [finding.label for finding in policy.findings()],
        "sampling_seed": job["sampling_seed"],
        "sampler": dataclasses.asdict(policy.sampler),
        "guidance": dataclasses.asdict(policy.guidance),
        "horizons": dataclasses.asdict(policy.horizons),
        "env": env.to_dict(),
        "train": {
            "hash": job["train_hash"],
            "run": f"{run.parent.name}/{run.name}",
            "steps": read_description(run)["step"],
            "minutes": read_minutes(run),
            "val_action_mse": last_validation(run),
        },
        "versions": {
            "diffpolicy": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "commit": trained["commit"],
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else processor(),
        "seconds": result.seconds + diversity.seconds,
    }
    write_json(Path(job["file"]), cell)
    return {"score": float(np.mean(cell["scores"])), "success": float(np.mean(cell["successes"]))}


def run_oracle(job: dict) -> dict:
    """Grades a process and sampler with the exact denoiser, and writes the Grade to job["file"]."""
    from diffpolicy import oracle

    config = config_from_dict(job["config"])
    process = FAMILIES["process"][config.process.name][1](config.process.options)
    grade = dataclasses.asdict(oracle.grade(process, config.sampler, **job["oracle"]))
    write_json(Path(job["file"]), {"hash": job["hash"], "label": job["label"], "grade": grade})
    return {"energy_distance": grade["energy_distance"]}


def _goals(episodes: list[Episode]) -> dict:
    """What a cell's file says of goals, one entry for each episode; nothing where the environment knows no goals."""
    if not all(e.goal for e in episodes):
        return {}
    return {
        "goals": [e.goal for e in episodes],
        "goals_reached": [list(e.goals_reached) for e in episodes],
        "other_scores": [e.best_other_score for e in episodes],
        "ignores": [bool(e.other_goals_reached) for e in episodes],
    }


def read_minutes(run: Path) -> float:
    """Minutes of training so far; 0 where none were written."""
    try:
        return float(json.loads((run / MINUTES).read_text())["minutes"])
    except FileNotFoundError:
        return 0.0


def last_validation(run: Path) -> float | None:
    """The last val/action_mse of a run folder; None where nothing was held out."""
    with open(run / "metrics.csv", newline="") as handle:
        seen = [row["val/action_mse"] for row in csv.DictReader(handle) if row["val/action_mse"]]
    return float(seen[-1]) if seen else None


def processor() -> str:
    """The model of this machine's processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_json(file: Path, plain: dict) -> None:
    """Writes a file that is whole or not there, even after a power cut."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    with open(partial, "w") as handle:
        json.dump(plain, handle, indent=1)
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(file)


def _count_calls(policy: DiffusionPolicy) -> dict[str, int]:
    """Counts the calls of encoder (one per chunk) and denoiser from here on."""
    counts = {"encoder": 0, "denoiser": 0}

    def count(name: str):
        def hook(module, inputs) -> None:
            counts[name] += 1

        return hook

    for name in counts:
        getattr(policy, name).register_forward_pre_hook(count(name))
    return counts


@contextlib.contextmanager
def _logged(file: Path) -> Iterator[None]:
    file.parent.mkdir(parents=True, exist_ok=True)
    show = lambda message, category, *_, **__: print(f"warning: {message}")
    with open(file, "a", buffering=1) as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
