"""Classifier-free guidance: the formula, what it costs, and that it steers."""

import pytest
import torch

from diffpolicy.config import build_policy, config_from_dict
from diffpolicy.guidance import GuidanceConfig, classifier_free
from diffpolicy.spec import Condition, DataSpec, FieldSpec

SPEC = DataSpec(
    fields={
        "observation.state": FieldSpec(shape=(3,), dtype="float32"),
        "goal.image": FieldSpec(shape=(32, 32, 3), dtype="uint8"),
        "action": FieldSpec(shape=(2,), dtype="float32"),
    }
)


def toy_condition(batch=3):
    """Three numbers a row: base, what the words add, what the goal adds."""
    full = torch.tensor([[1.0, 10.0, 100.0]]).repeat(batch, 1)
    no_words, no_goal = full.clone(), full.clone()
    no_words[:, 1], no_goal[:, 2] = 0, 0
    tokens = torch.zeros(batch, 0, 1)
    without = {"task": Condition(no_words, tokens), "goal": Condition(no_goal, tokens)}
    return Condition(full, tokens, without=without)


def toy_denoise(x_t, t, condition):
    assert len(x_t) == len(t) == len(condition.global_cond)
    return x_t * 0 + condition.global_cond.sum(dim=1)[:, None, None]


@pytest.mark.parametrize(
    ("weights", "want"),
    [
        ({"task": 3.0}, 1 + 3 * 10 + 100),
        ({"task": 0.0}, 1 + 0 + 100),
        ({"goal": 2.0}, 1 + 10 + 2 * 100),
        ({"task": 3.0, "goal": 0.5}, 1 + 3 * 10 + 0.5 * 100),
    ],
)
def test_weights_scale_what_each_part_adds_by_itself(weights, want):
    calls = []

    def denoise(x_t, t, condition):
        calls.append(len(x_t))
        return toy_denoise(x_t, t, condition)

    guided, everything = classifier_free(denoise, toy_condition(), GuidanceConfig(**weights))
    x_0 = guided(torch.randn(3, 4, 2), torch.full((3,), 0.5), everything)
    torch.testing.assert_close(x_0, torch.full((3, 4, 2), float(want)))
    assert calls == [3 * (1 + len(weights))]  # one batched pass


def test_weight_one_changes_and_costs_nothing():
    condition = toy_condition()
    denoise, same = classifier_free(toy_denoise, condition, GuidanceConfig())
    assert denoise is toy_denoise and same is condition


def test_time_per_action_is_repeated_with_its_rows():
    guided, everything = classifier_free(toy_denoise, toy_condition(), GuidanceConfig(task=2.0))
    assert guided(torch.randn(3, 4, 2), torch.zeros(3, 4), everything).shape == (3, 4, 2)


def test_guided_gaussians_are_gaussians_moved_along_the_difference():
    """p(x|c) = N(mu, s^2), p(x) = N(0, s^2): with equal spread the guided score is that of N(w mu, s^2)."""
    from diffpolicy.processes import PROCESSES, SamplerConfig, sample

    config_class, process_class = PROCESSES["flow"]
    process = process_class(config_class())
    spread, mu, weight = 0.2, 0.3, 2.5

    def denoise(x_t, t, condition):
        t = t[:, None, None].double()
        mean = condition.global_cond[:, :1, None]
        gain = (1 - t) * spread**2 / ((1 - t) ** 2 * spread**2 + t**2)
        return mean + gain * (x_t - (1 - t) * mean)

    tokens = torch.zeros(4000, 0, 1)
    full, none = torch.full((4000, 1), mu).double(), torch.zeros(4000, 1).double()
    condition = Condition(full, tokens, without={"task": Condition(none, tokens)})
    guided, everything = classifier_free(denoise, condition, GuidanceConfig(task=weight))
    noise = torch.randn(4000, 1, 1, generator=torch.Generator().manual_seed(0)).double()
    x = sample(
        process, guided, noise, everything, SamplerConfig(name="euler", num_inference_steps=200, clip_sample=None)
    )
    assert abs(x.mean().item() - weight * mu) < 0.02 and abs(x.std().item() - spread) < 0.01


