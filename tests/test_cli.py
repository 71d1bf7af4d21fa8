"""The command line: every command in a short form, its exit code, what it says and what it leaves behind."""

import csv
import json
import subprocess
import sys
import warnings
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch

from diffpolicy import __version__, cli
from diffpolicy.checkpoint import list_checkpoints, load_policy, read_description
from diffpolicy.replay import ReplayBuffer

SHORT = (
    "train.steps=4",
    "train.warmup_steps=1",
    "train.checkpoint_every=2",
    "train.val_every=2",
    "train.batch_size=16",
    "denoiser.width=16",
    "denoiser.depth=1",
)


def run(*arguments: object, monkeypatch, capsys) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of `diffpolicy ARGUMENTS`, as the console script would end."""
    monkeypatch.setattr(sys, "argv", ["diffpolicy", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main() sets it: give it back afterwards
    capsys.readouterr()
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def diffpolicy(monkeypatch, capsys):
    """diffpolicy("train", ...) -> (exit code, standard output, standard error)."""
    return lambda *arguments: run(*arguments, monkeypatch=monkeypatch, capsys=capsys)


def make_tabletop_store(folder: Path, episodes: int = 6) -> Path:
    from diffpolicy.quickstart import collect_demonstrations

    collect_demonstrations("tabletop", out=folder / "t.zarr", episodes=episodes, options={"pixels": False})
    return folder / "t.zarr"


def train_tabletop(store: Path, runs: Path, name: str = "first") -> Path:
    from diffpolicy import train as trainer
    from diffpolicy.config import load_config

    config = load_config(["conf/task/tabletop.yaml"], [f"data.path={store}", *SHORT])
    return trainer.train(config, runs=runs, name=name, device="cpu", progress=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Six scripted tabletop demonstrations."""
    return make_tabletop_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory) -> Path:
    """A run folder of four steps on them."""
    return train_tabletop(store, tmp_path_factory.mktemp("trained"))


