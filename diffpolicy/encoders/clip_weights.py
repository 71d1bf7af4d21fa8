"""Which CLIP models there are, what is known of their weights before they are read, and how they are read.

A model whose activation is not the one its weights were trained with computes other features without a word. A tag says
which it was; of a file it is known from the open_clip_config.json beside it, from the repository of the hub in whose cache it
lies, or from its name, if open_clip publishes weights under that name. Where nothing is known and the model comes in both
kinds, that is said.
"""

from __future__ import annotations

import copy
import difflib
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from diffpolicy.spec import unknown_name

PRESETS = Path(__file__).parent / "models"
"""Model configs of our own, in open_clip's format; the name of the file is the name of the model."""
HUB, FOLDER = "hf-hub:", "local-dir:"
"""Prefixes of encoder.model by which open_clip knows a repository of the hub and a folder."""
WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
CONFIG_FILE = "open_clip_config.json"


def known_models() -> list[str]:
    """Names that open_clip can build, ours among them."""
    import open_clip

    if not {file.stem for file in PRESETS.glob("*.json")} <= set(open_clip.list_models()):
        open_clip.add_model_config(PRESETS)
    return open_clip.list_models()


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
        patch_size = config["vision_cfg"].get("patch_size")
        if isinstance(patch_size, int) and image_size % patch_size:
            raise ValueError(
                f"encoder.image_size must be a multiple of {patch_size}, the patches of {model!r} (the rest would not be "
                f"seen), got {image_size}; take {max(1, round(image_size / patch_size)) * patch_size}"
            )
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
        file = Path(model.removeprefix(FOLDER)) / CONFIG_FILE
        if not file.is_file():
            raise ValueError(f"encoder.model={model!r} must name a folder with {CONFIG_FILE}; {file} is missing")
    else:
        try:
            with only_our_line():
                file = Path(download_pretrained_from_hf(model.removeprefix(HUB), filename=CONFIG_FILE))
        except (
            Exception
        ) as error:  # no network, no such repository, no right to it: the client's errors have no common base
            raise unreachable(f"encoder.model={model!r}", error) from error
    return read_config(file)


def read_config(file: Path) -> dict:
    """An open_clip_config.json: model_cfg, and perhaps preprocess_cfg."""
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not readable as JSON: {error}") from error
    if not isinstance(described, dict) or not isinstance(described.get("model_cfg"), dict):
        raise ValueError(f"{file} must hold a section model_cfg, as open_clip writes it")
    return described


def check_pretrained(model: str, config: dict, pretrained: str) -> dict:
    """How the pictures were prepared that a tag's or a file's weights were trained on, as far as known.

    Raises:
        ValueError: no such tag or file, or weights that were trained with another activation than the model's.
    """
    import open_clip

    tag = open_clip.get_pretrained_cfg(model, pretrained)
    if tag:
        require_same_activation(model, config, pretrained, tag.get("quick_gelu", False), "")
        return tag
    if Path(pretrained).suffix not in WEIGHT_SUFFIXES:
        raise unknown_name(
            f"encoder.pretrained must be a file ({', '.join(WEIGHT_SUFFIXES)}) or a tag; the tag for {model!r}",
            pretrained,
            open_clip.list_pretrained_tags_by_model(model),
        )
    if not Path(pretrained).is_file():
        raise ValueError(f"encoder.pretrained must be a tag or an existing file, got {pretrained!r}")
    return check_file(model, config, Path(pretrained))


