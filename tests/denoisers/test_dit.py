from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffpolicy.config import build_policy, load_config
from diffpolicy.denoisers.dit import FUSIONS, TOKEN_FUSIONS, Dit, DitConfig
from diffpolicy.denoisers.dit_blocks import Attention, hide_padding, may_see_frames, prefix_mask
from diffpolicy.spec import Condition, ConditionSpec, DataSpec, FieldSpec, TokenGroup

CONF = Path(__file__).parents[2] / "conf"
FUSION_FILES = sorted((CONF / "fusion").glob("*.yaml"))
COND = ConditionSpec(
    global_dim=6,
    token_dim=3,
    groups=(
        *(TokenGroup("state", 1, frame) for frame in (0, 1)),
        *(TokenGroup("image", 4, frame) for frame in (0, 1)),
        TokenGroup("text", 3),
    ),
)
STATES, FRAME_0, FRAME_1, WORDS = slice(0, 2), slice(2, 6), slice(6, 10), slice(10, 13)
"""Where the kinds stand among COND's 13 tokens."""
AT_ZERO = [fusion for fusion in FUSIONS if fusion != "film"]


def build(fusion, *, start=False, cond=COND, **choices):
    """A small Dit with random weights, in eval mode; start: as it begins its training."""
    torch.manual_seed(0)
    config = DitConfig(**{"fusion": fusion, "width": 16, "depth": 3, "num_heads": 2, "embed_dim": 8} | choices)
    denoiser = Dit(config, action_dim=2, pred_horizon=5, cond=cond)
    if start:
        return denoiser
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return denoiser.eval()


def inputs(batch=3):
    torch.manual_seed(1)
    condition = Condition(torch.randn(batch, 6), torch.randn(batch, 13, 3))
    return torch.randn(batch, 5, 2), 99 * torch.rand(batch), condition


def with_tokens(condition, where, value):
    tokens = condition.tokens.clone()
    tokens[:, where] = value
    return Condition(condition.global_cond, tokens, condition.token_mask)


# --- how training starts, and that it gets somewhere ---


@pytest.mark.parametrize("fusion", AT_ZERO)
def test_untrained_network_predicts_zero(fusion):
    assert not build(fusion, start=True)(*inputs()).any()


def test_film_starts_elsewhere():
    assert build("film", start=True)(*inputs()).abs().max() > 0.01


@pytest.mark.parametrize("fusion", AT_ZERO)
def test_every_block_starts_as_the_identity(fusion):
    denoiser, seen = build(fusion, start=True), []
    for block in denoiser.blocks:
        block.register_forward_hook(lambda _, given, got: seen.append(torch.equal(given[0], got)))
    denoiser(*inputs())
    assert seen == [True] * 3


