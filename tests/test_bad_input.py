"""Bad input gets one clear line on standard error, exit code 2 and no traceback; nothing is lost."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import zarr
from safetensors.torch import load_file, save_file

from diffpolicy import train
from diffpolicy.checkpoint import list_checkpoints, load_policy
from diffpolicy.replay import ReplayBuffer
from tests.test_cli import SHORT, make_tabletop_store, run, train_tabletop

TASK = "conf/task/tabletop.yaml"
QUICK = ("--episodes", "1", "--videos", "0", "--pictures", "0", "--env-option", "max_steps=5")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("made")
    store = make_tabletop_store(folder, 4)
    return store, train_tabletop(store, folder / "trained")


@pytest.fixture
def store(made) -> Path:
    return made[0]


@pytest.fixture
def checkpoint(made, tmp_path) -> Path:
    """A copy of a whole checkpoint, to be damaged."""
    return Path(shutil.copytree(list_checkpoints(made[1])[-1], tmp_path / "checkpoint"))


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """refused("train", ...) -> the one line that it was refused with; checks the code and that nothing was left behind."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def check(*arguments: object) -> str:
        code, _, err = run(*arguments, monkeypatch=monkeypatch, capsys=capsys)
        assert code == 2, err
        assert err.count("\n") == 1 and err.startswith("error: ") and "Traceback" not in err, err
        assert list(Path.cwd().iterdir()) == [], "something was left behind"
        return err

    return check


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("train.lrr=3", "config key 'train.lrr' (in command line: train.lrr=3) must be one of"),
        ("train.lrr=3", "Did you mean 'lr'?"),
        ("trian.lr=3", "Did you mean 'train'?"),
        ("denoiser.wdith=3", "Did you mean 'width'?"),
        ("denoiser.name=trnsformer", "Did you mean 'transformer'?"),
        ("process.name=flwo", "Did you mean 'flow'?"),
        ("encoder.name=resnt", "Did you mean 'resnet'?"),
        ("env.name=tabeltop", "Did you mean 'tabletop'?"),
        ("normalizer.action=limit", "Did you mean 'limits'?"),
        ("horizons.act=40", "horizons.act must be in [1, horizons.pred - horizons.past = 15], got 40"),
        ("horizons.past=2", "horizons.past must be in [0, horizons.obs - 1 = 1]"),
        ("horizons.pred=1", "horizons.past must be in [0, horizons.pred - 1 = 0], got 1"),
        ("train.batch_size=many", "train.batch_size: Value 'many'"),
        ("train.warmup_steps=9", "train.warmup_steps must be in [0, train.steps = 4], got 9"),
        (
            "sampler.name=direct",
            "sampler.name=direct cannot sample process.name=flow; it takes auto or one of ['euler', 'heun'",
        ),
        ("data.keys.action=actoin", "Did you mean 'action'?"),
        ("data.keys.action=action[7:9]", "data.keys.action: 'action[7:9]' takes nothing; action has 2 numbers a step"),
        ("data.val_ratio=2", "data.val_ratio must be in [0, 1), got 2"),
        ("seed=-1", "seed must not be negative, got -1"),
        ("encoder.name=resnet", "encoder.name=resnet needs a camera"),
    ],
)
def test_a_wrong_setting(refused, store, setting, line):
    assert line in refused("train", TASK, "--data", store, *SHORT, setting)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "no config: give at least one YAML file"),
        (("seed=3",), "no config: give at least one YAML file"),
        (("conf/task/tabeltop.yaml",), "Did you mean 'conf/task/tabletop.yaml'?"),
        ((TASK, "--device", "gpu"), "--device must be one of ['auto', 'cpu', 'cuda', 'mps'], got 'gpu'"),
        ((TASK, "--precision", "8"), "--precision must be one of ['32', 'auto', 'bf16', 'fp16'], got '8'"),
        ((TASK, "--data", "nowhere.zarr"), "nowhere.zarr does not exist"),
        ((TASK, "--resume", "nowhere"), "--resume takes the config of the run"),
        (("--resume", "nowhere"), "nowhere is not a run folder that can be resumed"),
    ],
)
def test_a_wrong_argument_of_train(refused, arguments, line):
    assert line in refused("train", *arguments)


