"""What every encoder of the family promises."""

import dataclasses

import pytest
import torch

from diffpolicy.encoders import ENCODERS
from diffpolicy.spec import DataSpec, FieldSpec

SMALL = {
    "state": {"hidden_dims": (8,), "output_dim": 5},
    "resnet": {"feature_dim": 8, "num_keypoints": 4},
    "clip": {"image": "patch_tokens", "token_dim": 16},
}
"""Choices that make a member small and trainable; a new member without an entry is tested with its defaults."""
SPEC = DataSpec(
    fields={
        "observation.images.top": FieldSpec(shape=(40, 48, 3), dtype="uint8"),
        "observation.state": FieldSpec(shape=(2,), dtype="float32"),
        "observation.environment_state": FieldSpec(shape=(3, 2), dtype="float32"),
        "action": FieldSpec(shape=(2,), dtype="float32"),
    },
    tasks=("push the block",),
)


def build(name):
    config_class, encoder_class = ENCODERS[name]
    torch.manual_seed(0)
    return encoder_class(config_class(**SMALL.get(name, {})), spec=SPEC, obs_horizon=2).eval()


def observation(batch=3):
    torch.manual_seed(1)
    return {
        "observation.images.top": torch.randint(0, 256, (batch, 2, 40, 48, 3), dtype=torch.uint8),
        "observation.state": torch.randn(batch, 2, 2),
        "observation.environment_state": torch.randn(batch, 2, 3, 2),
        "task": ["push the block"] * batch,
    }


@pytest.mark.parametrize("name", ENCODERS)
def test_config_is_frozen_and_takes_keywords_only(name):
    config_class, _ = ENCODERS[name]
    fields = dataclasses.fields(config_class)
    assert config_class.__dataclass_params__.frozen
    assert all(field.kw_only and field.default is not dataclasses.MISSING for field in fields)


@pytest.mark.parametrize("name", ENCODERS)
def test_condition_has_the_sizes_that_were_announced(name):
    encoder = build(name)
    condition = encoder(observation())
    assert condition.global_cond.shape == (3, encoder.cond.global_dim)
    assert condition.tokens.shape == (3, encoder.cond.num_tokens, encoder.cond.token_dim)


@pytest.mark.parametrize("name", ENCODERS)
def test_gradient_reaches_every_parameter(name):
    encoder = build(name)
    condition = encoder(observation(batch=8))
    (condition.global_cond.square().sum() + condition.tokens.square().sum()).backward()
    without = [key for key, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("name", ENCODERS)
def test_item_of_a_batch_does_not_see_its_neighbours(name):
    encoder, obs = build(name), observation()
    alone = encoder({key: value[1:2] for key, value in obs.items()})
    together = encoder(obs)
    torch.testing.assert_close(together.global_cond[1:2], alone.global_cond, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.tokens[1:2], alone.tokens, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ENCODERS)
def test_same_observation_gives_the_same_condition_in_eval(name):
    encoder = build(name)
    assert torch.equal(encoder(observation()).global_cond, encoder(observation()).global_cond)


@pytest.mark.parametrize("name", ENCODERS)
def test_missing_observation_is_named(name):
    obs = observation()
    del obs["observation.environment_state"]
    with pytest.raises(ValueError, match=r"observation must have 'observation\.environment_state'"):
        build(name)(obs)


@pytest.mark.parametrize("name", ENCODERS)
def test_wrong_number_of_frames_is_named(name):
    obs = observation() | {"observation.state": torch.randn(3, 1, 2)}
    with pytest.raises(ValueError, match=r"observation.state must be \(B, T_obs=2, 2\), got \(3, 1, 2\)"):
        build(name)(obs)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_built_without_memory_loads_a_state_dict(name):
    encoder = build(name)
    config_class, encoder_class = ENCODERS[name]
    with torch.device("meta"):
        empty = encoder_class(config_class(**SMALL.get(name, {})), spec=SPEC, obs_horizon=2)
    empty.load_state_dict(encoder.state_dict(), assign=True)
    assert torch.equal(empty.eval()(observation()).global_cond, encoder(observation()).global_cond)
