"""Image and text towers out of open_clip: which ones there are, how they are built, filled and frozen, how text becomes numbers.

The only file that knows open_clip; it is imported where it is used, because that takes seconds.

A tower is described by its architecture, plain data that a checkpoint keeps, so that a saved policy is rebuilt without the
network, the folder or the file that its weights once came from:

    {"model": open_clip's model config, "preprocess": {"mean": [3], "std": [3], "interpolation": "bicubic"}}
"""

from __future__ import annotations

import copy
import difflib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from diffpolicy.spec import unknown_name

PRESETS = Path(__file__).parent / "models"
"""Model configs of our own, in open_clip's format; the name of the file is the name of the model."""
HUB, FOLDER = "hf-hub:", "local-dir:"
"""Prefixes of encoder.model by which open_clip knows a repository of the hub and a folder."""
WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
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


def known_models() -> list[str]:
    """Names that open_clip can build, ours among them."""
    import open_clip

    if not {file.stem for file in PRESETS.glob("*.json")} <= set(open_clip.list_models()):
        open_clip.add_model_config(PRESETS)
    return open_clip.list_models()


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


def look_up(model: str, pretrained: str | None, *, image_size: int | None) -> dict:
    """The architecture of a model by its name or reference; only `hf-hub:` touches the network."""
    import open_clip

    preprocess: dict = {}
    if model.startswith((HUB, FOLDER)):
        if pretrained is not None:
            raise ValueError(
                f"encoder.pretrained must be null for encoder.model={model!r}, which brings its weights, got {pretrained!r}"
            )
        described = reference_config(model)
        config, preprocess = described["model_cfg"], described.get("preprocess_cfg", {})
    else:
        names = known_models()
        if model not in names:
            near = difflib.get_close_matches(model, names, n=3, cutoff=0.4)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ValueError(
                f"encoder.model must be one of the {len(names)} names of open_clip.list_models(), {HUB}ORG/REPOSITORY "
                f"or {FOLDER}FOLDER, got {model!r}.{hint}"
            )
        config = open_clip.get_model_config(model)
        if pretrained is not None:
            preprocess = check_pretrained(model, config, pretrained)
    config = copy.deepcopy(config)
    if "multimodal_cfg" in config or not {"embed_dim", "vision_cfg", "text_cfg"} <= config.keys():
        raise ValueError(f"encoder.model={model!r} is no pair of an image and a text tower; choose a contrastive model")
    # Dropping patches would change the number of tokens between training and rollout.
    config["vision_cfg"] |= {"patch_dropout": 0.0}
    if image_size is not None:
        if "timm_model_name" in config["vision_cfg"]:
            raise ValueError(f"encoder.image_size must be null for {model!r}, whose image tower has a size of its own")
        config["vision_cfg"]["image_size"] = image_size
    defaults = open_clip.transform.PreprocessCfg()
    kept = {key: preprocess.get(key, getattr(defaults, key)) for key in ("mean", "std", "interpolation")}
    kept = kept | {"mean": list(kept["mean"]), "std": list(kept["std"])}
    if kept["interpolation"] not in ("bilinear", "bicubic"):  # `random`, in open_clip's own training
        kept["interpolation"] = "bicubic"
    return {"model": config, "preprocess": kept}


def reference_config(model: str) -> dict:
    """open_clip_config.json of a folder or of a repository of the hub."""
    from open_clip.factory import download_pretrained_from_hf

    if model.startswith(FOLDER):
        file = Path(model.removeprefix(FOLDER)) / "open_clip_config.json"
        if not file.is_file():
            raise ValueError(
                f"encoder.model={model!r} must name a folder with open_clip_config.json; {file} is missing"
            )
    else:
        try:
            file = Path(download_pretrained_from_hf(model.removeprefix(HUB), filename="open_clip_config.json"))
        except (
            Exception
        ) as error:  # no network, no such repository, no right to it: the client's errors have no common base
            raise unreachable(f"encoder.model={model!r}", error) from error
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not readable as JSON: {error}") from error
    if not isinstance(described, dict) or not isinstance(described.get("model_cfg"), dict):
        raise ValueError(f"{file} must hold a section model_cfg, as open_clip writes it")
    return described


