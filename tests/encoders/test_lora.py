"""Adapters: they begin as nothing, they alone learn, the frozen weights stay what they were."""

import builtins
import copy

import pytest
import torch

from diffpolicy.encoders.clip_towers import Tokenizer, build_towers
from diffpolicy.spec import MissingExtraError

pytest.importorskip("peft", reason="peft is not installed (pip install 'diffpolicy[lora]')")

from diffpolicy.encoders.lora import TARGETS, PlainAttention, add_adapters, merge_adapters

TIMM = {
    "embed_dim": 16,
    "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160},
    "text_cfg": {},
}
SIDES = {"open_clip": 64, "timm": 160}


def image_tower(kind="open_clip"):
    torch.manual_seed(0)
    architecture = {"model": TIMM, "preprocess": {}} if kind == "timm" else None
    towers = build_towers("diffpolicy-tiny", None, need_image=True, need_text=False, architecture=architecture)
    return towers.image.eval()


def adapted(tower, **choices):
    add_adapters(tower, **{"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": None} | choices)
    return tower


def shaken(tower):
    """The tower with adapters that do something."""
    torch.manual_seed(1)
    for parameter in tower.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return tower


def pixels(kind="open_clip"):
    return torch.randn(3, 3, SIDES[kind], SIDES[kind], generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", SIDES)
def test_adapters_begin_as_nothing(kind):
    base, tower = image_tower(kind), image_tower(kind)
    for block in base.transformer.resblocks if kind == "open_clip" else ():
        block.attn = PlainAttention(block.attn)
    assert torch.equal(adapted(tower)(pixels(kind)), base.requires_grad_(False)(pixels(kind)))


def test_plain_attention_is_that_of_torch_for_pictures_and_for_causal_text():
    towers = build_towers("diffpolicy-tiny", None, need_image=True, need_text=True)
    ids = torch.stack([Tokenizer(32)("push the red block"), Tokenizer(32)("stop")])
    for tower, seen in ((towers.image, pixels()), (towers.text, ids)):
        base = copy.deepcopy(tower)
        for block in tower.transformer.resblocks:
            block.attn = PlainAttention(block.attn)
        torch.testing.assert_close(tower(seen), base(seen))
        with torch.no_grad():
            torch.testing.assert_close(tower.eval()(seen), base.eval()(seen))


@pytest.mark.parametrize("kind", SIDES)
def test_only_adapters_learn_and_the_frozen_weights_stay_bit_by_bit(kind):
    tower = shaken(adapted(image_tower(kind))).train()
    learns = {name for name, p in tower.named_parameters() if p.requires_grad}
    depth = 3 if kind == "open_clip" else 6
    assert len(learns) == depth * 4 * 2 and all("lora_A" in name or "lora_B" in name for name in learns)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in learns} == set(TARGETS[kind])
    before = {name: p.detach().clone() for name, p in tower.named_parameters()}
    optimizer = torch.optim.SGD([p for p in tower.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        tower(pixels(kind)).square().sum().backward()
        optimizer.step()
    assert {name for name, p in tower.named_parameters() if p.grad is not None} == learns
    changed = {name for name, p in tower.named_parameters() if not torch.equal(p, before[name])}
    assert changed == learns


@pytest.mark.parametrize("targets", [("in_proj",), ("c_fc", "c_proj")])
def test_chosen_layers_alone_are_adapted(targets):
    tower = adapted(image_tower(), targets=targets)
    names = {name.split(".lora_")[0].rpartition(".")[2] for name, p in tower.named_parameters() if p.requires_grad}
    assert names == set(targets)


def test_an_adapter_adds_alpha_over_rank_b_a():
    tower = shaken(adapted(image_tower(), rank=4, alpha=12.0, targets=("c_fc",)))
    layer = tower.transformer.resblocks[1].mlp.c_fc
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.shape == (4, 64) and b.shape == (256, 4)
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 3.0 * (x @ a.T) @ b.T)


def test_dropout_of_adapters_acts_in_training_only():
    tower = shaken(adapted(image_tower(), dropout=0.5))
    torch.testing.assert_close(tower(pixels()), tower(pixels()))
    tower.train()
    assert (tower(pixels()) - tower(pixels())).abs().max() > 1e-3


@pytest.mark.parametrize("kind", SIDES)
def test_merged_adapters_give_the_same_numbers_without_further_layers(kind):
    tower = shaken(adapted(image_tower(kind)))
    want, base = tower(pixels(kind)), image_tower(kind)(pixels(kind))
    assert (want - base).abs().max() > 1e-2
    merged = merge_adapters(tower)
    torch.testing.assert_close(merged(pixels(kind)), want, atol=1e-5, rtol=1e-4)
    assert not any("lora" in name for name in merged.state_dict())


def test_state_dict_holds_base_and_adapters():
    first = shaken(adapted(image_tower()))
    again = adapted(build_towers("diffpolicy-tiny", None, need_image=True, need_text=False).image.eval())
    again.load_state_dict(first.state_dict())
    assert torch.equal(again(pixels()), first(pixels()))


def test_adapters_can_be_built_on_the_meta_device_and_filled():
    first = shaken(adapted(image_tower()))
    with torch.device("meta"):
        again = adapted(build_towers("diffpolicy-tiny", None, need_image=True, need_text=False).image.eval())
    again.load_state_dict(first.state_dict(), assign=True)
    assert torch.equal(again(pixels()), first(pixels()))


def test_what_cannot_be_adapted_is_named():
    with pytest.raises(ValueError, match=r"a name of encoder\.lora_targets must be one of .* Did you mean 'in_proj'"):
        adapted(image_tower(), targets=("in_porj",))
    with pytest.raises(ValueError, match=r"a name of encoder\.lora_targets .* got 'in_proj'"):
        adapted(image_tower("timm"), targets=("in_proj",))
    with pytest.raises(ValueError, match="tuning=lora needs a Transformer of open_clip or timm, got Linear"):
        adapted(torch.nn.Linear(2, 2))


def test_attention_of_another_kind_is_named():
    architecture = {
        "model": {
            "embed_dim": 16,
            "vision_cfg": {
                "image_size": 64,
                "layers": 1,
                "width": 64,
                "head_width": 32,
                "patch_size": 8,
                "scale_fc": True,
            },
            "text_cfg": {},
        },
        "preprocess": {},
    }
    tower = build_towers("custom", None, need_image=True, need_text=False, architecture=architecture).image
    with pytest.raises(ValueError, match=r"'in_proj', which is no linear layer .*CustomResidualAttentionBlock"):
        adapted(tower)


def test_missing_peft_says_how_to_install_it(monkeypatch):
    real = builtins.__import__

    def without_peft(name, *args, **kwargs):
        if name.split(".")[0] == "peft":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(MissingExtraError, match=r"pip install 'diffpolicy\[lora\]'"):
        adapted(image_tower())
