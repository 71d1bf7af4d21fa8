"""What every denoiser of the family promises."""

import dataclasses

import pytest
import torch

from diffpolicy.denoisers import DENOISERS
from diffpolicy.denoisers.dit import FUSIONS, TOKEN_FUSIONS
from diffpolicy.denoisers.embedding import sinusoidal_embedding
from diffpolicy.spec import Condition, ConditionSpec, TokenGroup, frame_tokens

SMALL = {
    "unet": [{"down_dims": (16, 32), "diffusion_step_embed_dim": 16}],
    "transformer": [{"width": 16, "depth": 2, "num_heads": 2, "num_cond_layers": layers} for layers in (0, 1)],
    "mlp": [{"width": 32, "depth": 2, "embed_dim": 16}],
    "dit": [{"fusion": fusion, "width": 16, "depth": 2, "num_heads": 2, "embed_dim": 8} for fusion in FUSIONS]
    + [
        {"fusion": fusion, "width": 16, "depth": 2, "num_heads": 2, "embed_dim": 8, **more}
        for fusion, more in (
            ("cross_attention", {"causal": True, "global_vector": True}),
            ("unified", {"causal": True, "qk_norm": True}),
        )
    ],
}
"""Choices that make a member small; a new member without an entry is tested with its defaults."""
MEMBERS = [
    pytest.param(name, choices, id=f"{name} {number}" if number else name)
    for name in DENOISERS
    for number, choices in enumerate(SMALL.get(name, [{}]))
]
COND = ConditionSpec(global_dim=6, groups=frame_tokens(2), token_dim=3)
KINDS = ConditionSpec(
    global_dim=6,
    token_dim=3,
    groups=(
        *(TokenGroup("state", 1, frame) for frame in (0, 1)),
        *(TokenGroup("image", 4, frame) for frame in (0, 1)),
        TokenGroup("text", 3),
    ),
)
"""Thirteen tokens of all sorts; the words may be padded."""


def build(name, choices=None, pred_horizon=8, cond=COND):
    config_class, denoiser_class = DENOISERS[name]
    torch.manual_seed(0)
    config = config_class(**(SMALL.get(name, [{}])[0] if choices is None else choices))
    denoiser = denoiser_class(config, action_dim=2, pred_horizon=pred_horizon, cond=cond)
    with torch.no_grad():  # leave the start, where zero gates hide what lies behind them
        for parameter in denoiser.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return denoiser.eval()


def inputs(batch=3, pred_horizon=8, cond=COND):
    torch.manual_seed(1)
    condition = Condition(global_cond=torch.randn(batch, 6), tokens=torch.randn(batch, cond.num_tokens, 3))
    return torch.randn(batch, pred_horizon, 2), torch.rand(batch) * 99, condition


@pytest.mark.parametrize("name", DENOISERS)
def test_config_is_frozen_and_takes_keywords_only(name):
    config_class, _ = DENOISERS[name]
    fields = dataclasses.fields(config_class)
    assert config_class.__dataclass_params__.frozen
    assert all(field.kw_only and field.default is not dataclasses.MISSING for field in fields)


@pytest.mark.parametrize(("name", "choices"), MEMBERS)
def test_prediction_has_the_shape_of_the_chunk(name, choices):
    x_t, t, condition = inputs()
    assert build(name, choices)(x_t, t, condition).shape == (3, 8, 2)


@pytest.mark.parametrize(("name", "choices"), MEMBERS)
def test_gradient_reaches_every_parameter(name, choices):
    denoiser = build(name, choices)
    denoiser(*inputs()).square().sum().backward()
    without = [key for key, p in denoiser.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize(("name", "choices"), MEMBERS)
def test_item_of_a_batch_does_not_see_its_neighbours(name, choices):
    denoiser = build(name, choices)
    x_t, t, condition = inputs()
    alone = denoiser(x_t[1:2], t[1:2], Condition(condition.global_cond[1:2], condition.tokens[1:2]))
    torch.testing.assert_close(denoiser(x_t, t, condition)[1:2], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "choices"), MEMBERS)
def test_prediction_depends_on_chunk_time_and_condition(name, choices):
    denoiser = build(name, choices)
    x_t, t, condition = inputs()
    other = Condition(condition.global_cond + 1, condition.tokens + 1)
    before = denoiser(x_t, t, condition)
    for changed in (denoiser(x_t + 1, t, condition), denoiser(x_t, t + 1, condition), denoiser(x_t, t, other)):
        assert (changed - before).abs().max() > 1e-4


@pytest.mark.parametrize(("name", "choices"), MEMBERS)
def test_same_call_gives_the_same_prediction_in_eval(name, choices):
    denoiser = build(name, choices)
    assert torch.equal(denoiser(*inputs()), denoiser(*inputs()))


@pytest.mark.parametrize(("name", "choices"), MEMBERS)
def test_names_without_weight_decay_are_parameters(name, choices):
    denoiser = build(name, choices)
    assert denoiser.no_weight_decay() <= {key for key, _ in denoiser.named_parameters()}


