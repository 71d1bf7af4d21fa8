"""Diffusion: how actions are noised agrees with diffusers, and every prediction says the same about x_0."""

import warnings

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from diffpolicy.processes import SCHEDULES
from diffpolicy.processes.diffusion import PREDICTION_TYPES, Diffusion, DiffusionConfig
from tests.processes.exact import diffusion

EVERY_PREDICTION = [
    DiffusionConfig(prediction_type=p, sigma_data=0.5 if p == "edm" else None) for p in PREDICTION_TYPES
]
EVERY_STEP = (torch.arange(100) + 1) / 100
"""All times of T = 100, (100,)."""


def chunks(batch: int = 100, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """x_0 and noise, each (B, T_pred=4, D_act=3)."""
    return tuple(torch.randn(2, batch, 4, 3, dtype=dtype, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("config", EVERY_PREDICTION, ids=PREDICTION_TYPES)
def test_to_x0_inverts_the_target_at_every_step(config):
    process, (x_0, noise) = Diffusion(config), chunks()
    x_t = process.add_noise(x_0, noise, EVERY_STEP)
    got = process.to_x0(process.target(x_0, noise, EVERY_STEP), x_t, EVERY_STEP)
    torch.testing.assert_close(got, x_0, atol=1e-3 if config.prediction_type == "epsilon" else 1e-6, rtol=0)


def test_add_noise_equals_that_of_diffusers():
    process, (x_0, noise) = Diffusion(DiffusionConfig()), chunks(dtype=torch.float32)
    stock = DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")
    theirs = stock.add_noise(x_0, noise, torch.arange(100))
    torch.testing.assert_close(process.add_noise(x_0, noise, EVERY_STEP), theirs, atol=1e-6, rtol=1e-6)


def test_velocity_equals_that_of_diffusers():
    process, (x_0, noise) = Diffusion(DiffusionConfig(prediction_type="v_prediction")), chunks(dtype=torch.float32)
    stock = DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")
    theirs = stock.get_velocity(x_0, noise, torch.arange(100))
    torch.testing.assert_close(process.target(x_0, noise, EVERY_STEP), theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("t_shape", [(6,), (6, 4)])
@pytest.mark.parametrize("config", EVERY_PREDICTION, ids=PREDICTION_TYPES)
def test_from_x0_inverts_to_x0_and_the_target_is_from_x0_of_the_truth(config, t_shape):
    process, (x_0, noise) = Diffusion(config), chunks(batch=6)
    t = 0.05 + 0.9 * torch.rand(t_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x_t = process.add_noise(x_0, noise, t)
    torch.testing.assert_close(process.from_x0(x_0, x_t, t), process.target(x_0, noise, t), rtol=1e-6, atol=1e-6)
    prediction = torch.randn(x_t.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    again = process.from_x0(process.to_x0(prediction, x_t, t), x_t, t)
    torch.testing.assert_close(again, prediction, rtol=1e-6, atol=1e-6)


# --- edm ---


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_edm_is_table_1_of_karras_written_for_a_preserved_variance(sigma_data):
    """There x = x_0 + sigma noise is asked; ours is that divided by sqrt(1 + sigma^2) = 1 / alpha."""
    process = diffusion(prediction_type="edm", sigma_data=sigma_data)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    alpha, _ = process.levels(t)
    sigma = (1 / alpha.square() - 1).sqrt().view(-1, 1, 1)
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
    c_in = 1 / (sigma**2 + sigma_data**2).sqrt()
    x, prediction = chunks(batch=3)
    x_t = x * alpha.view(-1, 1, 1)
    torch.testing.assert_close(process.network_input(x_t, t), c_in * x)
    torch.testing.assert_close(process.to_x0(prediction, x_t, t), c_skip * x + c_out * prediction)


def test_edm_with_data_of_unit_spread_predicts_minus_v():
    x_0, noise = chunks(batch=99)
    t = EVERY_STEP[:99].double()
    edm = diffusion(prediction_type="edm", sigma_data=1.0).target(x_0, noise, t)
    velocity = diffusion(prediction_type="v_prediction").target(x_0, noise, t)
    torch.testing.assert_close(edm, -velocity, rtol=1e-6, atol=1e-6)


def test_edm_input_and_target_have_unit_spread_on_data_of_its_spread():
    process = diffusion(prediction_type="edm", sigma_data=0.3)
    x_0, noise = torch.randn(2, 1000, 50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for time in (0.05, 0.4, 0.8, 1.0):
        t = torch.full((1000,), time, dtype=torch.float64)
        x_in = process.network_input(process.add_noise(0.3 * x_0, noise, t), t)
        assert x_in.std().item() == pytest.approx(1, abs=0.01)
        assert process.target(0.3 * x_0, noise, t).std().item() == pytest.approx(1, abs=0.01)


def test_edm_takes_the_spread_of_the_data_unless_it_is_told():
    actions = 0.25 * torch.randn(10_000, 3, generator=torch.Generator().manual_seed(0)) + 0.5
    free = diffusion(prediction_type="edm")
    assert free.sigma_data.isnan()
    free.fit(actions)
    assert free.sigma_data.item() == pytest.approx(actions.std().item(), rel=1e-4)
    told = diffusion(prediction_type="edm", sigma_data=0.5)
    told.fit(actions)
    assert told.sigma_data.item() == 0.5
    assert set(free.state_dict()) == {"sigma_data"}  # it travels with the weights


def test_only_edm_scales_what_the_network_sees():
    x_t = chunks(batch=3)[0]
    for prediction_type in ("epsilon", "sample", "v_prediction"):
        process = diffusion(prediction_type=prediction_type)
        assert process.network_input(x_t, EVERY_STEP[:3]) is x_t


# --- levels ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_levels_are_exact_at_the_steps_and_monotone_between(schedule, dtype):
    process = diffusion(schedule=schedule)
    t = torch.arange(101, dtype=dtype) / 100
    alpha, sigma = process.levels(t)
    assert alpha.dtype == sigma.dtype == dtype
    expected = torch.cat([torch.ones(1), process.alpha_bar]).to(dtype)
    torch.testing.assert_close(alpha.square(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones_like(alpha), rtol=1e-6, atol=0)
    alpha, sigma = process.levels(torch.linspace(0, 1, 1013, dtype=dtype))
    assert (alpha.diff() <= 0).all() and (sigma.diff() >= 0).all()
    # strictly, up to the rounding of 1 - alpha_bar
    assert (sigma.double().diff() > 0).float().mean() > (0.99 if dtype == torch.float64 else 0.5)


@pytest.mark.parametrize("terminal_snr", ["as_is", "zero"])
def test_levels_at_time_zero_are_the_data_itself(terminal_snr):
    process = diffusion(terminal_snr=terminal_snr)
    for shape in ((3,), (3, 4)):
        alpha, sigma = process.levels(torch.zeros(shape))
        assert alpha.shape == shape and (alpha == 1).all() and (sigma == 0).all()


def test_level_halfway_between_two_steps_is_their_geometric_mean():
    process = diffusion(schedule="exponential", num_train_timesteps=10)
    alpha, sigma = process.levels(torch.tensor([0.5, 0.55, 0.6], dtype=torch.float64))
    ratio = sigma / alpha
    assert ratio[1].item() == pytest.approx((ratio[0] * ratio[2]).sqrt().item(), rel=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_time_of_sigma_inverts_the_levels(schedule):
    process = diffusion(schedule=schedule)
    t = torch.linspace(0.01, 0.999, 300, dtype=torch.float64)
    alpha, sigma = process.levels(t)
    torch.testing.assert_close(process.time_of_sigma(sigma / alpha), t, rtol=0, atol=1e-7)


def test_zero_terminal_snr_leaves_nothing_of_the_data():
    process, (x_0, noise) = diffusion(terminal_snr="zero"), chunks()
    assert process.terminal_signal == 0
    assert torch.equal(process.add_noise(x_0, noise, torch.ones(100)), noise)


def test_noise_says_nothing_about_the_data_at_zero_snr_and_so_it_is_taken_as_zero():
    process, (x_t, prediction) = diffusion(terminal_snr="zero"), chunks(batch=2)
    t = torch.tensor([1.0, 0.5])
    got = process.to_x0(prediction, x_t, t)
    assert (got[0] == 0).all() and got.isfinite().all() and (got[1] != 0).all()


def test_targets_are_the_noise_and_the_data():
    x_0, noise = chunks()
    assert Diffusion(DiffusionConfig(prediction_type="epsilon")).target(x_0, noise, EVERY_STEP) is noise
    assert Diffusion(DiffusionConfig(prediction_type="sample")).target(x_0, noise, EVERY_STEP) is x_0


def test_signal_and_noise_keep_the_variance():
    signal, sigma = Diffusion(DiffusionConfig()).signal_and_noise(EVERY_STEP, torch.zeros(100, 4, 3))
    assert signal.shape == sigma.shape == (100, 1, 1)
    torch.testing.assert_close(signal**2 + sigma**2, torch.ones(100, 1, 1))


@pytest.mark.parametrize("config", EVERY_PREDICTION, ids=PREDICTION_TYPES)
def test_time_may_differ_between_the_actions_of_a_chunk(config):
    process, (x_0, noise) = Diffusion(config), chunks(batch=2)
    t = torch.tensor([[0.01, 0.2, 0.5, 1.0], [1.0, 0.5, 0.5, 0.3]])  # (B, T_pred)
    x_t = process.add_noise(x_0, noise, t)
    x_0_again = process.to_x0(process.target(x_0, noise, t), x_t, t)
    for step in range(4):
        alone = process.add_noise(x_0[:, step : step + 1], noise[:, step : step + 1], t[:, step])
        torch.testing.assert_close(x_t[:, step : step + 1], alone)
    torch.testing.assert_close(x_0_again, x_0, atol=1e-3, rtol=0)


def test_training_times_are_all_steps_from_the_first_to_pure_noise():
    process = Diffusion(DiffusionConfig(num_train_timesteps=10))
    t = process.sample_time(1000, torch.device("cpu"), torch.Generator().manual_seed(0))
    torch.testing.assert_close(t.unique(), torch.arange(1, 11) / 10)


@pytest.mark.parametrize("num_steps", [7, 100, 1000])
def test_network_sees_the_integer_step(num_steps):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        process = Diffusion(DiffusionConfig(num_train_timesteps=num_steps))
    t = (torch.arange(num_steps) + 1) / num_steps
    assert process.network_time(t).tolist() == list(range(num_steps))


@pytest.mark.parametrize(("schedule", "left"), [("linear", "60%"), ("scaled_linear", "70%")])
def test_schedule_that_leaves_signal_at_the_end_warns(schedule, left):
    with pytest.warns(UserWarning, match=f"process.schedule={schedule} with 100 steps leaves {left} of the signal"):
        Diffusion(DiffusionConfig(schedule=schedule))


@pytest.mark.parametrize("choices", [{}, {"schedule": "linear", "num_train_timesteps": 1000}])
def test_schedule_that_ends_in_noise_is_silent(choices):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Diffusion(DiffusionConfig(**choices))


def test_tables_follow_the_device_but_are_not_saved():
    process = Diffusion(DiffusionConfig())
    assert process.state_dict() == {} and process.to("meta").alpha_bar.device.type == "meta"


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"prediction_type": "epsilo"}, "process.prediction_type must be one of .* Did you mean 'epsilon'"),
        ({"schedule": "linea"}, "process.schedule must be one of .* Did you mean 'linear'"),
    ],
)
def test_unknown_choice_is_refused_with_the_nearest(choices, message):
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(**choices)


def test_scaled_is_as_is_where_the_betas_were_made_for_so_many_steps():
    with pytest.warns(UserWarning, match="terminal_snr=scaled changes nothing: linear was made for 1000 steps"):
        config = DiffusionConfig(schedule="linear", num_train_timesteps=1000, terminal_snr="scaled")
    assert config == DiffusionConfig(schedule="linear", num_train_timesteps=1000)


def test_a_new_schedule_file_never_gives_way_silently_to_an_old_table(tmp_path):
    (tmp_path / "new.csv").write_text("t,alpha_bar\n0,1\n1,0.5\n")
    old = ((0.0, 1.0), (1.0, 0.01))
    with pytest.raises(ValueError, match=r"process.table holds the numbers of an earlier file; add process.table=\[\]"):
        DiffusionConfig(schedule="table", table=old, schedule_file=str(tmp_path / "new.csv"))


def test_edm_refuses_actions_that_never_vary():
    process = Diffusion(DiffusionConfig(prediction_type="edm"))
    with pytest.raises(ValueError, match="edm needs actions that vary"):
        process.fit(torch.zeros(100, 2))


def test_log_normal_times_have_their_mean_on_a_coarse_schedule_too():
    """Rounding to the nearest step in log(sigma), not up: with ten steps, up would add .4."""
    process = Diffusion(DiffusionConfig(num_train_timesteps=10, time_density="log_normal(-0.2, 0.8)"))
    t = process.sample_time(50_000, torch.device("cpu"), torch.Generator().manual_seed(0))
    alpha, sigma = process.levels(t.double())
    assert (sigma / alpha).log().mean().item() == pytest.approx(-0.2, abs=0.05)
