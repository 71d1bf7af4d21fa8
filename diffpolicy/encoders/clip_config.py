"""What can be chosen of the CLIP encoder, and what follows from the choices for a tower and a camera."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from diffpolicy.spec import unknown_name

IMAGE_FEATURES = ("pooled", "keypoints", "patch_tokens", "all_layers", "attention_pool", "perceiver")
RESAMPLED = ("attention_pool", "perceiver")
LAYERED = ("all_layers", *RESAMPLED)
"""Those of IMAGE_FEATURES that bring patches down to a few tokens, and that can look at any layer."""
TEXT_FEATURES = ("none", "pooled", "tokens")
TEXT_TOO_LONG = ("error", "truncate")
TUNINGS = ("frozen", "full", "last_n", "lora")


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Choices of ClipEncoder; the defaults learn a tiny CLIP from nothing together with the policy."""

    model: str = "diffpolicy-tiny"
    """A model of open_clip, `diffpolicy-tiny` or `diffpolicy-small`, `hf-hub:ORG/REPOSITORY`, `local-dir:FOLDER`."""
    pretrained: str | None = None
    """A tag of open_clip (fetched when training starts) or a file of weights; None: random, or those of the repository."""
    image: str = "pooled"
    """`pooled`: one vector per frame and camera; `keypoints`: and in it the places of num_keypoints learned things. Else the
    pooled vector and tokens: `patch_tokens`, the last layer's patches; `all_layers`, for each patch what all layers say of it,
    side by side; `attention_pool` and `perceiver`, num_image_tokens that look at the patches once, or in resampler_depth
    layers."""
    image_layers: tuple[int, ...] | None = None
    """Blocks whose patches are looked at, 0 the first and -1 the last; None: all of them for all_layers, the last for
    attention_pool and perceiver."""
    num_image_tokens: int = 16
    """Tokens per frame and camera of attention_pool and perceiver."""
    num_keypoints: int = 32
    """Places per frame and camera of keypoints."""
    resampler_depth: int = 2
    """Layers of perceiver."""
    share_towers: bool = True
    """One image tower for all cameras and the goal image; False: each has its own, all of them begin alike."""
    text: str = "pooled"
    """`pooled`: the instruction as one vector; `tokens`: and each of its words; `none`: the text tower is dropped."""
    prompt: str = "{}"
    """What the text tower reads; {} is the instruction, as in `a robot that is told to {}`."""
    text_too_long: str = "error"
    """What happens to an instruction of more tokens than the tower reads; `truncate` cuts its end off and says so."""
    tuning: str = "full"
    """`frozen`; `full`: the towers learn along; `last_n`: num_tuned_blocks of them do; `lora`: low-rank adapters do."""
    text_tuning: str | None = None
    """The same for the text tower; None: as tuning says."""
    num_tuned_blocks: int = 2
    """Blocks at the end of a tower that learn under last_n, with the norm and projection behind them."""
    lr_scale: float | None = None
    """Learning rate of tuned towers over train.lr; None: 0.1 for what begins with weights, 1 for what is random or an adapter."""
    lora_rank: int = 8
    lora_alpha: float = 16.0
    """Adapters are scaled by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Dropout on what goes into an adapter, in training."""
    lora_targets: tuple[str, ...] | None = None
    """Linear layers of each block that get adapters, of in_proj, out_proj, c_fc, c_proj (timm: qkv, proj, fc1, fc2); None: all."""
    gradient_checkpointing: bool = False
    """Run the towers' blocks again in the backward pass instead of keeping all they computed: less memory, more time."""
    image_size: int | None = None
    """Pixels a side that the image tower is built for, its positions interpolated; None: its own."""
    crop_ratio: float | None = 0.9
    """Crop's height over frame's height (and width over width); None: no crop."""
    square_crop: bool = False
    """Crop a square, which loses what lies at the sides; False: the crop keeps the frame's shape and is squeezed to a square."""
    token_dim: int = 128
    """Width that all tokens are brought to."""
    task_dropout: float = 0.0
    """Share of training samples whose instruction is hidden behind a learned null: what guidance and wordless runs need."""
    goal_dropout: float = 0.0
    """The same for the goal image."""
    camera_dropout: float = 0.0
    """The same for each camera by itself, so that the policy can run without it."""
    state_dropout: float = 0.0
    """The same for the state: keeps a policy from copying what it feels of itself instead of looking."""
    architecture: dict[str, Any] | None = None
    """Leave it null: a checkpoint notes here how its towers are built. Then nothing is looked up and no weights are read."""

    def __post_init__(self):
        for name in ("image_layers", "lora_targets"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
                if not getattr(self, name):
                    raise ValueError(f"encoder.{name} must name at least one, or be null for its default, got ()")
        for name, known in (
            ("image", IMAGE_FEATURES),
            ("text", TEXT_FEATURES),
            ("text_too_long", TEXT_TOO_LONG),
            ("tuning", TUNINGS),
        ):
            if getattr(self, name) not in known:
                raise unknown_name(f"encoder.{name}", getattr(self, name), known)
        if self.text_tuning is not None and self.text_tuning not in TUNINGS:
            raise unknown_name("encoder.text_tuning", self.text_tuning, TUNINGS)
        if self.prompt.count("{}") != 1:
            raise ValueError(f"encoder.prompt must hold {{}} once, where the instruction goes, got {self.prompt!r}")
        for name in (
            "num_tuned_blocks",
            "image_size",
            "token_dim",
            "num_image_tokens",
            "num_keypoints",
            "resampler_depth",
            "lora_rank",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"encoder.{name} must be at least 1, got {getattr(self, name)}")
        if self.lr_scale is not None and self.lr_scale <= 0:
            raise ValueError(f"encoder.lr_scale must be positive (tuning=frozen keeps weights), got {self.lr_scale}")
        if self.lora_alpha <= 0:
            raise ValueError(f"encoder.lora_alpha must be positive, got {self.lora_alpha}")
        for name in ("task_dropout", "goal_dropout", "camera_dropout", "state_dropout", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"encoder.{name} must be in [0, 1), got {getattr(self, name)}")
        if self.crop_ratio is not None and not 0 < self.crop_ratio <= 1:
            raise ValueError(f"encoder.crop_ratio must be in (0, 1] or null, got {self.crop_ratio}")

    @property
    def begins_with_weights(self) -> bool:
        return self.pretrained is not None or self.model.startswith(("hf-hub:", "local-dir:"))

    @property
    def wants_patches(self) -> bool:
        return self.image != "pooled"

    @property
    def for_tokens(self) -> dict[str, str]:
        """Choices that differ from `pooled` in the tokens alone -> what they are."""
        choices = {"image": self.image, "text": self.text}
        return {name: got for name, got in choices.items() if got not in ("none", "pooled", "keypoints")}

    def ignored(self) -> dict[str, str]:
        """Settings that differ from their default although nothing here looks at them -> the setting that makes it so."""
        text_tuning = self.text_tuning or self.tuning
        tunings = {self.tuning, text_tuning}
        image, tuning = f"encoder.image={self.image}", f"encoder.tuning={self.tuning}"
        if text_tuning != self.tuning:
            tuning += f", encoder.text_tuning={text_tuning}"
        looked_at = {
            "image_layers": (self.image in LAYERED, image),
            "num_image_tokens": (self.image in RESAMPLED, image),
            "num_keypoints": (self.image == "keypoints", image),
            "resampler_depth": (self.image == "perceiver", image),
            "num_tuned_blocks": ("last_n" in tunings, tuning),
            "gradient_checkpointing": (tunings != {"frozen"}, tuning),
            "lr_scale": (tunings != {"frozen"}, tuning),
            "text_too_long": (self.text != "none", f"encoder.text={self.text}"),
            **{f"lora_{name}": ("lora" in tunings, tuning) for name in ("rank", "alpha", "dropout", "targets")},
        }
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        return {
            name: why for name, (used, why) in looked_at.items() if not used and getattr(self, name) != defaults[name]
        }


def chosen_layers(config: ClipConfig, depth: int) -> tuple[int, ...]:
    """Blocks, of `depth`, whose patches are looked at; ValueError for one that is not there."""
    layers = config.image_layers if config.image in LAYERED else None
    if layers is None:
        return tuple(range(depth)) if config.image == "all_layers" else (-1,)
    for layer in layers:
        if not -depth <= layer < depth:
            raise ValueError(f"encoder.image_layers must be in [{-depth}, {depth - 1}] for this tower, got {layer}")
    return layers


def square_side(size: int | tuple[int, int], model: str) -> int:
    """Pixels a side that an image tower takes; ValueError where they differ."""
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ValueError(f"encoder.model={model!r} must see square pictures, its size is {(height, width)}")
    return height


def crop_size(config: ClipConfig, key: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """(h, w) in pixels that a camera of this shape is cropped to; ValueError where it is no colour image."""
    if len(shape) != 3 or shape[2] != 3:
        raise ValueError(f"{key} must be (H, W, 3) in the data's spec, got {shape}")
    height, width = (min(shape[:2]),) * 2 if config.square_crop else shape[:2]
    ratio = config.crop_ratio or 1.0
    return max(1, round(height * ratio)), max(1, round(width * ratio))