def test_a_device_that_is_not_there(refused, store, checkpoint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda is not on this machine" in refused("train", TASK, "--data", store, "--device", "cuda")
    assert "--device cuda is not on this machine" in refused("rollout", checkpoint, "--device", "cuda")
    assert "--device must be one of" in refused("rollout", checkpoint, "--device", "tpu")


def test_an_empty_dataset(refused, store, tmp_path):
    full = ReplayBuffer.open(store)
    ReplayBuffer.create(tmp_path / "empty.zarr", fields=full.fields, fps=10, roles=full.roles).close()
    assert "holds no finished episodes" in refused("train", TASK, "--data", tmp_path / "empty.zarr")


def test_a_folder_that_is_no_dataset(refused, tmp_path):
    (tmp_path / "folder").mkdir()
    assert "folder" in refused("train", TASK, "--data", tmp_path / "folder")
    (tmp_path / "file").write_text("hello")
    assert "file" in refused("train", TASK, "--data", tmp_path / "file")
    assert "file" in refused("data", "info", tmp_path / "file")


def test_a_dataset_without_a_key(refused, store):
    line = refused("train", "conf/task/pusht_image.yaml", "--data", store)
    assert "must be one of ['action', " in line and "got 'img'" in line


def test_a_dataset_with_nan_names_episode_key_and_row(refused, store, tmp_path):
    copy = Path(shutil.copytree(store, tmp_path / "nan.zarr"))
    row = ReplayBuffer.open(copy).episode_slice(2).start + 4
    array = zarr.open_group(copy, mode="r+")["data/observation.state"]
    values = array[:]
    values[row, 1] = float("inf")
    array[:] = values
    line = refused("train", TASK, "--data", copy)
    assert f"episode 2 of {copy}: observation.state is NaN or inf at step 4 (row {row})" in line


def test_data_that_do_not_fit_the_run(refused, store, made, tmp_path):
    """Another number of blocks: the same keys with other shapes."""
    from diffpolicy.quickstart import collect_demonstrations

    other = tmp_path / "other.zarr"
    collect_demonstrations("tabletop", out=other, episodes=2, options={"pixels": False, "num_blocks": 3})
    half = train_tabletop(store, tmp_path / "half", "half")
    shutil.rmtree(list_checkpoints(half)[-1])
    line = refused("train", "--resume", half, "--data", other)
    assert "does not fit the run" in line and "(14,)" in line


def test_an_environment_that_does_not_fit_the_checkpoint(refused, checkpoint):
    line = refused("rollout", checkpoint, "--env", "pusht", "--out", checkpoint / "out")
    assert "environment_state: the checkpoint has shape (14,), environment 'pusht' has (18,)" in line


def test_an_unknown_environment_or_option(refused, checkpoint):
    assert "Did you mean 'tabletop'?" in refused("rollout", checkpoint, "--env", "tabeltop")
    assert "Did you mean 'max_steps'?" in refused("rollout", checkpoint, "--env-option", "max_stesp=3")
    assert "must read key=value, got 'fast'" in refused("rollout", checkpoint, "--env-option", "fast")
    assert "Did you mean 'tabletop'?" in refused("collect", "tabeltop", "--out", "x.zarr")
    assert "'tabletop_language'], got 'pusht'" in refused("collect", "pusht", "--out", "x.zarr")


def test_a_missing_extra_names_the_pip_command(refused, store, checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "gym_pusht", None)
    for module in [m for m in sys.modules if m.startswith("gym_pusht.")]:
        monkeypatch.delitem(sys.modules, module)
    for command in (
        ("data", "replay", store, "--env", "pusht"),
        ("rollout", checkpoint, "--env", "pusht", "--out", checkpoint / "out"),
    ):
        assert "gym-pusht is not installed; install it with: pip install 'diffpolicy[pusht]'" in refused(*command)


def test_wandb_that_is_not_installed(refused, store, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install 'diffpolicy[wandb]'" in refused("train", TASK, "--data", store, *SHORT, "--wandb", "mine")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--sampler", "direct"), "sampler.name=direct cannot sample process 'flow'; it takes one of ['euler', 'heun'"),
        (("--sampler", "eluer"), "Did you mean 'euler'?"),
        (("--steps", "0"), "sampler.num_inference_steps must be at least 1, got 0"),
        (("--spacing", "trailling"), "Did you mean 'trailing'?"),
        (("--act", "40"), "horizons.act must be in [1, horizons.pred - horizons.past = 15], got 40"),
        (("--clip", "much"), "--clip must be a positive number or `none`, got 'much'"),
        (("--clip", "-1"), "sampler.clip_sample must be positive"),
    ],
)
def test_a_wrong_argument_of_rollout(refused, checkpoint, arguments, line):
    assert line in refused("rollout", checkpoint, *arguments)


