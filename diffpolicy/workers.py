"""Who does the jobs of an ablation: processes of this machine, a Ray cluster, or nobody but ourselves.

A job is a plain dict, `run(job)` is a function at the top of a module. All workers are used alike:

    with LocalWorkers(2, run) as workers:
        while workers.free: workers.submit(job)
        for outcome in workers.wait(): ...

A job that raises and a worker that dies end as an Outcome with an error of one line; the others go on.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from diffpolicy.spec import MissingExtraError

Run = Callable[[dict], Any]

PATIENCE_S = 30.0
"""How long a training may take to save its state when it is asked to stop."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    job: dict
    result: Any = None
    error: str | None = None
    """One line; None if it went well."""
    trace: str = ""
    """The traceback of a job that raised."""
    seconds: float = 0.0


def one_line(error: BaseException) -> str:
    """What went wrong, for a person; the type is told where the message does not explain itself."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    text = " ".join(str(error).split())
    expected = isinstance(error, ValueError | OSError | ImportError | FloatingPointError) and text
    return text if expected else f"{type(error).__name__}: {text}".rstrip(": ")


class Here:
    """Does each job at once, in this process: for debugging and for tests."""

    count = 1

    def __init__(self, run: Run):
        self._run, self._done = run, []

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_) -> None:
        pass

    @property
    def free(self) -> int:
        return 1 - len(self._done)

    def submit(self, job: dict) -> None:
        began = time.perf_counter()
        self._done.append(_attempt(self._run, job, began))

    def wait(self, timeout: float | None = None) -> list[Outcome]:
        done, self._done = self._done, []
        return done

    def stop(self) -> list[Outcome]:
        return []


def _attempt(run: Run, job: dict, began: float) -> Outcome:
    """The Outcome of running a job here; KeyboardInterrupt is left to the caller."""
    try:
        return Outcome(job, run(job), seconds=time.perf_counter() - began)
    except Exception as error:
        return Outcome(job, None, one_line(error), traceback.format_exc(), time.perf_counter() - began)


@dataclass
class _Seat:
    """A worker process, our end of its pipe, and what it is doing."""

    process: multiprocessing.process.BaseProcess
    pipe: Connection
    job: dict | None = None
    began: float = 0.0


class LocalWorkers:
    """Processes of this machine, started when first needed and kept; one that dies is replaced."""

    def __init__(self, count: int, run: Run):
        if count < 1:
            raise ValueError(f"--jobs must be at least 1, got {count}")
        self.count, self._run = count, run
        self._context = multiprocessing.get_context("spawn")  # forking a process with threads (torch) may deadlock
        self._seats: list[_Seat] = []

    def __enter__(self) -> LocalWorkers:
        return self

    def __exit__(self, *_) -> None:
        for seat in self._seats:
            seat.process.kill()
            seat.process.join()
            seat.pipe.close()
        self._seats.clear()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        return [seat.process.pid for seat in self._seats]

    @property
    def free(self) -> int:
        """How many more jobs would start at once."""
        return self.count - sum(seat.job is not None for seat in self._seats)

    def submit(self, job: dict) -> None:
        """Hands a job to an idle worker; there must be one (`free`)."""
        assert self.free > 0
        seat = next((s for s in self._seats if s.job is None), None) or self._start()
        seat.job, seat.began = job, time.perf_counter()
        try:
            seat.pipe.send(job)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it died while idle: wait() will find its pipe closed and say so

    def wait(self, timeout: float | None = None) -> list[Outcome]:
        """Waits until a job ends, at most timeout seconds; gives those that have ended."""
        busy = {seat.pipe: seat for seat in self._seats if seat.job is not None}
        if not busy:
            return []
        return [self._end(busy[pipe]) for pipe in wait(list(busy), timeout)]

    def stop(self) -> list[Outcome]:
        """Asks running trainings to save their state and end, ends all others at once; gives how they ended."""
        for seat in self._seats:
            if seat.job is not None and seat.job.get("kind") == "train":
                os.kill(seat.process.pid, signal.SIGINT)
            elif seat.job is not None:
                seat.process.kill()
        outcomes, deadline = [], time.monotonic() + PATIENCE_S
        while self.free < self.count and time.monotonic() < deadline:
            outcomes += self.wait(timeout=1.0)
        return outcomes

    def _start(self) -> _Seat:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, self._run), daemon=True)
        process.start()
        theirs.close()
        seat = _Seat(process, ours)
        self._seats.append(seat)
        return seat

    def _end(self, seat: _Seat) -> Outcome:
        job, seconds = seat.job, time.perf_counter() - seat.began
        seat.job = None
        try:
            result, error, trace = seat.pipe.recv()
            return Outcome(job, result, error, trace, seconds)
        except (EOFError, ConnectionResetError):
            seat.process.join()
            seat.pipe.close()
            self._seats.remove(seat)
            return Outcome(job, None, _how_it_died(seat.process.exitcode), "", seconds)


def _how_it_died(exit_code: int) -> str:
    if exit_code >= 0:
        return f"its process ended with exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    return f"its process was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"


def _work(pipe: Connection, run: Run) -> None:
    """A worker process: one job after the other until the pipe closes."""
    os.setpgid(0, 0)  # Ctrl-C in a terminal reaches our parent alone, which decides what each worker does
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            job = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        began = time.perf_counter()
        try:
            outcome = _attempt(run, job, began)
        except KeyboardInterrupt as error:
            outcome = Outcome(job, None, one_line(error))
        pipe.send((outcome.result, outcome.error, outcome.trace))


def _end_with_parent() -> None:
    """A parent that was killed leaves no worker behind that holds its run folders."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


