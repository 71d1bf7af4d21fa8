"""One rollout of a checkpoint from start to finish, and the replay of a recording."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from diffpolicy.checkpoint import list_checkpoints
from diffpolicy.evaluate import evaluate, replay_recording
from diffpolicy.replay import ReplayBuffer
from tests.test_cli import make_tabletop_store, train_tabletop

FEW = {"episodes": 2, "videos": 0, "pictures": 0, "env_options": ["max_steps=9"], "device": "cpu"}


def console() -> Console:
    return Console(file=io.StringIO(), width=160)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_tabletop_store(tmp_path_factory.mktemp("store"), 3)


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory) -> Path:
    return train_tabletop(store, tmp_path_factory.mktemp("trained"))


def outcomes(result) -> list[tuple]:
    return [(e.seed, e.score, e.steps, e.success) for e in result.episodes]


def test_a_run_folder_means_its_latest_checkpoint(trained, tmp_path):
    latest = list_checkpoints(trained)[-1]
    a, first = evaluate(trained, out=tmp_path / "a", console=console(), **FEW)
    b, second = evaluate(latest, out=tmp_path / "b", console=console(), **FEW)
    assert outcomes(a) == outcomes(b)
    written = [json.loads((out / "results.json").read_text()) for out in (first, second)]
    assert [w["checkpoint"] for w in written] == [str(latest)] * 2 and written[0]["step"] == 4


def test_results_stand_beside_the_checkpoints_and_are_never_overwritten(trained):
    outs = [evaluate(trained, console=console(), **FEW)[1] for _ in range(3)]
    assert {out.parent for out in outs} == {trained / "rollouts"}
    assert [out.name for out in outs] == [
        "tabletop_step_000004_euler-10_seed100000x2" + tail for tail in ("", "-2", "-3")
    ]
    first, second = ([e["score"] for e in json.loads((o / "results.json").read_text())["episodes"]] for o in outs[:2])
    assert first == second


def test_results_tell_how_they_came_about(trained, tmp_path):
    _, out = evaluate(trained, out=tmp_path, steps=3, act=4, sampling_seed=5, seed=7, console=console(), **FEW)
    written = json.loads((out / "results.json").read_text())
    assert {
        "checkpoint", "step", "env", "seed", "sampling_seed", "sampler", "horizons", "device", "torch_threads",
        "diffpolicy", "command", "finished", "single_observation_latency_ms", "summary", "episodes",
    } <= written.keys()  # fmt: skip
    assert written["env"] == {**written["env"], "name": "tabletop", "max_steps": 9}
    assert (written["sampler"]["name"], written["sampler"]["num_inference_steps"]) == ("euler", 3)
    assert (written["horizons"]["act"], written["seed"], written["sampling_seed"]) == (4, 7, 5)
    assert set(written["single_observation_latency_ms"]) == {"p50", "p95", "p99"}


def test_options_of_the_environment_change_only_what_they_name(store, tmp_path):
    from diffpolicy import train as trainer
    from diffpolicy.config import load_config
    from tests.test_cli import SHORT

    settings = [f"data.path={store}", *SHORT, "env.max_steps=30", "env.zone_radius=50"]
    run = trainer.train(
        load_config(["conf/task/tabletop.yaml"], settings), runs=tmp_path, name="r", device="cpu", progress=False
    )
    _, out = evaluate(run, out=tmp_path / "out", console=console(), **FEW)
    env = json.loads((out / "results.json").read_text())["env"]
    assert (env["max_steps"], env["zone_radius"]) == (9, 50)


def test_clip_none_takes_the_clip_away_and_nothing_leaves_it(trained, tmp_path):
    clips = {}
    for i, clip in enumerate((None, "none", 0.5, "2")):
        _, out = evaluate(trained, out=tmp_path / str(i), clip=clip, console=console(), **FEW)
        clips[clip] = json.loads((out / "results.json").read_text())["sampler"]["clip_sample"]
    trained_with = clips.pop(None)
    assert clips == {"none": None, 0.5: 0.5, "2": 2.0}
    assert (
        trained_with
        == json.loads((list_checkpoints(trained)[-1] / "config.json").read_text())["config"]["sampler"]["clip_sample"]
    )


def test_fewer_steps_lead_elsewhere(trained, tmp_path):
    """The last picture of an episode tells where the pusher went."""
    last = {}
    for i, steps in enumerate((1, 10, 10)):
        result, _ = evaluate(
            trained, out=tmp_path / str(i), steps=steps, console=console(), **{**FEW, "episodes": 1, "pictures": 1}
        )
        last[i] = result.pictures[100_000]
    assert np.array_equal(last[1], last[2]) and not np.array_equal(last[0], last[1])


def test_steps_that_a_baseline_does_not_take_are_said_to_be_ignored(store, tmp_path):
    from diffpolicy.config import load_config
    from diffpolicy.train import train
    from tests.test_cli import SHORT

    settings = [f"data.path={store}", *SHORT, "process=regression", "sampler.name=auto"]
    run = train(load_config(["conf/task/tabletop.yaml"], settings), runs=tmp_path, device="cpu", progress=False)
    with pytest.warns(UserWarning, match="--steps 4 is ignored: direct always makes 1"):
        evaluate(run, out=tmp_path / "out", steps=4, console=console(), **FEW)


def test_the_table_shows_the_numbers_of_the_summary(trained, tmp_path):
    said = console()
    result, out = evaluate(trained, out=tmp_path / "out", console=said, **FEW)
    text, summary = said.file.getvalue(), result.summary()
    assert "tabletop: 2 episodes, euler with 10 steps" in text and f"results in {out}" in text
    low, high = summary["success_interval_95"]
    assert f"{low:.1%} .. {high:.1%}  (Wilson)" in text
    assert f"{summary['mean_score']:.3f}" in text


def test_a_policy_without_an_environment_asks_for_one(store, trained, tmp_path):
    import shutil

    copy = Path(shutil.copytree(list_checkpoints(trained)[-1], tmp_path / "robot"))
    described = json.loads((copy / "config.json").read_text())
    described["config"]["env"] = None
    (copy / "config.json").write_text(json.dumps(described))
    few = {k: v for k, v in FEW.items() if k != "env_options"}
    with pytest.raises(ValueError, match=r"names no environment; choose one with --env from .*'tabletop'.*"):
        evaluate(copy, console=console(), **few)
    assert len(evaluate(copy, env="tabletop", console=console(), **FEW)[0].episodes) == 2


def test_a_camera_policy_gets_its_camera_without_being_asked(tmp_path):
    from diffpolicy.config import load_config
    from diffpolicy.quickstart import collect_demonstrations
    from diffpolicy.train import train

    collect_demonstrations("tabletop", out=tmp_path / "t.zarr", episodes=2, options={"pixels": True})
    role = "observation.images.top"
    encoder = ["encoder.name=resnet", "encoder.resize=[40,40]", "encoder.feature_dim=4", "encoder.num_keypoints=2"]
    few = [f"data.path={tmp_path / 't.zarr'}", f"data.keys.{role}={role}", "denoiser.width=16", *encoder]
    config = load_config(
        ["conf/task/tabletop.yaml"], [*few, "train.steps=1", "train.warmup_steps=0", "train.batch_size=2"]
    )
    assert not config.env.options.pixels
    run = train(config, runs=tmp_path, device="cpu", progress=False)
    result, out = evaluate(run, num_workers=0, console=console(), **{**FEW, "episodes": 1})
    assert len(result.episodes) == 1
    assert json.loads((out / "results.json").read_text())["env"]["pixels"]


def test_the_table_of_an_interrupted_rollout_says_so(trained, tmp_path, monkeypatch):
    from diffpolicy import evaluate as module

    cut = module.rollout
    monkeypatch.setattr(module, "rollout", lambda *args, **kw: dataclasses.replace(cut(*args, **kw), planned=5))
    said = console()
    evaluate(trained, out=tmp_path / "out", console=said, **FEW)
    assert "tabletop: 2 of 5 episodes (interrupted: biased)" in said.file.getvalue()


def test_a_recording_of_this_simulator_replays_without_drift(store, tmp_path):
    said = console()
    result = replay_recording(store, env="tabletop", out=tmp_path / "deep" / "r.json", console=said)
    assert result.to_dict(tolerance=1.0) == json.loads((tmp_path / "deep" / "r.json").read_text())
    assert "3/3" in said.file.getvalue() and "success 3 of 3" in " ".join(said.file.getvalue().split())


def test_a_recording_without_states_asks_for_their_key(tmp_path):
    from diffpolicy.spec import FieldSpec

    fields = {"action": FieldSpec(shape=(2,), dtype="float32"), "pose": FieldSpec(shape=(25,), dtype="float32")}
    with ReplayBuffer.create(tmp_path / "r.zarr", fields=fields, fps=10) as buffer:
        buffer.append_episode({"action": np.zeros((3, 2), np.float32), "pose": np.zeros((3, 25), np.float32)})
    with pytest.raises(ValueError, match=r"neither sim_state nor state; name the recorded states with --state-key"):
        replay_recording(tmp_path / "r.zarr", env="tabletop", console=console())
