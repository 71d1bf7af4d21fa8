"""Samplers do what diffusers does, step by step, where that is right; where it is not, the difference is shown.

All tables of diffusers are float32 (betas, their product, sigmas), ours are float64: agreement is 2e-6 on float64 chunks.
Where diffusers also casts the chunk to float32 (Euler), or draws noise in the chunk's type (DDIM, DDPM), chunks are float32.
"""

import inspect

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from diffpolicy.processes import SamplerConfig, make_plan, noise_generators, sample, visited_steps
from diffpolicy.processes.flow import Flow, FlowConfig
from diffpolicy.processes.schedules import schedule_betas
from tests.processes.exact import MEAN, diffusion, exact_denoise, noise_of

COSINE = diffusion()
LINEAR = diffusion(schedule="linear")
"""Its sigma / alpha ends at 1.3 and not at 2,000, so that nothing enlarges the float32 rounding of diffusers."""
FLOW = Flow(FlowConfig())
DPM = DPMSolverMultistepScheduler
MULTISTEP = {
    "dpmpp": (DPM, {"solver_order": 1}),
    "dpmpp_2m": (DPM, {"solver_order": 2}),
    "dpmpp_sde": (DPM, {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_2m_sde": (DPM, {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {}),
}


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stock(scheduler_class, num_steps: int, process=COSINE, **choices):
    """A scheduler of diffusers on the betas of a process, which takes x_0 and clips nothing."""
    takes = inspect.signature(scheduler_class.__init__).parameters
    choices = {"prediction_type": "sample", "timestep_spacing": "trailing", "clip_sample": False} | choices
    scheduler = scheduler_class(
        num_train_timesteps=process.num_train_timesteps,
        trained_betas=schedule_betas(process.config.schedule, process.num_train_timesteps).numpy(),
        **{k: v for k, v in choices.items() if k in takes},
    )
    scheduler.set_timesteps(num_steps)
    return scheduler


def stepped(scheduler, network, x_T: torch.Tensor, generator=None, num_train: int = 100, **choices) -> torch.Tensor:
    """The loop that the documentation of diffusers shows; its noise on the way comes from where ours does."""
    if generator is not None and "generator" in inspect.signature(scheduler.step).parameters:
        choices["generator"] = noise_generators(generator)
    x_t = x_T * float(scheduler.init_noise_sigma)
    for k in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x_t, k)
        t = ((k.double() + 1) / num_train).expand(len(x_T))
        x_t = scheduler.step(network(x_in, t, None), k, x_t, **choices).prev_sample
    return x_t


def ours(name: str, num_steps: int, x_T: torch.Tensor, process=COSINE, denoise=None, **choices) -> torch.Tensor:
    config = SamplerConfig(name=name, num_inference_steps=num_steps, **{"clip_sample": None} | choices)
    return sample(process, denoise or exact_denoise(process), x_T, None, config, seeded())


def wavy_noise(x_t, t, condition):
    """Stands for a network that predicts noise: smooth, nonlinear, dependent on time."""
    return torch.sin(3 * x_t) + t.view(-1, 1, 1).to(x_t) * x_t


def wavy_denoise(x_t, t, condition):
    """The same network in our currency."""
    return COSINE.to_x0(wavy_noise(x_t, t.float(), condition), x_t, t.float())


# --- step by step ---


@pytest.mark.parametrize(
    ("spacing", "num_steps"), [("trailing", 1), ("trailing", 10), ("leading", 20), ("linspace", 100)]
)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_equals_diffusers_where_the_stride_is_constant(spacing, num_steps, eta):
    x_T = noise_of(0, 5, 4, 3)
    scheduler = stock(DDIMScheduler, num_steps, timestep_spacing=spacing)
    theirs = stepped(scheduler, exact_denoise(COSINE), x_T, seeded(), eta=eta)
    torch.testing.assert_close(
        ours("ddim", num_steps, x_T, spacing=spacing, eta=eta), theirs, atol=2e-6, rtol=0, check_dtype=False
    )


@pytest.mark.parametrize("num_steps", [5, 10, 100])
def test_ddim_in_x0_equals_stock_stepping_in_epsilon_with_clipping(num_steps):
    x_T = noise_of(0, 5, 4, 3)
    scheduler = stock(DDIMScheduler, num_steps, prediction_type="epsilon", clip_sample=True)
    theirs = stepped(scheduler, wavy_noise, x_T, use_clipped_model_output=True)
    got = ours("ddim", num_steps, x_T, denoise=wavy_denoise, clip_sample=1.0)
    torch.testing.assert_close(got, theirs, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("spacing", "num_steps"), [("trailing", 100), ("trailing", 10), ("trailing", 2), ("leading", 20)]
)
def test_ddpm_equals_diffusers_with_the_posterior_variance(spacing, num_steps):
    x_T = noise_of(0, 5, 4, 3)
    scheduler = stock(DDPMScheduler, num_steps, variance_type="fixed_small", timestep_spacing=spacing)
    theirs = stepped(scheduler, exact_denoise(COSINE), x_T, seeded())
    torch.testing.assert_close(ours("ddpm", num_steps, x_T, spacing=spacing), theirs, atol=2e-6, rtol=0)


@pytest.mark.parametrize("num_steps", [100, 10])
def test_ddpm_in_x0_equals_stock_stepping_in_epsilon_with_clipping(num_steps):
    x_T = noise_of(0, 5, 4, 3)
    choices = {"prediction_type": "epsilon", "clip_sample": True, "variance_type": "fixed_small"}
    theirs = stepped(stock(DDPMScheduler, num_steps, **choices), wavy_noise, x_T, seeded())
    got = ours("ddpm", num_steps, x_T, denoise=wavy_denoise, clip_sample=1.0)
    torch.testing.assert_close(got, theirs, atol=2e-5, rtol=0)  # the wavy network enlarges rounding in a hundred steps


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 14, 15, 20, 50])
@pytest.mark.parametrize("final_sigma", ["zero", "sigma_min"])
@pytest.mark.parametrize("name", MULTISTEP)
def test_multistep_sampler_equals_diffusers(name, final_sigma, num_steps):
    scheduler_class, choices = MULTISTEP[name]
    x_T = noise_of(0, 5, 4, 3, dtype=torch.float64)
    scheduler = stock(scheduler_class, num_steps, final_sigmas_type=final_sigma, **choices)
    theirs = stepped(scheduler, exact_denoise(COSINE), x_T, seeded())
    torch.testing.assert_close(ours(name, num_steps, x_T, final_sigma=final_sigma), theirs, atol=2e-6, rtol=0)


