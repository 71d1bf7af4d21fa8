"""2N steps equal N steps, a stop, and N steps more: bit for bit on a CPU, in this process and in others."""

import dataclasses
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffpolicy import train as trainer
from diffpolicy.checkpoint import list_checkpoints, load_policy
from diffpolicy.replay import ReplayBuffer
from diffpolicy.training import BatchStream
from tests.conftest import TINY_KEYS, tiny_config_for
from tests.test_train import quiet, rows_of, run_tiny

MLP = {"name": "mlp", "width": 16, "depth": 1, "embed_dim": 8}
TRANSFORMER = {"name": "transformer", "width": 16, "depth": 2, "num_heads": 2, "dropout": 0.3, "embedding_dropout": 0.1}
DIFFUSION = {"name": "diffusion", "num_train_timesteps": 10}
STEPS = {"steps": 12, "val_every": 5, "log_every": 4, "checkpoint_every": 3}
"""The tiny store gives four batches an epoch, so that every stop but one lies in mid-epoch."""


def differences(a: object, b: object, place: str = "") -> list[str]:
    """Where two nested containers of tensors and numbers differ, bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for k in a for d in differences(a[k], b[k], f"{place}.{k}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{place}[{i}]")]
    if torch.is_tensor(a) and torch.is_tensor(b):
        return [] if torch.equal(a, b) else [place]
    return [] if a == b else [f"{place}: {a} is not {b}"]


def final_state(run: Path) -> dict:
    return torch.load(list_checkpoints(run)[-1] / "training_state.ckpt", weights_only=True)


def resume(run: Path, **kwargs) -> Path:
    return trainer.train(trainer.load_resume_config(run), resume=run, device="cpu", console=quiet(), **kwargs)


def assert_same_end(first: Path, second: Path) -> None:
    """Weights, average, optimiser, schedule, loops: everything that a checkpoint holds, and the metrics."""
    a, b = list_checkpoints(first)[-1], list_checkpoints(second)[-1]
    assert a.name == b.name
    # how often Lightning validated is counted after a checkpoint of the same step; nothing follows from it
    found = [d for d in differences(final_state(first), final_state(second)) if ".val_loop." not in d]
    assert found == []
    assert differences(load_file(a / "model.safetensors"), load_file(b / "model.safetensors")) == []


@pytest.mark.parametrize("stop_at", [1, 4, 5, 7, 10])  # after one step, an epoch, a validation, in mid-interval
@pytest.mark.parametrize(
    "parts", [{"denoiser": MLP}, {"denoiser": TRANSFORMER, "process": DIFFUSION}], ids=["mlp", "transformer"]
)
def test_a_resumed_run_equals_an_uninterrupted_one(tiny_store, tmp_path, parts, stop_at):
    whole = run_tiny(tiny_store, tmp_path / "whole", train=STEPS, **parts)
    halves = run_tiny(tiny_store, tmp_path / "halves", train=STEPS, stop_at=stop_at, **parts)
    assert list_checkpoints(halves)[-1].name == f"step_{stop_at:06d}"
    assert resume(halves) == halves
    assert_same_end(whole, halves)


def test_a_checkpoint_holds_optimiser_schedule_average_and_place(tiny_store, tmp_path):
    """So that the test above compares something."""
    run = run_tiny(tiny_store, tmp_path, train=STEPS, stop_at=7)
    state = final_state(run)
    moments = next(iter(state["optimizer_states"][0]["state"].values()))
    assert moments["step"] == 7 and moments["exp_avg_sq"].any()
    assert state["lr_schedulers"][0]["last_epoch"] == 7 and state["global_step"] == 7
    assert any(key.startswith("ema.") for key in state["state_dict"])


def test_resuming_twice_is_as_good_as_once(tiny_store, tmp_path):
    whole = run_tiny(tiny_store, tmp_path / "whole", train=STEPS, denoiser=TRANSFORMER)
    parts = run_tiny(tiny_store, tmp_path / "parts", train=STEPS, denoiser=TRANSFORMER, stop_at=2)
    resume(parts, stop_at=7)
    resume(parts)
    assert_same_end(whole, parts)


def test_a_resumed_run_sees_the_windows_that_were_to_come(tiny_store, tmp_path, monkeypatch):
    seen: list[list[int]] = []
    windows_of = BatchStream.windows

    def remember(self, step):
        window = windows_of(self, step)
        seen.append([step, *window.tolist()])
        return window

    monkeypatch.setattr(BatchStream, "windows", remember)
    run_tiny(tiny_store, tmp_path / "whole", train=STEPS)
    whole = {step: rest for step, *rest in seen}
    seen.clear()
    run = run_tiny(tiny_store, tmp_path / "halves", train=STEPS, stop_at=7)
    seen.clear()
    resume(run)
    resumed = {step: rest for step, *rest in seen}
    assert min(resumed) == 7 and max(resumed) >= 11
    assert all(whole[step] == window for step, window in resumed.items() if step in whole)


def metrics(run: Path) -> list[dict[str, str]]:
    """Rows without the speed, which is never the same twice."""
    return [{k: v for k, v in row.items() if k != "train/steps_per_s"} for row in rows_of(run)]


def test_metrics_of_a_resumed_run_equal_those_of_an_uninterrupted_one(tiny_store, tmp_path):
    whole = run_tiny(tiny_store, tmp_path / "whole", train=STEPS)
    halves = run_tiny(tiny_store, tmp_path / "halves", train=STEPS, stop_at=8)
    resume(halves)
    assert metrics(halves) == metrics(whole)


def test_a_stop_within_a_log_interval_adds_a_row_and_changes_no_validation(tiny_store, tmp_path):
    whole = run_tiny(tiny_store, tmp_path / "whole", train=STEPS)
    halves = run_tiny(tiny_store, tmp_path / "halves", train=STEPS, stop_at=7)
    resume(halves)
    assert [row["step"] for row in rows_of(whole)] == ["4", "5", "8", "10", "12"]
    assert [row["step"] for row in rows_of(halves)] == ["4", "5", "7", "8", "10", "12"]
    assert [r for r in metrics(halves) if r["val/loss"]] == [r for r in metrics(whole) if r["val/loss"]]


def test_rows_written_after_the_last_checkpoint_are_written_again_not_twice(tiny_store, tmp_path):
    run = run_tiny(tiny_store, tmp_path, train=STEPS, stop_at=6)
    with open(run / "metrics.csv", "a") as file:  # as a killed run would have left it
        file.write("8,9.9,0.1,5,,\n9,9.9,0.1,5,,\n")
    resume(run)
    rows = rows_of(run)
    assert [int(r["step"]) for r in rows] == [4, 5, 6, 8, 10, 12]
    assert not any(r["train/loss"] == "9.9" for r in rows)


def test_resuming_a_finished_run_says_so_and_changes_nothing(tiny_store, tmp_path):
    run = run_tiny(tiny_store, tmp_path, train=STEPS)
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    console = quiet()
    trainer.train(trainer.load_resume_config(run), resume=run, device="cpu", console=console)
    assert f"nothing to do: {run} is at step 12 already" in console.file.getvalue()
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before


def test_data_may_have_moved_since(tiny_store, tmp_path):
    run = run_tiny(tiny_store, tmp_path, train=STEPS, stop_at=5)
    moved = tiny_store.rename(tmp_path / "moved.zarr")
    config = trainer.load_resume_config(run, data_path=str(moved))
    trainer.train(config, resume=run, device="cpu", console=quiet())
    assert list_checkpoints(run)[-1].name == "step_000012"


def test_other_data_than_the_run_was_trained_on_are_refused(tiny_store, tmp_path):
    run = run_tiny(tiny_store, tmp_path, train=STEPS, stop_at=5)
    config = trainer.load_resume_config(run)
    keys = {**TINY_KEYS, "observation.environment_state": "state[3:5]"}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, keys=keys))
    with pytest.raises(ValueError, match=r"tiny.zarr does not fit the run: it has .*\(2,\).*trained on .*\(3,\)"):
        trainer.train(config, resume=run, device="cpu", console=quiet())


def test_data_with_other_episodes_than_the_run_was_trained_on_are_refused(tiny_store, tmp_path):
    run = run_tiny(tiny_store, tmp_path, train=STEPS, stop_at=5)
    with ReplayBuffer.open(tiny_store, mode="a") as buffer:
        buffer.append_episode(buffer.episode(0))
    with pytest.raises(ValueError, match=r"the data give \d+ training windows, the run began with \d+"):
        resume(run)


def test_a_run_that_another_process_trains_is_refused_and_left_alone(tiny_store, tmp_path):
    run = run_tiny(tiny_store, tmp_path, train=STEPS, stop_at=5)
    folder = os.open(run, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    rows = rows_of(run)
    with pytest.raises(ValueError, match=r"run is being trained by another process"):
        resume(run)
    assert rows_of(run) == rows
    os.close(folder)
    assert list_checkpoints(resume(run))[-1].name == "step_000012"


def test_a_folder_that_cannot_be_resumed_is_named(tmp_path, tiny_store):
    with pytest.raises(FileNotFoundError, match="nowhere is not a run folder that can be resumed"):
        trainer.load_resume_config(tmp_path / "nowhere")
    run = run_tiny(tiny_store, tmp_path, train=STEPS)
    (list_checkpoints(run)[-1] / "training_state.ckpt").unlink()
    with pytest.raises(FileNotFoundError, match=r"training_state.ckpt is missing"):
        trainer.load_resume_config(run)


def test_a_truncated_training_state_is_named(tmp_path, tiny_store):
    run = run_tiny(tiny_store, tmp_path, train=STEPS, stop_at=5)
    file = list_checkpoints(run)[-1] / "training_state.ckpt"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"training_state.ckpt is damaged; remove .*step_000005 to go on"):
        resume(run)


# ---- in processes of their own, through the command line ----


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "diffpolicy.cli", *map(str, arguments)]


def yaml_for(store: Path, folder: Path, **train: object) -> Path:
    from omegaconf import OmegaConf

    base = {"steps": 12, "batch_size": 16, "warmup_steps": 2, "val_windows": 8}
    config = tiny_config_for(store, denoiser=TRANSFORMER, train={**base, **train})
    OmegaConf.save(OmegaConf.create(config.to_dict()), folder / "tiny.yaml")
    return folder / "tiny.yaml"


def wait_for(found, process: subprocess.Popen, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run got nowhere"
        time.sleep(0.05)


def test_ctrl_c_and_kill_leave_checkpoints_from_which_a_new_process_goes_on_exactly(tiny_store, tmp_path):
    """SIGINT: exit code 0, saved at the step it stopped. kill -9: the last checkpoint is whole. Then the end is the same."""
    yaml = yaml_for(tiny_store, tmp_path, steps=4000, val_every=500, checkpoint_every=100, log_every=50)
    run = tmp_path / "runs" / "tiny" / "run"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    started = subprocess.Popen(command("train", yaml, "--runs", tmp_path / "runs", "--name", "run"), **pipes)
    wait_for(lambda: list_checkpoints(run), started)
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=60)
    assert started.returncode == 0 and err == "", err
    assert "stopping after this step and saving" in out and f"diffpolicy rollout {run}" in out
    stopped = list_checkpoints(run)[-1]
    load_policy(stopped)

    resumed = subprocess.Popen(command("train", "--resume", run), **pipes)
    wait_for(lambda: list_checkpoints(run)[-1] != stopped, resumed)
    resumed.send_signal(signal.SIGKILL)
    resumed.communicate(timeout=60)
    killed = list_checkpoints(run)[-1]
    load_policy(killed)
    state = torch.load(killed / "training_state.ckpt", weights_only=True)
    stop_at = state["global_step"] + 20

    done = subprocess.run(
        command("train", "--resume", run, "--stop-at", stop_at), capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    steps = [int(row["step"]) for row in rows_of(run) if row["train/loss"]]
    assert steps == sorted(set(steps)) and set(range(50, stop_at, 50)) <= set(steps)

    config = trainer.load_resume_config(run)
    whole = trainer.train(
        config, runs=tmp_path / "whole", name="run", stop_at=stop_at, device="cpu", console=quiet(), progress=False
    )
    assert_same_end(whole, run)
