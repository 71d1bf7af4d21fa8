"""Sweeps from start to end: what is trained, what is shared, and what remains after a failure, a kill or Ctrl-C."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from diffpolicy import train as trainer
from diffpolicy.ablate import _Clock, _Queue, ablate, dry_run, report
from diffpolicy.ablation_jobs import run_train
from diffpolicy.ablation_plan import DataMissingError, collect_results, plan_sweep
from diffpolicy.checkpoint import find_checkpoint, list_checkpoints
from diffpolicy.quickstart import collect_demonstrations
from diffpolicy.sweep import SweepConfig, cells_of, sweep_from_dict
from diffpolicy.workers import Here, Outcome

TINY = {
    "train.steps": 8,
    "train.warmup_steps": 2,
    "train.batch_size": 16,
    "train.val_every": 4,
    "train.val_windows": 8,
    "train.checkpoint_every": 4,
    "train.log_every": 4,
    "denoiser.width": 16,
    "denoiser.depth": 1,
    "env.max_steps": 12,
}
AXES = {
    "process.prediction_type": ["epsilon", "sample"],
    "steps": {2: {"sampler.num_inference_steps": 2}, 3: {"sampler.num_inference_steps": 3}},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Six scripted tabletop demonstrations."""
    path = tmp_path_factory.mktemp("store") / "t.zarr"
    collect_demonstrations("tabletop", out=path, episodes=6, options={"pixels": False})
    return path


def sweep(store: Path | str, **changed) -> SweepConfig:
    plain = {
        "name": "tiny",
        "base": ["conf/task/tabletop.yaml", "conf/process/ddim.yaml"],
        "axes": AXES,
        "episodes": 3,
        "set": TINY | {"data.path": str(store)} | changed.pop("set", {}),
    }
    return sweep_from_dict(plain | changed)


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory):
    """A sweep of two networks and two step counts, with its results folder; not to be written to."""
    out = tmp_path_factory.mktemp("finished") / "tiny"
    result, failures = ablate(sweep(store), out)
    assert failures == {}
    return result, out


def written(out: Path) -> dict[str, int]:
    """Cell files and checkpoints of a results folder, with the time they were written."""
    files = [*out.glob("cells/*.json"), *out.glob("train/*/checkpoints/*/model.safetensors")]
    return {str(file.relative_to(out)): file.stat().st_mtime_ns for file in files}


def scores(result) -> dict[str, list]:
    return {cell.label: cell.scores.tolist() for cell in result.cells}


class Fails(Here):
    """A worker that dies at the job of this label."""

    def __init__(self, run, label: str):
        super().__init__(run)
        self.label = label

    def submit(self, job: dict) -> None:
        if job["label"] == self.label:
            self._done.append(Outcome(job, None, "its process was killed by SIGKILL"))
        else:
            super().submit(job)


class Interrupted(Here):
    """Ctrl-C when the n-th job starts."""

    def __init__(self, run, after: int):
        super().__init__(run)
        self.left = after

    def submit(self, job: dict) -> None:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        super().submit(job)


def test_each_network_is_trained_once_and_each_cell_is_played(finished):
    result, out = finished
    assert len(list((out / "train").iterdir())) == 2
    assert [cell.label for cell in result.cells] == [
        "epsilon, steps 2",
        "epsilon, steps 3",
        "sample, steps 2",
        "sample, steps 3",
    ]
    assert [cell.nfe for cell in result.cells] == [2, 3, 2, 3]
    assert result.cells[0].train[0]["run"] == result.cells[1].train[0]["run"] != result.cells[2].train[0]["run"]
    assert result.cells[0].axes == {"process.prediction_type": "epsilon", "steps": 2}
    assert result.cells[0].train[0]["steps"] == 8 and result.cells[0].train[0]["val_action_mse"] > 0


def test_every_cell_plays_the_same_start_states(finished):
    result, out = finished
    assert {cell.env_seeds for cell in result.cells} == {(100_000, 100_001, 100_002)}
    assert {cell.scores.shape for cell in result.cells} == {(1, 3)}
    files = [json.loads(file.read_text()) for file in out.glob("cells/*.json")]
    assert {tuple(f["env_seeds"]) for f in files} == {(100_000, 100_001, 100_002)}
    assert {f["sampling_seed"] for f in files} == {0}