@pytest.mark.parametrize("spacing", ["linspace", "leading"])
@pytest.mark.parametrize("name", MULTISTEP)
def test_multistep_sampler_equals_diffusers_on_its_other_grids(name, spacing):
    """Which have one time more than ours and leave out the last: handed over as explicit timesteps."""
    scheduler_class, choices = MULTISTEP[name]
    x_T = noise_of(0, 5, 4, 3, dtype=torch.float64)
    scheduler = stock(scheduler_class, 10, timestep_spacing=spacing, **choices)
    theirs = stepped(scheduler, exact_denoise(COSINE), x_T, seeded())
    got = ours(name, 10, x_T, timesteps=tuple(scheduler.timesteps.tolist()))
    torch.testing.assert_close(got, theirs, atol=2e-6, rtol=0)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("num_steps", [2, 5, 10, 20])
def test_euler_equals_diffusers(num_steps, spacing):
    x_T = noise_of(0, 5, 4, 3)
    scheduler = stock(EulerDiscreteScheduler, num_steps, LINEAR, timestep_spacing=spacing)
    grid = tuple(scheduler.timesteps.tolist())  # linspace of Euler does not round to whole steps
    x_start = x_T * float(LINEAR.levels(torch.tensor(1.0))[1])  # Euler starts from sigma_max, not sqrt(1 + sigma_max^2)
    theirs = stepped(scheduler, blind_denoise, x_T)
    got = ours("euler", num_steps, x_start, LINEAR, blind_denoise, timesteps=grid)
    # diffusers interpolates sigma between two steps, we interpolate its logarithm
    torch.testing.assert_close(got, theirs, atol=2e-6 if spacing == "trailing" else 1e-3, rtol=0)


