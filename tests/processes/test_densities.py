"""Densities of the training time: quantiles against closed forms, shares of steps, and slips in their names."""

import math

import pytest
import torch

from diffpolicy.processes import DENSITIES
from diffpolicy.processes.densities import Named, beta, log_logistic, log_normal, logit_normal, u_shaped
from diffpolicy.processes.flow import Flow, FlowConfig
from tests.processes.exact import diffusion

CPU = torch.device("cpu")
EVEN = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
"""The middles of twenty thousand equal shares: a mean over quantiles of these is an integral."""


def at(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("name", DENSITIES)
def test_quantile_rises_and_is_finite_at_both_ends(name):
    values = DENSITIES[name](torch.linspace(1e-7, 1, 1000))
    assert values.isfinite().all() and (values.diff() >= 0).all() and values[-1] > values[0]


@pytest.mark.parametrize(("a", "b"), [(1.5, 1.0), (2.0, 3.0), (0.5, 0.5), (8.0, 2.0)])
def test_beta_has_its_mean_and_variance(a, b):
    t = beta(EVEN, a, b)
    assert t.mean().item() == pytest.approx(a / (a + b), abs=1e-4)
    assert t.var().item() == pytest.approx(a * b / ((a + b) ** 2 * (a + b + 1)), rel=2e-3)


def test_default_beta_leans_towards_noise_with_the_closed_form_of_its_quantile():
    assert beta(EVEN).mean().item() == pytest.approx(0.6, abs=1e-4)
    torch.testing.assert_close(beta(at(0.001, 0.125, 1.0)), at(0.01, 0.25, 1.0))  # u^(2/3)


def test_beta_two_three_inverts_its_closed_form():
    t = at(0.05, 0.3, 0.5, 0.9)
    cdf = 6 * t**2 - 8 * t**3 + 3 * t**4
    torch.testing.assert_close(beta(cdf, 2.0, 3.0), t, atol=1e-5, rtol=0)


def test_logit_normal_is_symmetric_about_the_logistic_of_its_mean():
    assert logit_normal(at(0.5)).item() == pytest.approx(0.5)
    assert logit_normal(at(0.5), 1.0).item() == pytest.approx(1 / (1 + math.exp(-1)))
    torch.testing.assert_close(logit_normal(EVEN) + logit_normal(1 - EVEN), torch.ones_like(EVEN))
    # one standard deviation: Phi(1) = 0.841345
    assert logit_normal(at(0.8413447), 0.0, 2.0).item() == pytest.approx(1 / (1 + math.exp(-2)), abs=1e-5)


def test_u_shape_is_symmetric_and_inverts_its_closed_form():
    torch.testing.assert_close(u_shaped(EVEN) + u_shaped(1 - EVEN), torch.ones_like(EVEN))
    # share of times below t: (e^(4t) - 1 + e^4 - e^(4 (1 - t))) / (2 (e^4 - 1))
    below = (math.exp(1) - 1 + math.exp(4) - math.exp(3)) / (2 * (math.exp(4) - 1))
    assert below == pytest.approx(0.33799, abs=1e-5)
    assert u_shaped(at(below)).item() == pytest.approx(0.25, abs=1e-9)
    torch.testing.assert_close(u_shaped(at(0.0, 1.0)), at(0.0, 1.0))


def test_log_normal_is_that_of_edm():
    log_sigma = log_normal(EVEN)
    assert log_sigma.median().exp().item() == pytest.approx(math.exp(-1.2), rel=1e-3)
    assert log_sigma.std().item() == pytest.approx(1.2, rel=1e-3)


def test_log_logistic_is_that_of_beso():
    assert log_logistic(at(0.5)).exp().item() == pytest.approx(0.5)
    assert log_logistic(at(0.8)).exp().item() == pytest.approx(1.0)  # odds 4 = (1 / 0.5)^2


@pytest.mark.parametrize("density", ["uniform", "beta(1.5, 1)", "beta(2, 3)", "logit_normal", "u_shaped(4)"])
def test_diffusion_trains_each_step_in_its_share(density):
    """The step k of T holds the times in (k/T, (k+1)/T]; chi-square of 10 shares, 99.99 % of which lie below 34."""
    process, n = diffusion(num_train_timesteps=10, time_density=density), 20_000
    t = process.sample_time(n, CPU, torch.Generator().manual_seed(0))
    count = torch.bincount((t * 10).round().long() - 1, minlength=10).double()
    named = Named.parse("density", density, DENSITIES)
    quantiles = DENSITIES[named.name](EVEN, *named.parameters)
    share = torch.histc(quantiles, bins=10, min=0, max=1) / len(EVEN)
    assert count.sum() == n
    assert ((count - n * share) ** 2 / (n * share)).sum() < 34


@pytest.mark.parametrize("density", [name for name in DENSITIES if name != "uniform"])
def test_uniform_number_nearest_zero_trains_pure_noise_and_nearest_one_the_first_step(monkeypatch, density):
    # torch.rand draws from [0, 1), so that no time is 0, where nothing is asked
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([0.0, 1 - 2**-24]))
    t = diffusion(schedule="flow", num_train_timesteps=10, time_density=density).sample_time(2, CPU)
    assert t.tolist() == pytest.approx([1.0, 0.1])


