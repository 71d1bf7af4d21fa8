"""The contract: horizons that fit, selections that parse, sizes that follow from the fields."""

import torch
from pytest import mark, raises

from diffpolicy.spec import (
    Condition,
    DataSpec,
    FieldSpec,
    Horizons,
    KeySelection,
    MissingExtraError,
    unknown_name,
)


def test_horizons_past_defaults_to_the_observed_frames_before_now():
    assert Horizons(obs=3, pred=16, act=8).past == 2
    assert Horizons(obs=3, pred=16, act=8).executed == slice(2, 10)
    assert Horizons(obs=2, pred=16, act=8, past=0).executed == slice(0, 8)


@mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"obs": 2, "pred": 16, "act": 40},
            r"horizons.act must be in \[1, horizons.pred - horizons.past = 15\], got 40",
        ),
        ({"obs": 2, "pred": 16, "act": 16}, "got 16"),
        ({"obs": 0}, "horizons.obs must be at least 1, got 0"),
        ({"pred": -1}, "horizons.pred must be at least 1, got -1"),
        ({"act": 0}, "horizons.act must be at least 1, got 0"),
        ({"obs": 20, "pred": 16}, r"horizons.past must be in \[0, horizons.pred - 1 = 15\], got 19"),
        ({"obs": 2, "past": 3}, r"horizons.past must be in \[0, horizons.obs - 1 = 1\]"),
        ({"obs": 2, "past": -1}, "horizons.past must be in"),
    ],
)
def test_horizons_that_do_not_fit_are_refused_with_their_bounds(sizes, message):
    with raises(ValueError, match=message):
        Horizons(**sizes)


def test_the_longest_execution_that_fits_is_allowed():
    assert Horizons(obs=2, pred=16, act=15).executed == slice(1, 16)


@mark.parametrize(
    ("text", "key", "dims"),
    [
        ("state", "state", None),
        ("observation.state", "observation.state", None),
        (" state[0:2] ", "state", slice(0, 2)),
        ("state[3]", "state", slice(3, 4)),
        ("state[-1]", "state", slice(-1, None)),
        ("state[2:]", "state", slice(2, None)),
        ("state[:-1]", "state", slice(None, -1)),
        ("state[:]", "state", slice(None, None)),
    ],
)
def test_key_selection_parses(text, key, dims):
    assert KeySelection.parse(text) == KeySelection(key, dims)


@mark.parametrize(
    "text", ["", "state[", "state[]", "state[a]", "state[1,2]", "state[0:2:1]", "[0]", "two words", "s[0][1]"]
)
def test_key_selection_that_does_not_read_is_refused_with_examples(text):
    with raises(ValueError, match=r"a key must read like `state`, `state\[3\]` or `state\[0:2\]`, got "):
        KeySelection.parse(text)


def test_unknown_name_lists_what_is_known_and_suggests_the_nearest():
    error = unknown_name("denoiser.name", "ditt", {"unet": 1, "dit": 2})
    assert str(error) == "denoiser.name must be one of ['dit', 'unet'], got 'ditt'. Did you mean 'dit'?"
    assert str(unknown_name("sampler.name", "zzz", ["ddim"])) == "sampler.name must be one of ['ddim'], got 'zzz'"


def test_missing_extra_says_how_to_install_it():
    assert "pip install 'diffpolicy[pusht]'" in str(MissingExtraError("gym-pusht", "pusht"))


SPEC = DataSpec(
    fields={
        "observation.environment_state": FieldSpec(shape=(9, 2), dtype="float32"),
        "observation.images.top": FieldSpec(shape=(96, 96, 3), dtype="uint8"),
        "observation.state": FieldSpec(shape=(2,), dtype="float32"),
        "action": FieldSpec(shape=(7,), dtype="float32"),
    }
)


def test_data_spec_sorts_keys_by_kind_and_counts_their_numbers():
    assert SPEC.state_keys == ("observation.environment_state", "observation.state")
    assert SPEC.image_keys == ("observation.images.top",)
    assert (SPEC.state_dim, SPEC.action_dim) == (20, 7)


def test_data_spec_comes_back_from_json():
    import dataclasses
    import json

    assert DataSpec(**json.loads(json.dumps(dataclasses.asdict(SPEC)))) == SPEC


def test_repeated_condition_keeps_samples_of_one_observation_together():
    condition = Condition(torch.tensor([[1.0], [2.0]]), torch.tensor([[[1.0]], [[2.0]]]))
    repeated = condition.repeat(3)
    assert repeated.global_cond.flatten().tolist() == [1, 1, 1, 2, 2, 2]
    assert repeated.tokens.flatten().tolist() == [1, 1, 1, 2, 2, 2]
