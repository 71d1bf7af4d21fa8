"""README's commands and code, run in their short form in an empty folder, in README's order."""

import re
import shlex
from pathlib import Path

import numpy as np
import open_clip
import pytest
from safetensors.torch import save_file

from diffpolicy import cli
from diffpolicy.encoders.clip_weights import known_models
from diffpolicy.replay import ReplayBuffer
from diffpolicy.spec import FieldSpec

README = (Path(__file__).parent.parent / "README.md").read_text()
SHORT = {
    "train": ["train.steps=4", "train.warmup_steps=1", "train.checkpoint_every=2", "train.batch_size=8"],
    "rollout": ["--episodes", "2", "--videos", "1", "--envs", "2"],
    "collect": ["--episodes", "2"],
    "ablate": ["--dry-run"],  # test_ablate.py runs sweeps
    "oracle": ["--steps", "2", "--samples", "64"],
    "quickstart": ["--demonstrations", "4", "--episodes", "2", "--train-steps", "4"],
}
"""What is appended to a command to make it short; a later option wins."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def commands(text: str) -> list[list[str]]:
    lines = [line.split("#")[0] for block in text.split("&&") for line in block.splitlines()]
    lines = [line.strip().removeprefix("OMP_NUM_THREADS=1 ") for line in lines]
    return [shlex.split(line) for line in lines if line.startswith("diffpolicy ")]


def run(arguments: list[str], monkeypatch, capsys) -> str:
    """Runs a command as the console script would; returns what it printed."""
    short = [*arguments, *SHORT.get(arguments[1], [])]
    if "--resume" in arguments:
        short = arguments
    monkeypatch.setattr("sys.argv", short)
    try:
        cli.main()
    except SystemExit as end:
        printed = capsys.readouterr()
        assert end.code in (0, None), f"{' '.join(arguments)}\n{printed.out[-2000:]}\n{printed.err}"
        return printed.out
    return capsys.readouterr().out


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder with X.zarr, a Push-T set recorded from random actions."""
    from diffpolicy.envs import make_env

    monkeypatch.chdir(tmp_path)
    env = make_env("pusht")
    fields = {
        "state": FieldSpec(shape=(5,), dtype="float32"),
        "keypoint": FieldSpec(shape=(9, 2), dtype="float32"),
        "action": FieldSpec(shape=(2,), dtype="float32"),
    }
    with ReplayBuffer.create(tmp_path / "X.zarr", fields=fields, fps=10) as buffer:
        for seed in range(8):
            obs, _ = env.reset(seed=seed)
            actions = np.random.default_rng(seed).uniform(100, 400, (20, 2)).astype(np.float32)
            rows = {"state": [], "keypoint": [], "action": actions}
            for action in actions:
                rows["state"].append(env.get_state())
                rows["keypoint"].append(obs["observation.environment_state"].reshape(9, 2))
                obs = env.step(action)[0]
            buffer.append_episode({k: np.asarray(v, np.float32) for k, v in rows.items()})
    return tmp_path


def test_quick_start_and_test_commands_are_those_that_ci_runs():
    first, second = [b for b in blocks("bash") if "pip install" in b]
    assert "pip install . && diffpolicy quickstart" in first
    ci = (Path(__file__).parent.parent / ".ci" / "run").read_text()
    assert "pip install" in ci and "'.[test]'" in second and second.strip().endswith("pytest -n 2")
    assert ci.strip().endswith("pytest -n 2")


def test_every_command_and_piece_of_code_runs(folder, monkeypatch, capsys):
    code = blocks("python")
    Path("drawer.yaml").write_text(blocks("yaml")[0])
    rng = np.random.default_rng(0)
    steps = {
        "joints": rng.normal(size=(40, 7)).astype(np.float32),
        "targets": rng.normal(size=(40, 7)).astype(np.float32),
    }
    exec(code[0], dict(steps))  # records mine.zarr
    Path("data").mkdir()
    for name in ("pusht_cchi_v7_replay.zarr", "pusht_keypoint_x356_y356.zarr"):
        Path("data", name).symlink_to(Path("X.zarr").resolve())
    known_models()  # open_clip knows ours now
    weights = open_clip.create_model("diffpolicy-tiny").state_dict()
    save_file({key: value.contiguous() for key, value in weights.items()}, "clip.safetensors")
    ran = []
    for command in [c for block in blocks("bash") for c in commands(block)]:
        if "conf/task/pusht_state.yaml" in command or "runs/pusht_state/unet" in command:
            continue  # made for a GPU; test_config.py builds it
        output = run(command, monkeypatch, capsys)
        ran.append(" ".join(command[1:3]))
        if command[1] == "train" and "--name" not in command:
            (run_folder,) = Path("runs/drawer").iterdir()
            run_folder.rename("runs/drawer/NAME")
        assert output.strip(), command
    assert {"data info", "data validate", "data replay", "train conf/task/pusht_keypoint.yaml"} <= set(ran)
    inline = [c for text in re.findall(r"`(diffpolicy [^`]*)`", README) for c in commands(" ".join(text.split()))]
    for command in inline:
        if command[1] in ("data", "train", "rollout", "collect", "schedules", "oracle") and "OLD.zarr" not in command:
            command = [a.replace("RUN", "runs/pusht_keypoint/first") if a == "RUN" else a for a in command]
            if "--sampler" in command and {"ddim", "diffusers"} & set(command):
                continue  # needs a run trained by diffusion; test_cli.py has one
            if "mine" in command:
                continue  # a name to fill in
            if command[1] == "train" and "conf/task/tabletop.yaml" in command:
                continue  # needs the tabletop store of the quick start
            run(command, monkeypatch, capsys)
    robot = code[1].replace("while True", "for _ in range(3)")
    exec(robot, {"read_joints": lambda: np.zeros(7, np.float32)})


def test_sweep_of_the_readme_is_one(tmp_path):
    from diffpolicy.sweep import cells_of, load_sweep

    (tmp_path / "mine.yaml").write_text(blocks("yaml")[1])
    assert [cell.label for cell in cells_of(load_sweep(tmp_path / "mine.yaml"))] == [
        f"{schedule}, {sampler}, 4 calls" for schedule in ("cosine", "linear") for sampler in ("DDIM", "UniPC")
    ]


def test_shipped_sweeps_are_those_that_readme_lists():
    listed = re.findall(
        r"^\| `(\w+)` \|", README.split("| shipped in conf/ablation/ | asks |")[1].split("\n\n")[0], re.M
    )
    assert sorted(listed) == sorted(p.stem for p in (Path(__file__).parent.parent / "conf" / "ablation").glob("*.yaml"))


def test_quick_start_runs_from_an_empty_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    output = run(["diffpolicy", "quickstart"], monkeypatch, capsys)
    assert "sampled_chunks.png" in output and "Next:" in output
    (results,) = Path("runs/quickstart/tabletop").glob("*/rollouts/*/results.json")
    assert (results.parent / "sampled_chunks.png").exists() and (results.parent / "contact_sheet.png").exists()