def test_every_cell_records_how_diverse_its_chunks_are_and_that_changes_nothing_else(finished):
    result, out = finished
    for cell in result.cells:
        assert cell.diversity.shape == (1, 3) and (cell.diversity > 0).all()
        assert cell.ignores is None and cell.guidance == {"task": 1.0, "goal": 1.0}
    assert [cell.nfe for cell in result.cells] == [2, 3, 2, 3]  # its calls are not counted
    files = [json.loads(file.read_text()) for file in out.glob("cells/*.json")]
    assert {f["diversity"]["num_chunks"] for f in files} == {16}
    assert "16 chunks for each of the first 3 start states" in report(sweep("gone.zarr"), out).read_text()


def test_cells_of_an_earlier_version_are_readable_without_their_diversity(finished, store, tmp_path):
    result, out = finished
    shutil.copytree(out, tmp_path / "out")
    old, broken = sorted((tmp_path / "out" / "cells").iterdir())[:2]
    plain = json.loads(old.read_text())
    del plain["diversity"], plain["guidance"]
    old.write_text(json.dumps(plain))
    plain = json.loads(broken.read_text())
    plain["diversity"]["values"][0] = None  # a chunk that was not finite
    broken.write_text(json.dumps(plain))
    before = written(tmp_path / "out")
    again, failures = ablate(sweep(store), tmp_path / "out")
    assert failures == {} and written(tmp_path / "out") == before and scores(again) == scores(result)
    assert sum(cell.diversity is None for cell in again.cells) == 2
    assert "A dash: not measured" in report(sweep(store), tmp_path / "out").read_text()


def test_what_is_finished_is_not_done_again(finished, store):
    result, out = finished
    before = written(out)
    again, failures = ablate(sweep(store, question="asked anew"), out)
    assert written(out) == before and failures == {} and scores(again) == scores(result)


def test_results_do_not_depend_on_the_place_of_the_data_or_on_other_axes(finished, store, tmp_path):
    shutil.copytree(store, tmp_path / "moved.zarr")
    one = sweep(tmp_path / "moved.zarr", axes={"steps": {3: {"sampler.num_inference_steps": 3}}})
    result, _ = ablate(dataclasses.replace(one, set=one.set | {"process.prediction_type": "sample"}), tmp_path / "out")
    assert result.cells[0].scores.tolist() == scores(finished[0])["sample, steps 3"]
    assert {f.name for f in (tmp_path / "out" / "cells").iterdir()} < {
        f.name for f in (finished[1] / "cells").iterdir()
    }


def test_settings_that_mean_the_same_are_done_once_and_told(store, tmp_path):
    axes = {"sampler.name": ["auto", "ddim"]}
    result, _ = ablate(sweep(store, axes=axes, baseline={"sampler.name": "ddim"}), tmp_path / "out")
    assert [cell.label for cell in result.cells] == ["auto"] and result.duplicates == {"ddim": "auto"}
    assert result.baseline == 0 and len(list((tmp_path / "out" / "cells").iterdir())) == 1


def test_a_damaged_cell_is_done_again_and_said_aloud(finished, store, tmp_path):
    result, out = finished
    shutil.copytree(out, tmp_path / "out")
    victim = sorted((tmp_path / "out" / "cells").iterdir())[0]
    victim.write_text(victim.read_text()[:100])
    with pytest.warns(UserWarning, match=f"{victim.name} is damaged and will be done again"):
        again, _ = ablate(sweep(store), tmp_path / "out")
    assert scores(again) == scores(result)


