import pytest
import torch
from torch.nn import functional as F

from diffpolicy.denoisers.unet import ConditionalUnet1d, FilmResidualBlock, UnetConfig
from diffpolicy.spec import Condition, ConditionSpec, frame_tokens


def num_parameters(config, global_dim):
    with torch.device("meta"):
        cond = ConditionSpec(global_dim=global_dim, groups=frame_tokens(2), token_dim=global_dim // 2)
        unet = ConditionalUnet1d(config, action_dim=2, pred_horizon=16, cond=cond)
    return sum(p.numel() for p in unet.parameters())


def small(pred_horizon=16, **choices):
    torch.manual_seed(0)
    cond = ConditionSpec(global_dim=6, groups=frame_tokens(2), token_dim=3)
    config = UnetConfig(**{"down_dims": (16, 32, 64), "diffusion_step_embed_dim": 16} | choices)
    return ConditionalUnet1d(config, action_dim=2, pred_horizon=pred_horizon, cond=cond)


def inputs(pred_horizon):
    torch.manual_seed(1)
    condition = Condition(global_cond=torch.randn(3, 6), tokens=torch.randn(3, 2, 3))
    return torch.randn(3, pred_horizon, 2), torch.tensor([0.0, 50.0, 99.0]), condition


def test_state_recipe_has_the_parameters_of_the_reference():
    assert num_parameters(UnetConfig(), global_dim=40) == 65_783_298


def test_image_recipe_has_the_parameters_of_the_reference():
    config = UnetConfig(down_dims=(512, 1024, 2048), diffusion_step_embed_dim=128)
    assert num_parameters(config, global_dim=132) == 251_511_938


def test_state_dict_has_the_keys_of_the_reference():
    def conv_block(prefix):
        return {f"{prefix}.block.{i}.{end}" for i in (0, 1) for end in ("weight", "bias")}

    def both(prefix):
        return {f"{prefix}.weight", f"{prefix}.bias"}

    def block(prefix, skip):
        keys = conv_block(f"{prefix}.blocks.0") | conv_block(f"{prefix}.blocks.1") | both(f"{prefix}.cond_encoder.1")
        return keys | (both(f"{prefix}.residual_conv") if skip else set())

    want = both("diffusion_step_encoder.1") | both("diffusion_step_encoder.3")
    want |= block("mid_modules.0", False) | block("mid_modules.1", False)
    for level in range(3):
        want |= block(f"down_modules.{level}.0", True) | block(f"down_modules.{level}.1", False)
    for level in range(2):
        want |= block(f"up_modules.{level}.0", True) | block(f"up_modules.{level}.1", False)
        want |= both(f"down_modules.{level}.2.conv") | both(f"up_modules.{level}.2.conv")
    want |= conv_block("final_conv.0") | both("final_conv.1")
    assert set(small().state_dict()) == want


def test_film_scales_with_the_first_half_and_shifts_with_the_second():
    torch.manual_seed(0)
    block = FilmResidualBlock(8, 8, 4, UnetConfig(down_dims=(8,)))
    block.cond_encoder[1].weight.data.zero_()
    block.cond_encoder[1].bias.data = torch.cat([torch.full((8,), 3.0), torch.full((8,), 5.0)])
    x = torch.randn(2, 8, 6)
    want = block.blocks[1](3.0 * block.blocks[0](x) + 5.0) + x
    torch.testing.assert_close(block(x, torch.randn(2, 4)), want)


def test_film_without_scale_only_shifts():
    torch.manual_seed(0)
    block = FilmResidualBlock(8, 8, 4, UnetConfig(down_dims=(8,), cond_predict_scale=False))
    block.cond_encoder[1].weight.data.zero_()
    block.cond_encoder[1].bias.data.fill_(5.0)
    x = torch.randn(2, 8, 6)
    torch.testing.assert_close(block(x, torch.randn(2, 4)), block.blocks[1](block.blocks[0](x) + 5.0) + x)


def test_last_norm_keeps_eight_groups_whatever_n_groups_says():
    unet = small(n_groups=4)
    assert unet.down_modules[0][0].blocks[0].block[1].num_groups == 4
    assert unet.final_conv[0].block[1].num_groups == 8


@pytest.mark.parametrize("pred_horizon", [1, 5, 10, 13, 15])
def test_any_length_is_its_edge_repeated_to_a_length_that_fits_and_cropped(pred_horizon):
    unet = small()
    x_t, t, condition = inputs(pred_horizon)
    padded = F.pad(x_t.transpose(1, 2), (0, -pred_horizon % 4), mode="replicate").transpose(1, 2)
    got = unet(x_t, t, condition)
    assert got.shape == x_t.shape
    torch.testing.assert_close(got, unet(padded, t, condition)[:, :pred_horizon])


def test_weights_do_not_depend_on_the_length():
    assert small(pred_horizon=10).state_dict().keys() == small(pred_horizon=16).state_dict().keys()


def test_nothing_is_exempt_from_weight_decay():
    assert small().no_weight_decay() == set()
