"""What every member of every family promises; a new member is tested the moment it is listed.

Denoisers and encoders have their own contract tests, in tests/denoisers and tests/encoders.
"""

import dataclasses
import inspect
import json
import pickle
import warnings

import numpy as np
import pytest
import torch

from diffpolicy.config import FAMILIES, choose
from diffpolicy.demos import DEMONSTRATORS, make_demonstrator
from diffpolicy.envs import ENVIRONMENTS, RobotEnv, make_env
from diffpolicy.executors import EXECUTORS
from diffpolicy.policies import POLICIES
from diffpolicy.processes import (
    DENSITIES,
    LOSS_WEIGHTS,
    PROCESSES,
    SAMPLERS,
    SCHEDULES,
    SPACINGS,
    SamplerConfig,
    make_plan,
    sample,
)
from diffpolicy.spec import IMAGES, Batch, MissingExtraError
from tests.conftest import TINY_SPEC

MEMBERS = [(section, name) for section, family in FAMILIES.items() for name in family]
CPU = torch.device("cpu")
SOLVERS = [(process, sampler) for process, (_, cls) in PROCESSES.items() for sampler in cls.samplers]
GENERATIVE = [name for name, (config, _) in PROCESSES.items() if "prediction_type" in config.__dataclass_fields__]
"""Processes with a path between noise and data; the baselines have none."""


# --- every family ---


@pytest.mark.parametrize(("section", "name"), MEMBERS)
def test_config_is_frozen_keyword_only_and_complete(section, name):
    config_class, _ = FAMILIES[section][name]
    assert config_class.__dataclass_params__.frozen
    for field in dataclasses.fields(config_class):
        assert field.kw_only, field.name
        assert field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING, field.name


@pytest.mark.parametrize(("section", "name"), MEMBERS)
def test_config_travels_through_json(section, name):
    choice = choose(section, name)
    options = {k: v for k, v in json.loads(json.dumps(choice.to_dict())).items() if k != "name"}
    assert choose(section, name, options) == choice


@pytest.mark.parametrize(("section", "name"), MEMBERS)
def test_option_that_does_not_exist_is_refused(section, name):
    with pytest.raises(ValueError, match=rf"'{section}.no_such_option' must be one of"):
        choose(section, name, {"no_such_option": 1})


@pytest.mark.parametrize(("section", "name"), MEMBERS)
def test_member_says_what_it_is(section, name):
    assert FAMILIES[section][name][1].__doc__


def test_names_are_words_that_can_be_typed():
    choices = (SAMPLERS, SCHEDULES, SPACINGS, DENSITIES, LOSS_WEIGHTS)
    named = [n for f in (*FAMILIES.values(), *choices, POLICIES, EXECUTORS, DEMONSTRATORS) for n in f]
    assert [n for n in named if not (n.isidentifier() and n == n.lower())] == []


# --- processes, samplers, schedules ---


def build_process(name: str):
    config_class, process_class = PROCESSES[name]
    return process_class(config_class())