def test_all_cells_that_cannot_run_are_told_before_the_first_one_starts(store, tmp_path):
    axes = {
        "process.schedule": ["cosine", "cosin"],
        "sampler.num_inference_steps": [2, 500],
        "horizons.act": [8, 40],
    }
    with pytest.raises(ValueError) as raised:
        ablate(sweep(store, axes=axes), tmp_path / "out")
    said = str(raised.value)
    assert "7 of 8 cells cannot run" in said
    assert "[process.schedule=cosin]" in said and "Did you mean 'cosine'?" in said
    assert "[sampler.num_inference_steps=500]" in said and "got 500" in said
    assert "[horizons.act=40]" in said and "got 40" in said
    assert not (tmp_path / "out" / "train").exists()


def test_an_environment_that_does_not_fit_is_told_before_anything_starts(store, tmp_path):
    axes = {"where": {"other table": {"env.num_blocks": 3}, "same": {"env.num_blocks": 2}}}
    with pytest.raises(ValueError, match=r"1 of 2 cells.*\[where=other table\] observation.environment_state"):
        ablate(sweep(store, axes=axes), tmp_path / "out")


def test_missing_demonstrations_are_one_clear_line(tmp_path):
    with pytest.raises(DataMissingError, match=r"demonstrations nowhere.zarr are not there.*--data PATH.zarr"):
        ablate(sweep("nowhere.zarr"), tmp_path / "out")


def test_demonstrations_are_collected_once_where_the_sweep_says_so(tmp_path):
    asked = sweep("", axes={"train.lr": [1e-3]}, collect={"env": "tabletop", "episodes": 6})
    ablate(asked, tmp_path / "out")
    stamp = (tmp_path / "out" / "demonstrations.zarr" / "zarr.json").stat().st_mtime_ns
    _, failures = ablate(asked, tmp_path / "out")
    assert failures == {} and (tmp_path / "out" / "demonstrations.zarr" / "zarr.json").stat().st_mtime_ns == stamp


def test_the_folder_of_another_sweep_is_refused_unless_extended(finished, store, tmp_path):
    shutil.copytree(finished[1], tmp_path / "out")
    more = sweep(store, axes=AXES | {"steps": AXES["steps"] | {1: {"sampler.num_inference_steps": 1}}})
    with pytest.raises(ValueError, match=r"holds another sweep: axes differ; choose another --out, or --extend"):
        ablate(more, tmp_path / "out")
    before = written(tmp_path / "out")
    result, _ = ablate(more, tmp_path / "out", extend=True)
    after = written(tmp_path / "out")
    assert len(result.cells) == 6 and before.items() < after.items() and len(after) - len(before) == 2


def test_other_demonstrations_are_another_sweep(finished, tmp_path):
    shutil.copytree(finished[1], tmp_path / "out")
    collect_demonstrations("tabletop", out=tmp_path / "t.zarr", episodes=7, options={"pixels": False})
    with pytest.raises(ValueError, match=r"holds results of other demonstrations.*--extend"):
        ablate(sweep(tmp_path / "t.zarr"), tmp_path / "out")


def test_a_report_needs_neither_the_demonstrations_nor_hashes_of_this_version(finished, tmp_path, monkeypatch):
    shutil.copytree(finished[1], tmp_path / "out")
    monkeypatch.setattr("diffpolicy.ablation_plan.content_hash", lambda plain: "another")
    page = report(sweep("gone.zarr", question="Why?"), tmp_path / "out").read_text()
    assert "Why?" in page and all(cell.label in page for cell in finished[0].cells)


def test_a_report_tells_the_command_that_ran_the_sweep(finished, store, tmp_path, monkeypatch):
    shutil.copytree(finished[1], tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["diffpolicy", "ablate", "tiny.yaml", "--jobs", "7"])
    ablate(sweep(store), tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["diffpolicy", "ablate", "tiny.yaml", "--report-only"])
    page = report(sweep(store), tmp_path / "out").read_text()
    assert "diffpolicy ablate tiny.yaml --jobs 7" in page and "--report-only" not in page


def test_a_report_is_not_written_into_the_folder_of_another_sweep(finished, store, tmp_path):
    shutil.copytree(finished[1], tmp_path / "out")
    other = sweep(store, name="other")
    with pytest.raises(ValueError, match="holds another sweep: name differ"):
        report(other, tmp_path / "out")
    assert "other" in report(other, tmp_path / "out", extend=True).read_text()
    with pytest.raises(FileNotFoundError, match="nowhere holds no finished cell of sweep other"):
        report(other, tmp_path / "nowhere")


