"""A training run from outside: what it writes, what it says, how it ends when something is wrong."""

import csv
import dataclasses
import io
import json
import os
import signal
import subprocess
import threading
from pathlib import Path

import lightning as L
import pytest
import torch
import zarr
from rich.console import Console
from safetensors.torch import load_file

from diffpolicy import train as trainer
from diffpolicy.checkpoint import list_checkpoints, load_policy, read_description
from diffpolicy.config import build_policy, load_config
from diffpolicy.replay import ReplayBuffer
from diffpolicy.training import PolicyModule, ReplayDataModule, ema_decay
from diffpolicy.windows import load_windows, split_episodes
from tests.conftest import tiny_config_for


def quiet() -> Console:
    return Console(file=io.StringIO(), width=300)


def run_tiny(store: Path, runs: Path, *, train: dict | None = None, console: Console | None = None, **kwargs) -> Path:
    """A run of a few steps on the tiny store; returns its folder."""
    sections = {k: kwargs.pop(k) for k in ("denoiser", "data", "process", "seed") if k in kwargs}
    base = {"steps": 8, "batch_size": 16, "warmup_steps": 2, "val_every": 4, "log_every": 1, "checkpoint_every": 4}
    config = tiny_config_for(store, **sections, train={**base, "val_windows": 8, **(train or {})})
    return trainer.train(config, runs=runs, device="cpu", console=console or quiet(), **{"name": "run", **kwargs})


