"""Image and text towers out of open_clip: how they are built, filled and frozen, what is read off them, how text becomes ids.

Only this file and clip_weights.py know open_clip; they are imported where they are used, because that takes seconds.

A tower is described by its architecture, plain data that a checkpoint keeps, so that a saved policy is rebuilt without the
network, the folder or the file that its weights once came from:

    {"model": open_clip's model config, "preprocess": {"mean": [3], "std": [3], "interpolation": "bicubic"}}
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffpolicy.encoders.clip_weights import FOLDER, HUB, check_text, load_model, look_up

NO_VISION = {"image_size": 1, "patch_size": 1, "width": 8, "head_width": 8, "layers": 1}
NO_TEXT = {"context_length": 4, "vocab_size": 4, "width": 8, "heads": 1, "layers": 1}
"""What stands in for a tower that the policy has no use for while open_clip builds the pair; it is dropped at once."""


@dataclass
class Towers:
    """What a policy needs of a CLIP model."""

    image: nn.Module | None
    """(N, 3, S, S) -> (N, embed_dim)"""
    text: nn.Module | None
    """token ids (N, context_length) -> (N, embed_dim)"""
    architecture: dict


def build_towers(
    model: str,
    pretrained: str | None,
    *,
    need_image: bool,
    need_text: bool,
    image_size: int | None = None,
    architecture: dict | None = None,
) -> Towers:
    """The towers of a model, with their weights.

    Args:
        model: open_clip's name, `hf-hub:ORG/REPOSITORY` or `local-dir:FOLDER`; the latter two bring their weights.
        pretrained: a tag, or a file of weights; None leaves a named model random.
        image_size: pixels a side that the image tower is built for; position embeddings are interpolated. None: its own.
        architecture: what Towers.architecture said of these towers once: nothing is looked up and no weights are read.
    Raises:
        ValueError: unknown model or tag, weights that cannot be had or do not fit, a model whose activation is not that of
            the weights, one that is no pair of an image and a text tower, or a tokenizer that open_clip does not carry.
    """
    is_reference = model.startswith((HUB, FOLDER))
    # On the meta device nothing is loaded: whoever builds there brings a state dict.
    reads_weights = architecture is None and (is_reference or pretrained is not None) and not torch.empty(0).is_meta
    if architecture is None:
        architecture = look_up(model, pretrained, image_size=image_size)
    check_text(model, architecture["model"], need_text=need_text)
    if reads_weights:
        clip = load_model(model, pretrained, image_size=image_size)
    else:
        clip = build_random(architecture["model"], need_image=need_image, need_text=need_text)
    text = clip.text if need_text else None
    if text is not None and text.attn_mask is not None and text.attn_mask.is_meta:
        with torch.device("cpu"):  # it is no part of a state dict, so that nobody would fill it
            text.register_buffer("attn_mask", text.build_causal_mask(), persistent=False)
    return Towers(clip.visual if need_image else None, text, architecture)


def build_random(config: dict, *, need_image: bool, need_text: bool) -> nn.Module:
    """Both towers with random weights; the one that is not needed is a stand-in of no size."""
    import open_clip

    config = copy.deepcopy(config)
    config.pop("custom_text", None)
    if need_image:
        if "timm_model_name" in config["vision_cfg"]:
            config["vision_cfg"]["timm_model_pretrained"] = False
    else:
        config["vision_cfg"] = NO_VISION
    if not need_text:
        config["text_cfg"] = NO_TEXT
    return open_clip.CustomTextCLIP(**config)


def freeze(tower: nn.Module, tuning: str, num_tuned_blocks: int) -> tuple[str, ...]:
    """Leaves trainable what `tuning` says; the names of the modules that must stay in eval mode, "" being the tower.

    Args:
        tuning: `full`; `frozen`; `last_n`: the last num_tuned_blocks blocks and what comes after them.
    Raises:
        ValueError: last_n of a tower without blocks, or of more blocks than there are.
    """
    if tuning == "full":
        return ()
    tower.requires_grad_(False)
    if tuning == "frozen":
        return ("",)
    blocks = getattr(getattr(tower, "transformer", None), "resblocks", None)
    if blocks is None:
        raise ValueError(
            f"encoder.tuning=last_n needs a Transformer of open_clip, got {type(tower).__name__}; use frozen or full"
        )
    if not 1 <= num_tuned_blocks <= len(blocks):
        raise ValueError(
            f"encoder.num_tuned_blocks must be in [1, {len(blocks)}] for this tower, got {num_tuned_blocks}"
        )
    first = len(blocks) - num_tuned_blocks
    for block in blocks[first:]:
        block.requires_grad_(True)
    for name in ("ln_post", "proj", "attn_pool", "attn_pool_contrastive", "ln_final", "text_projection"):
        part = getattr(tower, name, None)
        if part is not None:
            part.requires_grad_(True)
    return tuple(f"transformer.resblocks.{i}" for i in range(first))


def checkpoint_gradients(tower: nn.Module) -> None:
    """Each block of the tower is run again in the backward pass instead of keeping what it computed: less memory, more time.

    Chen et al. 2016, arXiv:1604.06174.

    Raises:
        ValueError: the tower cannot do this.
    """
    trunk = getattr(tower, "trunk", None)
    try:
        if trunk is not None:
            trunk.set_grad_checkpointing(True)
        elif hasattr(getattr(tower, "transformer", None), "grad_checkpointing"):
            tower.set_grad_checkpointing(True)
        else:
            raise NotImplementedError
    except (NotImplementedError, AttributeError, AssertionError) as error:  # what models of timm raise
        raise ValueError(
            f"encoder.gradient_checkpointing needs a Transformer of open_clip or timm, got {type(trunk or tower).__name__}; "
            "set it to false, or lower train.batch_size"
        ) from error


def patch_grid(tower: nn.Module, model: str, *, wanted: str = "patch_tokens") -> tuple[int, int]:
    """(number of patches, numbers in each) of an image tower.

    Args:
        wanted: encoder.image, for the error.

    Raises:
        ValueError: the tower does not see its picture as patches.
    """
    if hasattr(tower, "grid_size") and hasattr(tower, "transformer"):
        return tower.grid_size[0] * tower.grid_size[1], tower.transformer.width
    trunk = getattr(tower, "trunk", None)
    if hasattr(trunk, "patch_embed") and hasattr(trunk, "embed_dim") and hasattr(trunk, "blocks"):
        return trunk.patch_embed.num_patches, trunk.embed_dim
    raise ValueError(
        f"encoder.image={wanted} needs a ViT, the image tower of {model!r} is a {type(tower).__name__} without patches; "
        "use encoder.image=pooled"
    )


def num_layers(tower: nn.Module) -> int:
    """Blocks of a tower that sees patches (see patch_grid)."""
    return len(tower.trunk.blocks) if hasattr(tower, "trunk") else len(tower.transformer.resblocks)


def embed_image(
    tower: nn.Module, pixels: Tensor, *, patches: bool, layers: Sequence[int] = (-1,)
) -> tuple[Tensor, Tensor | None]:
    """Pixels -> one vector per picture, and its patches where asked for.

    Args:
        pixels: (N, 3, S, S).
        layers: blocks whose patches are taken, counted from 0, or from the end with -1 the last. Each block's output goes
            through the norm that belongs to the last one, which brings all of them to one scale.
    Returns:
        pooled (N, embed_dim); patches (N, num_patches, len(layers) * width), the layers side by side, or None.
    """
    if not patches:
        return tower(pixels), None
    depth = num_layers(tower)
    wanted = [layer % depth for layer in layers]
    seen = tower.forward_intermediates(
        pixels, indices=sorted(set(wanted)), normalize_intermediates=True, output_fmt="NLC"
    )
    by_layer = dict(zip(sorted(set(wanted)), seen["image_intermediates"], strict=True))
    return seen["image_features"], torch.cat([by_layer[layer] for layer in wanted], dim=-1)


def without_padding(tower: nn.Module, ids: Tensor) -> Tensor:
    """Token ids (n, C) cut to the longest of these texts, (n, L); as they are where the tower also reads what is behind the end.

    A causal tower that pools at the end token never sees the zeros behind it: they only cost time, three quarters of it for
    short instructions.
    """
    plain = getattr(tower, "cls_emb", None) is None and not getattr(tower, "use_pad_mask", False)
    if plain and getattr(tower, "pool_type", "") in ("argmax", "eos") and getattr(tower, "attn_mask", None) is not None:
        return ids[:, : int(ids.argmax(dim=-1).max()) + 1]
    return ids


@contextmanager
def reading(tower: nn.Module, length: int) -> Iterator[None]:
    """The tower reads texts of this many tokens meanwhile: open_clip's causal mask has the full length only."""
    mask = getattr(tower, "attn_mask", None)
    if mask is None or mask.shape[-1] == length:
        yield
        return
    tower.attn_mask = mask[:length, :length]
    try:
        yield
    finally:
        tower.attn_mask = mask