@pytest.mark.parametrize("fusion", FUSIONS)
def test_gradient_reaches_every_parameter_after_two_steps_from_the_start(fusion):
    denoiser = build(fusion, start=True)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-2)
    for _ in range(3):  # the head, then the gates, then what lies behind both
        optimizer.zero_grad()
        (denoiser(*inputs()) - 1).square().sum().backward()
        optimizer.step()
    without = [key for key, p in denoiser.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_few_steps_of_training_tell_two_conditions_apart(fusion):
    denoiser = build(fusion, start=True, depth=1)
    chunks = torch.tensor([-1.0, 1.0])[:, None, None].expand(2, 5, 2)
    condition = inputs(2)[2]
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        x_t, t = torch.randn(2, 5, 2, generator=generator), 1000 * torch.rand(2, generator=generator)
        loss = (denoiser(x_t, t, condition) - chunks).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


# --- who sees whom ---


def test_prefix_mask_of_words_image_and_state():
    want = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    assert torch.equal(prefix_mask(("text", "image", "state")), want)


def test_frames_later_than_an_action_are_hidden_and_words_never():
    want = torch.tensor([[1, 0, 1], [1, 1, 1]], dtype=torch.bool)
    assert torch.equal(may_see_frames(2, (0, 1, None)), want)


def test_padding_in_one_sequence_hides_the_token_and_nothing_behind_it():
    real = torch.tensor([[True, False]])
    assert hide_padding(None, real, behind=2).tolist() == [[[[True, False, True, True]]]]
    assert hide_padding(None, real, keep_self=True).tolist() == [[[[True, False], [True, True]]]]


def test_in_one_sequence_the_prefix_does_not_see_the_states_to_the_bit():
    denoiser = build("unified")
    _, _, condition = inputs()
    before = denoiser.prepare(condition).kept
    after = denoiser.prepare(with_tokens(condition, STATES, 7.0)).kept
    for (keys, values), (other_keys, other_values) in zip(before, after, strict=True):
        assert torch.equal(keys[:, :, 2:], other_keys[:, :, 2:]) and torch.equal(
            values[:, :, 2:], other_values[:, :, 2:]
        )
        assert not torch.equal(keys[:, :, :2], other_keys[:, :, :2])


def test_in_one_sequence_states_see_the_prefix_and_each_other():
    denoiser = build("unified")
    _, _, condition = inputs()
    before = denoiser.prepare(condition).kept[-1][0]
    for where, changed in ((WORDS, STATES), (FRAME_0, STATES), (slice(0, 1), slice(1, 2))):
        after = denoiser.prepare(with_tokens(condition, where, 7.0)).kept[-1][0]
        assert (after - before)[:, :, changed].abs().amin(dim=(0, 1, 3)).min() > 1e-6


@pytest.mark.parametrize("fusion", TOKEN_FUSIONS)
def test_every_token_reaches_every_action(fusion):
    denoiser = build(fusion)
    x_t, t, condition = inputs()
    before = denoiser(x_t, t, condition)
    for token in range(13):
        after = denoiser(x_t, t, with_tokens(condition, slice(token, token + 1), 5.0))
        assert (after - before).abs().amax(dim=2).min() > 1e-6, token


@pytest.mark.parametrize("fusion", ["film", "adaln"])
def test_fusion_of_the_global_vector_does_not_look_at_tokens(fusion):
    denoiser = build(fusion, cond=ConditionSpec(global_dim=6, token_dim=0, groups=()))
    x_t, t, condition = inputs()
    other = Condition(condition.global_cond, torch.zeros(3, 0, 0))
    assert torch.equal(denoiser(x_t, t, condition), denoiser(x_t, t, other))


@pytest.mark.parametrize("fusion", TOKEN_FUSIONS)
def test_fusion_of_tokens_looks_at_the_global_vector_on_demand_only(fusion):
    x_t, t, condition = inputs()
    other = Condition(condition.global_cond + 1, condition.tokens)
    denoiser = build(fusion)
    assert torch.equal(denoiser(x_t, t, condition), denoiser(x_t, t, other))
    if fusion != "readout":
        denoiser = build(fusion, global_vector=True)
        assert not torch.equal(denoiser(x_t, t, condition), denoiser(x_t, t, other))


@pytest.mark.parametrize("fusion", TOKEN_FUSIONS)
def test_tokens_are_told_apart_by_kind_and_frame_alone(fusion):
    denoiser = build(fusion)
    x_t, t, condition = inputs()
    before = denoiser(x_t, t, condition)
    order = torch.arange(13)
    order[FRAME_0] = torch.tensor([5, 3, 2, 4])  # patches of one picture know their places from the encoder
    shuffled = Condition(condition.global_cond, condition.tokens[:, order])
    torch.testing.assert_close(denoiser(x_t, t, shuffled), before, atol=1e-5, rtol=1e-4)
    order = torch.arange(13)
    order[FRAME_0], order[FRAME_1] = torch.arange(6, 10), torch.arange(2, 6)
    swapped = Condition(condition.global_cond, condition.tokens[:, order])
    assert (denoiser(x_t, t, swapped) - before).abs().max() > 1e-4


@pytest.mark.parametrize("fusion", FUSIONS)
def test_causal_action_sees_no_later_action(fusion):
    denoiser = build(fusion, causal=True)
    x_t, t, condition = inputs()
    changed = x_t.clone()
    changed[:, 3:] += 1
    before, after = denoiser(x_t, t, condition), denoiser(changed, t, condition)
    assert torch.equal(before[:, :3], after[:, :3])
    assert (before[:, 3:] - after[:, 3:]).abs().amax(dim=2).min() > 1e-6


@pytest.mark.parametrize("fusion", ["cross_attention", "unified"])
def test_causal_action_sees_no_token_of_a_later_frame(fusion):
    if fusion == "unified":  # there, tokens of an earlier frame have seen those of a later one
        cond = ConditionSpec(global_dim=6, token_dim=3, groups=(TokenGroup("image", 13, 1),))
    else:
        cond = COND
    denoiser = build(fusion, causal=True, cond=cond)
    x_t, t, condition = inputs()
    where = slice(0, 13) if fusion == "unified" else FRAME_1
    before, after = denoiser(x_t, t, condition), denoiser(x_t, t, with_tokens(condition, where, 5.0))
    assert torch.equal(before[:, 0], after[:, 0])
    assert (before[:, 1:] - after[:, 1:]).abs().amax(dim=2).min() > 1e-6


@pytest.mark.parametrize("fusion", TOKEN_FUSIONS)
def test_sample_whose_tokens_are_all_padding_stays_finite_and_does_not_know_what_they_hold(fusion):
    denoiser = build(fusion)
    x_t, t, condition = inputs()
    real = torch.ones(3, 13, dtype=torch.bool)
    real[1] = False
    got = denoiser(x_t, t, Condition(condition.global_cond, condition.tokens, real))
    other = denoiser(x_t, t, Condition(condition.global_cond, 2 * condition.tokens, real))
    assert got.isfinite().all() and torch.equal(got[1], other[1]) and not torch.equal(got[0], other[0])


# --- diffusion time ---


@pytest.mark.parametrize("fusion", FUSIONS)
def test_one_time_for_all_actions_is_the_time_of_the_sample(fusion):
    denoiser = build(fusion)
    x_t, t, condition = inputs()
    torch.testing.assert_close(denoiser(x_t, t[:, None].expand(3, 5), condition), denoiser(x_t, t, condition))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_time_of_a_causal_action_does_not_reach_earlier_ones(fusion):
    denoiser = build(fusion, causal=True)
    x_t, t, condition = inputs()
    times = t[:, None].repeat(1, 5)
    before = denoiser(x_t, times, condition)
    times[:, 3] += 20
    after = denoiser(x_t, times, condition)
    assert torch.equal(before[:, :3], after[:, :3]) and not torch.equal(before[:, 3], after[:, 3])


def test_times_of_another_length_are_named():
    x_t, _, condition = inputs()
    with pytest.raises(ValueError, match=r"one per action, \(B=3, T_pred=5\)"):
        build("adaln")(x_t, torch.zeros(3, 4), condition)


def test_modulation_is_one_linear_layer_over_time_and_condition_split_in_two():
    denoiser = build("adaln")
    _, t, condition = inputs()
    time, cond = torch.randn(3, 8), denoiser.cond_encoder(condition.global_cond)
    whole = nn.Linear(16, denoiser.time_modulation.out_features)
    with torch.no_grad():
        whole.weight.copy_(torch.cat([denoiser.time_modulation.weight, denoiser.cond_modulation.weight], dim=1))
        whole.bias.copy_(denoiser.time_modulation.bias)
    want = whole(F.silu(torch.cat([time, cond], dim=-1)))
    got = denoiser.time_modulation(F.silu(time)) + denoiser.prepare(condition).modulation.squeeze(1)
    torch.testing.assert_close(got, want)
    assert denoiser.modulation_of_time(t).shape == (3, 1, whole.out_features)
    assert denoiser.modulation_of_time(t[:, None].expand(3, 5)).shape == (3, 5, whole.out_features)


# --- attention, to be looked at ---


@pytest.mark.parametrize("qk_norm", [False, True])
def test_weights_are_those_that_attention_uses(qk_norm):
    torch.manual_seed(0)
    attention = Attention(16, 2, qk_norm=qk_norm, dropout=0.0)
    x, memory, mask = torch.randn(3, 5, 16), torch.randn(3, 7, 16), torch.rand(5, 7) > 0.3
    mask[:, 0] = True
    keys, values = attention.keys_values(memory)
    weights = attention.weights(x, keys, mask)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(3, 2, 5))
    assert not weights.masked_select(~mask).any()
    by_hand = attention.out((weights @ values).transpose(1, 2).flatten(-2))
    torch.testing.assert_close(attention(x, (keys, values), mask), by_hand, atol=1e-6, rtol=1e-5)


