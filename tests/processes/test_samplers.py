"""Samplers: step by step what diffusers does where that is right, and exact answers where an exact denoiser exists."""

import warnings

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from diffpolicy.processes import (
    PROCESSES,
    SAMPLERS,
    SamplerConfig,
    draw_noise,
    noise_generators,
    resolve_sampler,
    sample,
    visited_steps,
)
from diffpolicy.processes.diffusion import Diffusion, DiffusionConfig
from diffpolicy.processes.flow import Flow, FlowConfig

OF_STEPS = ("trailing", "leading", "linspace")
"""Spacings that visit whole training steps."""
CPU = torch.device("cpu")
DIFFUSION = Diffusion(DiffusionConfig())
MEAN, SPREAD = 0.3, 0.2
"""Of the data in the exact tests, normalised units."""
SOLVERS = [(process, sampler) for process in ("diffusion", "flow") for sampler in PROCESSES[process][1].samplers]


def noise_of(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wavy_noise(x_t, t, condition):
    """Stands for a network that predicts noise: smooth, nonlinear, dependent on time."""
    return torch.sin(3 * x_t) + t.view(-1, 1, 1) * x_t


def wavy_denoise(x_t, t, condition):
    """The same network in our currency."""
    return DIFFUSION.to_x0(wavy_noise(x_t, t, condition), x_t, t)


def exact_denoise(process, spread: float = SPREAD):
    """E[x_0 | x_t] of data ~ Normal(MEAN, spread): what a perfect network would answer."""

    def denoise(x_t, t, condition):
        signal, sigma = (level.view(-1, 1, 1) for level in process.levels(t))
        gain = spread**2 * signal / (spread**2 * signal**2 + sigma**2)
        return MEAN + gain * (x_t - signal * MEAN)

    return denoise


def stock_ddim(spacing: str, num_steps: int, **choices) -> DDIMScheduler:
    scheduler = DDIMScheduler(
        num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", timestep_spacing=spacing, **choices
    )
    scheduler.set_timesteps(num_steps)
    return scheduler


def run_stock(scheduler, network, x_T, **step_choices):
    x_t = x_T
    for k in scheduler.timesteps:
        t = ((k + 1) / 100).expand(len(x_t))
        x_t = scheduler.step(network(x_t, t, None), k, x_t, **step_choices).prev_sample
    return x_t


# --- which steps are visited ---


@pytest.mark.parametrize(
    ("num_steps", "spacing", "steps"),
    [
        (4, "trailing", [99, 74, 49, 24]),
        (4, "linspace", [99, 66, 33, 0]),
        (4, "leading", [75, 50, 25, 0]),
        (1, "trailing", [99]),
        (1, "linspace", [99]),
        (1, "leading", [0]),
        (2, "leading", [50, 0]),
        (3, "trailing", [99, 66, 32]),
    ],
)
def test_visited_steps_are_literally_these(num_steps, spacing, steps):
    assert visited_steps(100, num_steps, spacing) == steps


@pytest.mark.parametrize("spacing", OF_STEPS)
def test_visited_steps_equal_those_of_diffusers(spacing):
    for num_steps in (2, 3, 5, 7, 10, 16, 50, 99, 100):
        scheduler = stock_ddim(spacing, num_steps)
        assert visited_steps(100, num_steps, spacing) == scheduler.timesteps.tolist(), num_steps


@pytest.mark.parametrize("spacing", OF_STEPS)
def test_as_many_steps_as_were_trained_visit_each_once(spacing):
    assert visited_steps(100, 100, spacing) == list(range(99, -1, -1))


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_more_steps_than_were_trained_are_refused(name):
    config = SamplerConfig(name=name, num_inference_steps=101)
    with pytest.raises(
        ValueError, match=r"num_inference_steps must be in \[1, process.num_train_timesteps = 100\], got 101"
    ):
        sample(DIFFUSION, wavy_denoise, noise_of(0, 2, 4, 3), None, config)


# --- agreement with diffusers ---


@pytest.mark.parametrize(
    ("spacing", "num_steps"), [("trailing", 1), ("trailing", 10), ("leading", 20), ("linspace", 100)]
)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_equals_diffusers_where_the_stride_is_constant(spacing, num_steps, eta):
    x_T = noise_of(0, 5, 4, 3)
    scheduler = stock_ddim(spacing, num_steps, prediction_type="sample", clip_sample=False)
    generator = noise_generators(torch.Generator().manual_seed(1))
    theirs = run_stock(scheduler, exact_denoise(DIFFUSION), x_T, eta=eta, generator=generator)
    config = SamplerConfig(name="ddim", num_inference_steps=num_steps, spacing=spacing, clip_sample=None, eta=eta)
    ours = sample(DIFFUSION, exact_denoise(DIFFUSION), x_T, None, config, torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)


@pytest.mark.parametrize("num_steps", [5, 10, 100])
def test_ddim_in_x0_equals_stock_stepping_in_epsilon_with_clipping(num_steps):
    x_T = noise_of(0, 5, 4, 3)
    scheduler = stock_ddim("trailing", num_steps, prediction_type="epsilon", clip_sample=True)
    theirs = run_stock(scheduler, wavy_noise, x_T, use_clipped_model_output=True)
    config = SamplerConfig(name="ddim", num_inference_steps=num_steps, clip_sample=1.0)
    ours = sample(DIFFUSION, wavy_denoise, x_T, None, config)
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("spacing", "num_steps"), [("trailing", 100), ("trailing", 10), ("leading", 20)])
@pytest.mark.parametrize("clip", [1.0, None])
def test_ddpm_in_x0_equals_stock_stepping_in_epsilon(spacing, num_steps, clip):
    network, denoise = wavy_noise, wavy_denoise
    if clip is None:  # without clipping a wavy network diverges, so that agreement would mean nothing
        denoise = exact_denoise(DIFFUSION)

        def network(x_t, t, condition):
            signal, sigma = DIFFUSION.signal_and_noise(t, x_t)
            return (x_t - signal * denoise(x_t, t, condition)) / sigma

    x_T = noise_of(0, 5, 4, 3)
    scheduler = DDPMScheduler(
        num_train_timesteps=100,
        beta_schedule="squaredcos_cap_v2",
        variance_type="fixed_small",
        clip_sample=clip is not None,
        timestep_spacing=spacing,
    )
    scheduler.set_timesteps(num_steps)
    theirs = run_stock(scheduler, network, x_T, generator=noise_generators(torch.Generator().manual_seed(1)))
    config = SamplerConfig(name="ddpm", num_inference_steps=num_steps, spacing=spacing, clip_sample=clip)
    ours = sample(DIFFUSION, denoise, x_T, None, config, torch.Generator().manual_seed(1))
    tolerance = 2e-5 if clip else 1e-4  # stock works in float32, and its first x_0 divides by a signal of 0.0005
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


