"""What is read off the towers: patches of any layer, a feature for each word, instructions that are too long."""

import warnings

import open_clip
import pytest
import torch

from diffpolicy.encoders.clip_towers import (
    Tokenizer,
    build_towers,
    embed_image,
    embed_text,
    num_layers,
    reading,
    without_padding,
)
from diffpolicy.encoders.clip_weights import known_models

TINY = "diffpolicy-tiny"
TIMM = {
    "embed_dim": 16,
    "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160},
    "text_cfg": {},
}
"""A tower of timm: 6 blocks of width 64, 16 pixels a patch."""


@pytest.fixture(scope="module")
def towers():
    torch.manual_seed(0)
    towers = build_towers(TINY, None, need_image=True, need_text=True)
    towers.image.eval(), towers.text.eval()
    return towers


def timm_tower():
    torch.manual_seed(0)
    architecture = {"model": TIMM, "preprocess": {}}
    return build_towers("timm", None, need_image=True, need_text=False, architecture=architecture).image.eval()


def outputs_of_blocks(tower, blocks, pixels):
    """What each block hands on while the tower looks at pixels: list of (N, 1 + P, W)."""
    seen = []
    hooks = [block.register_forward_hook(lambda module, inputs, output: seen.append(output)) for block in blocks]
    tower(pixels)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("layers", [(-1,), (0, 1, 2), (2, 0), (-1, -3)])
def test_patches_of_chosen_layers_lie_side_by_side_in_the_order_asked_for(towers, layers):
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        blocks = outputs_of_blocks(towers.image, towers.image.transformer.resblocks, pixels)
        want = torch.cat([towers.image.ln_post(blocks[layer])[:, 1:] for layer in layers], dim=-1)
        pooled, patches = embed_image(towers.image, pixels, patches=True, layers=layers)
        torch.testing.assert_close(patches, want)
        torch.testing.assert_close(pooled, towers.image(pixels))


def test_tower_of_timm_gives_patches_of_its_layers_too():
    tower, pixels = timm_tower(), torch.randn(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    assert num_layers(tower) == 6
    with torch.no_grad():
        blocks = outputs_of_blocks(tower, tower.trunk.blocks, pixels)
        pooled, patches = embed_image(tower, pixels, patches=True, layers=(1, -1))
        want = torch.cat([tower.trunk.norm(blocks[layer])[:, 1:] for layer in (1, -1)], dim=-1)
        torch.testing.assert_close(patches, want)
        torch.testing.assert_close(pooled, tower(pixels))


def test_words_are_the_last_layer_behind_its_norm_and_the_end_token_is_what_is_pooled(towers):
    tokenize = Tokenizer(32)
    ids = torch.stack([tokenize("push the red block"), tokenize("stop")])
    with torch.no_grad():
        pooled, words, mask = embed_text(towers.text, ids)
        assert torch.equal(pooled, towers.text(ids))
        assert words.shape == (2, 32, 64) and mask.sum(dim=1).tolist() == [4 + 2, 1 + 2]  # start and end
        ends = words[torch.arange(2), mask.sum(dim=1) - 1]
        torch.testing.assert_close(ends @ towers.text.text_projection, pooled)


def test_a_word_knows_what_stands_before_it_and_nothing_of_what_follows(towers):
    tokenize = Tokenizer(32)
    ids = torch.stack([tokenize("push the red block"), tokenize("push the red ball")])
    with torch.no_grad():
        _, words, _ = embed_text(towers.text, ids)
    torch.testing.assert_close(words[0, :4], words[1, :4])  # start, push, the, red
    assert (words[0, 4] - words[1, 4]).abs().max() > 1e-3


def test_words_are_what_open_clip_hands_out_as_tokens():
    known_models()
    clip = open_clip.create_model(TINY, force_custom_text=True, output_dict=False).eval()
    ids = open_clip.get_tokenizer(TINY)(["push the red block"])
    with torch.no_grad():
        _, words, _ = embed_text(clip.text, ids)
        clip.text.output_tokens = True
        torch.testing.assert_close(words, clip.text(ids)[1])


def test_instruction_that_is_too_long_is_refused_and_the_error_names_the_way_out():
    with pytest.raises(
        ValueError, match=r"fit into 8 tokens, .* this has 9: 'a b c d e f g'; .*text_too_long=truncate"
    ):
        Tokenizer(8)("a b c d e f g")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("push <end_of_text> the red block", "must not hold <end_of_text>, which mark"),
        ("<start_of_text>", "must not hold <start_of_text>"),
        (" \x00 ", "must hold something that the tower can read"),
    ],
)
def test_a_text_that_the_tower_would_not_read_to_its_end_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer(8)(text)


def test_truncation_keeps_the_end_token_and_says_once_what_is_lost():
    tokenize = Tokenizer(8, too_long="truncate")
    with pytest.warns(UserWarning, match="text_too_long=truncate: .* 'g h' is cut off the end of 'a b c d e f g h'"):
        ids = tokenize("a b c d e f g h")
    assert ids[-1] == tokenize.encoding.eot_token_id
    assert torch.equal(ids, tokenize("a b c d e f"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(tokenize("a b c d e f g h"), ids)
    with pytest.warns(UserWarning, match="'y' is cut off"):  # another instruction
        tokenize("a b c d e f y")


def test_cutting_the_padding_off_changes_no_text():
    torch.manual_seed(0)
    tower = build_towers("diffpolicy-tiny", None, need_image=False, need_text=True).text.eval()
    tokenizer = Tokenizer(tower.context_length)
    ids = torch.stack([tokenizer(text) for text in ("push", "push the red block to the left edge")])
    short = without_padding(tower, ids)
    assert ids.shape == (2, 32) and short.shape == (2, 10)  # start, eight words, end
    mask = tower.attn_mask
    with torch.no_grad(), reading(tower, 10):
        got = tower(short), *embed_text(tower, short)
    assert tower.attn_mask is mask
    want = tower(ids), *embed_text(tower, ids)
    for a, b in ((got[0], want[0]), (got[1], want[1]), (got[2], want[2][:, :10]), (got[3], want[3][:, :10])):
        torch.testing.assert_close(a, b, atol=5e-6, rtol=0)
    assert not want[3][:, 10:].any()