def test_help_names_every_command_and_importing_it_imports_nothing_heavy():
    code = (
        "import sys; from diffpolicy.cli import main; sys.argv = ['diffpolicy', '--help']\n"
        "try: main()\nexcept SystemExit as end: code = end.code\n"
        "heavy = {'torch', 'numpy', 'zarr', 'lightning', 'diffusers', 'open_clip', 'omegaconf', 'gymnasium', 'matplotlib'}\n"
        "sys.exit(code or ' '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("train", "rollout", "collect", "data", "quickstart", "import-checkpoint"):
        assert name in done.stdout


@pytest.mark.parametrize(
    "command",
    [("train",), ("rollout",), ("collect",), ("quickstart",), ("import-checkpoint",), ("data",)]
    + [("data", sub) for sub in ("info", "validate", "drop", "convert", "replay")],
    ids=" ".join,
)
def test_every_command_explains_itself(diffpolicy, command):
    code, out, err = diffpolicy(*command, "-h")
    assert code == 0 and err == "" and "Usage: diffpolicy " + " ".join(command) in out


def test_version(diffpolicy):
    assert diffpolicy("--version") == (0, f"{__version__}\n", "")


def test_collect_goes_on_where_it_was_and_says_what_comes_next(diffpolicy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = diffpolicy("collect", "tabletop", "--episodes", 2, "--out", "t.zarr", "--no-pixels")
    assert code == 0 and err == ""
    assert "t.zarr: 2 episodes" in out and "(2 episodes new)" in out and "diffpolicy data info t.zarr" in out
    first = ReplayBuffer.open("t.zarr").episode(0)
    code, out, _ = diffpolicy("collect", "tabletop", "--episodes", 3, "--out", "t.zarr", "--no-pixels")
    assert code == 0 and "t.zarr: 3 episodes" in out and "(1 episodes new)" in out
    again = ReplayBuffer.open("t.zarr").episode(0)
    assert all((first[k] == again[k]).all() for k in first)


def test_collect_takes_options_of_the_environment(diffpolicy, tmp_path):
    out = tmp_path / "t.zarr"
    code, _, _ = diffpolicy("collect", "tabletop", "--episodes", 1, "--out", out, "--env-option", "image_size=32")
    assert code == 0 and ReplayBuffer.open(out).fields["observation.images.top"].shape == (32, 32, 3)


def test_train_then_resume_then_rollout(diffpolicy, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = diffpolicy(
        "train", "conf/task/tabletop.yaml", "--data", store, "--name", "one", "--device", "cpu", "--stop-at", 2, *SHORT
    )
    assert code == 0 and err == "", err
    assert "next: diffpolicy rollout runs/tabletop/one --env tabletop" in out and "step 2/2" in out
    run_folder = Path("runs/tabletop/one")
    code, out, err = diffpolicy("train", "--resume", run_folder, "--device", "cpu")
    assert code == 0 and err == "" and "step 4/4" in out
    assert [p.name for p in list_checkpoints(run_folder)] == ["step_000002", "step_000004"]
    with open(run_folder / "metrics.csv", newline="") as file:
        rows = [(row["step"], bool(row["train/loss"]), bool(row["val/loss"])) for row in csv.DictReader(file)]
    assert rows == [("2", True, False), ("2", False, True), ("4", True, False), ("4", False, True)]

    code, out, err = diffpolicy("rollout", run_folder, "--episodes", 2, "--videos", 1, "--env-option", "max_steps=9")
    assert code == 0 and err == ""
    for word in ("success", "Wilson", "mean score", "bootstrap", "p95", "p99", "steps/s", "results in"):
        assert word in out
    (results,) = (run_folder / "rollouts").iterdir()
    written = json.loads((results / "results.json").read_text())
    assert written["env"]["max_steps"] == 9 and written["step"] == 4
    assert [e["seed"] for e in written["episodes"]] == [100_000, 100_001]
    assert written["command"][1:3] == ["rollout", str(run_folder)]
    assert len(iio.imread(results / "videos" / "seed_100000.mp4")) == 10
    assert iio.imread(results / "contact_sheet.png").ndim == 3


def test_progress_can_be_switched_off(diffpolicy, store, tmp_path):
    where = ("--data", store, "--runs", tmp_path, "--name", "one", "--device", "cpu")
    code, out, err = diffpolicy("train", "conf/task/tabletop.yaml", *where, "--no-progress", *SHORT)
    assert code == 0 and err == "" and "step" not in out.replace("steps", "")


def test_yaml_files_stack_and_settings_win(diffpolicy, store, tmp_path):
    small = ("denoiser.width=16", "denoiser.depth=1", "denoiser.num_heads=2", "train.steps=2", "train.warmup_steps=0")
    code, out, err = diffpolicy(
        "train",
        "conf/task/tabletop.yaml",
        "conf/denoiser/transformer_small.yaml",
        "conf/process/ddim.yaml",
        *("--data", store, "--runs", tmp_path, "--name", "one", "--device", "cpu", "seed=7"),
        *small,
    )
    assert code == 0, err
    assert "transformer with diffusion" in out
    config = read_description(tmp_path / "tabletop" / "one")["config"]
    assert (config["seed"], config["denoiser"]["width"], config["sampler"]["name"]) == (7, 16, "ddim")


def test_rollout_options_are_used_and_recorded(diffpolicy, trained, tmp_path):
    options = ("--steps", 3, "--act", 2, "--seed", 5, "--sampling-seed", 9, "--batch", 2, "--envs", 1, "--clip", 1.0)
    limits = ("--episodes", 1, "--videos", 0, "--pictures", 0, "--env-option", "max_steps=5")
    code, out, err = diffpolicy("rollout", trained, "--out", tmp_path / "out", *options, *limits)
    assert code == 0, err
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["sampler"]["num_inference_steps"] == 3 and written["sampler"]["clip_sample"] == 1.0
    assert written["horizons"]["act"] == 2 and written["summary"]["call_batch_size"] == 2
    assert (written["seed"], written["sampling_seed"], written["episodes"][0]["seed"]) == (5, 9, 5)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["results.json"]
    assert "videos/" not in out and "contact_sheet" not in out


def test_data_commands(diffpolicy, store, tmp_path):
    code, out, err = diffpolicy("data", "info", store)
    assert code == 0 and err == "" and "observation.environment_state" in out
    code, out, err = diffpolicy("data", "validate", store)
    assert code == 0 and err == "" and "no errors" in out
    code, out, err = diffpolicy(
        "data", "replay", store, "--env", "tabletop", "--episodes", "0,2-3", "--out", tmp_path / "r.json"
    )
    assert code == 0 and err == "" and json.loads((tmp_path / "r.json").read_text())
    code, out, err = diffpolicy("data", "convert", store, tmp_path / "c.zarr")
    assert code == 0 and err == "" and "6 episodes" in out
    code, out, err = diffpolicy("data", "drop", tmp_path / "c.zarr", "--episodes", "0,4-5")
    assert code == 0 and err == "" and "dropped 3 episodes" in out and "has 3 episodes" in out
    assert ReplayBuffer.open(tmp_path / "c.zarr").num_episodes == 3


def test_validate_ends_with_1_where_something_is_wrong(diffpolicy, store, tmp_path):
    import zarr

    diffpolicy("data", "convert", store, tmp_path / "c.zarr")
    array = zarr.open_group(tmp_path / "c.zarr", mode="r+")["data/action"]
    values = array[:]
    values[3, 1] = float("nan")
    array[:] = values
    code, out, _ = diffpolicy("data", "validate", tmp_path / "c.zarr")
    assert code == 1 and "action" in out and "1 error" in out


def test_a_warning_is_one_line_on_standard_error(diffpolicy, store, tmp_path):
    where = ("--data", store, "--runs", tmp_path, "--name", "one", "--device", "cpu")
    schedule = ("conf/process/ddim.yaml", "process.schedule=linear")
    code, _, err = diffpolicy("train", "conf/task/tabletop.yaml", *schedule, *where, *SHORT)
    assert code == 0
    assert err.startswith("warning: process.schedule=linear with 100 steps leaves 60% of the signal")
    assert err.count("\n") == 1


def test_ctrl_c_before_anything_is_worth_saving_shows_no_traceback(diffpolicy, store, monkeypatch):
    monkeypatch.setattr("diffpolicy.config.load_config", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    code, out, err = diffpolicy("train", "conf/task/tabletop.yaml", "--data", store)
    assert code == 130 and out == "" and err in ("", "interrupted\n")


def test_a_policy_loads_without_the_training_state(diffpolicy, trained, tmp_path):
    import shutil

    shutil.copytree(list_checkpoints(trained)[-1], tmp_path / "policy")
    (tmp_path / "policy" / "training_state.ckpt").unlink()
    assert isinstance(load_policy(tmp_path / "policy"), torch.nn.Module)
    limits = ("--episodes", 1, "--videos", 0, "--pictures", 0, "--env-option", "max_steps=5")
    code, _, err = diffpolicy("rollout", tmp_path / "policy", *limits)
    assert code == 0, err
    assert (tmp_path / "policy" / "rollouts").is_dir()
