"""Schedules: closed forms that give diffusers' betas, and how much signal they leave."""

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from diffpolicy.processes import SCHEDULES
from diffpolicy.processes.schedules import MAX_BETA, schedule_betas, terminal_signal

THEIR_NAME = {"cosine": "squaredcos_cap_v2", "linear": "linear", "scaled_linear": "scaled_linear"}


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


@pytest.mark.parametrize("num_steps", [50, 100, 1000])
@pytest.mark.parametrize("name", THEIR_NAME)
def test_betas_equal_those_of_diffusers(name, num_steps):
    theirs = DDPMScheduler(num_train_timesteps=num_steps, beta_schedule=THEIR_NAME[name]).betas
    torch.testing.assert_close(schedule_betas(name, num_steps).float(), theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("name", "signal"), [("linear", 0.603), ("scaled_linear", 0.696), ("cosine", 0.0005)])
def test_terminal_signal_of_a_hundred_steps_is_the_known_one(name, signal):
    assert terminal_signal(schedule_betas(name, 100)) == pytest.approx(signal, abs=5e-4 if signal > 0.1 else 5e-5)


def test_linear_betas_were_made_for_a_thousand_steps():
    assert terminal_signal(schedule_betas("linear", 1000)) < 0.01


def test_last_cosine_step_is_capped_so_that_some_signal_is_left():
    betas = schedule_betas("cosine", 100)
    assert betas[-1] == MAX_BETA and betas[-2] < 0.9


def test_unknown_schedule_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"process.schedule must be one of .* got 'cosin'. Did you mean 'cosine'\?"):
        schedule_betas("cosin", 100)


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match=r"process.num_train_timesteps must be at least 1, got 0"):
        schedule_betas("cosine", 0)
