"""What every sampler promises beside its answer: calls, times, noise, clipping, a start of one's own, clear refusals."""

import itertools

import pytest
import torch

from diffpolicy.processes import (
    PROCESSES,
    SAMPLERS,
    SPACINGS,
    SamplerConfig,
    draw_noise,
    make_plan,
    noise_generators,
    resolve_sampler,
    sample,
    visited_steps,
)
from diffpolicy.processes.baselines import Mip, MipConfig, Regression, RegressionConfig
from diffpolicy.processes.flow import Flow, FlowConfig
from diffpolicy.processes.samplers import run_plan
from tests.processes.exact import MEAN, diffusion, exact_denoise, noise_of

CPU = torch.device("cpu")
COSINE, FLOW = diffusion(), Flow(FlowConfig())
PATHS = {"diffusion": COSINE, "flow": FLOW}
SOLVERS = [(path, name) for path in PATHS for name in PROCESSES[path][1].samplers]
OURS = [solver for solver in SOLVERS if solver[1] != "diffusers"]
STOCHASTIC = [(path, name) for path, name in OURS if name in ("ddpm", "dpmpp_sde", "dpmpp_2m_sde")]


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# --- calls and times ---


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
        (100, "trailing", list(range(99, -1, -1))),
        (100, "linspace", list(range(99, -1, -1))),
        (100, "leading", list(range(99, -1, -1))),
    ],
)
def test_visited_steps_are_literally_these(num_steps, spacing, steps):
    assert visited_steps(100, num_steps, spacing) == steps
    plan = make_plan(COSINE, SamplerConfig(name="ddim", num_inference_steps=num_steps, spacing=spacing))
    assert plan.times == pytest.approx([(k + 1) / 100 for k in steps])


@pytest.mark.parametrize(
    ("spacing", "times"),
    [
        ("trailing", [1, 0.75, 0.5, 0.25]),
        ("leading", [0.751, 0.501, 0.251, 0.001]),
        ("linspace", [1, 0.667, 0.334, 0.001]),
        ("exponential", [1, 0.1, 0.01, 0.001]),
        ("karras", [1, 0.1936, 0.0226, 0.001]),
    ],
)
def test_times_of_flow_are_literally_these(spacing, times):
    plan = make_plan(FLOW, SamplerConfig(num_inference_steps=4, spacing=spacing))
    assert plan.times == pytest.approx(times, abs=1e-4)


def test_shift_of_a_flow_moves_its_grid():
    plan = make_plan(Flow(FlowConfig(shift=3.0)), SamplerConfig(num_inference_steps=4))
    assert plan.times == pytest.approx([1, 0.9, 0.75, 0.5])  # 3 t / (1 + 2 t)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("path", PATHS)
def test_times_fall_strictly_within_zero_and_one(path, spacing):
    for num_steps in (1, 2, 5, 50, 100):
        times = make_plan(PATHS[path], SamplerConfig(num_inference_steps=num_steps, spacing=spacing)).times
        assert len(times) == num_steps and 0 < times[-1] and times[0] <= 1
        assert all(a > b for a, b in itertools.pairwise(times)), (num_steps, times)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("path", "name"), OURS)
def test_plan_is_the_same_where_a_policy_is_built_without_memory(path, name, spacing):
    config = SamplerConfig(name=name, spacing=spacing)
    expected = make_plan(PATHS[path], config)
    with torch.device("meta"):
        assert make_plan(PATHS[path], config) == expected


@pytest.mark.parametrize(("path", "name"), SOLVERS)
def test_num_inference_steps_is_the_number_of_calls(path, name):
    process = PATHS[path]
    for num_steps in range(1, 13):
        config, asked = SamplerConfig(name=name, num_inference_steps=num_steps), []

        def denoise(x_t, t, condition, asked=asked):
            asked.append(t.unique().item())
            return exact_denoise(process)(x_t, t, condition)

        sample(process, denoise, noise_of(0, 2, 4, 3), None, config)
        plan = make_plan(process, config)
        assert len(asked) == plan.num_calls == num_steps
        assert asked == pytest.approx(plan.times) and asked == sorted(asked, reverse=True) and asked[0] == 1


@pytest.mark.parametrize(("name", "calls"), [("ddim", 3), ("dpmpp_2m", 3), ("unipc", 3), ("heun", 5)])
def test_explicit_timesteps_are_visited_whatever_num_inference_steps_says(name, calls):
    plan = make_plan(COSINE, SamplerConfig(name=name, timesteps=(99, 42, 7), num_inference_steps=50))
    assert sorted(set(plan.times), reverse=True) == pytest.approx([1.0, 0.43, 0.08])
    assert plan.num_calls == calls