def rows_of(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def finished(tiny_store, tmp_path) -> tuple[Path, str]:
    """A run of 8 steps, and what it said."""
    console = quiet()
    return run_tiny(tiny_store, tmp_path / "runs", console=console), console.file.getvalue()


def test_run_folder_explains_itself(finished):
    run, said = finished
    assert run.parts[-2:] == ("tiny", "run")
    assert {p.name for p in run.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "environment.json",
        "metrics.csv",
        "tensorboard",
    }
    assert [p.name for p in list_checkpoints(run)] == ["step_000004", "step_000008"]
    environment = json.loads((run / "environment.json").read_text())
    assert environment["torch"] == torch.__version__ and environment["command"]
    assert list((run / "tensorboard").glob("events.*"))
    assert "5 training and 1 validation episodes" in said and str(run) in said


def test_training_needs_no_git(tiny_store, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    run = run_tiny(tiny_store, tmp_path / "runs")
    assert json.loads((run / "environment.json").read_text())["commit"] is None


def test_a_package_installed_inside_another_repository_does_not_claim_its_commit(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    package = tmp_path / "venv" / "diffpolicy"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    assert trainer._commit(package) is None
    subprocess.run([*git, "add", "venv/diffpolicy/__init__.py"], check=True)
    assert len(trainer._commit(package)) == 40


def test_metrics_hold_every_logged_step_and_validation_once(finished):
    rows = rows_of(finished[0])
    assert [int(r["step"]) for r in rows if r["train/loss"]] == list(range(1, 9))
    assert [int(r["step"]) for r in rows if r["val/loss"]] == [4, 8]
    assert [float(r["train/lr"]) for r in rows if r["train/lr"]][-1] == 0.0
    assert all(float(r["val/action_mse"]) > 0 for r in rows if r["val/loss"])


def test_configuration_of_the_run_can_be_trained_again_with_the_same_result(finished, tmp_path):
    from diffpolicy.config import load_config

    run, _ = finished
    again = trainer.train(
        load_config([run / "config.yaml"]), runs=tmp_path / "again", name="run", device="cpu", console=quiet()
    )
    for first, second in zip(list_checkpoints(run), list_checkpoints(again), strict=True):
        a, b = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_another_seed_gives_another_policy(finished, tiny_store, tmp_path):
    other = run_tiny(tiny_store, tmp_path / "other", seed=1)
    a, b = (load_file(list_checkpoints(run)[-1] / "model.safetensors") for run in (finished[0], other))
    assert any(not torch.equal(a[k], b[k]) for k in a)


def test_checkpoint_holds_the_average_the_step_and_the_metrics(finished):
    last = list_checkpoints(finished[0])[-1]
    described = read_description(last)
    assert described["step"] == 8 and described["metrics"]["train/loss"] > 0
    state = torch.load(last / "training_state.ckpt", weights_only=True)["state_dict"]
    kept = load_file(last / "model.safetensors")
    assert all(torch.equal(kept[k], state[f"ema.{k}"]) for k in kept)
    assert any(not torch.equal(kept[k], state[f"policy.{k}"]) for k in kept)
    load_policy(finished[0])


def test_a_checkpoint_says_which_step_its_validation_is_of(finished):
    run, _ = finished
    validated = {int(r["step"]): float(r["val/loss"]) for r in rows_of(run) if r["val/loss"]}
    metrics = read_description(run)["metrics"]
    assert metrics["val/step"] == 4  # the checkpoint of step 8 is written before the validation of step 8
    assert metrics["val/loss"] == pytest.approx(validated[4], rel=1e-5)


def test_only_the_last_checkpoints_are_kept(tiny_store, tmp_path):
    run = run_tiny(tiny_store, tmp_path, train={"checkpoint_every": 2}, keep_checkpoints=2)
    assert [p.name for p in list_checkpoints(run)] == ["step_000006", "step_000008"]


def test_loss_of_a_row_is_the_mean_of_the_steps_since_the_row_before(tiny_store, tmp_path):
    """... although a checkpoint comes in between."""
    each = run_tiny(tiny_store, tmp_path / "each", train={"log_every": 1, "checkpoint_every": 3})
    some = run_tiny(tiny_store, tmp_path / "some", train={"log_every": 4, "checkpoint_every": 3})
    losses = [float(r["train/loss"]) for r in rows_of(each) if r["train/loss"]]
    means = [float(r["train/loss"]) for r in rows_of(some) if r["train/loss"]]
    assert means == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 4], rel=1e-4)


class _Weights(L.Callback):
    """Remembers the learning weights before training and after each step."""

    def __init__(self):
        self.seen = []

    def on_train_start(self, trainer, module):
        self.seen.append([p.detach().clone() for p in module.policy.parameters()])

    def on_train_batch_end(self, trainer, module, *_):
        self.seen.append([p.detach().clone() for p in module.policy.parameters()])


@pytest.mark.filterwarnings("ignore:.*(treespec|in eval mode at the start).*")
def test_average_of_a_real_run_equals_one_computed_by_hand(tiny_store):
    config = tiny_config_for(tiny_store)
    splits = split_episodes(6, val_ratio=0.2, seed=0)
    (train, val), spec = load_windows(ReplayBuffer.open(tiny_store), config.data.keys, config.horizons, splits)
    policy = build_policy(config, spec)
    for key in policy.normalizer.shapes:
        policy.normalizer.fit(key, train.arrays[key])
    module, weights = PolicyModule(policy, config=config.train, seed=0), _Weights()
    L.Trainer(
        accelerator="cpu",
        max_steps=12,
        logger=False,
        callbacks=[weights],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, ReplayDataModule(train, val, config=config.train, seed=0))
    assert len(weights.seen) == 13
    average = weights.seen[0]
    for update, current in enumerate(weights.seen[1:]):
        decay = ema_decay(update, power=0.75, maximum=0.9999)
        average = [decay * a + (1 - decay) * p for a, p in zip(average, current, strict=True)]
    for ours, theirs in zip(module.ema.parameters(), average, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    last = weights.seen[-1]
    assert any(not torch.equal(e, p) for e, p in zip(module.ema.parameters(), last, strict=True))
    assert not any(m.training for m in module.ema.modules())


@pytest.mark.parametrize("key", ["state", "action"])
def test_nan_in_the_data_is_refused_with_its_row_before_a_run_folder_exists(tiny_store, tmp_path, key):
    root = zarr.open_group(tiny_store, mode="r+")
    values = root[f"data/{key}"][:]
    values[20, 1] = float("nan")
    root[f"data/{key}"][:] = values
    role = {"state": "observation.state", "action": "action"}[key]
    where = rf"episode 1 of .*tiny.zarr: {role} is NaN or inf at step 8 \(row 20\); .*data drop .* --episodes 1"
    with pytest.raises(ValueError, match=where):
        run_tiny(tiny_store, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tiny_store, tmp_path):
    wild = {"lr": 1e6, "grad_clip": None, "warmup_steps": 0, "steps": 60, "checkpoint_every": 2, "log_every": 60}
    with pytest.raises(FloatingPointError, match=r"at step \d+ .*lower train\.lr") as caught:
        run_tiny(tiny_store, tmp_path, train=wild)
    message = str(caught.value)
    assert "windows from episode" in message
    checkpoints = list_checkpoints(tmp_path / "tiny" / "run")
    assert checkpoints and f"The last checkpoint is {checkpoints[-1]}" in message
    for folder in checkpoints:
        for file in ("model.safetensors", "training_state.ckpt"):
            path = folder / file
            tensors = load_file(path) if file.startswith("model") else torch.load(path)["state_dict"]
            assert all(v.isfinite().all() for v in tensors.values()), path


def test_weights_that_are_not_finite_are_never_written(tiny_store, tmp_path):
    """One step can overflow the weights although its own loss was finite."""
    wild = {"lr": 3e38, "grad_clip": None, "warmup_steps": 0, "checkpoint_every": 1}
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(FloatingPointError, match=r"is not finite after step 1; .*No checkpoint was written yet"):
        run_tiny(tiny_store, tmp_path, train=wild)
    assert list_checkpoints(tmp_path / "tiny" / "run") == []
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_bad_window_behind_a_bad_loss_is_named(tiny_store, tmp_path, monkeypatch):
    """Should a NaN slip in after the statistics were taken, the message says where it stands."""
    fitted = PolicyModule.__init__

    def spoil(self, *args, **kwargs):
        fitted(self, *args, **kwargs)

    def spoilt_stream(self, start_step=0):
        self.train.arrays["action"][25] = float("nan")
        return stream(self, start_step)

    stream = ReplayDataModule.stream
    monkeypatch.setattr(PolicyModule, "__init__", spoil)
    monkeypatch.setattr(ReplayDataModule, "stream", spoilt_stream)
    with pytest.raises(FloatingPointError, match=r"loss is nan at step \d+: action is not finite in episode 1, step"):
        run_tiny(tiny_store, tmp_path)


def test_a_batch_larger_than_the_dataset_is_said_aloud(tiny_store, tmp_path):
    console = quiet()
    run_tiny(tiny_store, tmp_path, train={"batch_size": 5000}, console=console)
    said = console.file.getvalue()
    assert "train.batch_size=5000 is lowered to" in said


@pytest.mark.parametrize(
    ("mode", "clip", "said"), [("limits", 1.0, False), ("gaussian", 1.0, True), ("gaussian", None, False)]
)
def test_clipping_that_cuts_off_recorded_actions_is_said_aloud(tiny_store, tmp_path, mode, clip, said):
    config = tiny_config_for(
        tiny_store,
        normalizer={"action": mode},
        sampler={"clip_sample": clip, "num_inference_steps": 2},
        train={"steps": 1, "warmup_steps": 0},
    )
    console = quiet()
    trainer.train(config, runs=tmp_path, device="cpu", console=console)
    assert ("sampler.clip_sample=1.0 cuts off" in console.file.getvalue()) == said


def test_training_without_a_validation_set_runs(tiny_store, tmp_path):
    config = tiny_config_for(tiny_store)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, val_ratio=0.0))
    run = trainer.train(config, runs=tmp_path, name="run", device="cpu", console=quiet())
    assert not any(row["val/loss"] for row in rows_of(run)) and len(list_checkpoints(run)) == 2