@pytest.mark.parametrize(("name", "choices"), MEMBERS)
def test_denoiser_built_without_memory_loads_a_state_dict(name, choices):
    denoiser = build(name, choices)
    config_class, denoiser_class = DENOISERS[name]
    with torch.device("meta"):
        empty = denoiser_class(config_class(**choices), action_dim=2, pred_horizon=8, cond=COND)
    empty.load_state_dict(denoiser.state_dict(), assign=True)
    assert torch.equal(empty.eval()(*inputs()), denoiser(*inputs()))


@pytest.mark.parametrize(("name", "choices"), MEMBERS)
def test_wrong_chunk_is_named(name, choices):
    x_t, t, condition = inputs()
    with pytest.raises(ValueError, match=r"x_t must be \(B, T_pred=8, D_act=2\), got \(3, 8, 1\)"):
        build(name, choices)(x_t[..., :1], t, condition)


@pytest.mark.parametrize(("name", "choices"), MEMBERS)
def test_time_must_be_one_number_per_sample(name, choices):
    x_t, t, condition = inputs()
    with pytest.raises(ValueError, match=r"t must hold one network time per sample, \(B=3,\), got \(1,\)"):
        build(name, choices)(x_t, t[:1], condition)


@pytest.mark.parametrize(("name", "choices"), MEMBERS)
def test_padded_tokens_and_what_they_hold_change_nothing_to_the_bit(name, choices):
    denoiser = build(name, choices, cond=KINDS)
    x_t, t, condition = inputs(cond=KINDS)
    real = torch.ones(3, 13, dtype=torch.bool)
    real[1:, 11:] = False  # two words of three
    other = condition.tokens.masked_fill(~real[..., None], 1e6)
    before = denoiser(x_t, t, Condition(condition.global_cond, condition.tokens, real))
    assert torch.equal(denoiser(x_t, t, Condition(condition.global_cond, other, real)), before)
    unpadded = denoiser(x_t, t, condition)
    torch.testing.assert_close(before[:1], unpadded[:1])
    if getattr(denoiser, "fusion", None) in TOKEN_FUSIONS or name == "transformer":
        assert (before[1:] - unpadded[1:]).abs().amax(dim=(1, 2)).min() > 1e-5
    else:
        assert torch.equal(before, unpadded)


@pytest.mark.parametrize(("name", "choices"), MEMBERS)
def test_prepared_condition_gives_the_same_numbers(name, choices):
    denoiser = build(name, choices, cond=KINDS)
    if not hasattr(denoiser, "prepare"):
        pytest.skip(f"denoiser.name={name} has no prepare")
    x_t, t, condition = inputs(cond=KINDS)
    real = torch.rand(3, 13) > 0.3
    for mask in (None, real):
        condition = Condition(condition.global_cond, condition.tokens, mask)
        prepared = denoiser.prepare(condition)
        for step in (t, t + 1):
            got, want = denoiser(x_t, step, prepared), denoiser(x_t, step, condition)
            if name == "dit":  # one path: a network sampled from is the network that was trained, to the bit
                assert torch.equal(got, want)
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_time_embedding_has_sines_before_cosines_and_ends_at_one_ten_thousandth():
    got = sinusoidal_embedding(torch.tensor([3.0]), 6)
    # frequencies 1, 10000^(-1/2) = .01, 10000^-1 = .0001
    want = torch.tensor([[0.1411200, 0.0299955, 0.0003000, -0.9899925, 0.9995500, 1.0000000]])
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["transformer", "mlp", "dit"])
def test_network_of_fixed_length_names_another_length(name):
    x_t, t, condition = inputs(pred_horizon=9)
    with pytest.raises(ValueError, match="T_pred=8"):
        build(name)(x_t, t, condition)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("unet", {"kernel_size": 4}, "kernel_size must be odd"),
        ("unet", {"down_dims": (16, 20)}, "n_groups must divide every entry"),
        ("unet", {"down_dims": (12, 24), "n_groups": 4}, r"down_dims\[0\] must be a multiple of 8"),
        ("unet", {"down_dims": ()}, "at least one level"),
        ("unet", {"diffusion_step_embed_dim": 15}, "must be even"),
        ("transformer", {"width": 30, "num_heads": 4}, "num_heads must divide denoiser.width = 30, got 4"),
        ("transformer", {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ("dit", {"fusion": "film_"}, r"denoiser.fusion must be one of .* Did you mean 'film'"),
        ("dit", {"width": 30, "num_heads": 4}, "num_heads must divide denoiser.width = 30, got 4"),
        ("dit", {"num_readouts": 0}, "num_readouts must be at least 1, got 0"),
        ("dit", {"embed_dim": 7}, "embed_dim must be even"),
        ("dit", {"dropout": -0.1}, r"dropout must be in \[0, 1\), got -0.1"),
        ("mlp", {"depth": 0}, "depth must be at least 1, got 0"),
        ("mlp", {"embed_dim": 2}, "embed_dim must be even and at least 4"),
    ],
)
def test_impossible_choice_is_named(name, wrong, message):
    with pytest.raises(ValueError, match=message):
        DENOISERS[name][0](**wrong)
