"""What a policy may do without: learned nulls, dropout in training, and what must be there."""

import pytest
import torch

from tests.encoders.test_clip import GOAL, NO_CAMERA, ONE, STATE, TOP, TWO, WRIST, build, make_spec, observation

ALL = {"task_dropout": 0.5, "state_dropout": 0.5, "camera_dropout": 0.5, "goal_dropout": 0.5}
KEYS = {"state": STATE, TOP: TOP, WRIST: WRIST, "goal": "goal.image", "task": "task"}


def numbers(condition):
    return torch.cat([condition.global_cond, condition.tokens.flatten(1)], dim=1)


@pytest.mark.parametrize("image", ["pooled", "patch_tokens"])
@pytest.mark.parametrize("text", ["pooled", "tokens"])
@pytest.mark.parametrize(
    ("part", "spec"), [("state", TWO), (TOP, TWO), (WRIST, TWO), ("task", TWO), ("goal", GOAL), ("task", NO_CAMERA)]
)
def test_missing_part_leaves_no_trace_of_its_content(part, spec, text, image):
    choices = {k: v for k, v in ALL.items() if k != "goal_dropout" or spec is GOAL}
    if spec is NO_CAMERA:
        choices, image = {"task_dropout": 0.5, "state_dropout": 0.5}, "pooled"
    encoder = build(spec, text=text, image=image, **choices)
    obs, other = observation(spec, seed=1), observation(spec, seed=2)
    key = KEYS[part]
    if part == "task":
        other["task"] = ["pull the yellow one"] * 3
    changed = obs | {key: other[key]}
    missing = {k: v for k, v in obs.items() if k != key}
    want = encoder(missing)
    for got in (encoder(obs, drop=[part]), encoder(changed, drop=[part])):
        assert torch.equal(numbers(got), numbers(want))
        assert (got.token_mask is None) == (want.token_mask is None)
        assert got.token_mask is None or torch.equal(got.token_mask, want.token_mask)
    assert not torch.equal(numbers(want), numbers(encoder(obs)))
    assert not torch.equal(numbers(encoder(changed)), numbers(encoder(obs)))


def test_not_a_number_in_a_dropped_camera_does_not_spread():
    encoder = build(TWO, **{k: v for k, v in ALL.items() if k != "goal_dropout"})
    obs = observation(TWO)
    obs[STATE] = obs[STATE] * float("nan")
    assert numbers(encoder(obs, drop=["state"])).isfinite().all()


def test_some_of_a_batch_may_have_no_words():
    encoder = build(NO_CAMERA, text="tokens", task_dropout=0.1)
    obs = observation(NO_CAMERA)
    mixed = encoder(obs | {"task": [obs["task"][0], "", " "]})
    full, none = encoder(obs), encoder(obs, drop=["task"])
    assert torch.equal(mixed.global_cond[0], full.global_cond[0])
    assert torch.equal(mixed.global_cond[1:], none.global_cond[1:])
    assert mixed.token_mask.sum(dim=1).tolist() == [2 + 6, 2 + 1, 2 + 1]  # start, four words, end; else the one null
    assert torch.equal(mixed.tokens[1:, :3], none.tokens[1:, :3])


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("task", "observation must have 'task'.*encoder.task_dropout can do without"),
        (TOP, f"the policy needs '{TOP}': it was trained without encoder.camera_dropout, .* \\['state'\\] only"),
    ],
)
def test_part_that_training_never_hid_must_be_there(key, message):
    encoder = build(ONE, state_dropout=0.2)
    obs = observation(ONE)
    del obs[key]
    with pytest.raises(ValueError, match=message):
        encoder(obs)
    with pytest.raises(ValueError, match=f"the policy needs '{key}'"):
        encoder(observation(ONE), drop=[key])
    with pytest.raises(ValueError, match=r"a part of this policy's observation must be one of .* Did you mean 'task'"):
        encoder(observation(ONE), drop=["tasks"])


def test_empty_instruction_is_refused_where_training_never_hid_it():
    with pytest.raises(ValueError, match=r"number 1 has ''.*encoder.task_dropout can do without"):
        build(NO_CAMERA)(observation(NO_CAMERA) | {"task": ["push", "", "push"]})