@pytest.mark.parametrize("num_steps", [3, 4, 7, 10, 16])
@pytest.mark.parametrize("spacing", OF_STEPS)
def test_what_ddim_hands_to_the_denoiser_has_the_noise_of_that_time(spacing, num_steps):
    """diffusers takes every step to be T // N long, so that with linspace its chunk is noisier than the network is told."""
    x_T, off = noise_of(0, 4, 1, 1), {"ours": [], "diffusers": []}

    def watched(who):
        def denoise(x_t, t, condition):
            signal, sigma = DIFFUSION.signal_and_noise(t, x_t)
            off[who].append((x_t - (signal * MEAN + sigma * x_T)).abs().max().item())
            return torch.full_like(x_t, MEAN)  # all data lies here, so that the path of every noise is known

        return denoise

    start = visited_steps(100, num_steps, spacing)[0]
    signal, sigma = DIFFUSION.signal_and_noise(torch.full((4,), (start + 1) / 100), x_T)
    x_start = signal * MEAN + sigma * x_T
    config = SamplerConfig(name="ddim", num_inference_steps=num_steps, spacing=spacing, clip_sample=None)
    sample(DIFFUSION, watched("ours"), x_start, None, config)
    run_stock(
        stock_ddim(spacing, num_steps, prediction_type="sample", clip_sample=False), watched("diffusers"), x_start
    )
    assert max(off["ours"]) < 1e-5
    if spacing == "linspace":
        assert max(off["diffusers"]) > 0.02


def test_ddim_linspace_leaves_no_noise_in_a_narrow_mode_where_diffusers_does():
    """Four steps. Narrower than the truth, as every few-step DDIM: noise left over can offset that, but not by design."""
    narrow, x_T = 0.05, noise_of(0, 4000, 1, 1)
    denoise = exact_denoise(DIFFUSION, spread=narrow)
    stock = stock_ddim("linspace", 4, prediction_type="sample", clip_sample=False)
    config = SamplerConfig(name="ddim", num_inference_steps=4, spacing="linspace", clip_sample=None)
    assert run_stock(stock, denoise, x_T).std() > 3 * narrow
    assert sample(DIFFUSION, denoise, x_T, None, config).std() < narrow


