import pytest
import torch

from diffpolicy.encoders.state import StateConfig, StateEncoder
from diffpolicy.spec import ConditionSpec, DataSpec, FieldSpec, frame_tokens

SPEC = DataSpec(
    fields={
        "observation.environment_state": FieldSpec(shape=(2, 2), dtype="float32"),
        "action": FieldSpec(shape=(2,), dtype="float32"),
        "observation.state": FieldSpec(shape=(1,), dtype="float32"),
    }
)


def test_default_hands_on_the_numbers_in_the_order_of_the_spec():
    encoder = StateEncoder(StateConfig(), spec=SPEC, obs_horizon=2)
    obs = {
        "observation.state": torch.tensor([[[50.0], [60.0]]]),
        "observation.environment_state": torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]]]),
    }
    condition = encoder(obs)
    frames = [[1.0, 2.0, 3.0, 4.0, 50.0], [5.0, 6.0, 7.0, 8.0, 60.0]]
    assert condition.tokens.tolist() == [frames]
    assert condition.global_cond.tolist() == [frames[0] + frames[1]]
    assert encoder.cond == ConditionSpec(global_dim=10, groups=frame_tokens(2), token_dim=5)
    assert not list(encoder.parameters())


def test_mlp_sees_one_frame_at_a_time():
    torch.manual_seed(0)
    encoder = StateEncoder(StateConfig(hidden_dims=(8,), output_dim=3), spec=SPEC, obs_horizon=2)
    obs = {"observation.state": torch.randn(4, 2, 1), "observation.environment_state": torch.randn(4, 2, 2, 2)}
    changed = {key: value.clone() for key, value in obs.items()}
    changed["observation.state"][:, 1] += 1
    before, after = encoder(obs).tokens, encoder(changed).tokens
    torch.testing.assert_close(before[:, 0], after[:, 0])
    assert (before[:, 1] != after[:, 1]).any()
    assert encoder.cond == ConditionSpec(global_dim=6, groups=frame_tokens(2), token_dim=3)


def test_data_without_states_is_refused():
    spec = DataSpec(
        fields={
            "observation.images.top": FieldSpec(shape=(8, 8, 3), dtype="uint8"),
            "action": FieldSpec(shape=(2,), dtype="float32"),
        }
    )
    with pytest.raises(ValueError, match=r"use encoder\.name=resnet"):
        StateEncoder(StateConfig(), spec=spec, obs_horizon=1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden_dims": (8,)}, "encoder.output_dim must be set"),
        ({"hidden_dims": (0,), "output_dim": 2}, "encoder.hidden_dims must all be at least 1"),
        ({"output_dim": 0}, "encoder.output_dim must be at least 1, got 0"),
    ],
)
def test_impossible_choice_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        StateConfig(**wrong)


def test_cameras_that_are_not_looked_at_are_said_aloud():
    camera = {"observation.images.top": FieldSpec(shape=(96, 96, 3), dtype="uint8")}
    spec = DataSpec(fields={**SPEC.fields, **camera})
    with pytest.warns(UserWarning, match=r"encoder.name=state does not look at \('observation.images.top',\)"):
        StateEncoder(StateConfig(), spec=spec, obs_horizon=2)


def test_a_goal_image_that_is_not_looked_at_is_said_aloud():
    goal = {"goal.image": FieldSpec(shape=(96, 96, 3), dtype="uint8")}
    spec = DataSpec(fields={**SPEC.fields, **goal})
    with pytest.warns(UserWarning, match=r"encoder.name=state does not look at \('goal.image',\)"):
        StateEncoder(StateConfig(), spec=spec, obs_horizon=2)
