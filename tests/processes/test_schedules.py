"""Schedules: closed forms that give diffusers' betas, how much signal they leave, their rescaling, and tables of one's own."""

import dataclasses
import json
import math
import warnings

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler, betas_for_alpha_bar

from diffpolicy.config import choose
from diffpolicy.processes import SCHEDULES
from diffpolicy.processes.diffusion import Diffusion, DiffusionConfig
from diffpolicy.processes.schedules import (
    MAX_BETA,
    TUNED_FOR_1000,
    alpha_bar_table,
    alpha_bar_to_flow_time,
    alpha_bar_to_log_snr,
    alpha_bar_to_sigma,
    flow_time_to_alpha_bar,
    log_snr_to_alpha_bar,
    read_schedule,
    schedule_betas,
    shift_alpha_bar,
    sigma_to_alpha_bar,
    terminal_signal,
    zero_terminal_snr,
)
from tests.processes.exact import diffusion

THEIR_NAME = {
    "cosine": "squaredcos_cap_v2",
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "sigmoid": "sigmoid",
    "laplace": "laplace",
    "exponential": "exp",
}
FRACTIONS = torch.linspace(0.001, 0.999, 50, dtype=torch.float64)


# --- every schedule ---


@pytest.mark.parametrize("num_steps", [10, 100, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_alpha_bar_decreases_from_one(name, num_steps):
    alpha_bar = SCHEDULES[name](torch.linspace(0, 1, 997, dtype=torch.float64), num_steps)
    assert alpha_bar[0].item() == pytest.approx(1, abs=1e-9)
    assert (alpha_bar.diff() < 0).all() and alpha_bar[-1] >= -1e-12


@pytest.mark.parametrize("name", SCHEDULES)
def test_betas_are_fractions_whose_product_is_alpha_bar(name):
    betas, t = schedule_betas(name, 100), torch.arange(1, 101, dtype=torch.float64) / 100
    assert ((betas > 0) & (betas <= MAX_BETA)).all()
    product, closed_form = (1 - betas).cumprod(dim=0), SCHEDULES[name](t, 100)
    torch.testing.assert_close(product[:99], closed_form[:99], rtol=1e-9, atol=0)  # the last beta may be capped


@pytest.mark.parametrize("num_steps", [10, 100, 1000])
@pytest.mark.parametrize("name", THEIR_NAME)
def test_betas_equal_those_of_diffusers(name, num_steps):
    theirs = (
        betas_for_alpha_bar(num_steps, alpha_transform_type="exp")
        if name == "exponential"
        else DDPMScheduler(num_train_timesteps=num_steps, beta_schedule=THEIR_NAME[name]).betas
    )
    # their laplace is computed in float32: 1 - ratio of two neighbours loses four digits
    torch.testing.assert_close(
        schedule_betas(name, num_steps).float(), theirs.float(), rtol=0, atol=2e-6 if name == "laplace" else 2e-7
    )


@pytest.mark.parametrize(
    ("name", "terminal_snr", "signal"),
    [
        ("linear", "as_is", 0.603),
        ("scaled_linear", "as_is", 0.696),
        ("sigmoid", "as_is", 0.6025),
        ("laplace", "as_is", 0.178),
        ("cosine", "as_is", 0.0005),
        ("linear", "scaled", 0.0045),
        ("geometric", "as_is", 0.0200),  # 1 / sqrt(1 + 50^2)
        ("karras", "as_is", 0.0125),  # 1 / sqrt(1 + 80^2)
        ("exponential", "as_is", 0.0025),  # exp(-6)
        ("cosine", "zero", 0.0),
        ("linear", "zero", 0.0),
    ],
)
def test_terminal_signal_of_a_hundred_steps_is_the_known_one(name, terminal_snr, signal):
    betas = schedule_betas(name, 100, terminal_snr=terminal_snr)
    assert terminal_signal(betas) == pytest.approx(signal, abs=5e-4 if signal > 0.1 else 5e-5)
    assert diffusion(schedule=name, terminal_snr=terminal_snr).terminal_signal == pytest.approx(
        terminal_signal(betas), abs=1e-12
    )


def test_linear_betas_were_made_for_a_thousand_steps():
    assert terminal_signal(schedule_betas("linear", 1000)) < 0.01


def test_last_cosine_step_is_capped_so_that_some_signal_is_left():
    betas = schedule_betas("cosine", 100)
    assert betas[-1] == MAX_BETA == 0.999 and betas[-2] < 0.9


@pytest.mark.parametrize(
    ("name", "t", "alpha_bar"),
    [
        ("flow", 0.5, 0.5),
        ("flow", 0.25, 0.9),  # (3/4)^2 / ((3/4)^2 + (1/4)^2)
        ("exponential", 0.5, math.exp(-6)),
        ("chen_sigmoid", 0.5, 0.5),
        ("laplace_snr", 0.5, 0.5),  # log-SNR is mu = 0 there
        ("laplace_snr", 0.75, 1 / (1 + math.sqrt(0.5) ** -1)),  # log-SNR is 0.5 log(1 - 2 * 0.25)
        ("karras", 1.0, 1 / (1 + 80**2)),
        ("karras", 0.01, 1 / (1 + 0.002**2)),
        ("geometric", 1.0, 1 / (1 + 50**2)),
        ("geometric", 0.01, 1 / (1 + 0.01**2)),
        ("geometric", 0.505, 1 / (1 + 0.5)),  # halfway: sigma^2 = 0.01 * 50
    ],
)
def test_closed_form_gives_this_literal(name, t, alpha_bar):
    got = SCHEDULES[name](torch.tensor([t], dtype=torch.float64), 100).item()
    assert got == pytest.approx(alpha_bar, rel=1e-9)


def test_laplace_of_the_paper_is_the_square_of_what_diffusers_has():
    """alpha_bar = SNR / (1 + SNR), without the root, up to the 1e-6 that keeps diffusers' logarithm finite."""
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    torch.testing.assert_close(SCHEDULES["laplace"](t, 100) ** 2, SCHEDULES["laplace_snr"](t, 100), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_only_schedules_tuned_for_a_thousand_steps_depend_on_their_number(name):
    ends = [alpha_bar_table(name, n)[n // 2 - 1].item() for n in (100, 1000)]
    same = ends[0] == pytest.approx(ends[1], rel=0.02)
    if name in ("geometric", "karras"):  # their ramp begins at the first step, wherever that is
        same = ends[0] == pytest.approx(ends[1], rel=0.2)
    assert same == (name not in TUNED_FOR_1000)


def test_unknown_schedule_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"process.schedule must be one of .* got 'cosin'. Did you mean 'cosine'\?"):
        schedule_betas("cosin", 100)


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match=r"process.num_train_timesteps must be at least 1, got 0"):
        schedule_betas("cosine", 0)


# --- rescaling and shifting ---


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "sigmoid"])
def test_zero_terminal_snr_equals_that_of_diffusers_and_keeps_the_first_step(name):
    alpha_bar = alpha_bar_table(name, 100)
    ours = zero_terminal_snr(alpha_bar)
    theirs = (1 - rescale_zero_terminal_snr(schedule_betas(name, 100))).cumprod(dim=0)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert ours[-1] == 0
    assert ours[0].item() == pytest.approx(alpha_bar[0].item(), rel=1e-12)
    torch.testing.assert_close(alpha_bar_table(name, 100, terminal_snr="zero"), ours)


@pytest.mark.parametrize("name", TUNED_FOR_1000)
def test_scaled_betas_are_a_thousandth_per_step_whatever_the_number_of_steps(name):
    for num_steps in (50, 100, 1000):
        scaled = schedule_betas(name, num_steps, terminal_snr="scaled")
        plain = schedule_betas(name, num_steps) * 1000 / num_steps
        torch.testing.assert_close(scaled, plain.clamp_max(MAX_BETA), rtol=1e-9, atol=0)


def test_scaling_a_schedule_without_betas_of_its_own_warns_and_is_called_as_is():
    with pytest.warns(UserWarning, match="process.terminal_snr=scaled changes nothing: cosine does not depend"):
        config = DiffusionConfig(terminal_snr="scaled")
    assert config == DiffusionConfig()


@pytest.mark.parametrize("shift", [0.3, 2.0, 5.0])
def test_shift_lowers_log_snr_by_twice_its_logarithm(shift):
    got = alpha_bar_to_log_snr(shift_alpha_bar(FRACTIONS, shift))
    torch.testing.assert_close(got, alpha_bar_to_log_snr(FRACTIONS) - 2 * math.log(shift))
    table, plain = alpha_bar_table("cosine", 100, shift=shift), alpha_bar_table("cosine", 100)
    torch.testing.assert_close(table, shift_alpha_bar(plain, shift))


@pytest.mark.parametrize("shift", [0.3, 3.0])
def test_shift_on_the_straight_path_is_the_time_shift_of_stable_diffusion_3(shift):
    t = FRACTIONS
    got = alpha_bar_to_flow_time(shift_alpha_bar(flow_time_to_alpha_bar(t), shift))
    torch.testing.assert_close(got, shift * t / (1 + (shift - 1) * t))


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan"), float("inf")])
def test_shift_that_is_no_factor_is_refused(shift):
    with pytest.raises(ValueError, match=r"process.shift must be positive, got"):
        shift_alpha_bar(FRACTIONS, shift)
    with pytest.raises(ValueError, match=r"process.shift must be positive, got"):
        DiffusionConfig(shift=shift)


# --- conversions ---


@pytest.mark.parametrize(
    ("there", "back"),
    [
        (alpha_bar_to_sigma, sigma_to_alpha_bar),
        (alpha_bar_to_log_snr, log_snr_to_alpha_bar),
        (alpha_bar_to_flow_time, flow_time_to_alpha_bar),
    ],
)
def test_conversion_round_trips_and_keeps_shape_and_type(there, back):
    ends = torch.cat([FRACTIONS.new_tensor([0.0]), FRACTIONS, FRACTIONS.new_tensor([1.0])])
    torch.testing.assert_close(back(there(ends)), ends, rtol=1e-9, atol=1e-12)
    half = there(torch.full((2, 3), 0.5))
    assert half.shape == (2, 3) and half.dtype == torch.float32


def test_conversions_of_a_known_point():
    ninth = torch.tensor(0.1, dtype=torch.float64)  # noise is three times the signal
    assert alpha_bar_to_sigma(ninth).item() == pytest.approx(3)
    assert alpha_bar_to_log_snr(ninth).item() == pytest.approx(-math.log(9))
    assert alpha_bar_to_flow_time(ninth).item() == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("convert", "value", "message"),
    [
        (alpha_bar_to_sigma, 1.5, r"alpha_bar must lie in \[0, 1\], got 1.5"),
        (alpha_bar_to_log_snr, -0.1, r"alpha_bar must lie in \[0, 1\], got -0.1"),
        (alpha_bar_to_flow_time, float("nan"), r"alpha_bar must lie in \[0, 1\], got nan"),
        (sigma_to_alpha_bar, -1.0, r"sigma must lie in \[0, inf\], got -1"),
        (log_snr_to_alpha_bar, float("nan"), r"log_snr must lie in \[-inf, inf\], got nan"),
        (flow_time_to_alpha_bar, 1.01, r"flow time must lie in \[0, 1\], got 1.01"),
    ],
)
def test_conversion_refuses_what_is_out_of_range(convert, value, message):
    with pytest.raises(ValueError, match=message):
        convert(torch.tensor([value]))