# --- exact answers ---


@pytest.mark.parametrize(("process", "sampler"), SOLVERS)
def test_sampler_recovers_gaussian_mean_and_spread_with_the_exact_denoiser(process, sampler):
    config_class, process_class = PROCESSES[process]
    process = process_class(config_class())
    config = SamplerConfig(name=sampler, num_inference_steps=100, clip_sample=None)
    got = sample(
        process, exact_denoise(process), noise_of(0, 20_000, 1, 1), None, config, torch.Generator().manual_seed(1)
    )
    assert got.mean().item() == pytest.approx(MEAN, abs=0.01)
    # fixed_small, the smaller of DDPM's two variances, costs 8 % of the spread at T = 100 and 1 % at T = 1000
    assert got.std().item() == pytest.approx(SPREAD, rel=0.1 if sampler in ("ddpm", "dpmpp_sde") else 0.05)


def test_ddpm_spread_approaches_the_truth_with_more_steps():
    process = Diffusion(DiffusionConfig(num_train_timesteps=1000))
    config = SamplerConfig(name="ddpm", num_inference_steps=1000, clip_sample=None)
    got = sample(
        process, exact_denoise(process), noise_of(0, 20_000, 1, 1), None, config, torch.Generator().manual_seed(1)
    )
    assert got.std().item() == pytest.approx(SPREAD, rel=0.02)


def test_ddim_with_eta_one_has_the_spread_of_ddpm():
    x_T, spreads = noise_of(0, 20_000, 1, 1), {}
    for name, eta in (("ddpm", 0.0), ("ddim", 1.0)):
        config = SamplerConfig(name=name, num_inference_steps=50, clip_sample=None, eta=eta)
        spreads[name] = sample(
            DIFFUSION, exact_denoise(DIFFUSION), x_T, None, config, torch.Generator().manual_seed(1)
        ).std()
    torch.testing.assert_close(spreads["ddim"], spreads["ddpm"], atol=2e-3, rtol=0)