def test_attention_to_a_memory_sums_to_one_and_passes_over_padding():
    denoiser = build("cross_attention")
    x_t, t, condition = inputs()
    condition.token_mask = torch.ones(3, 13, dtype=torch.bool)
    condition.token_mask[:, 11:] = False
    weights = denoiser.attention_weights(x_t, t, condition)
    assert weights.shape == (3, 3, 2, 5, 13) and not weights.requires_grad
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(3, 3, 2, 5))
    assert not weights[..., 11:].any() and (weights[..., :11] > 0).all()


def test_attention_in_one_sequence_leaves_a_share_to_the_actions():
    weights = build("unified").attention_weights(*inputs())
    assert weights.shape == (3, 3, 2, 5, 13)
    share = weights.sum(dim=-1)
    assert (share > 0).all() and (share < 1).all()


@pytest.mark.parametrize("fusion", ["cross_attention", "unified"])
def test_attention_weights_follow_what_forward_computes(fusion):
    denoiser, seen = build(fusion), []
    x_t, t, condition = inputs()
    where = "memory_attn" if fusion == "cross_attention" else "attn"
    for block in denoiser.blocks:
        getattr(block, where).register_forward_pre_hook(
            lambda module, given: seen.append(module.weights(*given_keys(given)))
        )

    def given_keys(given):
        x, (keys, _), mask = given
        return x, keys, mask

    denoiser(x_t, t, condition)
    seen = [weights[..., -18:] for weights in seen if weights.shape[2] == 5]  # the actions' rows
    want = torch.stack([weights[..., :13] for weights in seen])
    torch.testing.assert_close(denoiser.attention_weights(x_t, t, denoiser.prepare(condition)), want)