def check_file(model: str, config: dict, file: Path) -> dict:
    """What is known of a file of weights by what lies beside it, where it lies, and its name; see check_pretrained."""
    refuse_torchscript(file)
    beside = file.parent / CONFIG_FILE
    if beside.is_file():
        described = read_config(beside)
        trained = described["model_cfg"].get("quick_gelu", False)
        require_same_activation(model, config, str(file), trained, f", as {beside} says")
        return described.get("preprocess_cfg", {})
    built = config.get("quick_gelu", False)
    for name, tag in open_clip_tags():
        repository = "models--" + tag.get("hf_hub", "").strip("/").replace("/", "--")  # as the hub's cache calls it
        if repository in file.parts:
            require_same_activation(model, config, str(file), tag.get("quick_gelu", False), f", as {repository} says")
            return tag
        if file.name != tag.get("url", "").rpartition("/")[2]:
            continue
        trained = tag.get("quick_gelu", False)
        if trained == built or re.search(r"-[0-9a-f]{8}$", file.stem):  # a name that ends in its hash is no coincidence
            require_same_activation(
                model, config, str(file), trained, f", as its name says: a file of open_clip's {name}"
            )
            return tag
        warnings.warn(
            f"encoder.pretrained={str(file)!r} has the name of weights that were trained with quick_gelu={trained}, "
            f"encoder.model={model!r} has quick_gelu={built}; if it is these, every activation is off: set encoder.model="
            f"{twin_of(model) or 'another model'}",
            stacklevel=2,
        )
        return {}
    if twin := twin_of(model):
        warnings.warn(
            f"nothing says whether encoder.pretrained={str(file)!r} was trained with quick_gelu; encoder.model={model!r} has "
            f"quick_gelu={config.get('quick_gelu', False)}, for the other kind (OpenAI's, MetaCLIP's and DFN's weights are "
            f"quick_gelu) set encoder.model={twin}",
            stacklevel=2,
        )
    return {}


def open_clip_tags() -> list[tuple[str, dict]]:
    """(model, what open_clip says of a tag) of all weights that it knows where to fetch."""
    import open_clip

    return [(model, open_clip.get_pretrained_cfg(model, tag)) for model, tag in open_clip.list_pretrained()]


def twin_of(model: str) -> str:
    """The same model with the other activation; "" where there is none."""
    twin = model.removesuffix("-quickgelu") if model.endswith("-quickgelu") else f"{model}-quickgelu"
    return twin if twin in known_models() else ""


def require_same_activation(model: str, config: dict, pretrained: str, trained: bool, why: str) -> None:
    """ValueError where the weights were trained with quick_gelu and the model has none, or the other way round."""
    built = config.get("quick_gelu", False)
    if trained != built:
        twin = twin_of(model)
        fix = f"encoder.model={twin}" if twin else "another model or other weights"
        raise ValueError(
            f"encoder.pretrained={pretrained!r} was trained with quick_gelu={trained}{why}, encoder.model={model!r} has "
            f"quick_gelu={built}: every activation would be off; set {fix}"
        )


def refuse_torchscript(file: Path) -> None:
    """ValueError for an archive of code and weights, as OpenAI published its models; says how to take the weights out."""
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        holds_code = any("/code/" in name for name in archive.namelist())
    if holds_code:
        raise ValueError(
            f"encoder.pretrained={str(file)!r} is a TorchScript archive, which runs code when loaded. Of OpenAI's models, "
            "encoder.pretrained=openai with a model named -quickgelu fetches the weights alone; of others, if you trust the "
            "file, save torch.jit.load(FILE).state_dict() with torch.save"
        )


def check_text(model: str, config: dict, *, need_text: bool) -> None:
    """Raises ValueError where text is wanted of a model whose tokenizer or text tower lives on the hub."""
    text = config["text_cfg"]
    if need_text and (text.get("hf_tokenizer_name") or text.get("hf_model_name") or "siglip" in model.lower()):
        raise ValueError(
            f"encoder.text=pooled needs a model with open_clip's own tokenizer, that of {model!r} must be fetched from the "
            "hub, so that a saved policy could not be loaded without it; choose another model or encoder.text=none"
        )


def load_model(model: str, pretrained: str | None, *, image_size: int | None) -> nn.Module:
    """Both towers with their weights, fetched where they are not here yet; nothing in a file is executed."""
    import open_clip

    try:
        with only_our_line():
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


@contextmanager
def only_our_line() -> Iterator[None]:
    """Meanwhile the hub's client does not print each of its retries: what went wrong in the end is in our error."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def unreachable(what: str, error: Exception) -> ValueError:
    return ValueError(
        f"{what} could not be fetched: {first_line(error)}; without a network, set encoder.pretrained to a file of weights or "
        f"encoder.model={FOLDER}FOLDER"
    )


def first_line(error: Exception, limit: int = 200) -> str:
    line = " ".join(str(error).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