def chunks(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("name", PROCESSES)
def test_process_names_samplers_that_exist(name):
    samplers = PROCESSES[name][1].samplers
    assert samplers and set(samplers) <= set(SAMPLERS)


@pytest.mark.parametrize("name", PROCESSES)
def test_training_times_lie_in_zero_to_one_and_follow_the_generator(name):
    process = build_process(name)
    draw = lambda seed: process.sample_time(500, CPU, torch.Generator().manual_seed(seed))
    t = draw(0)
    assert t.shape == (500,) and t.min() > 0 and t.max() <= 1
    assert torch.equal(t, draw(0))
    if t.unique().numel() > 1:  # regression and straight flow know one time only
        assert not torch.equal(t, draw(1))


@pytest.mark.parametrize("name", GENERATIVE)
def test_process_ends_in_noise_and_begins_near_the_data(name):
    process, (x_0, noise) = build_process(name), chunks(5, 4, 3)
    torch.testing.assert_close(process.add_noise(x_0, noise, torch.ones(5)), noise, atol=0.01, rtol=0)
    torch.testing.assert_close(process.add_noise(x_0, noise, torch.full((5,), 0.01)), x_0, atol=0.2, rtol=0)


@pytest.mark.parametrize("t_shape", [(5,), (5, 4)])
@pytest.mark.parametrize("name", PROCESSES)
def test_process_takes_time_per_sample_and_per_action(name, t_shape):
    process, (x_0, noise) = build_process(name), chunks(5, 4, 3)
    t = process.sample_time(int(np.prod(t_shape)), CPU, torch.Generator().manual_seed(0)).view(t_shape)
    x_t, target = process.add_noise(x_0, noise, t), process.target(x_0, noise, t)
    assert x_t.shape == target.shape == x_0.shape and process.network_time(t).shape == t_shape
    torch.testing.assert_close(process.to_x0(target, x_t, t), x_0, atol=0.02, rtol=0)


@pytest.mark.parametrize("name", GENERATIVE)
def test_process_refuses_an_unknown_prediction_by_name(name):
    with pytest.raises(ValueError, match=r"process.prediction_type must be one of"):
        PROCESSES[name][0](prediction_type="nothing")


@pytest.mark.parametrize(("process", "sampler"), SOLVERS)
def test_sampler_keeps_shape_type_and_its_input(process, sampler):
    process, (x_T, _) = build_process(process), chunks(3, 4, 2)
    given = x_T.clone()
    config = SamplerConfig(name=sampler, num_inference_steps=4)
    got = sample(process, lambda x_t, t, condition: x_t / 2, x_T, None, config, torch.Generator().manual_seed(0))
    assert got.shape == x_T.shape and got.dtype == x_T.dtype and got.isfinite().all()
    assert torch.equal(x_T, given)


@pytest.mark.parametrize(("process", "sampler"), SOLVERS)
def test_sampler_returns_what_a_certain_denoiser_says(process, sampler):
    x_T, _ = chunks(3, 4, 2)
    config = SamplerConfig(name=sampler, num_inference_steps=4)
    got = sample(build_process(process), lambda x_t, t, condition: torch.full_like(x_t, 0.5), x_T, None, config)
    torch.testing.assert_close(got, torch.full_like(got, 0.5))


@pytest.mark.parametrize(("process", "sampler"), SOLVERS)
def test_sampler_hands_the_condition_on_and_time_per_sample(process, sampler):
    x_T, _ = chunks(3, 4, 2)
    condition = object()

    def denoise(x_t, t, got):
        assert got is condition and t.shape == (3,) and t.is_floating_point() and x_t.shape == (3, 4, 2)
        return x_t

    sample(build_process(process), denoise, x_T, condition, SamplerConfig(name=sampler, num_inference_steps=3))


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_sde", "dpmpp_2m_sde"])
def test_samples_of_one_observation_draw_noise_of_their_own_on_the_way(sampler):
    one = torch.Generator().manual_seed(0)
    start = torch.zeros(2, 4, 2)  # the same for both: what differs comes from the way
    first, second = sample(
        build_process("diffusion"), lambda x_t, t, c: x_t / 2, start, None, SamplerConfig(name=sampler), [one, one]
    )
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "scheduler", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"]
)
def test_scheduler_of_diffusers_that_would_answer_nan_at_zero_snr_is_refused(scheduler):
    config_class, process_class = PROCESSES["diffusion"]
    process = process_class(config_class(terminal_snr="zero", prediction_type="v_prediction"))
    with pytest.raises(ValueError, match=rf"{scheduler} steps in sigma / alpha, .* zero terminal SNR"):
        make_plan(process, SamplerConfig(name="diffusers", scheduler=scheduler))


