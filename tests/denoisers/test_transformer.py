import pytest
import torch
from torch import nn

from diffpolicy.denoisers.transformer import DiffusionTransformer, TransformerConfig, causal_mask, memory_mask
from diffpolicy.spec import Condition, ConditionSpec, frame_tokens

INF = float("inf")


def build(pred_horizon=5, num_tokens=3, **choices):
    torch.manual_seed(0)
    cond = ConditionSpec(global_dim=4 * num_tokens, groups=frame_tokens(num_tokens), token_dim=4)
    config = TransformerConfig(**{"width": 16, "depth": 2, "num_heads": 2} | choices)
    return DiffusionTransformer(config, action_dim=2, pred_horizon=pred_horizon, cond=cond)


def inputs(pred_horizon=5, num_tokens=3):
    torch.manual_seed(1)
    tokens = torch.randn(2, num_tokens, 4)
    return torch.randn(2, pred_horizon, 2), torch.tensor([10.0, 90.0]), Condition(tokens.flatten(1), tokens)


def test_state_recipe_has_the_parameters_of_the_reference():
    with torch.device("meta"):
        cond = ConditionSpec(global_dim=40, groups=frame_tokens(2), token_dim=20)
        denoiser = DiffusionTransformer(TransformerConfig(), action_dim=2, pred_horizon=16, cond=cond)
    assert sum(p.numel() for p in denoiser.parameters()) == 8_965_122


def test_causal_mask_of_three_actions():
    want = torch.tensor([[0, -INF, -INF], [0, 0, -INF], [0, 0, 0]])
    assert torch.equal(causal_mask(3), want)


def test_memory_mask_of_three_actions_and_time_and_two_observations():
    want = torch.tensor([[0, 0, -INF], [0, 0, 0], [0, 0, 0]])
    assert torch.equal(memory_mask(3, (0, 1)), want)


def test_memory_mask_shows_tokens_of_no_frame_to_every_action():
    want = torch.tensor([[0, 0, float("-inf"), 0, 0], [0, 0, 0, 0, 0]])  # time, two frames, two tokens of no frame
    assert torch.equal(memory_mask(2, (0, 1, None, None)), want)


def test_memory_mask_hides_observations_later_than_the_action():
    want = torch.tensor([[0, 0, -INF, -INF], [0, 0, 0, -INF]])
    assert torch.equal(memory_mask(2, (0, 1, 2)), want)


def test_state_dict_has_the_keys_of_the_reference():
    def both(prefix):
        return {f"{prefix}.weight", f"{prefix}.bias"}

    want = {"pos_emb", "cond_pos_emb", "mask", "memory_mask"}
    for name in ("input_emb", "cond_obs_emb", "encoder.0", "encoder.2", "ln_f", "head"):
        want |= both(name)
    for layer in ("decoder.layers.0", "decoder.layers.1"):
        for name in ("linear1", "linear2", "norm1", "norm2", "norm3"):
            want |= both(f"{layer}.{name}")
        for name in ("self_attn", "multihead_attn"):
            want |= {f"{layer}.{name}.in_proj_weight", f"{layer}.{name}.in_proj_bias"}
            want |= both(f"{layer}.{name}.out_proj")
    assert set(build().state_dict()) == want


@pytest.mark.parametrize("num_cond_layers", [0, 2])
def test_layers_compute_what_those_of_pytorch_compute(num_cond_layers):
    denoiser = build(num_cond_layers=num_cond_layers).eval()
    shape = {"d_model": 16, "nhead": 2, "dim_feedforward": 64, "activation": "gelu"}
    layer = nn.TransformerDecoderLayer(**shape, batch_first=True, norm_first=True)
    decoder = nn.TransformerDecoder(layer, num_layers=2).eval()
    decoder.load_state_dict(denoiser.decoder.state_dict())
    encoder = denoiser.encoder
    if num_cond_layers:
        layer = nn.TransformerEncoderLayer(**shape, batch_first=True, norm_first=True)
        encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False).eval()
        encoder.load_state_dict(denoiser.encoder.state_dict())
    x, tokens = torch.randn(2, 5, 16), torch.randn(2, 4, 16)
    memory = encoder(tokens)
    torch.testing.assert_close(denoiser.encoder(tokens, None) if num_cond_layers else denoiser.encoder(tokens), memory)
    want = decoder(x, memory, tgt_mask=denoiser.mask, memory_mask=denoiser.memory_mask)
    torch.testing.assert_close(denoiser.decoder(x, memory, denoiser.mask, denoiser.memory_mask), want)


def test_action_does_not_see_later_actions():
    denoiser = build().eval()
    x_t, t, condition = inputs()
    changed = x_t.clone()
    changed[:, 3:] += 1
    before, after = denoiser(x_t, t, condition), denoiser(changed, t, condition)
    torch.testing.assert_close(before[:, :3], after[:, :3])
    assert (before[:, 3:] - after[:, 3:]).abs().min() > 0


def test_without_causal_every_action_sees_every_other():
    denoiser = build(causal=False).eval()
    x_t, t, condition = inputs()
    changed = x_t.clone()
    changed[:, 4:] += 1
    assert (denoiser(x_t, t, condition)[:, 0] - denoiser(changed, t, condition)[:, 0]).abs().min() > 0
    assert "mask" not in denoiser.state_dict()


def test_weight_decay_spares_biases_norms_and_positions_only():
    denoiser = build(depth=1)
    decayed = {key for key, _ in denoiser.named_parameters()} - denoiser.no_weight_decay()
    layer = "decoder.layers.0"
    assert decayed == {
        "input_emb.weight", "cond_obs_emb.weight", "encoder.0.weight", "encoder.2.weight", "head.weight",
        f"{layer}.self_attn.in_proj_weight", f"{layer}.self_attn.out_proj.weight",
        f"{layer}.multihead_attn.in_proj_weight", f"{layer}.multihead_attn.out_proj.weight",
        f"{layer}.linear1.weight", f"{layer}.linear2.weight",
    }  # fmt: skip


def test_weights_start_with_a_spread_of_two_hundredths_and_biases_at_zero():
    denoiser = build(width=64)
    for key, parameter in denoiser.named_parameters():
        if key.endswith("bias"):
            assert not parameter.any(), key
        elif "norm" not in key and "ln_f" not in key:
            error = 0.02 * 4 / parameter.numel() ** 0.5
            assert abs(parameter.std().item() - 0.02) < error, key


def test_dropout_acts_in_training_only():
    denoiser = build(dropout=0.5)
    x_t, t, condition = inputs()
    assert not torch.equal(denoiser(x_t, t, condition), denoiser(x_t, t, condition))
    denoiser.eval()
    assert torch.equal(denoiser(x_t, t, condition), denoiser(x_t, t, condition))


def test_encoder_without_tokens_is_refused():
    cond = ConditionSpec(global_dim=4, groups=(), token_dim=0)
    with pytest.raises(ValueError, match="needs at least 1, got 0"):
        DiffusionTransformer(TransformerConfig(), action_dim=2, pred_horizon=4, cond=cond)


def test_denoiser_can_be_exported():
    denoiser = build().eval()
    x_t, t, condition = inputs()

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.denoiser = denoiser

        def forward(self, x_t, t, tokens):
            return self.denoiser(x_t, t, Condition(tokens.flatten(1), tokens))

    exported = torch.export.export(Plain(), (x_t, t, condition.tokens)).module()
    torch.testing.assert_close(exported(x_t, t, condition.tokens), denoiser(x_t, t, condition))