def test_bf16_trains_with_clipped_gradients(tiny_store, tmp_path):
    run = run_tiny(tiny_store, tmp_path, train={"grad_clip": 1.0}, precision="bf16")
    assert load_file(list_checkpoints(run)[-1] / "model.safetensors")


def test_gradients_are_clipped_to_the_norm_asked_for(tiny_store, tmp_path, monkeypatch):
    norms = []

    def remember(self):
        norms.append(torch.cat([p.grad.flatten() for p in self.policy.parameters()]).norm().item())

    monkeypatch.setattr(PolicyModule, "_update_ema", remember)  # called right after the optimiser's step
    run_tiny(tiny_store, tmp_path, train={"grad_clip": 1e-3, "steps": 3})
    assert norms == pytest.approx([1e-3] * 3, rel=1e-3)


def test_an_existing_run_is_never_overwritten(finished, tiny_store, tmp_path):
    before = (finished[0] / "metrics.csv").read_bytes()
    with pytest.raises(ValueError, match=r"exists; resume it with `diffpolicy train --resume .*run` or choose another"):
        run_tiny(tiny_store, tmp_path / "runs")
    assert (finished[0] / "metrics.csv").read_bytes() == before


def test_a_folder_without_a_checkpoint_is_not_said_to_be_resumable(tiny_store, tmp_path):
    (tmp_path / "tiny" / "run").mkdir(parents=True)
    (tmp_path / "tiny" / "run" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="without a checkpoint to resume from; remove it or choose another --name"):
        run_tiny(tiny_store, tmp_path)


