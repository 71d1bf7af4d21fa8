"""Every sweep in conf/ablation: its full form can be built to the last cell, its --smoke form runs to a report."""

import csv
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from diffpolicy.ablate import ablate, report
from diffpolicy.ablation_plan import plan_sweep
from diffpolicy.replay import ReplayBuffer
from diffpolicy.spec import FieldSpec
from diffpolicy.sweep import load_sweep

SWEEPS = sorted((Path(__file__).parents[1] / "conf" / "ablation").glob("*.yaml"))
NUM_CELLS = {
    "noise_schedule": 14,
    "prediction_type": 12,
    "sampler_steps": 36,
    "spacing_and_clip": 30,
    "time_density": 15,
    "horizons": 10,
    "guidance": 14,
    "fusion": 12,
    "fusion_state": 18,
}
"""Cells of the full forms."""


@pytest.fixture(scope="module")
def any_store(tmp_path_factory) -> Path:
    """A store with the keys of the Push-T demonstrations, those of tabletop_language, and numbers that mean nothing."""
    pytest.importorskip("gym_pusht")
    path, rng = tmp_path_factory.mktemp("store") / "any.zarr", np.random.default_rng(0)
    shapes = {"state": (5,), "keypoint": (9, 2), "action": (2,), "observation.state": (2,)}
    shapes["observation.environment_state"] = (16,)
    fields = {k: FieldSpec(shape=s, dtype="float32") for k, s in shapes.items()}
    fields["observation.images.top"] = FieldSpec(shape=(64, 64, 3), dtype="uint8")
    with ReplayBuffer.create(path, fields=fields, fps=10) as b:
        for _ in range(3):
            rows = {k: rng.uniform(0, 255, (40, *f.shape)).astype(f.dtype) for k, f in fields.items()}
            b.append_episode(rows, task="push the T to the centre")
    return path


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_full_form_can_be_built_to_the_last_cell(path, any_store, tmp_path):
    sweep = load_sweep(path, data=any_store)
    plan = plan_sweep(sweep, tmp_path)
    assert len(plan.cells) == NUM_CELLS[path.stem] and plan.duplicates == {}
    assert len(sweep.seeds) >= 3 and sweep.episodes >= 200 and sweep.first_env_seed >= 100_000
    assert sweep.question and "2 CPU cores" in sweep.expected_time


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_smoke_form_runs_to_a_report_without_any_data(path, tmp_path):
    sweep = load_sweep(path, smoke=True)
    result, failures = ablate(sweep, tmp_path / "out", console=Console(quiet=True))
    page = report(sweep, tmp_path / "out").read_text()
    assert failures == {} and "SMOKE" in page
    with open(tmp_path / "out" / "results.csv", newline="") as handle:
        assert len(list(csv.DictReader(handle))) == len(result.cells) >= 2
    assert sorted(p.stem for p in (tmp_path / "out" / "figures").glob("*.png")) == sorted(
        p.stem for p in (tmp_path / "out" / "figures").glob("*.pdf")
    )