def test_training_hides_each_part_of_a_sample_by_itself_and_evaluation_hides_nothing():
    encoder = build(TWO, task_dropout=0.3, state_dropout=0.2, camera_dropout=0.1)
    obs = {
        key: value * 200 if isinstance(value, list) else value[:1].expand(600, *value.shape[1:])
        for key, value in observation(TWO).items()
    }
    obs["task"] = obs["task"][:1] * 600
    with torch.no_grad():
        features = {
            key: value
            for key, value in zip(
                [TOP, WRIST], encoder.embed_images(observation(TWO), [TOP, WRIST]).values(), strict=True
            )
        }
        encoder.train()
        encoder.embed_images = lambda obs, keys: {
            key: type(f)(f.vector[:1].expand(600, -1, -1), f.tokens[:1].expand(600, -1, -1, -1))
            for key, f in features.items()
        }  # the tower is not what is tested
        torch.manual_seed(0)
        tokens = encoder(obs).tokens  # (600, 2 state + 4 image + 1 text, 16)
        encoder.eval()
        kept = encoder(obs).tokens
    hidden = (tokens != kept).any(dim=-1)
    assert torch.equal(hidden[:, 0], hidden[:, 1])  # both frames of a part go together
    assert torch.equal(hidden[:, 2], hidden[:, 4]) and torch.equal(hidden[:, 3], hidden[:, 5])
    shares = hidden[:, [0, 2, 3, 6]].double().mean(dim=0)
    torch.testing.assert_close(shares, torch.tensor([0.2, 0.1, 0.1, 0.3]).double(), atol=0.05, rtol=0)
    both = (hidden[:, 0] & hidden[:, 6]).double().mean().item()
    assert 0.02 < both < 0.11  # independent: .06
    assert (kept == kept[0]).all()


def test_condition_without_a_part_is_that_of_an_observation_that_lacks_it_and_costs_no_second_look():
    encoder = build(GOAL, **ALL)
    calls = []
    encoder.image_tower.register_forward_hook(lambda *_: calls.append("image"))
    encoder.text_tower.register_forward_hook(lambda *_: calls.append("text"))
    obs = observation(GOAL)
    obs["task"] = obs["task"][:1] * 3
    both = encoder(obs, without=["task", "goal"])
    assert calls == ["image", "text"]
    assert set(both.without) == {"task", "goal"}
    assert torch.equal(numbers(both), numbers(encoder(obs)))
    for part in ("task", "goal"):
        assert torch.equal(numbers(both.without[part]), numbers(encoder(obs, drop=[part])))
    twice = both.repeat(2)
    assert torch.equal(twice.without["goal"].global_cond[::2], both.without["goal"].global_cond)


def test_gradient_reaches_every_null():
    encoder = build(GOAL, **ALL)
    condition = encoder(observation(GOAL), drop=list(encoder.droppable))
    numbers(condition).square().sum().backward()
    nulls = {name: p for name, p in encoder.named_parameters() if "null" in name}
    assert len(nulls) == 2 * 4 and all(p.grad.any() for p in nulls.values())


def test_dropout_of_a_part_that_is_not_there_is_said():
    with pytest.warns(UserWarning, match="encoder.goal_dropout is ignored: this policy has no goal"):
        build(ONE, goal_dropout=0.1)
    with pytest.warns(UserWarning, match="encoder.camera_dropout is ignored"):
        build(NO_CAMERA, camera_dropout=0.1)


def test_goal_image_alone_tells_what_to_do():
    encoder = build(GOAL, text="none")
    obs, other = observation(GOAL, seed=1), observation(GOAL, seed=2)
    changed = encoder(obs | {"goal.image": other["goal.image"]})
    same = (changed.tokens == encoder(obs).tokens).all(dim=-1)
    assert same.tolist() == [[True] * 4 + [False]] * 3
    with pytest.raises(ValueError, match=r"goal.image must be \(B, T_obs=1, 48, 48, 3\)"):
        encoder(obs | {"goal.image": obs["goal.image"].repeat(1, 2, 1, 1, 1)})


def test_cameras_whose_names_differ_in_a_dot_only_keep_their_own_nulls_and_towers():
    spec = make_spec(**{"a.b": (40, 40), "a_b": (40, 40)})
    encoder = build(spec, camera_dropout=0.2, share_towers=False)
    assert len(encoder.assemble.null_vectors) == 2 and len(encoder.image_towers) == 2
    obs = observation(spec)
    first, second = (numbers(encoder(obs, drop=[key])) for key in spec.image_keys)
    assert not torch.equal(first, second)
    twin = build(spec, camera_dropout=0.2, share_towers=False)
    twin.load_state_dict(encoder.state_dict())
    assert torch.equal(numbers(twin(obs)), numbers(encoder(obs)))
