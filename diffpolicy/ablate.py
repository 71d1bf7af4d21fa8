"""Runs a sweep: cells -> trainings and rollouts -> one table, figures and a report. Stop it anywhere, run it again.

runs/ablations/<name>/
    sweep.json                 the sweep that this folder belongs to
    train/<hash>/              one run folder per network: distinct training settings, data and training seed
    cells/<hash>.json          one file per network and way of using it: every episode, written when it is whole
    cells/oracle_<hash>.json   a process and sampler graded with the exact denoiser
    logs/                      what trainings and rollouts said
    report.html, results.csv, figures/ ...

    sweep file --sweep--> cells --ablation_plan--> runs --this file--> jobs --workers--> files --ablation_plan--> AblationResult
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from diffpolicy.ablation_cells import AblationResult
from diffpolicy.ablation_folder import check_folder, claim, collect, read_sweep_file, sole_user_of, take_over_networks
from diffpolicy.ablation_jobs import is_trained, run_job
from diffpolicy.ablation_plan import (
    SMOKE,
    DataMissingError,
    Plan,
    Run,
    collect_results,
    plan_sweep,
    read_cell,
    read_grade,
    read_plan,
)
from diffpolicy.checkpoint import resolve_device
from diffpolicy.progress import progress_bar
from diffpolicy.sweep import SweepConfig, cells_of, identity
from diffpolicy.workers import Here, LocalWorkers, Outcome, RayWorkers


def ablate(
    sweep: SweepConfig,
    out: str | Path,
    *,
    make_workers: Callable[[Callable[[dict], dict]], Here | LocalWorkers | RayWorkers] = Here,
    device: str = "auto",
    extend: bool = False,
    console: Console | None = None,
) -> tuple[AblationResult | None, dict[str, str]]:
    """Runs what is not there yet.

    Args:
        make_workers: run_job -> who does the jobs; default: this process, one after the other.
        extend: go on in a folder of another sweep; finished cells that are in this one too are kept.
    Returns:
        what is finished (None: nothing), and label -> reason of everything that failed.
    Raises:
        ValueError: cells that cannot run (all of them, before the first starts), or another sweep's folder.
        DataMissingError: no demonstrations where the sweep says.
        KeyboardInterrupt: asked to stop; finished cells are kept and trainings saved.
    """
    console, out, device = console or Console(), Path(out).absolute(), resolve_device(device)
    with sole_user_of(out):
        check_folder(sweep, out, extend=extend)
        collect(sweep, out, console)
        plan = plan_sweep(sweep, out)
        claim(plan, extend=extend)
        taken = take_over_networks(plan)
        queue = _Queue(plan, device)
        console.print(opening(plan, queue), soft_wrap=True)
        if taken:
            console.print(f"{taken} networks were trained by another sweep in {out.parent} already: copied")
        if queue.num_open:
            with make_workers(run_job) as workers:
                _work_off(queue, workers, console)
        return collect_results(plan, queue.failures), queue.failures


def report(
    sweep: SweepConfig, out: str | Path, failures: dict[str, str] | None = None, *, extend: bool = False
) -> Path:
    """Writes the table, the figures and report.html from what a results folder holds.

    Args:
        extend: report what the folder of another sweep holds of this one.
    Raises:
        FileNotFoundError: no finished cell.
        ValueError: another sweep's folder.
    """
    from diffpolicy.ablation_report import write_report

    out = Path(out).absolute()
    nothing = FileNotFoundError(f"{out} holds no finished cell of sweep {sweep.name} to report")
    recorded = read_sweep_file(out)
    if recorded is None:
        raise nothing
    check_folder(sweep, out, extend=extend)
    if recorded["sweep"] == identity(sweep) and "plan" in recorded:
        plan = read_plan(recorded["plan"], out)
        plan = dataclasses.replace(
            plan, sweep=dataclasses.replace(plan.sweep, question=sweep.question, compare=sweep.compare)
        )
    else:
        plan = plan_sweep(sweep, out)
    result = collect_results(plan, failures)
    if result is None:
        raise nothing
    return write_report(result, out)


def opening(plan: Plan, queue: _Queue) -> str:
    """What is about to happen, in a few lines."""
    sweep = plan.sweep
    lines = [f"[bold]{sweep.name}[/bold]: {sweep.question}"] if sweep.question else [f"[bold]{sweep.name}[/bold]"]
    if sweep.is_smoke:
        lines.append(f"SMOKE: {SMOKE}")
    lines.append(
        f"{len(plan.cells)} cells, {len(sweep.seeds)} training seeds, {sweep.episodes} episodes each: "
        f"{queue.count('train')} networks to train and {queue.count('rollout')} rollouts to do, "
        f"{len(plan.runs) - queue.count('rollout')} are done; results in {plan.out}"
    )
    if num_strange := len(list((plan.out / "cells").glob("*.json"))) - len(_files_of(plan)):
        lines.append(
            f"{num_strange} finished cells here belong to none of these (other settings, or another version of "
            "diffpolicy); they are left alone"
        )
    lines += [f"{label} means the same as {first}: done once" for label, first in plan.duplicates.items()]
    if sweep.expected_time and queue.num_open:
        lines.append(f"expected time from the start: {sweep.expected_time}")
    return "\n".join(lines)


class _Queue:
    """The jobs of a plan that are not done: which may start now, which must wait for a network."""

    def __init__(self, plan: Plan, device: str):
        self.plan, self.failures = plan, {}
        self._train: dict[str, dict] = {}
        self._rollout: dict[str, list[dict]] = {}
        """Train hash -> rollouts that wait for that network."""
        self._ready: list[dict] = []
        self._oracle: dict[str, dict] = {}
        for run in plan.runs:
            if read_cell(plan, run) is None:
                job = self._job(run, "rollout", device)
                if is_trained(plan.run_folder(run), run.training.train.steps):
                    self._ready.append(job)
                else:
                    self._train.setdefault(run.train_hash, self._job(run, "train", device))
                    self._rollout.setdefault(run.train_hash, []).append(job)
            if plan.sweep.oracle is not None and read_grade(plan, run) is None:
                self._oracle.setdefault(run.oracle_hash, self._job(run, "oracle", device))
        self.num_open = len(self._train) + sum(map(len, self._rollout.values())) + len(self._ready) + len(self._oracle)

    def count(self, kind: str) -> int:
        """Jobs of a kind that have not started."""
        waiting = len(self._ready) + sum(map(len, self._rollout.values()))
        return {"train": len(self._train), "rollout": waiting, "oracle": len(self._oracle)}[kind]

    def work(self, kind: str) -> float:
        """How much of a kind is left: steps of training, or jobs."""
        return sum(size_of(job) for job in self._train.values()) if kind == "train" else self.count(kind)

    def next(self) -> dict | None:
        """A job that may start: rollouts of trained networks first, so that results come early; then trainings."""
        if self._ready:
            return self._ready.pop(0)
        for waiting in (self._train, self._oracle):
            if waiting:
                return waiting.pop(next(iter(waiting)))
        return None

    def done(self, outcome: Outcome) -> list[str]:
        """Takes in how a job ended; gives the labels that cannot be done any more."""
        job = outcome.job
        if outcome.error is None:
            if job["kind"] == "train":
                self._ready += self._rollout.pop(job["hash"])
            return []
        if job["kind"] == "train":
            lost = [waiting["label"] for waiting in self._rollout.pop(job["hash"])]
            self.failures |= {label: f"its training failed: {outcome.error}" for label in lost}
            return lost
        self.failures[job["label"]] = outcome.error
        return [job["label"]]

    def _job(self, run: Run, kind: str, device: str) -> dict:
        plan, sweep = self.plan, self.plan.sweep
        hash_of_kind = {"train": run.train_hash, "rollout": run.hash, "oracle": run.oracle_hash}[kind]
        job = {
            "kind": kind,
            "label": {"train": f"training of {run.label}", "oracle": f"oracle of {run.cell.label}"}.get(
                kind, run.label
            ),
            "hash": hash_of_kind,
            "config": (run.training if kind == "train" else run.config).to_dict(),
            "log": str(plan.out / "logs" / f"{kind}_{hash_of_kind}.txt"),
            "device": device,
        }
        if kind == "oracle":
            return job | {"file": str(plan.oracle_file(run)), "oracle": sweep.oracle}
        job["run"] = str(plan.run_folder(run))
        if kind == "rollout":
            job |= {
                "file": str(plan.file(run)),
                "axes": run.cell.axes,
                "train_hash": run.train_hash,
                "first_env_seed": sweep.first_env_seed,
                "episodes": sweep.episodes,
                "sampling_seed": sweep.sampling_seed,
            }
        return job


def size_of(job: dict) -> float:
    """How long a job takes, compared with others of its kind."""
    return job["config"]["train"]["steps"] if job["kind"] == "train" else 1


def _work_off(queue: _Queue, workers: Here | LocalWorkers | RayWorkers, console: Console) -> None:
    total, num_done = queue.num_open, 0
    running: list[dict] = []
    clock = _Clock(queue, workers)
    # time left is told by the clock, which knows that a training is not a rollout
    with progress_bar("ablate", console) as bar:
        bar.columns = bar.columns[:-2]
        task = bar.add_task("ablate", total=total, shown="")
        try:
            while True:
                while workers.free > 0 and (job := queue.next()) is not None:
                    running.append(job)
                    bar.update(task, shown=clock.shown(running))
                    workers.submit(job)
                if not running:
                    return
                for outcome in workers.wait(timeout=10.0):
                    running.remove(outcome.job)
                    clock.ended(outcome)
                    lost = queue.done(outcome)
                    num_done += 1 + (len(lost) if outcome.job["kind"] == "train" else 0)
                    console.print(_line(outcome, lost, num_done, total), soft_wrap=True, markup=False, highlight=False)
                    _keep_trace(outcome, queue.plan.out)
                bar.update(task, completed=num_done, shown=clock.shown(running))
        except KeyboardInterrupt:
            console.print("stopping: trainings save their state, unfinished rollouts begin anew next time")
            for outcome in workers.stop():
                if outcome.error is None:
                    console.print(_line(outcome, [], num_done, total), soft_wrap=True, markup=False, highlight=False)
            console.print("run the same command again to go on")
            raise


class _Clock:
    """Time left, from finished jobs of the same kind."""

    def __init__(self, queue: _Queue, workers: Here | LocalWorkers | RayWorkers):
        self._queue, self._workers = queue, workers
        self._spent: dict[str, list[tuple[float, float]]] = {}
        self._began: dict[int, float] = {}

    def ended(self, outcome: Outcome) -> None:
        self._began.pop(id(outcome.job), None)
        if outcome.error is None:
            self._spent.setdefault(outcome.job["kind"], []).append((outcome.seconds, size_of(outcome.job)))

    def shown(self, running: list[dict]) -> str:
        doing = ", ".join(f"{n} {kind}" for kind in _KINDS if (n := _num(running, kind)))
        left = self.seconds_left(running)
        return f"{doing or 'idle'}; " + ("time left unknown yet" if left is None else f"about {spoken_time(left)} left")

    def seconds_left(self, running: list[dict]) -> float | None:
        """None as long as no job of some kind has ended."""
        now, total = time.perf_counter(), 0.0
        for job in running:
            self._began.setdefault(id(job), now)
        for kind in _KINDS:
            mine = [job for job in running if job["kind"] == kind]
            if not mine and not self._queue.count(kind):
                continue
            if kind not in self._spent:
                return None
            seconds, sizes = map(sum, zip(*self._spent[kind], strict=True))
            pace = seconds / sizes
            total += pace * self._queue.work(kind)
            total += sum(max(0.0, pace * size_of(job) - (now - self._began[id(job)])) for job in mine)
        return total / max(1, min(self._workers.count, len(running) + sum(map(self._queue.count, _KINDS))))


_KINDS = ("train", "rollout", "oracle")


def _num(jobs: list[dict], kind: str) -> int:
    return sum(job["kind"] == kind for job in jobs)


def spoken_time(seconds: float) -> str:
    """`40 s`, `12 min`, `2 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _line(outcome: Outcome, lost: list[str], num_done: int, total: int) -> str:
    """What a finished job has to say."""
    job, where = outcome.job, f"{num_done}/{total}"
    if outcome.error is not None:
        also = f"; with it: {', '.join(lost)}" if job["kind"] == "train" and lost else ""
        return f"{where} FAILED {job['label']}: {outcome.error}{also}"
    took = spoken_time(outcome.seconds)
    if job["kind"] == "rollout":
        result = outcome.result
        return f"{where} {job['label']}: success {result['success']:.1%}, score {result['score']:.3f} ({took})"
    if job["kind"] == "oracle":
        return f"{where} {job['label']}: energy distance {outcome.result['energy_distance']:.4f} ({took})"
    return f"{where} {job['label']}: {outcome.result['minutes']:.1f} min"


def _keep_trace(outcome: Outcome, out: Path) -> None:
    if outcome.trace:
        with open(out / "failures.log", "a") as log:
            log.write(f"{outcome.job['label']} ({outcome.job['hash']})\n{outcome.trace}\n")


def dry_run(sweep: SweepConfig, out: str | Path) -> str:
    """The cells of a sweep, what each needs and what is done; writes nothing."""
    out = Path(out).absolute()
    try:
        plan = plan_sweep(sweep, out)
    except DataMissingError as error:
        why = f"{sweep.collect['episodes']} demonstrations are collected first" if sweep.collect else str(error)
        cells = cells_of(sweep)
        listed = "\n".join(f"  {cell.label}" for cell in cells)
        return f"{len(cells)} cells, {len(sweep.seeds)} training seeds; nothing is done yet: {why}\n{listed}"
    queue, lines = _Queue(plan, "cpu"), []
    trained = {run.train_hash for run in plan.runs if is_trained(plan.run_folder(run), run.training.train.steps)}
    for cell in plan.cells:
        runs = [run for run in plan.runs if run.cell is cell]
        num_done = sum(plan.file(run).exists() for run in runs)
        num_trained = sum(run.train_hash in trained for run in runs)
        lines.append(
            f"  {cell.label}: {num_trained} of {len(runs)} networks trained, {num_done} of {len(runs)} rollouts done; "
            f"network {runs[0].train_hash}"
        )
    return opening(plan, queue) + "\n" + "\n".join(lines)


def _files_of(plan: Plan) -> set[Path]:
    """The files in cells/ that are this plan's and are there."""
    files = {plan.file(run) for run in plan.runs} | {plan.oracle_file(run) for run in plan.runs}
    return {file for file in files if file.exists()}
