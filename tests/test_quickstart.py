"""The embedded default in its short form. How well the full one does is README's business."""

import json
import re
import shlex
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from diffpolicy.checkpoint import list_checkpoints
from diffpolicy.quickstart import parse_options
from diffpolicy.replay import ReplayBuffer
from tests.test_cli import run


def quickstart(monkeypatch, capsys) -> str:
    short = ("--demonstrations", 8, "--episodes", 2, "--train-steps", 10)
    code, out, err = run("quickstart", *short, "--out", "qs", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0 and err == "", err
    return out


def test_quickstart_leaves_demonstrations_a_policy_a_table_a_video_and_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = quickstart(monkeypatch, capsys)
    assert ReplayBuffer.open("qs/tabletop.zarr").num_episodes == 8
    (run_folder,) = Path("qs/tabletop").iterdir()
    assert list_checkpoints(run_folder)[-1].name == "step_000010"
    (results,) = (run_folder / "rollouts").iterdir()
    assert json.loads((results / "results.json").read_text())["summary"]["episodes"] == 2
    for file in ("videos/seed_100000.mp4", "contact_sheet.png", "sampled_chunks.png", "results.json"):
        assert (results / file).exists() and str(results / file) in out
    fan = iio.imread(results / "sampled_chunks.png")
    assert fan.shape[1] > 2.5 * fan.shape[0], "three scenes side by side"
    scene = fan[:, : fan.shape[0]].reshape(-1, 3).astype(int)
    assert len(np.unique(scene // 16, axis=0)) > 40, "chunks are drawn in many colours"
    assert "success" in out and "minutes in all" in out

    again = quickstart(monkeypatch, capsys)  # goes on with the demonstrations, trains anew, overwrites nothing
    assert "8 episodes" in again and len(list(Path("qs/tabletop").iterdir())) == 2


def test_commands_that_quickstart_suggests_are_right(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = quickstart(monkeypatch, capsys)
    suggested = [shlex.split(line) for line in re.findall(r"^  (diffpolicy .*)$", out, flags=re.M)]
    assert {command[1] for command in suggested} == {"data", "rollout", "train"} and len(suggested) >= 4
    short = {
        "train": ["train.steps=2", "train.warmup_steps=1", "--device", "cpu", "--runs", "more", "--name"],
        "rollout": ["--episodes", "1", "--env-option", "max_steps=5", "--videos", "0"],
    }
    for i, command in enumerate(suggested):
        extra = short.get(command[1], [])
        extra = [*extra, str(i)] if command[1] == "train" else extra
        code, _, err = run(*command[1:], *extra, monkeypatch=monkeypatch, capsys=capsys)
        assert code == 0, (command, err)


def test_options_are_read_as_yaml():
    assert parse_options(["a=1", "b=[1, 2.5]", "c=true", "d=null", "e=word"]) == {
        "a": 1,
        "b": [1, 2.5],
        "c": True,
        "d": None,
        "e": "word",
    }
    with pytest.raises(ValueError, match="--env-option must read key=value, got 'fast'"):
        parse_options(["fast"])
