"""Every schedule meets every sampler on every grid, and with the exact denoiser of Gaussian data the answer is known."""

import itertools
import math

import pytest
import torch

from diffpolicy.processes import PROCESSES, SCHEDULES, SPACINGS, SamplerConfig, sample
from diffpolicy.processes.diffusion import Diffusion
from diffpolicy.processes.flow import Flow, FlowConfig
from diffpolicy.processes.schedules import TERMINAL_SNRS, TUNED_FOR_1000
from tests.processes.exact import MEAN, SPREAD, diffusion, exact_denoise, noise_of

FLOW = Flow(FlowConfig())
COSINE = diffusion()
LINEAR_1000 = diffusion(schedule="linear", num_train_timesteps=1000)
PATHS = {"diffusion": COSINE, "flow": FLOW}
OURS = [name for name in Diffusion.samplers if name != "diffusers"]
STOCHASTIC = ("ddpm", "dpmpp_sde", "dpmpp_2m_sde")
LENGTHS = ((1, "zero"), (4, "sigma_min"), (7, "sigma_min"), (15, "zero"))
"""Steps and where the last one ends: warm-up only, odd and even, from fifteen on no lower order at the end."""
SOLVERS = [(path, name) for path in PATHS for name in PROCESSES[path][1].samplers]


def run(process, x_T, denoise=None, **choices):
    config = SamplerConfig(**{"clip_sample": None} | choices)
    return sample(process, denoise or exact_denoise(process), x_T, None, config, torch.Generator().manual_seed(1))


def carried(process, x_T: torch.Tensor, end: float) -> torch.Tensor:
    """Where the noise-free path of Gaussian data, along which x stays at the same quantile, leads from t = 1 to `end`."""
    alpha, sigma = process.levels(torch.tensor([1.0, end], dtype=torch.float64))
    spread = ((alpha * SPREAD).square() + sigma.square()).sqrt()
    return alpha[1] * MEAN + spread[1] / spread[0] * (x_T - alpha[0] * MEAN)


# --- everything meets everything ---


@pytest.mark.parametrize(
    ("schedule", "terminal_snr"),
    [(s, t) for s in SCHEDULES for t in TERMINAL_SNRS if t != "scaled" or s in TUNED_FOR_1000],
)
def test_every_sampler_on_every_grid_is_finite_or_one_clear_error(schedule, terminal_snr):
    process, x_T = diffusion(schedule=schedule, terminal_snr=terminal_snr), noise_of(0, 3, 2, 2)
    for name, spacing, (num_steps, final) in itertools.product(OURS, SPACINGS, LENGTHS):
        choices = {"name": name, "spacing": spacing, "num_inference_steps": num_steps, "final_sigma": final}
        try:
            got = run(process, x_T, **choices)
        except ValueError as error:
            assert terminal_snr == "zero" and spacing in ("karras", "exponential"), choices
            assert "zero terminal SNR has none; use trailing" in str(error)
            continue
        # a Heun step across a large ratio of sigmas overshoots: cosine ends at 2,000, karras halves it in four steps
        assert got.isfinite().all() and got.abs().max() < (100 if name == "heun" else 10), choices


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_every_sampler_of_flow_is_finite_on_every_grid(shift, spacing):
    process, x_T = Flow(FlowConfig(shift=shift)), noise_of(0, 3, 2, 2)
    for name, (num_steps, final) in itertools.product(Flow.samplers, LENGTHS):
        got = run(process, x_T, name=name, spacing=spacing, num_inference_steps=num_steps, final_sigma=final)
        assert got.isfinite().all() and got.abs().max() < 10, (name, num_steps, final)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_meets_the_schedulers_of_diffusers(schedule, name):
    process, x_T = diffusion(schedule=schedule), noise_of(0, 3, 2, 2)
    ours = {"DDIMScheduler": "ddim", "DPMSolverMultistepScheduler": "dpmpp_2m", "UniPCMultistepScheduler": "unipc"}
    theirs = run(process, x_T, name="diffusers", scheduler=name)
    torch.testing.assert_close(theirs, run(process, x_T, name=ours[name]), atol=2e-3, rtol=0)


# --- order of convergence ---