def edit(checkpoint: Path, change) -> None:
    described = json.loads((checkpoint / "config.json").read_text())
    change(described)
    (checkpoint / "config.json").write_text(json.dumps(described))


DAMAGE = {
    "is damaged or truncated": lambda c: os.truncate(c / "model.safetensors", 1000),
    "damaged or truncated": lambda c: os.truncate(
        c / "model.safetensors", (c / "model.safetensors").stat().st_size - 1
    ),
    "header too small": lambda c: os.truncate(c / "model.safetensors", 0),
    "model.safetensors is missing": lambda c: (c / "model.safetensors").unlink(),
    "config.json is missing": lambda c: (c / "config.json").unlink(),
    "config.json is damaged": lambda c: os.truncate(c / "config.json", 100),
    "config.json is not a diffpolicy checkpoint": lambda c: (c / "config.json").write_text('{"a": 1}'),
    "has format version 99": lambda c: edit(c, lambda d: d.update(format_version=99)),
    "Did you mean 'mlp'?": lambda c: edit(c, lambda d: d["config"]["denoiser"].update(name="mpl")),
    "the config says (64,)": lambda c: edit(c, lambda d: d["config"]["denoiser"].update(width=32)),
    "does not fit its config: missing": lambda c: edit(c, lambda d: d["config"]["denoiser"].update(depth=2)),
}


@pytest.mark.parametrize("line", DAMAGE)
def test_a_damaged_checkpoint(refused, checkpoint, line):
    DAMAGE[line](checkpoint)
    assert line in refused("rollout", checkpoint, *QUICK)