def test_results_folder_that_cannot_be_made_is_named(store, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"--out must be a folder that can be made or is there, got .*file"):
            ablate(sweep(store), out)


def test_a_folder_that_holds_something_else_is_refused(store, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="exists and holds no sweep; choose another --out"):
        ablate(sweep(store), tmp_path)


def test_a_failed_rollout_leaves_the_others_and_is_tried_again(finished, store, tmp_path):
    out, label = tmp_path / "out", "epsilon, steps 3, seed 0"
    result, failures = ablate(sweep(store), out, make_workers=lambda run: Fails(run, label))
    assert failures == {label: "its process was killed by SIGKILL"} == result.failed
    assert [cell.label for cell in result.cells] == ["epsilon, steps 2", "sample, steps 2", "sample, steps 3"]
    result, failures = ablate(sweep(store), out)
    assert failures == {} == result.failed and scores(result) == scores(finished[0])


def test_a_failed_training_takes_its_own_rollouts_along_and_no_others(store, tmp_path):
    axes = {"rate": {"good": {"train.lr": 1e-3}, "wild": {"train.lr": 1e30, "train.grad_clip": None}}}
    result, failures = ablate(sweep(store, axes=axes, seeds=[0, 1]), tmp_path / "out")
    assert sorted(failures) == ["wild, seed 0", "wild, seed 1"]
    assert "its training failed: " in failures["wild, seed 0"] and "loss is nan" in failures["wild, seed 0"]
    assert [cell.label for cell in result.cells] == ["good"] and result.cells[0].scores.shape == (2, 3)
    assert "FloatingPointError" in (tmp_path / "out" / "failures.log").read_text()