@pytest.mark.parametrize(
    ("path", "name", "order"),
    [
        ("diffusion", "ddim", 1),
        ("diffusion", "euler", 1),
        ("diffusion", "dpmpp", 1),
        ("diffusion", "dpmpp_2m", 2),
        ("diffusion", "heun", 2),
        ("diffusion", "unipc", 3),  # the corrector adds one: Zhao et al. 2023, theorem 3.1
        ("flow", "euler", 1),
        ("flow", "ddim", 1),
        ("flow", "dpmpp_2m", 2),
        ("flow", "heun", 2),
        ("flow", "midpoint", 3),  # 2 in general; the error of order 2 cancels on Gaussian data
        ("flow", "unipc", 3),
    ],
)
def test_error_falls_with_the_order_of_the_sampler(path, name, order):
    process = LINEAR_1000 if path == "diffusion" else FLOW
    x_T = noise_of(0, 200, 1, 1, dtype=torch.float64)
    truth = carried(process, x_T, process.smallest_time)
    choices = {"name": name, "spacing": "exponential", "final_sigma": "sigma_min"}  # even steps of log-SNR
    few, many = (
        (run(process, x_T, num_inference_steps=n, **choices) - truth).square().mean().sqrt().item() for n in (40, 160)
    )
    assert math.log(few / many) / math.log(4) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize(("path", "name"), [s for s in SOLVERS if s[1] not in (*STOCHASTIC, "diffusers")])
def test_hundred_deterministic_steps_carry_each_noise_to_its_quantile(path, name):
    process, x_T = PATHS[path], noise_of(0, 500, 1, 1, dtype=torch.float64)
    got = run(process, x_T, name=name, num_inference_steps=100)
    torch.testing.assert_close(got, carried(process, x_T, 0.0), atol=0.04, rtol=0)


@pytest.mark.parametrize(("path", "name"), SOLVERS)
def test_sampler_recovers_mean_and_spread_of_the_data(path, name):
    got = run(PATHS[path], noise_of(0, 20_000, 1, 1), name=name, num_inference_steps=100)
    assert got.mean().item() == pytest.approx(MEAN, abs=0.01)
    # fixed_small, the smaller of DDPM's two variances, costs 8 % of the spread at T = 100 and 1 % at T = 1000
    assert got.std().item() == pytest.approx(SPREAD, rel=0.1 if name in ("ddpm", "dpmpp_sde") else 0.05)


@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m_sde"])
def test_spread_approaches_the_truth_with_more_steps(name):
    process = diffusion(num_train_timesteps=1000)
    got = run(process, noise_of(0, 20_000, 1, 1), name=name, num_inference_steps=1000)
    assert got.std().item() == pytest.approx(SPREAD, rel=0.02)


@pytest.mark.parametrize("name", ["dpmpp_sde", "dpmpp_2m_sde", "ddpm"])
def test_stochastic_sampler_forgets_where_it_started(name):
    x_T = noise_of(0, 20_000, 1, 1)
    got = run(COSINE, x_T, name=name, num_inference_steps=50)
    assert torch.corrcoef(torch.stack([x_T.flatten(), got.flatten()]))[0, 1].abs() < 0.1


def test_ddim_with_eta_one_is_ddpm():
    x_T = noise_of(0, 5, 4, 3)
    assert torch.equal(run(COSINE, x_T, name="ddim", eta=1.0), run(COSINE, x_T, name="ddpm"))