def check_pretrained(model: str, config: dict, pretrained: str) -> dict:
    """What open_clip says of a tag (empty for a file), after checking that the tag or the file is there and fits."""
    import open_clip

    tag = open_clip.get_pretrained_cfg(model, pretrained)
    if not tag:
        if Path(pretrained).suffix in WEIGHT_SUFFIXES:
            if not Path(pretrained).is_file():
                raise ValueError(f"encoder.pretrained must be a tag or an existing file, got {pretrained!r}")
            return {}
        raise unknown_name(
            f"encoder.pretrained must be a file ({', '.join(WEIGHT_SUFFIXES)}) or a tag; the tag for {model!r}",
            pretrained,
            open_clip.list_pretrained_tags_by_model(model),
        )
    trained, built = tag.get("quick_gelu", False), config.get("quick_gelu", False)
    if trained != built:
        twin = f"{model}-quickgelu" if trained else model.removesuffix("-quickgelu")
        fix = f"encoder.model={twin}" if twin in known_models() else "another tag"
        raise ValueError(
            f"encoder.pretrained={pretrained!r} was trained with quick_gelu={trained}, encoder.model={model!r} has "
            f"quick_gelu={built}: every activation would be off; set {fix}"
        )
    return tag


def check_text(model: str, config: dict, *, need_text: bool) -> None:
    """Raises ValueError where text is wanted of a model whose tokenizer or text tower lives on the hub."""
    text = config["text_cfg"]
    if need_text and (text.get("hf_tokenizer_name") or text.get("hf_model_name") or "siglip" in model.lower()):
        raise ValueError(
            f"encoder.text=pooled needs a model with open_clip's own tokenizer, that of {model!r} must be fetched from the "
            "hub, so that a saved policy could not be loaded without it; choose another model or encoder.text=none"
        )


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


def load_model(model: str, pretrained: str | None, *, image_size: int | None) -> nn.Module:
    """Both towers with their weights, fetched where they are not here yet; nothing in a file is executed."""
    import open_clip

    try:
        return open_clip.create_model(
            model,
            pretrained=pretrained,
            require_pretrained=True,
            force_custom_text=True,
            force_patch_dropout=0.0,
            force_image_size=image_size,
            pretrained_text=False,
            weights_only=True,
        )
    except (
        Exception
    ) as error:  # open_clip wraps all it meets in RuntimeError; pickle's and safetensors' own come through
        what = f"encoder.model={model!r}" if pretrained is None else f"encoder.pretrained={pretrained!r}"
        if model.startswith(FOLDER) or (pretrained is not None and Path(pretrained).is_file()):
            raise ValueError(f"{what} does not hold weights that fit {model!r}: {first_line(error)}") from error
        raise unreachable(what, error) from error


def unreachable(what: str, error: Exception) -> ValueError:
    return ValueError(
        f"{what} could not be fetched: {first_line(error)}; without a network, set encoder.pretrained to a file of weights or "
        f"encoder.model={FOLDER}FOLDER"
    )


def first_line(error: Exception, limit: int = 200) -> str:
    line = " ".join(str(error).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


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


def patch_grid(tower: nn.Module, model: str) -> tuple[int, int]:
    """(number of patches, numbers in each) of an image tower.

    Raises:
        ValueError: the tower does not see its picture as patches.
    """
    if hasattr(tower, "grid_size") and hasattr(tower, "transformer"):
        return tower.grid_size[0] * tower.grid_size[1], tower.transformer.width
    trunk = getattr(tower, "trunk", None)
    if hasattr(trunk, "patch_embed") and hasattr(trunk, "embed_dim") and hasattr(trunk, "blocks"):
        return trunk.patch_embed.num_patches, trunk.embed_dim
    raise ValueError(
        f"encoder.image=patch_tokens needs a ViT, the image tower of {model!r} is a {type(tower).__name__} without patches; "
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
            ValueError: the text is longer than the tower can read, and too_long is not `truncate`.
        """
        ids = self.encoding.encode(text)
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