def test_explicit_timesteps_of_a_flow_are_times():
    assert make_plan(FLOW, SamplerConfig(timesteps=(1.0, 0.3))).times == (1.0, 0.3)
    assert make_plan(FLOW, SamplerConfig(name="midpoint", timesteps=(1.0, 0.4))).times == pytest.approx(
        (1, 0.7, 0.4, 0.2)
    )


@pytest.mark.parametrize(
    ("process", "times", "message"),
    [
        (COSINE, (100, 3), r"sampler.timesteps must lie in \[0, 99\] \(T = 100\), got \[100, 3\]"),
        (COSINE, (3, -1), r"sampler.timesteps must lie in \[0, 99\]"),
        (FLOW, (1.5, 0.5), r"sampler.timesteps of a flow must lie in \(0, 1\], got \[1.5, 0.5\]"),
        (FLOW, (0.5, 0.0), r"sampler.timesteps of a flow must lie in \(0, 1\]"),
    ],
)
def test_explicit_timesteps_outside_the_process_are_refused(process, times, message):
    with pytest.raises(ValueError, match=message):
        make_plan(process, SamplerConfig(timesteps=times))


# --- what the loop does ---


@pytest.mark.parametrize(("path", "name"), OURS)
def test_sampling_never_waits_for_the_device(path, name):
    """On tensors without numbers every read by the host raises, as it would block on a GPU."""
    plan = make_plan(PATHS[path], SamplerConfig(name=name, num_inference_steps=4))
    got = run_plan(
        plan, lambda x_t, t, condition: x_t / (1 + t.view(-1, 1, 1)), torch.empty(2, 4, 3, device="meta"), None
    )
    assert got.shape == (2, 4, 3) and got.device.type == "meta"


def test_euler_visits_an_even_grid_and_lands_on_x0():
    seen = []

    def denoise(x_t, t, condition):
        seen.append((t[0].item(), x_t[0, 0, 0].item()))
        return torch.zeros_like(x_t) + (8.0 if len(seen) == 4 else 0.0)

    config = SamplerConfig(name="euler", num_inference_steps=4, clip_sample=None)
    got = sample(FLOW, denoise, torch.full((1, 1, 1), 4.0), None, config)
    assert seen == [(1.0, 4.0), (0.75, 3.0), (0.5, 2.0), (0.25, 1.0)]
    assert got.item() == 8.0


def test_midpoint_steps_along_the_velocity_in_the_middle():
    velocity = lambda x, t: torch.sin(x) - t
    denoise = lambda x, t, condition: FLOW.to_x0(velocity(x, t.view(-1, 1, 1)), x, t)
    x_t = noise_of(0, 3, 4, 2)
    config = SamplerConfig(name="midpoint", num_inference_steps=6, clip_sample=None)
    got = sample(FLOW, denoise, x_t, None, config)
    for t in (1, 2 / 3, 1 / 3):
        middle = x_t - velocity(x_t, t) / 6
        x_t = x_t - velocity(middle, t - 1 / 6) / 3
    torch.testing.assert_close(got, x_t, atol=1e-5, rtol=0)


def test_heun_on_a_flow_averages_the_velocities_at_both_ends():
    velocity = lambda x, t: torch.sin(x) - t
    denoise = lambda x, t, condition: FLOW.to_x0(velocity(x, t.view(-1, 1, 1)), x, t)
    x_t = noise_of(0, 3, 4, 2)
    got = sample(FLOW, denoise, x_t, None, SamplerConfig(name="heun", num_inference_steps=5, clip_sample=None))
    for t in (1, 2 / 3):
        first = velocity(x_t, t)
        x_t = x_t - (first + velocity(x_t - first / 3, t - 1 / 3)) / 6
    x_t = x_t - velocity(x_t, 1 / 3) / 3
    torch.testing.assert_close(got, x_t, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("path", "name"), SOLVERS)
def test_clipping_is_what_the_config_says_and_nothing_else(path, name):
    far, x_T = lambda x_t, t, condition: torch.full_like(x_t, 7.0), noise_of(0, 2, 4, 3)
    for limit, largest in ((0.5, 0.5), (3.0, 3.0), (None, 7.0)):
        got = sample(PATHS[path], far, x_T, None, SamplerConfig(name=name, clip_sample=limit))
        torch.testing.assert_close(got, torch.full_like(got, largest), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("path", "name"), SOLVERS)
def test_temperature_zero_starts_from_zeros(path, name):
    seen = []

    def denoise(x_t, t, condition):
        seen.append(x_t)
        return x_t

    config = SamplerConfig(name=name, temperature=0.0, scheduler="DDIMScheduler")
    sample(PATHS[path], denoise, noise_of(0, 2, 4, 3), None, config)
    assert not seen[0].any()


# --- noise ---