def embed_text(tower: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids (n, C) of the Tokenizer -> one vector per text, and one per token.

    Returns:
        pooled (n, embed_dim); words (n, C, width), the last layer behind its norm and before pooling; mask (n, C) bool, True
        from the start token to the end token. Of a causal tower, a word knows those before it, and the end token all.
    """
    seen = tower.forward_intermediates(ids, indices=1, normalize_intermediates=True, output_fmt="NLC")
    end = ids.argmax(dim=-1, keepdim=True)  # the end token has the highest id
    mask = torch.arange(ids.shape[1], device=ids.device) <= end
    return seen["text_features"], seen["text_intermediates"][-1], mask


class Tokenizer:
    """Instruction -> token ids, by open_clip's byte-pair encoding."""

    def __init__(self, context_length: int, *, too_long: str = "error", **choices):
        """too_long: `error`, or `truncate`: cut off what does not fit, before the end token, and say so once per text."""
        import open_clip

        self.context_length, self.too_long = context_length, too_long
        self.encoding = open_clip.SimpleTokenizer(context_length=context_length, **choices)
        self._cut: set[str] = set()

    def __call__(self, text: str) -> Tensor:
        """(context_length,) ids: start, text, end, zeros.

        Raises:
            ValueError: the text is longer than the tower can read, and too_long is not `truncate`; or it holds the marks
                themselves, behind which nothing would be read, or nothing but characters that the encoding drops.
        """
        ids = self.encoding.encode(text)
        if marks := set(self.encoding.all_special_ids).intersection(ids):
            held = self.encoding.decode(sorted(marks)).split()
            raise ValueError(f"the instruction must not hold {', '.join(held)}, which mark its start and end: {text!r}")
        if not ids:
            raise ValueError(f"the instruction must hold something that the tower can read, got {text!r}")
        length = len(ids) + 2  # start and end
        if length > self.context_length:
            fits = f"fit into {self.context_length} tokens, start and end included"
            if self.too_long != "truncate":
                raise ValueError(
                    f"the instruction must {fits}; this has {length}: {text!r}; shorten it, or set "
                    "encoder.text_too_long=truncate"
                )
            if text not in self._cut:
                self._cut.add(text)
                lost = self.encoding.decode(ids[self.context_length - 2 :]).strip()
                warnings.warn(
                    f"encoder.text_too_long=truncate: an instruction of {length} tokens must {fits}; {lost!r} is cut off "
                    f"the end of {text!r}",
                    stacklevel=2,
                )
        return self.encoding([text])[0]