def test_a_checkpoint_without_statistics(refused, checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    key = next(k for k in weights if k.endswith("action:scale"))
    save_file({**weights, key: torch.full_like(weights[key], float("nan"))}, checkpoint / "model.safetensors")
    assert "normaliser statistics are missing for ['action']" in refused("rollout", checkpoint, *QUICK)


def test_what_is_no_checkpoint(refused, checkpoint, store, tmp_path):
    assert "checkpoint nowhere does not exist" in refused("rollout", "nowhere")
    assert "holds no checkpoint" in refused("rollout", store)
    assert "a checkpoint is a folder with" in refused("rollout", checkpoint / "model.safetensors")
    (tmp_path / "bad.ckpt").write_bytes(b"not a zip")
    assert "bad.ckpt is not a zip archive" in refused("import-checkpoint", tmp_path / "bad.ckpt", "--out", "out")
    foreign = refused("import-checkpoint", checkpoint / "training_state.ckpt", "--out", "out")
    assert "its payload must have `cfg` and `state_dicts`" in foreign


def test_a_truncated_training_state(refused, store, tmp_path):
    half = train_tabletop(store, tmp_path / "half", "half")
    shutil.rmtree(list_checkpoints(half)[-1])
    os.truncate(list_checkpoints(half)[-1] / "training_state.ckpt", 500)
    assert "training_state.ckpt is damaged; remove" in refused("train", "--resume", half)


def test_collecting_into_another_collection_is_refused_and_loses_nothing(refused, store):
    before = ReplayBuffer.open(store).num_episodes
    assert "begins with seed 0" in refused("collect", "tabletop", "--out", store, "--no-pixels", "--seed", "5")
    assert "observation.images.top" in refused("collect", "tabletop", "--out", store)
    assert ReplayBuffer.open(store).num_episodes == before


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--episodes", "1,99"), "episodes must be in [0, 3], got 99"),
        (("--episodes", "a"), "episodes must read like 3,7-9"),
        (("--state-key", "sim_stat"), "Did you mean 'sim_state'?"),
        (("--env", "pushtt"), "Did you mean 'pusht'?"),
    ],
)
def test_a_wrong_argument_of_replay(refused, store, arguments, line):
    assert line in refused("data", "replay", store, "--env", "tabletop", *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", TASK, "--bogus"),
        ("train", TASK, "--num-devices", "0"),
        ("rollout", "x", "--episodes", "0"),
        ("rollout", "x", "--batch", "0"),
        ("rollout", "x", "--workers", "-1"),
        ("rollout", "x", "--seed", "-5"),
        ("collect", "tabletop", "--episodes", "many", "--out", "x"),
        ("frobnicate",),
        ("data", "frobnicate"),
        ("rollout",),
    ],
    ids=" ".join,
)
def test_options_that_do_not_exist_or_numbers_out_of_range_end_with_2(arguments, monkeypatch, capsys):
    code, out, err = run(*arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and out == "" and "Usage: diffpolicy" in err and "Traceback" not in err


def test_debug_shows_the_traceback_wherever_it_stands(monkeypatch, capsys):
    for arguments in (("--debug", "rollout", "nowhere"), ("rollout", "nowhere", "--debug")):
        with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
            run(*arguments, monkeypatch=monkeypatch, capsys=capsys)
    command = [sys.executable, "-m", "diffpolicy.cli", "data", "info", "nowhere", "--debug"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "Traceback (most recent call last)" in done.stderr


def test_our_own_slips_are_called_internal_and_still_one_line(monkeypatch, capsys):
    def slip(*_, **__):
        raise AssertionError("two\nlines")

    monkeypatch.setattr("diffpolicy.evaluate.evaluate", slip)
    code, _, err = run("rollout", "x", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and err == "internal error: AssertionError: two lines; see it whole with --debug\n"


# ---- the disk ----


def test_no_permission_to_write(refused, store, checkpoint, tmp_path, monkeypatch):
    """Simulated, since a test may run as root, whom no permission stops."""
    mkdir = Path.mkdir

    def deny(self, *args, **kwargs):
        if "forbidden" in str(self):
            raise PermissionError(13, "Permission denied", str(self))
        return mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", deny)
    for command in (
        ("train", TASK, "--data", store, *SHORT, "--runs", "forbidden"),
        ("rollout", checkpoint, *QUICK, "--out", "forbidden"),
    ):
        line = refused(*command)
        assert "Permission denied" in line and "forbidden" in line


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: what a full disk does, without one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_while_training_keeps_the_earlier_checkpoint(refused, store, tmp_path):
    half = train_tabletop(store, tmp_path, "half")
    shutil.rmtree(list_checkpoints(half)[-1])
    (before,) = list_checkpoints(half)
    with full_disk(20_000):
        line = refused("train", "--resume", half, "--device", "cpu")
    assert "checkpoints/step_000004 could not be written" in line and "earlier checkpoints are intact" in line
    assert [p.name for p in (half / "checkpoints").iterdir()] == [before.name]
    load_policy(before)
    train.train(train.load_resume_config(half), resume=half, device="cpu", progress=False)  # once there is room
    assert list_checkpoints(half)[-1].name == "step_000004"


def test_a_full_disk_while_rolling_out_still_shows_the_table(checkpoint, tmp_path, monkeypatch, capsys):
    with full_disk(200):
        code, out, err = run(
            "rollout", checkpoint, *QUICK, "--out", tmp_path / "out", monkeypatch=monkeypatch, capsys=capsys
        )
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert "mean score" in out
    assert not (tmp_path / "out" / "results.json").exists()