# --- a table of one's own ---


def write_table(path, name: str, rows: int = 101):
    t = torch.linspace(0, 1, rows, dtype=torch.float64)
    alpha_bar = SCHEDULES[name](t, 100)
    path.write_text(
        "t,alpha_bar\n" + "".join(f"{x!r},{y!r}\n" for x, y in zip(t.tolist(), alpha_bar.tolist(), strict=True))
    )
    return str(path)


@pytest.mark.parametrize("name", ["flow", "exponential", "chen_sigmoid"])
@pytest.mark.parametrize("num_steps", [10, 50, 100])
def test_table_from_a_file_is_the_schedule_that_wrote_it(tmp_path, name, num_steps):
    file = write_table(tmp_path / "mine.csv", name)
    table = diffusion(schedule="table", schedule_file=file, num_train_timesteps=num_steps)
    named = diffusion(schedule=name, num_train_timesteps=num_steps)
    torch.testing.assert_close(table.alpha_bar, named.alpha_bar, rtol=1e-6, atol=1e-9)


def test_table_between_its_rows_is_straight(tmp_path):
    (tmp_path / "mine.csv").write_text("t,alpha_bar\n0,1\n0.5,0.6\n1,0.0\n")
    got = alpha_bar_table("table", 4, table=read_schedule(tmp_path / "mine.csv"))
    # alpha_bar would end at 0; MAX_BETA leaves a thousandth of the step before
    torch.testing.assert_close(got, torch.tensor([0.8, 0.6, 0.3, 0.0003], dtype=torch.float64))


