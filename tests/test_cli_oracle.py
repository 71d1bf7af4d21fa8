"""`diffpolicy oracle`: every combination is graded, named or refused with its reason; a table, a figure, a CSV file."""

import csv
import subprocess
import sys

import imageio.v3 as iio
import pytest
import typer
from typer.testing import CliRunner

from diffpolicy.cli_oracle import combine, draw, oracle, told_apart
from diffpolicy.oracle import grade_table

app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)
app.command()(oracle)
QUICK = ("--samples", "128")


def run(*arguments: object) -> str:
    """Standard output of the command; an error is raised as the command line would report it."""
    done = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def combined(processes=("diffusion",), samplers=(), spacings=("trailing",), steps=(4,), **asked):
    options = ("schedule", "prediction_type", "terminal_snr", "num_train_timesteps")
    asked = {key: asked.get(key, ()) for key in options}
    return combine(processes, asked, samplers=samplers, spacings=spacings, steps=steps, clip_sample=1.0)


def test_importing_the_command_loads_nothing_heavy():
    code = "import sys, diffpolicy.cli_oracle; sys.exit(' '.join({'torch', 'numpy', 'matplotlib'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_options_the_sound_settings_stand_beside_an_unsound_one():
    out = run(*QUICK)
    for word in ("cosine", "linear", "ddim", "dpmpp_2m", "euler", "terminal signal 60%", "a perfect sampler scores"):
        assert word in out
    assert "skipped" not in out


def test_table_shows_only_what_tells_settings_apart():
    out = run(*QUICK, "--process", "diffusion", "--schedule", "cosine", "--sampler", "ddim,ddpm", "--steps", "4")
    header = next(line for line in out.splitlines() if "NFE" in line)
    assert "sampler" in header and "schedule" not in header and "spacing" not in header


def test_csv_holds_every_grade_and_a_figure_is_drawn(tmp_path):
    out = run(
        *("--process", "diffusion,flow", "--schedule", "cosine", "--steps", "2,4", "--samples", "128"),
        *("--csv", tmp_path / "new" / "o.csv", "--out", tmp_path / "o.png"),
    )
    assert f"wrote {tmp_path / 'o.png'}" in out
    with open(tmp_path / "new" / "o.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["process"], r["schedule"], r["sampler.name"], r["nfe"]) for r in rows] == [
        *(("diffusion", "cosine", name, n) for name in ("ddim", "dpmpp_2m") for n in ("2", "4")),
        *(("flow", "", "euler", n) for n in ("2", "4")),
    ]
    assert all(0 < float(r["energy_distance"]) < 1 for r in rows)
    picture = iio.imread(tmp_path / "o.png")
    assert picture.shape[0] > 600 and picture.std() > 10


def test_figure_takes_one_setting_and_grades_that_are_not_finite(tmp_path):
    import dataclasses

    settings, _ = combined(steps=(4, 8))
    grades = grade_table(settings, num_samples=64)
    broken = dataclasses.replace(grades[0], energy_distance=float("inf"), dispersion_ratio=float("nan"))
    for name, shown in (("one.png", grades[:1]), ("broken.png", [broken, *grades[1:]])):
        draw(shown, tmp_path / name)
        assert iio.imread(tmp_path / name).std() > 5


def test_every_combination_is_there_once():
    settings, skipped = combined(
        schedule=("cosine", "linear"), samplers=("ddim", "ddpm"), steps=(4, 8), spacings=("trailing", "leading")
    )
    assert len(settings) == 16 and skipped == []
    assert len(combined(("diffusion", "flow"), steps=(4, 8))[0]) == 2 * 2 * 2 + 2


def test_incompatible_settings_are_skipped_with_their_reason():
    out = run(
        *QUICK, "--process", "diffusion,flow", "--schedule", "cosine", "--sampler", "midpoint,ddim", "--steps", "4,200"
    )
    assert (
        "skipped: diffusion cosine as_is 100 midpoint trailing 4 and 1 more: sampler.name=midpoint cannot sample process"
        in out
    )
    assert "100 ddim trailing 200: sampler.num_inference_steps must be in [1, process.num_train_timesteps = 100]" in out
    assert "skipped: --schedule: flow has no such choice" in out