@pytest.mark.parametrize(("eta", "kept"), [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)])
def test_eta_says_how_much_of_the_noise_of_a_step_is_fresh(eta, kept):
    """One step of data at 0 to sigma_1: of the posterior variance eta^2 is fresh, so that x stays Normal(0, sigma)."""
    x_T = noise_of(0, 100_000, 1, 1)
    none = lambda x_t, t, condition: torch.zeros_like(x_t)
    choices = {"name": "ddim", "timesteps": (99, 49), "final_sigma": "sigma_min", "eta": eta}
    got = run(COSINE, x_T, none, **choices)
    alpha, sigma = COSINE.levels(torch.tensor([1.0, 0.5, 0.01], dtype=torch.float64))
    assert got.std().item() == pytest.approx(sigma[2].item(), rel=0.01)
    share = torch.corrcoef(torch.stack([x_T.flatten(), got.flatten()]))[0, 1].item()
    fresh = lambda i: eta**2 * (1 - (alpha[i] * sigma[i + 1]) ** 2 / (alpha[i + 1] * sigma[i]) ** 2)
    assert share == pytest.approx(math.sqrt((1 - fresh(0)) * (1 - fresh(1))), abs=0.01)
    assert (share < 0.01) == (kept == 0)


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("path", PATHS)
def test_one_deterministic_call_is_the_conditional_mean(path, name):
    process, x_T = PATHS[path], noise_of(0, 50, 4, 3)
    expected = exact_denoise(process)(x_T, torch.ones(50), None)
    torch.testing.assert_close(run(process, x_T, name=name, num_inference_steps=1), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("num_calls", [3, 5, 9])
@pytest.mark.parametrize(
    "process", [FLOW, diffusion(terminal_snr="zero", prediction_type="sample")], ids=["flow", "zero"]
)
def test_few_heun_calls_shrink_the_spread_and_never_overshoot(process, num_calls):
    """From pure noise, where the first step of zero SNR is Euler's."""
    got = run(process, noise_of(0, 5000, 1, 1), name="heun", num_inference_steps=num_calls)
    assert 0.1 * SPREAD < got.std() < SPREAD
    assert got.mean().item() == pytest.approx(MEAN, abs=0.01)


def test_schedule_that_leaves_signal_misses_even_the_mean():
    """What the warning of Diffusion is about: with 60 % of the signal left, pure noise is the wrong start."""
    got = run(diffusion(schedule="linear"), noise_of(0, 20_000, 1, 1), name="ddim", num_inference_steps=100)
    assert abs(got.mean().item() - MEAN) > 0.03


@pytest.mark.parametrize("terminal_snr", ["scaled", "zero"])
def test_rescaled_linear_schedule_finds_the_mean(terminal_snr):
    process = diffusion(schedule="linear", terminal_snr=terminal_snr)
    got = run(process, noise_of(0, 20_000, 1, 1), name="ddim", num_inference_steps=100)
    assert got.mean().item() == pytest.approx(MEAN, abs=0.005)


# --- another start, another end ---


@pytest.mark.parametrize(("path", "name"), [("flow", "euler"), ("diffusion", "ddim"), ("flow", "heun")])
def test_temperature_scales_the_spread_around_the_mean(path, name):
    x_T = noise_of(0, 20_000, 1, 1)
    full, half = (run(PATHS[path], x_T, name=name, num_inference_steps=100, temperature=t) for t in (1.0, 0.5))
    torch.testing.assert_close(half - MEAN, (full - MEAN) / 2, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("path", "name"), [s for s in SOLVERS if s[1] not in (*STOCHASTIC, "diffusers")])
def test_final_sigma_min_ends_on_the_least_noise_that_was_trained(path, name):
    process, x_T = PATHS[path], noise_of(0, 500, 1, 1, dtype=torch.float64)
    at = carried(process, x_T, process.smallest_time)
    got = run(process, x_T, name=name, num_inference_steps=100, final_sigma="sigma_min")
    torch.testing.assert_close(got, at, atol=0.04, rtol=0)
    certain = run(process, x_T, lambda x_t, t, c: torch.zeros_like(x_t), name=name, final_sigma="sigma_min")
    _, sigma = process.levels(torch.tensor(process.smallest_time, dtype=torch.float64))
    torch.testing.assert_close(certain, sigma * x_T, atol=2e-3, rtol=0)


@pytest.mark.parametrize(("path", "name"), [("diffusion", "ddim"), ("diffusion", "dpmpp"), ("flow", "euler")])
def test_start_in_the_middle_goes_on_from_there(path, name):
    process, start = PATHS[path], torch.tensor([1.0, 0.7, 0.3, 0.0])
    x_0, noise = torch.full((4, 2, 1), MEAN, dtype=torch.float64), noise_of(0, 4, 2, 1, dtype=torch.float64)
    x_start = process.add_noise(x_0, noise, start.double())
    config = SamplerConfig(name=name, num_inference_steps=50, clip_sample=None)
    got = sample(process, exact_denoise(process), x_start, None, config, start=start)
    alpha, sigma = (level.view(-1, 1, 1) for level in process.levels(start.double()))
    quantile = (x_start - alpha * MEAN) / ((alpha * SPREAD).square() + sigma.square()).sqrt()
    torch.testing.assert_close(got, MEAN + SPREAD * quantile, atol=0.03, rtol=0)
    assert torch.equal(got[3], x_start[3])