def test_after_ctrl_c_finished_cells_are_kept(finished, store, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        ablate(sweep(store), tmp_path / "out", make_workers=lambda run: Interrupted(run, after=2))
    before = written(tmp_path / "out")
    partial = collect_results(plan_sweep(sweep(store), tmp_path / "out"))
    assert [cell.label for cell in partial.cells] == ["epsilon, steps 2"] and len(partial.failed) == 3
    assert set(partial.failed.values()) == {"not run yet"}
    result, _ = ablate(sweep(store), tmp_path / "out")
    assert scores(result) == scores(finished[0]) and before.items() < written(tmp_path / "out").items()


def training_job(store: Path, out: Path) -> dict:
    plan = plan_sweep(sweep(store), out)
    run = plan.runs[0]
    return {"config": run.training.to_dict(), "run": str(plan.run_folder(run)), "device": "cpu"}


def test_an_interrupted_training_goes_on_exactly(finished, store, tmp_path):
    job = training_job(store, tmp_path)
    run = Path(job["run"])
    config = plan_sweep(sweep(store), tmp_path).runs[0].training
    config = dataclasses.replace(config, task="train")
    trainer.train(config, runs=tmp_path, name=run.name, stop_at=4, device="cpu", progress=False)
    assert [c.name for c in list_checkpoints(run)] == ["step_000004"]
    run_train(job)
    mine, theirs = (
        load_file(find_checkpoint(folder) / "model.safetensors") for folder in (run, finished[1] / "train" / run.name)
    )
    assert mine.keys() == theirs.keys() and all((mine[name] == theirs[name]).all() for name in mine)


def test_a_training_that_was_killed_before_its_first_checkpoint_begins_anew(store, tmp_path):
    job = training_job(store, tmp_path)
    (Path(job["run"]) / "checkpoints").mkdir(parents=True)
    run_train(job)
    assert find_checkpoint(job["run"]).name == "step_000008"


def test_two_commands_never_work_in_one_folder(store, tmp_path):
    class Meddler(Here):
        def submit(self, job):
            with pytest.raises(ValueError, match="another `diffpolicy ablate` is at work in"):
                ablate(sweep(store), tmp_path / "out")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ablate(sweep(store), tmp_path / "out", make_workers=Meddler)


def test_dry_run_lists_cells_and_writes_nothing(finished, store, tmp_path):
    said = dry_run(sweep(store), tmp_path / "out")
    assert "4 cells, 1 training seeds, 3 episodes each: 2 networks to train and 4 rollouts to do" in said
    assert "epsilon, steps 2: 0 of 1 networks trained, 0 of 1 rollouts done" in said
    assert not (tmp_path / "out").exists()
    assert "0 networks to train and 0 rollouts to do, 4 are done" in dry_run(sweep(store), finished[1])
    missing = dry_run(sweep("nowhere.zarr"), tmp_path / "out")
    assert all(cell.label in missing for cell in cells_of(sweep(store))) and "nowhere.zarr" in missing


def test_time_left_follows_from_finished_jobs_of_each_kind(store, tmp_path):
    plan = plan_sweep(sweep(store), tmp_path)
    queue = _Queue(plan, "cpu")
    clock = _Clock(queue, Here(None))
    training = queue.next()
    assert clock.shown([training]) == "1 train; time left unknown yet"
    clock.ended(Outcome(training, {}, seconds=80.0))  # 8 steps
    queue.done(Outcome(training, {}))
    assert clock.seconds_left([]) is None  # no rollout has ended yet
    rollout = queue.next()
    clock.ended(Outcome(rollout, {}, seconds=5.0))
    assert clock.seconds_left([]) == 80 + 3 * 5  # one more training of as many steps, three more rollouts
    assert clock.shown([]) == "idle; about 2 min left"


KILLED = """
import sys
from diffpolicy.ablate import ablate
from diffpolicy.workers import LocalWorkers
from tests.test_ablate import sweep
if __name__ == "__main__":
    ablate(sweep(sys.argv[1]), sys.argv[2], make_workers=lambda run: LocalWorkers(2, run))
"""


def test_after_kill_9_the_rest_is_done_and_two_workers_give_the_same_bits_as_none(finished, store, tmp_path, project):
    """A command with two workers is killed when each has given a result; what is left is done here."""
    out, script = tmp_path / "out", tmp_path / "killed.py"
    script.write_text(KILLED)
    process = subprocess.Popen(
        [sys.executable, str(script), str(store), str(out)],
        env=os.environ | {"PYTHONPATH": str(project)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    while len(list(out.glob("cells/*.json"))) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    complaint = process.communicate()[1].decode()
    before = written(out)
    assert len([name for name in before if name.startswith("cells")]) >= 3, complaint
    result, failures = ablate(sweep(store), out)
    assert failures == {} and before.items() <= written(out).items() and scores(result) == scores(finished[0])
    weights = [
        {f.parent.parent.parent.name: f.read_bytes() for f in folder.glob("train/*/checkpoints/*/model.safetensors")}
        for folder in (out, finished[1])
    ]
    assert weights[0] == weights[1] and len(weights[0]) == 2


def test_a_network_that_a_sweep_beside_it_has_trained_is_not_trained_again(finished, store, tmp_path):
    _, out = finished
    shutil.copytree(out, tmp_path / "first")
    other = sweep(store, name="other", axes=AXES | {"steps": {4: {"sampler.num_inference_steps": 4}}})
    (run,) = [
        r for r in plan_sweep(other, tmp_path / "second").runs if r.cell.axes["process.prediction_type"] == "sample"
    ]
    shutil.rmtree(tmp_path / "first" / "train" / run.train_hash / "checkpoints")  # not whole: not taken
    ablate(other, tmp_path / "second")
    first, second = (load_weights(tmp_path / name) for name in ("first", "second"))
    assert len(second) == 2 and len(first) == 1 and set(first.items()) <= set(second.items())
    modified = {
        p.parts[-4]: p.stat().st_mtime for p in (tmp_path / "second").glob("train/*/checkpoints/*/model.safetensors")
    }
    taken = next(iter(first))
    assert modified[run.train_hash] > modified[taken]  # copied with its time, trained now


def load_weights(out: Path) -> dict[str, bytes]:
    return {p.parts[-4]: p.read_bytes() for p in out.glob("train/*/checkpoints/*/model.safetensors")}
