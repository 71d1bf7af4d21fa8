"""`diffpolicy ablate`: where results go, what is printed, and how it ends."""

import pytest
import typer
from omegaconf import OmegaConf
from typer.testing import CliRunner

from diffpolicy import workers
from diffpolicy.cli_ablate import ablate
from tests.test_ablate import TINY, Fails, Interrupted

app = typer.Typer()
app.command()(ablate)


@pytest.fixture(autouse=True)
def no_processes(monkeypatch):
    """The jobs are done in this process; tests/test_ablate.py has the others."""
    monkeypatch.setattr(workers, "LocalWorkers", lambda count, run: workers.Here(run))


def run(*arguments: object) -> tuple[int, str]:
    """(exit code, output); errors that the main command line turns into one line come out as they are."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"}, catch_exceptions=False)
    return result.exit_code, result.output


@pytest.fixture
def sweep_file(tmp_path):
    plain = {
        "name": "steps",
        "question": "How many calls are enough?",
        "base": ["conf/task/tabletop.yaml"],
        "set": TINY,
        "axes": {"steps": {1: {"sampler.num_inference_steps": 1}, 2: {"sampler.num_inference_steps": 2}}},
        "episodes": 3,
        "collect": {"env": "tabletop", "episodes": 6},
        "expected_time": "a second on one core",
        "smoke": {"episodes": 2, "set": {"train.steps": 4}},
    }
    OmegaConf.save(OmegaConf.create(plain), tmp_path / "steps.yaml")
    return tmp_path / "steps.yaml"


def test_a_sweep_ends_with_a_report_and_every_cell_has_its_line(sweep_file, tmp_path):
    code, said = run(sweep_file, "--out", tmp_path / "out", "episodes=2")
    assert code == 0
    assert "How many calls are enough?" in said and "expected time from the start: a second on one core" in said
    assert "2/3 steps 1, seed 0: success" in said and "3/3 steps 2, seed 0: success" in said
    assert f"report: {tmp_path / 'out' / 'report.html'}" in said.replace("\n", "")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "How many calls are enough?" in page and "SMOKE" not in page
    assert (tmp_path / "out" / "results.csv").read_text().count("\n") == 3


def test_a_smoke_run_goes_to_a_folder_of_its_own_and_says_so(sweep_file, tmp_path):
    code, said = run(sweep_file, "--out", tmp_path / "out", "--smoke")
    assert code == 0 and "SMOKE" in said and not (tmp_path / "out").exists()
    assert "SMOKE" in (tmp_path / "out_smoke" / "report.html").read_text()


def test_results_go_where_the_sweep_is_named_after(sweep_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(sweep_file, "--smoke")[0] == 0
    assert (tmp_path / "runs" / "ablations" / "steps_smoke" / "report.html").exists()


def test_dry_run_shows_the_cells_and_makes_no_folder(sweep_file, tmp_path):
    code, said = run(sweep_file, "--out", tmp_path / "out", "--dry-run")
    assert code == 0 and "6 demonstrations are collected first" in said and "steps 2" in said
    assert not (tmp_path / "out").exists()


def test_a_failed_cell_ends_with_1_after_the_others(sweep_file, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "LocalWorkers", lambda count, run: Fails(run, "steps 1, seed 0"))
    code, said = run(sweep_file, "--out", tmp_path / "out")
    assert code == 1 and "FAILED steps 1, seed 0: its process was killed by SIGKILL" in said
    assert "3/3 steps 2, seed 0: success" in said and "1 failed:" in said
    assert "its process was killed by SIGKILL" in (tmp_path / "out" / "report.html").read_text()


def test_report_only_tells_what_is_there_after_an_interruption(sweep_file, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "LocalWorkers", lambda count, run: Interrupted(run, after=2))
    with pytest.raises(FileNotFoundError, match=r"out holds no finished cell of sweep steps"):
        run(sweep_file, "--out", tmp_path / "out", "--report-only")
    code, said = run(sweep_file, "--out", tmp_path / "out")
    assert code != 0 and "run the same command again to go on" in said
    code, said = run(sweep_file, "--out", tmp_path / "out", "--report-only")
    assert code == 0 and "report: " in said
    assert "not run yet" in (tmp_path / "out" / "report.html").read_text()


def test_jobs_and_ray_exclude_each_other(sweep_file, tmp_path):
    with pytest.raises(ValueError, match="give it or --ray, not both"):
        run(sweep_file, "--jobs", 2, "--ray", "auto", "--out", tmp_path / "out")


def test_help_says_that_a_cluster_must_see_the_folder():
    assert "must see the results folder" in " ".join(run("--help")[1].replace("│", "").split())