@pytest.mark.parametrize("name", SPACINGS)
def test_spacing_takes_a_process_of_one_training_step(name):
    config_class, process_class = PROCESSES["diffusion"]
    process = process_class(config_class(num_train_timesteps=1))
    assert make_plan(process, SamplerConfig(spacing=name, num_inference_steps=1)).times == (1.0,)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_keeps_the_shape_of_time_and_names_its_source(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alpha_bar = SCHEDULES[name](torch.rand(3, 4, 5, dtype=torch.float64), 100)
    assert alpha_bar.shape == (3, 4, 5) and ((alpha_bar > 0) & (alpha_bar <= 1)).all()
    assert "arXiv:" in SCHEDULES[name].__doc__ or "diffusers" in SCHEDULES[name].__doc__


@pytest.mark.parametrize("name", DENSITIES)
def test_density_is_a_choice_of_every_generative_process(name):
    for process in GENERATIVE:
        config_class, process_class = PROCESSES[process]
        t = process_class(config_class(time_density=name)).sample_time(100, CPU, torch.Generator().manual_seed(0))
        assert t.shape == (100,) and t.dtype == torch.float32 and t.min() > 0 and t.max() <= 1
    assert DENSITIES[name].__doc__


@pytest.mark.parametrize("name", LOSS_WEIGHTS)
def test_loss_weight_is_a_choice_of_every_generative_process(name):
    for process in GENERATIVE:
        config_class, process_class = PROCESSES[process]
        weight = process_class(config_class(loss_weight=name)).loss_weight(torch.tensor([0.1, 0.5, 0.9]))
        assert (weight is None) == (name == "none")
        assert weight is None or (weight.shape == (3,) and (weight > 0).all())


@pytest.mark.parametrize(
    ("process", "prediction", "sound"),
    [
        ("diffusion", "epsilon", False),
        ("diffusion", "sample", False),
        ("diffusion", "v_prediction", True),
        ("flow", "sample", False),
        ("flow", "velocity", True),
    ],
)
def test_cosmap_is_a_finding_where_one_noise_level_would_be_all_that_is_learnt(process, prediction, sound):
    config_class, process_class = PROCESSES[process]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        built = process_class(config_class(prediction_type=prediction, loss_weight="cosmap"))
    assert [f.label.startswith("one noise level weighs") for f in built.findings()] == ([] if sound else [True])
    assert len(said) == (0 if sound else 1)


@pytest.mark.parametrize("name", SPACINGS)
def test_spacing_is_a_choice_of_every_generative_process(name):
    for process in GENERATIVE:
        times = make_plan(build_process(process), SamplerConfig(spacing=name, num_inference_steps=6)).times
        assert len(times) == 6 and list(times) == sorted(set(times), reverse=True) and 0 < times[-1] < times[0] <= 1
    assert SPACINGS[name].__doc__


@pytest.mark.parametrize("name", PROCESSES)
def test_process_trains_a_policy_and_samples_from_it(make_policy, name):
    policy = make_policy(process={"name": name})
    mask = torch.ones(3, 8, dtype=torch.bool)
    batch = Batch(obs=observation(), actions=torch.rand(3, 8, 2) + 2, mask=mask, window=torch.arange(3))
    policy.compute_loss(batch, torch.Generator().manual_seed(0)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.denoiser.parameters())
    chunk = policy.sample_actions(observation(), generators=torch.Generator().manual_seed(0))
    assert chunk.shape == (3, 8, 2) and chunk.isfinite().all()


# --- policies and executors ---


def observation(batch: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.rand(batch, 2, *TINY_SPEC.fields[key].shape, generator=generator) for key in TINY_SPEC.state_keys
    }


@pytest.mark.parametrize("name", POLICIES)
def test_policy_goes_from_observation_to_a_chunk_in_physical_units(make_policy, name):
    policy = make_policy(policy=name)
    chunk = policy.sample_actions(observation(), generators=torch.Generator().manual_seed(0))
    assert chunk.shape == (3, 8, 2) and chunk.dtype == torch.float32 and chunk.isfinite().all()
    condition = policy.encode(observation())
    assert torch.equal(policy.sample(condition, generators=torch.Generator().manual_seed(0)), chunk)
    assert policy.sample(condition, num_samples=4).shape == (3, 4, 8, 2)


@pytest.mark.parametrize("name", POLICIES)
def test_policy_has_a_loss_that_trains_it(make_policy, name):
    policy = make_policy(policy=name)
    mask = torch.ones(3, 8, dtype=torch.bool)
    batch = Batch(obs=observation(), actions=torch.rand(3, 8, 2) + 2, mask=mask, window=torch.arange(3))
    optimiser = torch.optim.Adam(policy.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = policy.compute_loss(batch, torch.Generator().manual_seed(0))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", POLICIES)
def test_policy_remembers_nothing_between_calls(make_policy, name):
    policy = make_policy(policy=name)
    seeded = lambda: policy.sample_actions(observation(), generators=torch.Generator().manual_seed(0))
    before = seeded()
    policy.sample_actions({key: value + 5 for key, value in observation().items()})
    assert torch.equal(seeded(), before)


@pytest.mark.parametrize("name", EXECUTORS)
def test_executor_plans_for_each_environment_alone(tiny_policy, name):
    executor = EXECUTORS[name](tiny_policy, batch_size=4)
    obs = {key: value.numpy() for key, value in observation(6).items()}
    generators = lambda *seeds: [torch.Generator().manual_seed(seed) for seed in seeds]
    together = executor.plan(obs, generators(*range(6)))
    assert together.shape[0] == 6 and together.shape[1] >= 1 and together.shape[2] == 2
    assert together.dtype == np.float64 and np.isfinite(together).all()
    alone = executor.plan({key: value[5:] for key, value in obs.items()}, generators(5))
    np.testing.assert_array_equal(together[5:], alone)


@pytest.mark.parametrize("name", EXECUTORS)
def test_executor_inside_a_control_loop_repeats_after_a_reset(tiny_policy, name):
    executor = EXECUTORS[name](tiny_policy)
    frames = [
        {key: np.random.default_rng(i).random(TINY_SPEC.fields[key].shape) for key in TINY_SPEC.state_keys}
        for i in range(9)
    ]

    def play() -> np.ndarray:
        executor.reset()
        generator = torch.Generator().manual_seed(0)
        return np.stack([executor.select_action(frame, generator) for frame in frames])

    first = play()
    assert first.shape == (9, 2)
    np.testing.assert_array_equal(play(), first)


# --- environments ---


def env_of(name: str, *, draws: bool = False, **choices) -> RobotEnv:
    try:
        env = make_env(name, **choices)
        if draws:  # a simulator that is installed may still find nothing to draw with
            env.reset(seed=0)
            env.render()
        return env
    except MissingExtraError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environment_says_what_it_is(name):
    env = env_of(name)
    obs, _ = env.reset(seed=1)
    assert env.fps > 0 and env.max_steps > 0 and env.task
    assert len(env.action_names) == env.action_space.shape[0] and env.action_units
    assert len(env.state_names) == len(env.get_state())
    assert set(obs) == set(env.observation_space.spaces)
    assert all(len(names) == obs[role].size for role, names in env.observation_names.items())
    assert set(env.observation_units) <= set(obs)
    assert all(key.startswith("observation.") for key in obs)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environment_keeps_to_its_spaces_and_reward_to_one(name):
    env = env_of(name, draws=True, pixels=True)
    env.action_space.seed(0)
    obs, _ = env.reset(seed=1)
    for _ in range(10):
        assert env.observation_space.contains(obs)
        obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
        assert 0 <= reward <= 1
        assert isinstance(bool(terminated), bool) and bool(info["is_success"]) == bool(terminated) and not truncated
    cameras = [key for key in obs if key.startswith(IMAGES)]
    assert cameras and all(obs[key].dtype == np.uint8 and obs[key].shape[-1] == 3 for key in cameras)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environment_is_decided_by_its_seed_and_restored_by_its_state(name):
    env, other = env_of(name), env_of(name)
    env.reset(seed=3)
    start = env.get_state()
    other.reset(seed=4)
    assert not np.array_equal(other.get_state(), start)
    other.reset(seed=3)
    np.testing.assert_array_equal(other.get_state(), start)
    assert start.dtype == np.float64
    env.action_space.seed(0)
    for _ in range(5):
        action = env.action_space.sample()
        env.step(action)
        other.step(action)
    np.testing.assert_array_equal(other.get_state(), env.get_state())
    other.reset(options={"state": start})
    np.testing.assert_allclose(other.get_state(), start, atol=1e-9)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environment_draws_itself_and_knows_where_actions_lie(name):
    env = env_of(name, draws=True)
    env.reset(seed=1)
    env.action_space.seed(0)
    picture = env.render()
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3 and picture.std() > 0
    actions = np.stack([env.action_space.sample() for _ in range(12)]).reshape(3, 4, -1)
    pixels = env.action_to_pixels(actions)
    assert pixels.shape == (3, 4, 2)
    assert (pixels >= 0).all() and (pixels <= np.array(picture.shape[1::-1])).all()


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environment_choices_travel_to_worker_processes(name):
    config = ENVIRONMENTS[name][0]()
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize("name", DEMONSTRATORS)
def test_demonstrator_acts_in_the_environment_of_its_name(name):
    env, demonstrator = env_of(name), make_demonstrator(name)
    env.reset(seed=1)
    demonstrator.reset(env, np.random.default_rng(0))
    action = np.asarray(demonstrator.act(env), dtype=env.action_space.dtype)
    assert action.shape == env.action_space.shape and np.isfinite(action).all()


def test_samplers_are_functions_of_a_process_and_their_config():
    required = {
        name: [p.name for p in inspect.signature(f).parameters.values() if p.default is p.empty]
        for name, f in SAMPLERS.items()
    }
    assert [name for name, names in required.items() if names != ["process", "config"]] == []