@pytest.mark.parametrize(("path", "name"), SOLVERS)
def test_sample_of_a_batch_does_not_depend_on_its_neighbours(path, name):
    process = PATHS[path]
    config = SamplerConfig(name=name, eta=1.0 if name == "ddim" else 0.0, scheduler="DDPMScheduler")

    def chunks(*seeds: int) -> torch.Tensor:
        generators = seeded(*seeds)
        x_T = draw_noise((len(seeds), 4, 3), CPU, generators)
        return sample(process, exact_denoise(process), x_T, None, config, generators)

    together = chunks(5, 6, 7)
    assert torch.equal(together[0], chunks(5)[0]) and torch.equal(together[1], chunks(6)[0])
    assert torch.equal(together.flip(0), chunks(7, 6, 5))
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize(("path", "name"), SOLVERS)
def test_sampling_leaves_the_generators_untouched(path, name):
    """So that an episode's next chunk starts from the same noise whatever sampled this one, in however many steps."""
    generators = seeded(1, 2)
    before = [g.get_state() for g in generators]
    config = SamplerConfig(name=name, eta=1.0 if name == "ddim" else 0.0, scheduler="DDPMScheduler")
    sample(PATHS[path], exact_denoise(PATHS[path]), noise_of(0, 2, 4, 3), None, config, generators)
    assert all(torch.equal(a, g.get_state()) for a, g in zip(before, generators, strict=True))


@pytest.mark.parametrize(("path", "name"), STOCHASTIC)
def test_noise_on_the_way_follows_the_generator_and_is_not_the_initial_noise_again(path, name):
    process, config = PATHS[path], SamplerConfig(name=name)
    x_T = noise_of(1, 2, 4, 3)
    chunk = lambda seed: sample(process, exact_denoise(process), x_T, None, config, torch.Generator().manual_seed(seed))
    assert torch.equal(chunk(1), chunk(1)) and not torch.equal(chunk(1), chunk(2))
    fresh = draw_noise((2, 4, 3), CPU, noise_generators(torch.Generator().manual_seed(1)))
    assert (fresh - x_T).abs().min() > 1e-3


def test_noise_on_the_way_shares_no_number_with_what_its_generator_draws_next():
    """Else the next chunk would start from the noise that this one was stirred with."""
    (generator,) = seeded(1)
    fresh = noise_generators(generator)
    of_next_chunk, on_the_way = (set(torch.randint(2**31, (1000,), generator=g).tolist()) for g in (generator, fresh))
    assert not of_next_chunk & on_the_way


def test_noise_of_one_generator_is_that_of_torch():
    got = draw_noise((2, 3), CPU, torch.Generator().manual_seed(3))
    assert torch.equal(got, torch.randn(2, 3, generator=torch.Generator().manual_seed(3)))


def test_wrong_number_of_generators_is_refused():
    with pytest.raises(ValueError, match="2 generators for a batch of 3; give one, or one for each sample"):
        draw_noise((3, 4), CPU, [torch.Generator(), torch.Generator()])


# --- a start of one's own ---


@pytest.mark.parametrize(("path", "name"), [("diffusion", "ddim"), ("diffusion", "dpmpp"), ("flow", "euler")])
@pytest.mark.parametrize("shape", [(3,), (3, 4)])
def test_start_one_everywhere_is_the_plain_sampler(path, name, shape):
    process, x_T = PATHS[path], noise_of(0, 3, 4, 2)
    config = SamplerConfig(name=name, num_inference_steps=5)
    plain = sample(process, exact_denoise(process), x_T, None, config)
    got = sample(process, exact_denoise(process), x_T, None, config, start=torch.ones(shape))
    torch.testing.assert_close(got, plain, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("path", "name"), [("diffusion", "ddim"), ("flow", "euler")])
def test_given_action_stays_to_the_bit_and_its_neighbours_are_sampled_as_ever(path, name):
    process, x_T = PATHS[path], noise_of(0, 3, 4, 2)
    start = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(3, 4)  # a committed prefix of two actions
    config = SamplerConfig(name=name, num_inference_steps=5)
    seen = []

    def denoise(x_t, t, condition):
        seen.append(t)
        answer = exact_denoise(process)(x_t, t, condition)
        return answer.where(t[..., None] > 0, torch.nan)  # nothing is asked of it where there is no noise

    got = sample(process, denoise, x_T, None, config, start=start)
    plain = sample(process, exact_denoise(process), x_T, None, config)
    assert torch.equal(got[:, :2], x_T[:, :2])
    torch.testing.assert_close(got[:, 2:], plain[:, 2:], atol=2e-6, rtol=0)
    assert all(t.shape == (3, 4) and not t[:, :2].any() for t in seen) and (seen[0][:, 2:] == 1).all()


