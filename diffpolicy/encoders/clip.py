"""Cameras and the instruction through the towers of a CLIP model, frozen or learning with the policy."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffpolicy.encoders.resnet import crop_frames
from diffpolicy.encoders.state import concatenate_states, take_observation
from diffpolicy.spec import (
    TASK,
    Condition,
    ConditionSpec,
    DataSpec,
    Observation,
    TokenGroup,
    frame_tokens,
    unknown_name,
)

IMAGE_FEATURES = ("pooled", "patch_tokens")
TEXT_FEATURES = ("none", "pooled")
TUNINGS = ("frozen", "full", "last_n")
EMBEDDING_STD = 0.02
"""Spread of the embeddings of cameras and frames at the start, GPT-2's."""
PRETRAINED_LR_SCALE = 0.1
"""Of the policy's learning rate, for towers that begin with weights."""


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Choices of ClipEncoder; the defaults learn a tiny CLIP from nothing together with the policy."""

    model: str = "diffpolicy-tiny"
    """A model of open_clip, `diffpolicy-tiny` or `diffpolicy-small`, `hf-hub:ORG/REPOSITORY`, `local-dir:FOLDER`."""
    pretrained: str | None = None
    """A tag of open_clip (fetched when training starts) or a file of weights; None: random, or those of the repository."""
    image: str = "pooled"
    """`pooled`: one vector per frame and camera; `patch_tokens`: and the last layer's patches as tokens."""
    text: str = "pooled"
    """`pooled`: the instruction as one vector; `none`: it is not looked at, and the text tower is dropped."""
    prompt: str = "{}"
    """What the text tower reads; {} is the instruction, as in `a robot that is told to {}`."""
    tuning: str = "full"
    """`frozen`; `full`: the towers learn along; `last_n`: num_tuned_blocks of them do."""
    text_tuning: str | None = None
    """The same for the text tower; None: as tuning says."""
    num_tuned_blocks: int = 2
    """Blocks at the end of a tower that learn under last_n, with the norm and projection behind them."""
    lr_scale: float | None = None
    """Learning rate of tuned towers over train.lr; None: 0.1 where they begin with weights, 1 where they are random."""
    image_size: int | None = None
    """Pixels a side that the image tower is built for, its positions interpolated; None: its own."""
    crop_ratio: float | None = 0.9
    """Crop's height over frame's height (and width over width); None: no crop."""
    square_crop: bool = False
    """Crop a square, which loses what lies at the sides; False: the crop keeps the frame's shape and is squeezed to a square."""
    token_dim: int = 128
    """Width of the tokens, where words or patches are among them; frames alone stay as they are."""
    architecture: dict[str, Any] | None = None
    """Leave it null: a checkpoint notes here how its towers are built. Then nothing is looked up and no weights are read."""

    def __post_init__(self):
        for name, known in (("image", IMAGE_FEATURES), ("text", TEXT_FEATURES), ("tuning", TUNINGS)):
            if getattr(self, name) not in known:
                raise unknown_name(f"encoder.{name}", getattr(self, name), known)
        if self.text_tuning is not None and self.text_tuning not in TUNINGS:
            raise unknown_name("encoder.text_tuning", self.text_tuning, TUNINGS)
        if self.prompt.count("{}") != 1:
            raise ValueError(f"encoder.prompt must hold {{}} once, where the instruction goes, got {self.prompt!r}")
        for name in ("num_tuned_blocks", "image_size", "token_dim"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"encoder.{name} must be at least 1, got {getattr(self, name)}")
        if self.lr_scale is not None and self.lr_scale <= 0:
            raise ValueError(f"encoder.lr_scale must be positive (tuning=frozen keeps weights), got {self.lr_scale}")
        if self.crop_ratio is not None and not 0 < self.crop_ratio <= 1:
            raise ValueError(f"encoder.crop_ratio must be in (0, 1] or null, got {self.crop_ratio}")

    @property
    def begins_with_weights(self) -> bool:
        return self.pretrained is not None or self.model.startswith(("hf-hub:", "local-dir:"))