def blind_denoise(x_t, t, condition):
    """A denoiser that does not look at time, so that rounded times change nothing."""
    return torch.tanh(2 * x_t) / 2 + MEAN / 2


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 5, 10])
def test_heun_of_n_steps_equals_diffusers_and_makes_2n_minus_1_calls(num_steps, prediction_type):
    x_T = noise_of(0, 5, 4, 3, dtype=torch.float64)
    denoise = exact_denoise(LINEAR)

    def network(x_t, t, condition):
        if prediction_type == "sample":
            return denoise(x_t, t, condition)
        alpha, sigma = (level.view(-1, 1, 1) for level in LINEAR.levels(t))
        return (x_t - alpha * denoise(x_t, t, condition)) / sigma

    scheduler = stock(HeunDiscreteScheduler, num_steps, LINEAR, prediction_type=prediction_type)
    x_start = x_T * float(LINEAR.levels(torch.tensor(1.0))[1])
    got = ours("heun", 2 * num_steps - 1, x_start, LINEAR)
    torch.testing.assert_close(got, stepped(scheduler, network, x_T), atol=2e-6, rtol=0)
    assert len(scheduler.timesteps) == 2 * num_steps - 1


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize(("name", "scheduler_class"), [("dpmpp_2m", DPM), ("unipc", UniPCMultistepScheduler)])
def test_sigma_spacings_visit_the_sigmas_of_diffusers(name, scheduler_class, spacing):
    scheduler = stock(scheduler_class, 8, LINEAR, **{f"use_{spacing}_sigmas": True})
    plan = make_plan(LINEAR, SamplerConfig(name=name, num_inference_steps=8, spacing=spacing))
    alpha, sigma = LINEAR.levels(torch.tensor(plan.times, dtype=torch.float64))
    torch.testing.assert_close(sigma / alpha, scheduler.sigmas[:-1].double(), rtol=1e-4, atol=0)  # 1 - beta in float32
    x_T = noise_of(0, 5, 4, 3, dtype=torch.float64)
    got = ours(name, 8, x_T, LINEAR, blind_denoise, spacing=spacing)
    torch.testing.assert_close(got, stepped(scheduler, blind_denoise, x_T), atol=5e-5, rtol=0)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 10])
def test_flow_euler_equals_diffusers_with_even_sigmas(num_steps):
    x_T, velocity = noise_of(0, 5, 4, 3), lambda x_t, t: torch.sin(x_t) - t
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps))
    theirs = x_T
    for t in scheduler.timesteps:
        theirs = scheduler.step(velocity(theirs, t / 1000), t, theirs).prev_sample
    denoise = lambda x_t, t, condition: FLOW.to_x0(velocity(x_t, t.view(-1, 1, 1)), x_t, t)
    torch.testing.assert_close(ours("euler", num_steps, x_T, FLOW, denoise), theirs, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("scheduler_class", "name"),
    [(DDIMScheduler, "ddim"), (DDPMScheduler, "ddpm"), (DPM, "dpmpp_2m"), (UniPCMultistepScheduler, "unipc")],
)
def test_diffusers_as_a_sampler_steps_its_scheduler_as_documented(scheduler_class, name):
    x_T, choices = noise_of(0, 5, 4, 3), {"scheduler": scheduler_class.__name__}
    got = ours("diffusers", 10, x_T, **choices)
    torch.testing.assert_close(
        got, stepped(stock(scheduler_class, 10), exact_denoise(COSINE), x_T, seeded()), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(got, ours(name, 10, x_T), atol=2e-6, rtol=0)


def test_diffusers_as_a_sampler_clips_x0_as_the_config_says():
    far = lambda x_t, t, condition: torch.full_like(x_t, 7.0)
    got = ours("diffusers", 5, noise_of(0, 2, 4, 3), denoise=far, clip_sample=0.5)
    torch.testing.assert_close(got, torch.full_like(got, 0.5))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"scheduler": "DDIMSheduler"}, "sampler.scheduler must be one of .* Did you mean 'DDIMScheduler'"),
        ({"scheduler": "CMStochasticIterativeScheduler"}, "takes no betas or no x_0 prediction"),
        (
            {"scheduler": "DPMSolverMultistepScheduler", "num_steps": 101},
            r"num_inference_steps must be in \[1, process.num_train_timesteps = 100\], got 101",
        ),
        ({"scheduler": "DDIMScheduler", "spacing": "karras"}, "DDIMScheduler has no spacing 'karras'"),
        ({"scheduler": "DDIMScheduler", "timesteps": (99, 3)}, "takes no explicit sampler.timesteps"),
        ({"scheduler": "UniPCMultistepScheduler", "spacing": "karras"}, "of diffusers fails at step .* choose another"),
    ],
)
def test_scheduler_of_diffusers_that_cannot_is_refused_by_name(choices, message):
    with pytest.raises(ValueError, match=message):
        ours("diffusers", **({"num_steps": 5, "x_T": noise_of(0, 2, 4, 3)} | choices))


# --- which steps are visited ---


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_visited_steps_equal_those_of_diffusers(spacing):
    for num_steps in (2, 3, 5, 7, 10, 16, 50, 99, 100):
        theirs = stock(DDIMScheduler, num_steps, timestep_spacing=spacing).timesteps.tolist()
        assert visited_steps(100, num_steps, spacing) == theirs, num_steps


# --- where diffusers is wrong ---


