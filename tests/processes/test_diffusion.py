"""Diffusion: how actions are noised agrees with diffusers, and every prediction says the same about x_0."""

import warnings

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from diffpolicy.processes.diffusion import PREDICTION_TYPES, Diffusion, DiffusionConfig

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