def make_policy(**encoder):
    config = config_from_dict(
        {
            "horizons": {"obs": 2, "pred": 8, "act": 4},
            "encoder": {"name": "clip", "token_dim": 16, **encoder},
            "denoiser": {"name": "transformer", "width": 32, "depth": 1, "num_heads": 2},
            "sampler": {"num_inference_steps": 3},
        }
    )
    torch.manual_seed(0)
    policy = build_policy(config, SPEC).eval()
    for key in ("observation.state", "action"):
        policy.normalizer.fit(key, torch.randn(50, SPEC.fields[key].shape[0]))
    return policy


def observation(batch=2):
    generator = torch.Generator().manual_seed(1)
    return {
        "observation.state": torch.randn(batch, 2, 3, generator=generator),
        "goal.image": torch.randint(0, 256, (batch, 1, 32, 32, 3), dtype=torch.uint8, generator=generator),
        "task": ["push", "pull"][:batch],
    }


def chunk(policy, obs, **kwargs):
    return policy.sample_actions(obs, generators=[torch.Generator().manual_seed(i) for i in range(2)], **kwargs)


def test_policy_guides_with_one_look_and_one_network_call_a_step():
    policy = make_policy(task_dropout=0.1, goal_dropout=0.1)
    looks, calls = [], []
    policy.encoder.register_forward_hook(lambda *_: looks.append(1))
    policy.denoiser.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    plain = chunk(policy, observation())
    policy.use_guidance(GuidanceConfig(task=2.0, goal=1.5))
    guided = chunk(policy, observation())
    assert looks == [1, 1] and calls == [2] * 3 + [6] * 3
    assert guided.shape == plain.shape and not torch.allclose(guided, plain)
    policy.use_guidance(GuidanceConfig())
    assert torch.equal(chunk(policy, observation()), plain)


def test_weight_zero_is_the_policy_that_was_told_nothing():
    policy = make_policy(task_dropout=0.1)
    unheard = chunk(policy, {k: v for k, v in observation().items() if k != "task"})
    policy.use_guidance(GuidanceConfig(task=0.0))
    torch.testing.assert_close(chunk(policy, observation()), unheard, atol=1e-4, rtol=0)


def test_several_samples_are_guided_each_for_itself():
    policy = make_policy(task_dropout=0.1).use_guidance(GuidanceConfig(task=2.0))
    many = chunk(policy, observation(), num_samples=3)
    assert many.shape == (2, 3, 8, 2)
    torch.testing.assert_close(many[:, 0], chunk(policy, observation()), atol=1e-5, rtol=1e-5)


def test_training_makes_no_condition_that_it_does_not_use():
    policy = make_policy(task_dropout=0.1).use_guidance(GuidanceConfig(task=2.0)).train()
    assert policy.encode(observation()).without == {}


def test_guiding_what_training_never_hid_is_refused():
    with pytest.raises(ValueError, match=r"guidance.task=2 needs a policy .* encoder.task_dropout above 0; .* nothing"):
        make_policy().use_guidance(GuidanceConfig(task=2.0))
    with pytest.raises(ValueError, match=r"guidance.goal=3 .* this one can do without \['task'\]"):
        make_policy(task_dropout=0.1).use_guidance(GuidanceConfig(goal=3.0))


@pytest.mark.parametrize("weight", [-0.5, float("nan"), float("inf")])
def test_impossible_weight_is_named(weight):
    with pytest.raises(ValueError, match=r"guidance.task must be a finite number >= 0"):
        GuidanceConfig(task=weight)


def test_policy_without_its_words_runs_where_training_hid_them_and_says_so_where_not():
    obs = observation()
    del obs["task"]
    assert chunk(make_policy(task_dropout=0.1), obs).isfinite().all()
    with pytest.raises(ValueError, match="observation must have 'task'"):
        chunk(make_policy(), obs)
    del obs["goal.image"]
    assert chunk(make_policy(task_dropout=0.1, goal_dropout=0.1), obs).isfinite().all()
    with pytest.raises(ValueError, match=r"the policy needs 'goal.image'; the observation holds"):
        chunk(make_policy(task_dropout=0.1), obs)