def test_schedule_that_leaves_signal_misses_even_the_mean():
    """What the warning of Diffusion is about: with 60 % of the signal left, pure noise is the wrong start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        linear = Diffusion(DiffusionConfig(schedule="linear"))
    config = SamplerConfig(name="ddim", num_inference_steps=100, clip_sample=None)
    got = sample(linear, exact_denoise(linear), noise_of(0, 20_000, 1, 1), None, config)
    assert abs(got.mean().item() - MEAN) > 0.03


@pytest.mark.parametrize("num_steps", [1, 2, 10])
@pytest.mark.parametrize(("process", "sampler"), SOLVERS)
def test_every_step_asks_the_denoiser_once_from_noise_to_data(process, sampler, num_steps):
    config_class, process_class = PROCESSES[process]
    process, asked = process_class(config_class()), []

    def denoise(x_t, t, condition):
        asked.append(t.unique().item())
        return exact_denoise(process)(x_t, t, condition)

    sample(process, denoise, noise_of(0, 2, 4, 3), None, SamplerConfig(name=sampler, num_inference_steps=num_steps))
    assert len(asked) == num_steps
    assert asked[0] == 1 and asked == sorted(asked, reverse=True) and min(asked) > 0


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_one_deterministic_step_is_the_conditional_mean(sampler):
    process = Flow(FlowConfig()) if sampler == "euler" else DIFFUSION
    x_T = noise_of(0, 50, 4, 3)
    config = SamplerConfig(name=sampler, num_inference_steps=1, clip_sample=None)
    expected = exact_denoise(process)(x_T, torch.ones(50), None)
    torch.testing.assert_close(sample(process, exact_denoise(process), x_T, None, config), expected)


def test_euler_visits_a_uniform_grid_and_lands_on_x0():
    seen = []

    def denoise(x_t, t, condition):
        seen.append((t[0].item(), x_t[0, 0, 0].item()))
        return torch.zeros_like(x_t) + (8.0 if len(seen) == 4 else 0.0)

    config = SamplerConfig(name="euler", num_inference_steps=4, clip_sample=None)
    got = sample(Flow(FlowConfig()), denoise, torch.full((1, 1, 1), 4.0), None, config)
    assert seen == [(1.0, 4.0), (0.75, 3.0), (0.5, 2.0), (0.25, 1.0)]
    assert got.item() == 8.0


def test_euler_steps_along_the_velocity():
    flow, x_t = Flow(FlowConfig()), noise_of(0, 3, 4, 2)
    velocity = lambda x, t: torch.sin(x) - t.view(-1, 1, 1)
    denoise = lambda x, t, condition: flow.to_x0(velocity(x, t), x, t)
    config = SamplerConfig(name="euler", num_inference_steps=10, clip_sample=None)
    got = sample(flow, denoise, x_t, None, config)
    for i in range(10):
        x_t = x_t - 0.1 * velocity(x_t, torch.full((3,), 1 - i / 10))
    torch.testing.assert_close(got, x_t, atol=1e-5, rtol=0)


# --- noise, clipping, choices ---


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0), ("euler", 0.0)])
def test_sample_of_a_batch_does_not_depend_on_its_neighbours(sampler, eta):
    process = Flow(FlowConfig()) if sampler == "euler" else DIFFUSION
    config = SamplerConfig(name=sampler, eta=eta)

    def chunks(*seeds: int) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        x_T = draw_noise((len(seeds), 4, 3), CPU, generators)
        return sample(process, exact_denoise(process), x_T, None, config, generators)

    together = chunks(5, 6, 7)
    assert torch.equal(together[1], chunks(6)[0])
    assert torch.equal(together.flip(0), chunks(7, 6, 5))
    assert not torch.equal(together[0], together[1])


def test_noise_of_one_generator_is_that_of_torch():
    got = draw_noise((2, 3), CPU, torch.Generator().manual_seed(3))
    assert torch.equal(got, torch.randn(2, 3, generator=torch.Generator().manual_seed(3)))


def test_wrong_number_of_generators_is_refused():
    with pytest.raises(ValueError, match="2 generators for a batch of 3; give one, or one for each sample"):
        draw_noise((3, 4), CPU, [torch.Generator(), torch.Generator()])


@pytest.mark.parametrize(("process", "sampler"), SOLVERS)
def test_clipping_is_what_the_config_says_and_nothing_else(process, sampler):
    config_class, process_class = PROCESSES[process]
    process = process_class(config_class())
    far = lambda x_t, t, condition: torch.full_like(x_t, 7.0)
    x_T = noise_of(0, 2, 4, 3)
    for limit, largest in ((0.5, 0.5), (3.0, 3.0), (None, 7.0)):
        got = sample(process, far, x_T, None, SamplerConfig(name=sampler, clip_sample=limit))
        torch.testing.assert_close(got, torch.full_like(got, largest), atol=1e-5, rtol=0)


def test_auto_takes_the_first_sampler_of_the_process():
    assert resolve_sampler(DIFFUSION, SamplerConfig()).name == "ddim"
    assert resolve_sampler(Flow(FlowConfig()), SamplerConfig()).name == "euler"


def test_more_steps_than_were_trained_are_refused_when_the_sampler_is_chosen():
    with pytest.raises(ValueError, match=r"num_inference_steps must be in \[1, process.num_train_timesteps = 50\], got 60"):
        resolve_sampler(Diffusion(DiffusionConfig(num_train_timesteps=50)), SamplerConfig(num_inference_steps=60))


@pytest.mark.parametrize(("process", "wrong"), [(Flow(FlowConfig()), "direct"), (DIFFUSION, "midpoint")])
def test_sampler_of_another_process_is_refused_with_those_that_fit(process, wrong):
    with pytest.raises(
        ValueError, match=rf"sampler.name={wrong} cannot sample process '(flow|diffusion)'; it takes one of \["
    ):
        resolve_sampler(process, SamplerConfig(name=wrong))


def test_clipping_to_no_number_is_refused():
    with pytest.raises(ValueError, match=r"sampler.clip_sample must be positive or null, got nan"):
        SamplerConfig(clip_sample=float("nan"))


def test_every_sampler_solves_some_process():
    assert {sampler for _, process in PROCESSES.values() for sampler in process.samplers} == set(SAMPLERS)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"name": "dddim"}, "sampler.name must be one of .* Did you mean 'ddim'"),
        ({"spacing": "trail"}, "sampler.spacing must be one of .* Did you mean 'trailing'"),
        ({"num_inference_steps": 0}, "sampler.num_inference_steps must be at least 1, got 0"),
        ({"clip_sample": 0.0}, "sampler.clip_sample must be positive or null, got 0.0"),
        ({"eta": 1.5}, r"sampler.eta must be in \[0, 1\], got 1.5"),
    ],
)
def test_choice_that_cannot_be_is_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**choices)