@pytest.mark.parametrize("density", ["log_normal", "log_logistic"])
def test_diffusion_turns_a_density_of_sigma_into_its_own_steps(density):
    process = diffusion(schedule="karras", num_train_timesteps=1000, time_density=density)
    t = process.sample_time(20_000, CPU, torch.Generator().manual_seed(0)).double()
    alpha, sigma = process.levels(t)
    median = {"log_normal": math.exp(-1.2), "log_logistic": 0.5}[density]
    assert (sigma / alpha).median().item() == pytest.approx(median, rel=0.05)


@pytest.mark.parametrize("density", DENSITIES)
def test_training_times_are_steps_of_the_diffusion_and_times_of_the_flow(density):
    steps = diffusion(num_train_timesteps=7, time_density=density).sample_time(500, CPU)
    torch.testing.assert_close(steps * 7, (steps * 7).round())
    assert steps.min() > 0 and steps.max() <= 1
    t = Flow(FlowConfig(time_density=density)).sample_time(500, CPU)
    assert 0 < t.min() and t.max() <= 1 and t.unique().numel() > 400


def test_flow_reads_a_density_of_sigma_as_noise_over_signal():
    t = Flow(FlowConfig(time_density="log_normal")).sample_time(50_000, CPU, torch.Generator().manual_seed(0))
    assert (t / (1 - t)).median().item() == pytest.approx(math.exp(-1.2), rel=0.03)


def test_shift_of_a_flow_moves_its_training_times():
    draw = lambda shift: Flow(FlowConfig(shift=shift)).sample_time(100, CPU, torch.Generator().manual_seed(0))
    t = draw(1.0)
    torch.testing.assert_close(draw(3.0), 3 * t / (1 + 2 * t))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("betta", r"process.time_density must be one of .* got 'betta'. Did you mean 'beta'\?"),
        ("beta(1,2,3)", r"process.time_density=beta takes at most \(a, b\), got 'beta\(1,2,3\)'"),
        ("beta(-1)", r"process.time_density=beta: a must be positive, got -1"),
        ("beta(1, 0)", r"process.time_density=beta: b must be positive, got 0"),
        ("beta(x)", r"parameters must be numbers as in beta\(1, 2\), got 'beta\(x\)'"),
        ("beta(nan)", r"process.time_density=beta takes at most \(a, b\), got 'beta\(nan\)'"),
        ("beta(1", r"process.time_density must be one of .* got 'beta\(1'"),
        ("uniform(1)", r"process.time_density=uniform takes at most \(\), got"),
        ("logit_normal(0, 0)", r"process.time_density=logit_normal: sd must be positive, got 0"),
    ],
)
def test_slip_in_a_density_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        FlowConfig(time_density=text)
    with pytest.raises(ValueError, match=message):
        diffusion(time_density=text)


@pytest.mark.parametrize(
    ("text", "name", "parameters"),
    [
        ("beta", "beta", ()),
        (" beta ( 1.5 , 1 ) ", "beta", (1.5, 1.0)),
        ("beta()", "beta", ()),
        ("log_normal(-1.2, 1.2)", "log_normal", (-1.2, 1.2)),
    ],
)
def test_density_is_read_with_its_parameters(text, name, parameters):
    assert Named.parse("density", text, DENSITIES) == Named(name, parameters)