@pytest.mark.parametrize(
    ("process", "choices", "start", "message"),
    [
        (COSINE, {"name": "ddpm"}, torch.ones(3), "a start time needs a deterministic first-order sampler .* got ddpm"),
        (COSINE, {"name": "ddim", "eta": 0.5}, torch.ones(3), "a start time needs a deterministic"),
        (FLOW, {"name": "heun"}, torch.ones(3), "a start time needs a deterministic"),
        (COSINE, {}, torch.ones(2), r"start must be times in \[0, 1\] of shape \(B,\) or \(B, T_pred\), got \(2,\)"),
        (COSINE, {}, torch.ones(3, 4, 2), r"start must be times in \[0, 1\]"),
        (COSINE, {}, torch.full((3,), 1.5), r"start must be times in \[0, 1\]"),
    ],
)
def test_start_that_cannot_be_is_refused(process, choices, start, message):
    with pytest.raises(ValueError, match=message):
        sample(process, exact_denoise(process), noise_of(0, 3, 4, 2), None, SamplerConfig(**choices), start=start)


# --- choices ---


def test_auto_takes_the_first_sampler_of_the_process():
    assert resolve_sampler(COSINE, SamplerConfig()).name == "ddim"
    assert resolve_sampler(FLOW, SamplerConfig()).name == "euler"


def test_resolved_config_says_how_many_calls_a_fixed_plan_makes():
    assert resolve_sampler(Regression(RegressionConfig()), SamplerConfig()).num_inference_steps == 1
    assert resolve_sampler(Mip(MipConfig()), SamplerConfig()).num_inference_steps == 2
    assert resolve_sampler(COSINE, SamplerConfig(timesteps=(99, 42, 7))).num_inference_steps == 3
    assert resolve_sampler(COSINE, SamplerConfig(num_inference_steps=7)).num_inference_steps == 7


def test_more_steps_than_were_trained_are_refused_when_the_sampler_is_chosen():
    with pytest.raises(
        ValueError, match=r"num_inference_steps must be in \[1, process.num_train_timesteps = 50\], got 60"
    ):
        resolve_sampler(diffusion(num_train_timesteps=50), SamplerConfig(num_inference_steps=60))


@pytest.mark.parametrize(("process", "wrong"), [(FLOW, "direct"), (COSINE, "midpoint"), (FLOW, "diffusers")])
def test_sampler_of_another_process_is_refused_with_those_that_fit(process, wrong):
    with pytest.raises(
        ValueError, match=rf"sampler.name={wrong} cannot sample process '(flow|diffusion)'; it takes one of \["
    ):
        resolve_sampler(process, SamplerConfig(name=wrong))


def test_every_sampler_solves_some_process():
    assert {sampler for _, process in PROCESSES.values() for sampler in process.samplers} == set(SAMPLERS)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"name": "dddim"}, "sampler.name must be one of .* Did you mean 'ddim'"),
        ({"spacing": "trail"}, "sampler.spacing must be one of .* Did you mean 'trailing'"),
        ({"final_sigma": "sigma_mi"}, "sampler.final_sigma must be one of .* Did you mean 'sigma_min'"),
        ({"num_inference_steps": 0}, "sampler.num_inference_steps must be at least 1, got 0"),
        ({"clip_sample": 0.0}, "sampler.clip_sample must be positive or null, got 0.0"),
        ({"clip_sample": float("nan")}, "sampler.clip_sample must be positive or null, got nan"),
        ({"eta": 1.5}, r"sampler.eta must be in \[0, 1\], got 1.5"),
        ({"temperature": -1.0}, "sampler.temperature must not be negative, got -1.0"),
        ({"timesteps": ()}, r"sampler.timesteps must be a falling list of times, got \[\]"),
        ({"timesteps": (1, 2)}, r"sampler.timesteps must be a falling list of times, got \[1, 2\]"),
        ({"timesteps": (float("nan"),)}, r"sampler.timesteps must be a falling list of times, got \[nan\]"),
    ],
)
def test_choice_that_cannot_be_is_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**choices)


def test_mixed_starts_agree_with_the_mean_of_certain_data():
    """All data lies at MEAN, so every start, given or noisy, ends there unless it was given elsewhere."""
    x_start = noise_of(0, 2, 4, 1)
    start = torch.tensor([[0.0, 0.2, 0.6, 1.0], [1.0, 1.0, 0.0, 0.5]])
    certain = lambda x_t, t, condition: torch.full_like(x_t, MEAN)
    got = sample(COSINE, certain, x_start, None, SamplerConfig(name="ddim"), start=start)
    expected = torch.where(start[..., None] == 0, x_start, torch.full_like(x_start, MEAN))
    torch.testing.assert_close(got, expected)