class ClipEncoder(nn.Module):
    """States, pooled images and the instruction as one vector; frames, patches and the instruction as tokens.

    Towers as in Radford et al. 2021, arXiv:2103.00020, built by open_clip; embeddings are not brought to length 1.

        uint8 (B, T_obs, H, W, 3) - crop - resize -> image tower -+- pooled (B, T_obs, E) per camera --+-- frames (B, T_obs, F)
        states (B, T_obs, D_state) -------------------------------|------------------------------------+
        task, B strings -> text tower - words (B, E)              +- patches (B, T_obs * V * P, W) per camera, on demand

        global_cond = [frame 0, ..., frame T_obs - 1, words]
        tokens      = [frames (T_obs), patches (T_obs * V * P, frame by frame, camera by camera), words (1)]

    All cameras share the image tower. The random crop of training is the same over a sample's frames.
    """

    def __init__(self, config: ClipConfig, *, spec: DataSpec, obs_horizon: int):
        super().__init__()
        from diffpolicy.encoders import clip_towers  # open_clip takes seconds that other policies need not pay

        if not spec.state_keys and not spec.image_keys:
            raise ValueError(f"encoder.name=clip needs a camera or a state, the data has only {sorted(spec.fields)}")
        if not spec.image_keys and config.text == "none":
            raise ValueError(
                f"encoder.name=clip has nothing to do with encoder.text=none and no camera among {sorted(spec.fields)}; "
                "use encoder.name=state"
            )
        if not spec.image_keys and config.image == "patch_tokens":
            raise ValueError(f"encoder.image=patch_tokens needs a camera, the data has only {sorted(spec.fields)}")
        self.config, self.spec, self.obs_horizon = config, spec, obs_horizon
        self._embed_image = clip_towers.embed_image
        towers = clip_towers.build_towers(
            config.model,
            config.pretrained,
            need_image=bool(spec.image_keys),
            need_text=config.text == "pooled",
            image_size=config.image_size,
            architecture=config.architecture,
        )
        self.image_tower, self.text_tower, self.architecture = towers.image, towers.text, towers.architecture
        self._tunings = {"image_tower": config.tuning, "text_tower": config.text_tuning or config.tuning}
        self._frozen: list[str] = []
        for name, tuning in self._tunings.items():
            if getattr(self, name) is not None:
                frozen = clip_towers.freeze(getattr(self, name), tuning, config.num_tuned_blocks)
                self._frozen += [f"{name}.{part}".rstrip(".") for part in frozen]
        if self._frozen and not config.begins_with_weights and config.architecture is None:
            warnings.warn(
                f"encoder.model={config.model!r} keeps random weights in {self._frozen[0]}; set encoder.pretrained, "
                "or encoder.tuning=full to learn them",
                stacklevel=2,
            )

        embed_dim = self.architecture["model"]["embed_dim"]
        frame_dim = spec.state_dim
        num_patches = 0
        if self.image_tower is not None:
            self.image_size = square_side(self.image_tower.image_size, config.model)
            self.crop_sizes = {key: crop_size(config, key, spec.fields[key].shape) for key in spec.image_keys}
            frame_dim += len(spec.image_keys) * embed_dim
            if config.image == "patch_tokens":
                num_patches, patch_dim = clip_towers.patch_grid(self.image_tower, config.model)
        if self.text_tower is not None:
            text = self.architecture["model"]["text_cfg"]
            choices = text.get("tokenizer_kwargs") or {}
            self.tokenizer = clip_towers.Tokenizer(self.text_tower.context_length, **choices)
            self._embedded: dict[str, Tensor] = {}
            self._embedded_by: tuple = ()

        # Frames alone are handed on as they are; beside other tokens all are brought to one width.
        self.has_projections = num_patches > 0 or self.text_tower is not None
        if self.has_projections:
            self.frame_projection = nn.Linear(frame_dim, config.token_dim)
        if num_patches:
            self.patch_projection = nn.Linear(patch_dim, config.token_dim)
            self.camera_embedding = nn.Parameter(torch.empty(len(spec.image_keys), 1, config.token_dim))
            self.time_embedding = nn.Parameter(torch.empty(obs_horizon, 1, 1, config.token_dim))
            nn.init.normal_(self.camera_embedding, std=EMBEDDING_STD)
            nn.init.normal_(self.time_embedding, std=EMBEDDING_STD)
        if self.text_tower is not None:
            self.text_projection = nn.Linear(embed_dim, config.token_dim)
        groups = list(frame_tokens(obs_horizon))
        if num_patches:
            groups += [TokenGroup("image", num_patches, frame) for frame in range(obs_horizon) for _ in spec.image_keys]
        if self.text_tower is not None:
            groups.append(TokenGroup("text", 1))
        self.cond = ConditionSpec(
            global_dim=obs_horizon * frame_dim + (embed_dim if self.text_tower is not None else 0),
            token_dim=config.token_dim if self.has_projections else frame_dim,
            groups=tuple(groups),
        )

    def train(self, mode: bool = True) -> ClipEncoder:
        """Frozen parts stay in eval mode: no dropout, no moving statistics."""
        super().train(mode)
        for name in self._frozen:
            self.get_submodule(name).eval()
        return self

    def lr_scales(self) -> dict[str, float]:
        """Names of the towers' parameters that learn -> their learning rate over the policy's."""
        scale = self.config.lr_scale
        if scale is None:
            scale = PRETRAINED_LR_SCALE if self.config.begins_with_weights else 1.0
        towers = ("image_tower.", "text_tower.")
        return {name: scale for name, p in self.named_parameters() if p.requires_grad and name.startswith(towers)}

    def forward(self, obs: Observation) -> Condition:
        """obs: role -> (B, T_obs, ...), states normalised, images uint8; task -> B strings; -> Condition."""
        features, patches = [], None
        if self.spec.state_keys:
            features.append(concatenate_states(obs, self.spec, self.obs_horizon))
        if self.image_tower is not None:
            pooled, patches = self.embed_images(obs)
            features.append(pooled)
        frames = torch.cat(features, dim=-1)  # (B, T_obs, F)
        words = None if self.text_tower is None else self.embed_tasks(obs, batch_size=len(frames), like=frames)
        global_cond = frames.flatten(1)
        tokens = [self.frame_projection(frames) if self.has_projections else frames]
        if patches is not None:
            patches = self.patch_projection(patches) + self.camera_embedding + self.time_embedding
            tokens.append(patches.flatten(1, 3))  # (B, T_obs * V * P, token_dim)
        if words is not None:
            global_cond = torch.cat([global_cond, words], dim=-1)  # (B, T_obs * F + E)
            tokens.append(self.text_projection(words).unsqueeze(1))
        return Condition(global_cond=global_cond, tokens=torch.cat(tokens, dim=1))

    def embed_images(self, obs: Observation) -> tuple[Tensor, Tensor | None]:
        """Every camera through the one tower, in one pass.

        Returns:
            pooled (B, T_obs, V * E), cameras side by side; patches (B, T_obs, V, P, W), or None where nobody asked.
        """
        keys = self.spec.image_keys
        pixels = torch.cat([self.pixels(obs, key) for key in keys])  # (V*B*T_obs, 3, S, S)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._tunings["image_tower"] != "frozen"):
            pooled, patches = self._embed_image(self.image_tower, pixels, patches=self.config.image == "patch_tokens")
        split = lambda x: x.unflatten(0, (len(keys), -1, self.obs_horizon)).movedim(0, 2)  # (B, T_obs, V, ...)
        return split(pooled).flatten(2), None if patches is None else split(patches)

    def pixels(self, obs: Observation, key: str) -> Tensor:
        """What the tower sees of one camera, (B*T_obs, 3, S, S) floats; a random crop in training, else the centre.

        Resized with antialiasing where the crop has another size, by the interpolation and normalised by the constants
        that the weights were trained with.

        Raises:
            ValueError: the camera is missing, of another size, or not uint8.
        """
        frames = take_observation(obs, key, (self.obs_horizon, *self.spec.fields[key].shape))
        if frames.dtype != torch.uint8:
            raise ValueError(f"{key} must be uint8 in 0..255 (it is scaled here), got {frames.dtype}")
        if self.crop_sizes[key] != tuple(frames.shape[2:4]):
            frames = crop_frames(frames, self.crop_sizes[key], random=self.training)  # uint8: a quarter of the traffic
        x = frames.flatten(0, 1).permute(0, 3, 1, 2).float()  # (B*T_obs, 3, h, w), 0..255
        preprocess = self.architecture["preprocess"]
        if x.shape[-2:] != (self.image_size, self.image_size):
            x = F.interpolate(x, size=self.image_size, mode=preprocess["interpolation"], antialias=True)
            x = x.clamp(0, 255).round()  # bicubic overshoots; what the tower was trained on was rounded
        mean, std = (x.new_tensor(preprocess[name]).view(3, 1, 1) for name in ("mean", "std"))
        return ((x / 255 - mean) / std).to(next(self.image_tower.parameters()).dtype)

    def embed_tasks(self, obs: Observation, *, batch_size: int, like: Tensor) -> Tensor:
        """The instructions as vectors (B, E); each distinct one is embedded once.

        Where the text tower learns, that is once in a batch, with gradients; else once for as long as its weights last.

        Raises:
            ValueError: an instruction is missing, empty, no text, or too long.
        """
        tasks = check_tasks(obs.get(TASK), batch_size)
        distinct = {task: i for i, task in enumerate(dict.fromkeys(tasks))}
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.text_tower.parameters())
        if learns or (self.training and self._tunings["text_tower"] != "frozen"):
            ids = torch.stack([self.tokenizer(self.config.prompt.replace("{}", task)) for task in distinct])
            words = self.text_tower(ids.to(like.device))  # (number of distinct tasks, E)
        else:
            words = torch.cat([self.remembered(task, like.device) for task in distinct])
        return words[torch.tensor([distinct[task] for task in tasks], device=words.device)]

    def remembered(self, task: str, device: torch.device) -> Tensor:
        """The vector (1, E) of one instruction, embedded alone, so that it does not depend on its neighbours in a batch."""
        bits = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        weights = (bits, *((p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.text_tower.parameters()))
        if weights != self._embedded_by:
            self._embedded, self._embedded_by = {}, weights
        if task not in self._embedded:
            ids = self.tokenizer(self.config.prompt.replace("{}", task))
            with torch.inference_mode(False), torch.no_grad():  # a later training step may use it
                self._embedded[task] = self.text_tower(ids[None].to(device)).clone()
        return self._embedded[task]


def check_tasks(tasks: object, batch_size: int) -> list[str]:
    """The instructions, one for each observation; ValueError where one is missing, empty or no text."""
    fix = "record demonstrations with an instruction, or set encoder.text=none"
    if tasks is None:
        raise ValueError(f"observation must have {TASK!r}, the instruction that encoder.text=pooled reads; {fix}")
    if isinstance(tasks, str) or len(tasks) != batch_size:
        raise ValueError(f"{TASK} must be a list of B={batch_size} strings, got {tasks!r}")
    for i, task in enumerate(tasks):
        if not isinstance(task, str) or not task.strip():
            raise ValueError(f"{TASK} must hold an instruction for every observation, number {i} has {task!r}; {fix}")
    return [str(task) for task in tasks]


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