def test_table_travels_in_the_config_so_that_a_checkpoint_needs_no_file(tmp_path):
    file = write_table(tmp_path / "mine.csv", "flow")
    choice = choose("process", "diffusion", [f"schedule_file={file}", "schedule=table"])
    plain = json.loads(json.dumps(choice.to_dict()))
    (tmp_path / "mine.csv").unlink()
    again = choose("process", "diffusion", {k: v for k, v in plain.items() if k != "name"})
    assert len(again.options.table) == 101 and again == choice
    torch.testing.assert_close(
        Diffusion(again.options).alpha_bar, diffusion(schedule="flow").alpha_bar, rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"the first line must read `t,alpha_bar`, got ''"),
        ("time,alpha\n0,1\n1,0\n", r"the first line must read `t,alpha_bar`, got 'time,alpha'"),
        ("t,alpha_bar\n0,1\n0.5,half\n1,0\n", r"line 3: expected two numbers, got \['0.5', 'half'\]"),
        ("t,alpha_bar\n0,1\n0.5\n1,0\n", r"line 3: expected two numbers, got \['0.5', None\]"),
        ("t,alpha_bar\n0,1\n", r"needs at least the rows t=0 and t=1, got 1 rows"),
        ("t,alpha_bar\n", r"needs at least the rows t=0 and t=1, got 0 rows"),
        ("t,alpha_bar\n0.1,1\n1,0\n", r"t must run from 0 to 1, got 0.1 .. 1"),
        ("t,alpha_bar\n0,1\n0.9,0\n", r"t must run from 0 to 1, got 0 .. 0.9"),
        ("t,alpha_bar\n0,0.9\n1,0\n", r"alpha_bar must be 1 at t=0 \(no noise\), got 0.9"),
        ("t,alpha_bar\n0,1\n0.5,0.5\n0.4,0.4\n1,0\n", r"t must rise, row 3 goes from 0.5 to 0.4"),
        (
            "t,alpha_bar\n0,1\n0.5,0.5\n0.6,0.5\n1,0\n",
            r"alpha_bar must fall and stay in \[0, 1\], row 3 goes from 0.5 to 0.5",
        ),
        (
            "t,alpha_bar\n0,1\n0.5,0.5\n1,-0.1\n",
            r"alpha_bar must fall and stay in \[0, 1\], row 3 goes from 0.5 to -0.1",
        ),
        ("t,alpha_bar\n0,1\n0.5,nan\n1,0\n", r"alpha_bar must fall and stay in \[0, 1\], row 2 goes from 1 to nan"),
    ],
)
def test_bad_table_is_named_with_its_file_and_line(tmp_path, text, message):
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"mine.csv(, |: ).*{message}"):
        DiffusionConfig(schedule="table", schedule_file=str(tmp_path / "mine.csv"))


def test_table_without_a_file_and_a_file_without_table_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"process.schedule=table needs process.schedule_file"):
        DiffusionConfig(schedule="table")
    with pytest.raises(FileNotFoundError, match=r"process.schedule_file=.*none.csv does not exist"):
        DiffusionConfig(schedule="table", schedule_file=str(tmp_path / "none.csv"))
    with pytest.raises(ValueError, match=r"process.schedule_file is read by process.schedule=table, this is 'cosine'"):
        DiffusionConfig(schedule_file=write_table(tmp_path / "mine.csv", "flow"))


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_is_built_without_memory_on_the_meta_device(name):
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        process = Diffusion(dataclasses.replace(DiffusionConfig(), schedule=name))
    assert 0 < process.terminal_signal < 1