def test_a_prediction_that_a_process_cannot_make_is_skipped():
    settings, skipped = combined(("diffusion", "flow"), prediction_type=("v_prediction",), schedule=("cosine",))
    assert [type(process).__name__ for process, _ in settings] == ["Diffusion", "Diffusion"]
    assert any("flow v_prediction: process.prediction_type must be one of" in reason for reason in skipped)


def test_settings_that_mean_the_same_are_graded_once_and_said():
    settings, skipped = combined(schedule=("cosine",), terminal_snr=("as_is", "scaled"), samplers=("ddim",))
    assert len(settings) == 1
    assert skipped == ["diffusion cosine scaled 100: the same as diffusion cosine as_is 100"]
    settings, skipped = combined(("regression",), steps=(4, 8))
    assert len(settings) == 1 and "the same as" in skipped[0]


def test_a_choice_that_a_process_lacks_does_not_tell_it_apart():
    settings, _ = combined(("diffusion", "flow"), schedule=("cosine",), samplers=("auto",))
    assert told_apart(grade_table(settings, num_samples=16)) == ["process", "prediction_type", "sampler.name"]


def test_an_error_of_the_network_is_in_the_title():
    out = run(*QUICK, "--process", "flow", "--steps", "4", "--error", "0.01", "--problem", "ring", "--clip", "none")
    assert "ring, 128 chunks per setting, exact denoiser with an error of 0.01" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--schedule", "cosin"), "--schedule must be one of .*Did you mean 'cosine'"),
        (("--sampler", "dpmpp2m"), "--sampler must be one of .*Did you mean 'dpmpp_2m'"),
        (("--spacing", "trailling"), "--spacing must be one of .*Did you mean 'trailing'"),
        (("--process", "flux"), "--process must be one of"),
        (("--problem", "two_mode"), "--problem must be one of .*Did you mean 'two_modes'"),
        (("--steps", "4,x"), "--steps must be whole numbers from 1"),
        (("--steps", ""), "--steps must be whole numbers from 1"),
        (("--timesteps-train", "0"), "--timesteps-train must be whole numbers from 1"),
        (("--clip", "-1"), "--clip must be a positive number or none"),
        (("--terminal-snr", "zeroo"), "--terminal-snr must be one of .*Did you mean 'zero'"),
        (("--prediction", "velocty"), "--prediction must be one of .*Did you mean 'velocity'"),
        (("--out", "picture.foo"), "--out must end in .png or .pdf, got picture.foo"),
        (("--csv", "/"), "--csv must name a file, got the folder /"),
        (
            ("--process", "flow", "--prediction", "epsilon"),
            "no setting can be sampled: flow epsilon: process.prediction_type",
        ),
    ],
)
def test_wrong_names_are_errors_with_the_nearest_right_one(arguments, message):
    with pytest.raises(ValueError, match=message):
        run(*QUICK, *arguments)


def test_shift_a_table_of_ones_own_and_settings_of_the_sampler_are_graded(tmp_path):
    (tmp_path / "mine.csv").write_text("t,alpha_bar\n0,1\n0.5,0.5\n1,0.0001\n")
    common = ("--process", "diffusion", "--steps", "4", "--samples", "64", "--csv", tmp_path / "o.csv")
    run(*common, "--file", tmp_path / "mine.csv", "--shift", "1,3", "--sampler", "ddim", "--sampler-option", "eta=1.0")
    with open(tmp_path / "o.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [r["schedule"] for r in rows] == ["table", "table"] and [float(r["shift"]) for r in rows] == [1, 3]
    assert {float(r["sampler.eta"]) for r in rows} == {1.0}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shift", "0"], "--shift must be positive numbers"),
        (["--sampler-option", "etta=1"], "config key 'sampler.etta' must be one of .* Did you mean 'eta'"),
        (["--schedule", "table"], "--schedule must be one of"),
    ],
)
def test_slip_in_a_further_choice_is_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        run(*arguments)