def test_a_device_or_library_that_is_missing_is_said_before_a_run_folder_exists(tiny_store, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = tiny_config_for(tiny_store)
    for wrong, error, message in (
        ({"device": "cuda"}, ValueError, "--device cuda is not on this machine"),
        ({"device": "gpu"}, ValueError, "--device must be one of"),
        ({"num_devices": 0}, ValueError, "--num-devices 0: at least 1 is needed"),
        ({"wandb_project": "p"}, ImportError, r"wandb is not installed; .*pip install 'diffpolicy\[wandb\]'"),
        ({"stop_at": 0}, ValueError, r"--stop-at must be in \[1, train.steps = 8\], got 0"),
    ):
        monkeypatch.setitem(__import__("sys").modules, "wandb", None)
        with pytest.raises(error, match=message):
            trainer.train(config, runs=tmp_path / "runs", name="run", console=quiet(), **wrong)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_at_hand_and_saves(tiny_store, tmp_path, monkeypatch, signum):
    step_of = PolicyModule.training_step

    def interrupt(self, batch, batch_idx):
        if self.global_step == 5:
            os.kill(os.getpid(), signum)
        return step_of(self, batch, batch_idx)

    monkeypatch.setattr(PolicyModule, "training_step", interrupt)
    before, console = signal.getsignal(signum), quiet()
    run = run_tiny(tiny_store, tmp_path, train={"steps": 5000, "checkpoint_every": 5000}, console=console)
    assert [p.name for p in list_checkpoints(run)] == ["step_000006"]
    assert "stopping after this step and saving" in console.file.getvalue()
    assert signal.getsignal(signum) is before
    load_policy(run)


def test_a_signal_while_a_checkpoint_is_written_loses_nothing(tiny_store, tmp_path, monkeypatch):
    """It comes too late for that step; the next one is saved."""
    save = trainer.save_policy
    fired = []

    def interrupt(*args, **kwargs):
        if not fired:
            fired.append(1)
            os.kill(os.getpid(), signal.SIGINT)
        return save(*args, **kwargs)

    monkeypatch.setattr(trainer, "save_policy", interrupt)
    run = run_tiny(tiny_store, tmp_path, train={"steps": 5000, "checkpoint_every": 3})
    assert [p.name for p in list_checkpoints(run)] == ["step_000003", "step_000004"]


def test_training_runs_outside_the_main_thread(tiny_store, tmp_path):
    runs = []
    thread = threading.Thread(target=lambda: runs.append(run_tiny(tiny_store, tmp_path)))
    thread.start()
    thread.join()
    assert runs and len(list_checkpoints(runs[0])) == 2


def test_a_full_disk_loses_no_earlier_checkpoint(tiny_store, tmp_path, monkeypatch):
    save = L.Trainer.save_checkpoint

    def full(self, path, *args, **kwargs):
        if self.global_step > 4:
            raise OSError(28, "No space left on device")
        save(self, path, *args, **kwargs)

    monkeypatch.setattr(L.Trainer, "save_checkpoint", full)
    with pytest.raises(OSError, match=r"checkpoint .*step_000008 could not be written: .*No space left"):
        run_tiny(tiny_store, tmp_path)
    run = tmp_path / "tiny" / "run"
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_000004"]
    load_policy(run)


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", ".."])
def test_a_name_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    from diffpolicy.train import _new_run

    config = load_config(["conf/task/tabletop.yaml"])
    with pytest.raises(ValueError, match="must hold no path separators"):
        _new_run(tmp_path, config, name)
    assert not list(tmp_path.iterdir())


def test_a_store_that_is_not_there_is_answered_with_how_to_say_where_it_is(tmp_path):
    config = load_config(["conf/task/tabletop.yaml"], [f"data.path={tmp_path / 'nowhere.zarr'}"])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.zarr does not exist; .* --data PATH"):
        trainer.train(config, runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