class RayWorkers:
    """The processors of a Ray cluster, one per job; files go through a folder that all its nodes see."""

    def __init__(self, address: str, run: Run):
        os.environ["RAY_AUTH_MODE"] = "disabled"  # before the import: else ray writes a token into the home folder
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            import ray
        except ImportError:
            raise MissingExtraError("ray", "ray") from None
        self._ray = ray
        try:
            ray.init(address=address, log_to_driver=False, logging_level="error", include_dashboard=None)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConnectionError(f"--ray {address}: no cluster answers there ({one_line(error)})") from error
        # a job is never tried again in secret: what it wrote stays, and the next run of the sweep goes on from it
        self._remote = ray.remote(num_cpus=1, max_retries=0)(_attempt_remotely)
        self._run, self._running = run, {}

    def __enter__(self) -> RayWorkers:
        return self

    def __exit__(self, *_) -> None:
        self._ray.shutdown()

    @property
    def count(self) -> int:
        """Processors of the cluster, now."""
        return max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    @property
    def free(self) -> int:
        return self.count - len(self._running)

    def submit(self, job: dict) -> None:
        self._running[self._remote.remote(self._run, job)] = (job, time.perf_counter())

    def wait(self, timeout: float | None = None) -> list[Outcome]:
        if not self._running:
            return []
        done, _ = self._ray.wait(list(self._running), num_returns=1, timeout=timeout)
        return [self._end(reference) for reference in done]

    def stop(self) -> list[Outcome]:
        for reference, (job, _) in self._running.items():
            self._ray.cancel(reference, force=job.get("kind") != "train")
        outcomes, deadline = [], time.monotonic() + PATIENCE_S
        while self._running and time.monotonic() < deadline:
            outcomes += self.wait(timeout=1.0)
        return outcomes

    def _end(self, reference: Any) -> Outcome:
        job, began = self._running.pop(reference)
        seconds = time.perf_counter() - began
        try:
            result, error, trace = self._ray.get(reference)
            return Outcome(job, result, error, trace, seconds)
        except self._ray.exceptions.TaskCancelledError:
            return Outcome(job, None, "interrupted", "", seconds)
        except self._ray.exceptions.RayTaskError as error:  # what raises in a job is an Outcome: this is before it
            last = str(error).strip().splitlines()[-1]
            return Outcome(job, None, f"it could not begin on its node: {last}", str(error), seconds)
        except self._ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines()
            what = f"its worker died: {lines[0]}" if len(lines) == 1 else f"it could not begin on its node: {lines[-1]}"
            return Outcome(job, None, what, str(error), seconds)


def _attempt_remotely(run: Run, job: dict) -> tuple[Any, str | None, str]:
    outcome = _attempt(run, job, time.perf_counter())
    return outcome.result, outcome.error, outcome.trace