@pytest.mark.parametrize("num_steps", [3, 4, 7, 10, 16])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_what_ddim_hands_to_the_denoiser_has_the_noise_of_that_time(spacing, num_steps):
    """diffusers takes every step to be T // N long, so that with linspace its chunk is noisier than the network is told."""
    x_T, off = noise_of(0, 4, 1, 1), {"ours": [], "diffusers": []}

    def watched(who):
        def denoise(x_t, t, condition):
            alpha, sigma = COSINE.signal_and_noise(t, x_t)
            off[who].append((x_t - (alpha * MEAN + sigma * x_T)).abs().max().item())
            return torch.full_like(x_t, MEAN)  # all data lies here, so that the path of every noise is known

        return denoise

    start = visited_steps(100, num_steps, spacing)[0]
    alpha, sigma = COSINE.signal_and_noise(torch.full((4,), (start + 1) / 100), x_T)
    x_start = alpha * MEAN + sigma * x_T
    ours("ddim", num_steps, x_start, denoise=watched("ours"), spacing=spacing)
    stepped(stock(DDIMScheduler, num_steps, timestep_spacing=spacing), watched("diffusers"), x_start)
    assert max(off["ours"]) < 1e-5
    if spacing == "linspace":
        assert max(off["diffusers"]) > 0.02


def test_ddim_linspace_leaves_no_noise_in_a_narrow_mode_where_diffusers_does():
    """Four steps. Narrower than the truth, as every few-step DDIM: noise left over can offset that, but not by design."""
    narrow, x_T = 0.05, noise_of(0, 4000, 1, 1)
    denoise = exact_denoise(COSINE, spread=narrow)
    scheduler = stock(DDIMScheduler, 4, timestep_spacing="linspace")
    assert stepped(scheduler, denoise, x_T).std() > 3 * narrow
    assert ours("ddim", 4, x_T, denoise=denoise, spacing="linspace").std() < narrow


@pytest.mark.parametrize(("num_steps", "start"), [(10, 90), (2, 50), (1, 0)])
def test_default_spacing_of_diffusers_starts_below_pure_noise_and_ours_does_not(num_steps, start):
    scheduler = DDPMScheduler(num_train_timesteps=100)
    scheduler.set_timesteps(num_steps)
    assert scheduler.timesteps[0] == start
    assert make_plan(COSINE, SamplerConfig(num_inference_steps=num_steps)).times[0] == 1


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc"])
def test_linspace_over_all_steps_is_finite_where_diffusers_gives_nan(name):
    scheduler_class, choices = MULTISTEP[name]
    x_T = noise_of(0, 5, 4, 3, dtype=torch.float64)
    scheduler = stock(scheduler_class, 100, timestep_spacing="linspace", **choices)
    assert stepped(scheduler, exact_denoise(COSINE), x_T).isnan().any()
    assert ours(name, 100, x_T, spacing="linspace").isfinite().all()


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc"])
def test_karras_on_cosine_visits_ten_times_where_diffusers_collides_and_fails(name):
    scheduler_class, choices = MULTISTEP[name]
    x_T = noise_of(0, 5, 4, 3, dtype=torch.float64)
    scheduler = stock(scheduler_class, 10, use_karras_sigmas=True, **choices)
    assert scheduler.timesteps.tolist()[:5] == [99, 99, 99, 98, 98]
    with pytest.raises((IndexError, AssertionError)):
        stepped(scheduler, exact_denoise(COSINE), x_T)
    plan = make_plan(COSINE, SamplerConfig(name=name, spacing="karras"))
    assert len(set(plan.times)) == 10
    assert ours(name, 10, x_T, spacing="karras").isfinite().all()


def test_default_grid_of_flow_matching_in_diffusers_wastes_its_last_step():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(2)
    assert scheduler.sigmas.tolist() == pytest.approx([1, 0.001, 0])
    assert make_plan(FLOW, SamplerConfig(num_inference_steps=2)).times == (1.0, 0.5)


def test_scheduler_of_diffusers_cannot_be_shared_by_two_samplings_and_a_plan_can():
    x_T, denoise = noise_of(0, 5, 4, 3), exact_denoise(COSINE)
    scheduler = stock(DPM, 10)
    stepped(scheduler, denoise, x_T)
    with pytest.raises(IndexError):
        stepped(scheduler, denoise, x_T)
    config = SamplerConfig(name="dpmpp_2m", clip_sample=None)
    plan = make_plan(COSINE, config)
    first, second = (sample(COSINE, denoise, x_T, None, config, plan=plan) for _ in range(2))
    assert torch.equal(first, second)
