"""Workers: jobs that raise, processes that die, parents that die, and being asked to stop."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffpolicy.spec import MissingExtraError
from diffpolicy.workers import Here, LocalWorkers, Outcome, RayWorkers, one_line


def do(job: dict):
    """What the jobs of these tests do; at the top of the module so that other processes find it."""
    match job["do"]:
        case "add":
            return job["a"] + job["b"]
        case "pid":
            return os.getpid()
        case "raise":
            raise ValueError("train.lr must be positive,\n got -1")
        case "slip":
            return {}["missing"]
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(3)
        case "sleep":
            if "began" in job:
                Path(job["began"]).touch()
            time.sleep(60)


def work_off(workers, jobs: list[dict]) -> list[Outcome]:
    """All outcomes, in the order of the jobs."""
    waiting, outcomes = list(jobs), []
    while len(outcomes) < len(jobs):
        while workers.free and waiting:
            workers.submit(waiting.pop(0))
        outcomes += workers.wait()
    return sorted(outcomes, key=lambda outcome: jobs.index(outcome.job))


@pytest.fixture(scope="module")
def two_workers():
    with LocalWorkers(2, do) as workers:
        yield workers


@pytest.fixture(params=["here", "two processes"])
def workers(request, two_workers):
    return Here(do) if request.param == "here" else two_workers


def test_every_job_ends_once_with_its_result(workers):
    jobs = [{"do": "add", "a": i, "b": 1} for i in range(7)]
    assert [outcome.result for outcome in work_off(workers, jobs)] == [1, 2, 3, 4, 5, 6, 7]


def test_a_job_that_raises_is_one_line_and_the_others_go_on(workers):
    jobs = [{"do": "raise"}, {"do": "slip"}, {"do": "add", "a": 1, "b": 1}]
    refused, slipped, fine = work_off(workers, jobs)
    assert refused.error == "train.lr must be positive, got -1" and "do(job)" not in refused.error
    assert slipped.error == "KeyError: 'missing'" and "Traceback" in slipped.trace
    assert (fine.error, fine.result) == (None, 2)


def test_processes_are_kept_from_job_to_job(two_workers):
    jobs = [{"do": "pid", "n": n} for n in range(6)]
    pids = {outcome.result for outcome in work_off(two_workers, jobs)}
    assert len(pids) <= 2 and pids <= set(two_workers.pids) and os.getpid() not in pids


def test_a_killed_worker_is_named_and_replaced(two_workers):
    jobs = [{"do": "die"}, {"do": "add", "a": 1, "b": 1}, {"do": "exit"}, {"do": "add", "a": 2, "b": 2}]
    killed, one, ended, two = work_off(two_workers, jobs)
    assert killed.error == "its process was killed by SIGKILL (out of memory?)"
    assert ended.error == "its process ended with exit code 3"
    assert (one.result, two.result) == (2, 4)


def test_a_worker_killed_while_idle_costs_its_next_job_and_no_more(two_workers):
    work_off(two_workers, [{"do": "pid", "n": n} for n in range(2)])
    victim = two_workers.pids[0]
    os.kill(victim, signal.SIGKILL)
    outcomes = work_off(two_workers, [{"do": "add", "a": n, "b": 0} for n in range(4)])
    assert sum(outcome.error is not None for outcome in outcomes) <= 1 and victim not in two_workers.pids


def test_stopping_interrupts_trainings_and_ends_the_others(tmp_path):
    jobs = [{"do": "sleep", "kind": kind, "began": str(tmp_path / kind)} for kind in ("train", "rollout")]
    with LocalWorkers(2, do) as workers:
        for job in jobs:
            workers.submit(job)
        while not all(Path(job["began"]).exists() for job in jobs):
            time.sleep(0.01)
        errors = {outcome.job["kind"]: outcome.error for outcome in workers.stop()}
    assert errors == {"train": "interrupted", "rollout": "its process was killed by SIGKILL (out of memory?)"}


ORPHANS = """
import os, sys
from diffpolicy.workers import LocalWorkers
from tests.test_workers import do
if __name__ == "__main__":
    with LocalWorkers(1, do) as workers:
        workers.submit({"do": "pid"})
        workers.wait()
        workers.submit({"do": "sleep"})
        print(*workers.pids, flush=True)
        workers.wait()
"""


def test_no_worker_outlives_a_killed_parent(tmp_path, project):
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    parent = subprocess.Popen(
        [sys.executable, str(script)], env=os.environ | {"PYTHONPATH": str(project)}, stdout=subprocess.PIPE, text=True
    )
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(1000):  # it ends by itself within milliseconds, or not at all
        if not os.path.exists(f"/proc/{worker}") or _is_zombie(worker):
            return
        time.sleep(0.01)
    os.kill(worker, signal.SIGKILL)
    pytest.fail(f"worker {worker} outlived its parent")


def _is_zombie(pid: int) -> bool:
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rsplit(")", 1)[1].split()[0] == "Z"


def test_no_jobs_at_all_is_refused():
    with pytest.raises(ValueError, match="--jobs must be at least 1, got 0"):
        LocalWorkers(0, do)


def test_one_line_says_the_type_only_where_the_message_does_not_explain_itself():
    assert one_line(OSError("disk full")) == "disk full"
    assert one_line(AssertionError()) == "AssertionError"
    assert one_line(KeyboardInterrupt()) == "interrupted"


def test_ray_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"ray is not installed.*diffpolicy\[ray\]"):
        RayWorkers("auto", do)


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory):
    """The address of a cluster of two processors that runs here, with a home folder of its own."""
    pytest.importorskip("ray", reason="ray is not installed: pip install 'diffpolicy[ray]'")
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "HOME": str(home)}.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where its workers find this file
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        yield cluster.address
        cluster.shutdown()
        assert list(home.rglob("auth_token")) == []


def test_ray_does_jobs_and_outlives_those_that_raise_or_die(ray_cluster):
    jobs = [{"do": "add", "a": 1, "b": 2}, {"do": "raise"}, {"do": "exit"}, {"do": "add", "a": 3, "b": 4}]
    with RayWorkers(ray_cluster, do) as workers:
        assert workers.count == 2
        one, refused, died, two = work_off(workers, jobs)
    assert (one.result, two.result) == (3, 7)
    assert refused.error == "train.lr must be positive, got -1" and died.error.startswith("its worker died: ")


def test_ray_gives_the_same_bits_as_no_workers(ray_cluster, tmp_path):
    from diffpolicy.ablate import ablate
    from diffpolicy.quickstart import collect_demonstrations
    from tests.test_ablate import scores, sweep

    collect_demonstrations("tabletop", out=tmp_path / "t.zarr", episodes=6, options={"pixels": False})
    asked = sweep(tmp_path / "t.zarr")
    far, failures = ablate(asked, tmp_path / "far", make_workers=lambda run: RayWorkers(ray_cluster, run))
    assert failures == {}
    here, _ = ablate(asked, tmp_path / "here")
    assert scores(far) == scores(here)
    weights = [
        sorted(f.read_bytes() for f in (tmp_path / out).glob("train/*/checkpoints/*/model.safetensors"))
        for out in ("far", "here")
    ]
    assert weights[0] == weights[1] and len(weights[0]) == 2


def test_a_ray_cluster_that_does_not_answer_is_one_clear_line(ray_cluster):
    with pytest.raises(ConnectionError, match="--ray nonsense: no cluster answers there"):
        RayWorkers("nonsense", do)
