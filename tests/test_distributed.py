"""Training in two processes on a CPU (gloo), through Lightning's own launcher."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from diffpolicy.checkpoint import list_checkpoints, load_policy
from tests.conftest import tiny_config_for
from tests.test_train import rows_of

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from diffpolicy import train as trainer
from diffpolicy.config import load_config
from diffpolicy.training import BatchStream, PolicyModule

here, options = Path(sys.argv[1]), json.loads(sys.argv[2])
windows_of = BatchStream.windows

def remember(self, step):
    windows = windows_of(self, step)
    with open(here / f"windows_{self.rank}_of_{self.world_size}.txt", "a") as file:
        print(step, *windows.tolist(), file=file)
    return windows

BatchStream.windows = remember
PolicyModule.on_train_end = lambda self: torch.save(self.state_dict(), here / f"weights_{self.global_rank}.pt")
trainer.train(load_config([here / "tiny.yaml"]), runs=here / "runs", device="cpu", num_devices=2, **options)
"""


@pytest.fixture
def launch(tiny_store, tmp_path):
    """launch({...}, steps=...): the script above as a process, with keyword arguments of train() and settings."""
    from omegaconf import OmegaConf

    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DIFFPOLICY_RUN")}

    def start(options: dict, **settings) -> subprocess.Popen:
        train = {"steps": 6, "batch_size": 8, "warmup_steps": 1, "val_every": 3, "log_every": 1, "checkpoint_every": 3}
        config = tiny_config_for(tiny_store, train={**train, "val_windows": 8, **settings})
        OmegaConf.save(OmegaConf.create(config.to_dict()), tmp_path / "tiny.yaml")
        (tmp_path / "script.py").write_text(SCRIPT)
        return subprocess.Popen(
            [sys.executable, tmp_path / "script.py", tmp_path, json.dumps(options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=clean,
        )

    return start


def the_run(folder: Path) -> Path:
    (run,) = (folder / "runs" / "tiny").iterdir()
    return run


def test_two_processes_train_one_policy_on_disjoint_windows(launch, tmp_path):
    """The run folder's name is a time of day: both must nevertheless use the same."""
    process = launch({})
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count("run folder") == 1, "only the first process speaks"
    run = the_run(tmp_path)
    assert [p.name for p in list_checkpoints(run)] == ["step_000003", "step_000006"]
    load_policy(run)
    assert [int(r["step"]) for r in rows_of(run) if r["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [int(r["step"]) for r in rows_of(run) if r["val/loss"]] == [3, 6]

    ranks = [
        [list(map(int, line.split())) for line in (tmp_path / f"windows_{r}_of_2.txt").read_text().splitlines()]
        for r in range(2)
    ]
    for (step, *first), (same_step, *second) in zip(*ranks, strict=False):
        assert step == same_step and len(first) == len(second) == 8
        assert not set(first) & set(second)

    weights = [torch.load(tmp_path / f"weights_{r}.pt", weights_only=True) for r in range(2)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0]), "gradients were not shared"


def test_ctrl_c_ends_both_processes_with_a_checkpoint(launch, tmp_path):
    process = launch({"name": "run"}, steps=100_000, val_every=100_000, checkpoint_every=20, log_every=10)
    run = tmp_path / "runs" / "tiny" / "run"
    deadline = time.monotonic() + 90
    while not list_checkpoints(run):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail("the processes wait for each other for ever")
    assert process.returncode == 0, err
    load_policy(run)