@pytest.mark.parametrize("fusion", ["film", "adaln", "readout"])
def test_fusion_through_a_vector_has_no_attention_to_show(fusion):
    with pytest.raises(ValueError, match=f"cross_attention or unified, got denoiser.fusion={fusion}"):
        build(fusion).attention_weights(*inputs())


# --- the rest of the contract ---


@pytest.mark.parametrize("fusion", TOKEN_FUSIONS)
def test_encoder_without_tokens_is_refused_with_the_option_that_gives_some(fusion):
    with pytest.raises(ValueError, match=rf"fusion={fusion} .* needs at least 1, got 0; .*encoder.image=patch_tokens"):
        build(fusion, cond=ConditionSpec(global_dim=6, token_dim=0, groups=()))


@pytest.mark.parametrize(
    ("fusion", "choice", "value"),
    [("adaln", "global_vector", True), ("unified", "num_readouts", 8), ("film", "readout_depth", 1)],
)
def test_choice_that_a_fusion_does_not_use_is_said_aloud(fusion, choice, value):
    with pytest.warns(UserWarning, match=f"denoiser.{choice} is ignored: denoiser.fusion={fusion}"):
        DitConfig(fusion=fusion, **{choice: value})


@pytest.mark.parametrize("fusion", FUSIONS)
def test_weight_decay_spares_biases_norms_and_embeddings_only(fusion):
    denoiser = build(fusion, qk_norm=True)
    spared = denoiser.no_weight_decay()
    embeddings = {"positions", "readouts", "token_embedding.kinds", "token_embedding.frames"}
    for name, parameter in denoiser.named_parameters():
        assert (name in spared) == (parameter.ndim == 1 or name in embeddings), name


def test_dropout_acts_in_training_only():
    denoiser, given = build("unified", dropout=0.5).train(), inputs()
    assert not torch.equal(denoiser(*given), denoiser(*given))
    denoiser.eval()
    assert torch.equal(denoiser(*given), denoiser(*given))


class Plain(nn.Module):
    """A denoiser with tensors for arguments."""

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x_t, t, global_cond, tokens, token_mask):
        return self.denoiser(x_t, t, Condition(global_cond, tokens, token_mask))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_denoiser_can_be_exported(fusion):
    denoiser = build(fusion, depth=1)
    x_t, t, condition = inputs()
    arguments = (x_t, t, condition.global_cond, condition.tokens, torch.rand(3, 13) > 0.2)
    exported = torch.export.export(Plain(denoiser), arguments).module()
    torch.testing.assert_close(exported(*arguments), Plain(denoiser)(*arguments))


# --- the files of conf/fusion ---


@pytest.fixture(scope="module")
def configs():
    """File of conf/fusion -> the config it gives for pushing blocks as words say, from pictures."""
    task = CONF / "task" / "tabletop_language.yaml"
    return {file.stem: load_config([task, file]) for file in FUSION_FILES}


@pytest.fixture(scope="module")
def policies(configs):
    """And the policy, for pictures of 64x64 and two numbers of state."""
    spec = DataSpec(
        fields={
            "observation.images.top": FieldSpec(shape=(64, 64, 3), dtype="uint8"),
            "observation.state": FieldSpec(shape=(2,), dtype="float32"),
            "action": FieldSpec(shape=(2,), dtype="float32"),
        },
        fps=10,
    )
    with torch.device("meta"):
        return {name: build_policy(config, spec) for name, config in configs.items()}


def test_fusions_have_the_same_number_of_parameters_within_five_percent(policies):
    for part in ("denoiser", "encoder"):
        sizes = {name: sum(p.numel() for p in getattr(policy, part).parameters()) for name, policy in policies.items()}
        assert max(sizes.values()) - min(sizes.values()) < 0.05 * min(sizes.values()), (part, sizes)


def test_files_give_the_fusions_of_their_names_and_patches_where_tokens_are_looked_at(policies):
    assert set(policies) == {*FUSIONS, "film_dit"}
    assert type(policies["film"].denoiser).__name__ == "ConditionalUnet1d"
    for name in set(policies) - {"film"}:
        assert policies[name].denoiser.fusion == name.removesuffix("_dit")
        cond = policies[name].encoder.cond
        patches_per_frame = cond.kinds.count("image") / policies[name].horizons.obs
        assert (patches_per_frame == 64) == (name in TOKEN_FUSIONS)


def test_fusions_are_trained_in_the_same_way(configs):
    assert len({str(config.train) for config in configs.values()}) == 1
