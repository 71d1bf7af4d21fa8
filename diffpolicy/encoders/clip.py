"""Cameras and the instruction through the towers of a CLIP model, frozen or learning with the policy."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffpolicy.encoders.parts import GOAL_PART, STATE_PART, Features, Part, PartsToCondition, part_of
from diffpolicy.encoders.resnet import crop_frames
from diffpolicy.encoders.state import concatenate_states, take_observation
from diffpolicy.spec import GOAL_IMAGE, TASK, Condition, DataSpec, Observation, unknown_name

IMAGE_FEATURES = ("pooled", "patch_tokens")
TEXT_FEATURES = ("none", "pooled", "tokens")
TUNINGS = ("frozen", "full", "last_n")
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
    """`pooled`: the instruction as one vector; `tokens`: and each of its words; `none`: the text tower is dropped."""
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
        for name in ("task_dropout", "goal_dropout", "camera_dropout", "state_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"encoder.{name} must be in [0, 1), got {getattr(self, name)}")
        if self.crop_ratio is not None and not 0 < self.crop_ratio <= 1:
            raise ValueError(f"encoder.crop_ratio must be in (0, 1] or null, got {self.crop_ratio}")

    @property
    def begins_with_weights(self) -> bool:
        return self.pretrained is not None or self.model.startswith(("hf-hub:", "local-dir:"))


class ClipEncoder(nn.Module):
    """States, cameras, a goal image and the instruction as one vector and as tokens; parts.py says in which order.

    Towers as in Radford et al. 2021, arXiv:2103.00020, built by open_clip; embeddings are not brought to length 1.

        uint8 (B, T_obs, H, W, 3) - crop - resize -> image tower -+- pooled (B, T_obs, E) per camera
                                                                  +- patches (B, T_obs, P, W) per camera, on demand
        task, B strings -> text tower - words (B, E)

    All cameras and the goal image share the image tower. The random crop of training is the same over a sample's frames.
    What a training dropout hides (`droppable`) may be missing later: a role that an observation lacks, a task of "".
    """

    def __init__(self, config: ClipConfig, *, spec: DataSpec, obs_horizon: int):
        super().__init__()
        from diffpolicy.encoders import clip_towers  # open_clip takes seconds that other policies need not pay

        self.picture_keys = (*spec.image_keys, *spec.goal_keys)
        if not spec.state_keys and not self.picture_keys:
            raise ValueError(f"encoder.name=clip needs a camera or a state, the data has only {sorted(spec.fields)}")
        if not self.picture_keys and config.text == "none":
            raise ValueError(
                f"encoder.name=clip has nothing to do with encoder.text=none and no camera among {sorted(spec.fields)}; "
                "use encoder.name=state"
            )
        if not self.picture_keys and config.image == "patch_tokens":
            raise ValueError(f"encoder.image=patch_tokens needs a camera, the data has only {sorted(spec.fields)}")
        self.config, self.spec, self.obs_horizon = config, spec, obs_horizon
        self._embed_image, self._embed_text = clip_towers.embed_image, clip_towers.embed_text
        towers = clip_towers.build_towers(
            config.model,
            config.pretrained,
            need_image=bool(self.picture_keys),
            need_text=config.text != "none",
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
        num_image_tokens, image_dim = 1, embed_dim
        if self.image_tower is not None:
            self.image_size = square_side(self.image_tower.image_size, config.model)
            self.crop_sizes = {key: crop_size(config, key, spec.fields[key].shape) for key in self.picture_keys}
            if config.image == "patch_tokens":
                num_image_tokens, image_dim = clip_towers.patch_grid(self.image_tower, config.model)
        if self.text_tower is not None:
            text = self.architecture["model"]["text_cfg"]
            choices = text.get("tokenizer_kwargs") or {}
            self.tokenizer = clip_towers.Tokenizer(self.text_tower.context_length, **choices)
            self._embedded: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
            self._embedded_by: tuple = ()

        parts = []
        if spec.state_keys:
            parts.append(
                Part(
                    STATE_PART,
                    "state",
                    obs_horizon,
                    spec.state_dim,
                    1,
                    spec.state_dim,
                    config.state_dropout,
                    framed=True,
                )
            )
        picture = (embed_dim, num_image_tokens, image_dim)
        parts += [
            Part(key, "image", obs_horizon, *picture, config.camera_dropout, framed=True) for key in spec.image_keys
        ]
        parts += [Part(GOAL_PART, "goal", 1, *picture, config.goal_dropout, framed=False) for _ in spec.goal_keys]
        if self.text_tower is not None:
            num_words, word_dim = 1, embed_dim
            if config.text == "tokens":
                num_words, word_dim = self.text_tower.context_length, text["width"]
            parts.append(Part(TASK, "text", 1, embed_dim, num_words, word_dim, config.task_dropout, framed=False))
        names = {part.name for part in parts}
        for name, section in ((TASK, "task"), (GOAL_PART, "goal"), (STATE_PART, "state")):
            if getattr(config, f"{section}_dropout") > 0 and name not in names:
                warnings.warn(f"encoder.{section}_dropout is ignored: this policy has no {name}", stacklevel=2)
        if config.camera_dropout > 0 and not spec.image_keys:
            warnings.warn("encoder.camera_dropout is ignored: this policy has no camera", stacklevel=2)
        self.assemble = PartsToCondition(parts, token_dim=config.token_dim)
        self.cond = self.assemble.cond

    @property
    def droppable(self) -> frozenset[str]:
        """Parts that may be missing, as training hid them now and then: `state`, camera roles, `goal`, `task`."""
        return self.assemble.droppable

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

    def forward(self, obs: Observation, *, drop: Collection[str] = (), without: Collection[str] = ()) -> Condition:
        """Condition of observations role -> (B, T_obs, ...): states normalised, images uint8; task -> B strings.

        Args:
            drop: parts that are treated as missing although they are here.
            without: parts for which the condition also comes without them (Condition.without), from the same features.
        Raises:
            ValueError: a part is missing that the policy never learned to do without, or has another shape or type.
        """
        names = [part.name for part in self.assemble.parts]
        for name in {*drop, *without} - set(names):
            raise unknown_name("a part of this policy's observation", name, names)
        batch_size = len(next(iter(obs.values())))
        like = next(self.assemble.parameters())
        features: dict[str, Features | None] = dict.fromkeys(names)
        if STATE_PART in features and STATE_PART not in drop and any(key in obs for key in self.spec.state_keys):
            states = concatenate_states(obs, self.spec, self.obs_horizon)  # (B, T_obs, D_state)
            features[STATE_PART] = Features(states, states.unsqueeze(2))
        here = [key for key in self.picture_keys if key in obs and part_of(key) not in drop]
        if here:
            for key, found in self.embed_images(obs, here).items():
                features[part_of(key)] = found
        if self.text_tower is not None and TASK not in drop:
            features[TASK] = self.embed_tasks(obs, batch_size=batch_size, like=like)
        return self.assemble(features, batch_size=batch_size, like=like, without=without)

    def embed_images(self, obs: Observation, keys: Sequence[str]) -> dict[str, Features]:
        """Cameras and goal image through the one tower, in one pass."""
        pixels = [self.pixels(obs, key) for key in keys]  # (B*T_obs, 3, S, S) each; of a goal image (B, 3, S, S)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._tunings["image_tower"] != "frozen"):
            pooled, patches = self._embed_image(
                self.image_tower, torch.cat(pixels), patches=self.config.image == "patch_tokens"
            )
        sizes = [len(p) for p in pixels]
        tokens = pooled.unsqueeze(1) if patches is None else patches  # (N, P or 1, W)
        found = {}
        for key, vector, token in zip(keys, pooled.split(sizes), tokens.split(sizes), strict=True):
            frames = self.num_frames(key)
            found[key] = Features(vector.unflatten(0, (-1, frames)), token.unflatten(0, (-1, frames)))
        return found

    def num_frames(self, key: str) -> int:
        """T_obs of a camera, 1 of the goal image."""
        return 1 if key == GOAL_IMAGE else self.obs_horizon

    def pixels(self, obs: Observation, key: str) -> Tensor:
        """What the tower sees of one camera, (B*T_obs, 3, S, S) floats; a random crop in training, else the centre.

        Resized with antialiasing where the crop has another size, by the interpolation and normalised by the constants
        that the weights were trained with.

        Raises:
            ValueError: the camera is missing, of another size, or not uint8.
        """
        frames = take_observation(obs, key, (self.num_frames(key), *self.spec.fields[key].shape))
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

    def embed_tasks(self, obs: Observation, *, batch_size: int, like: Tensor) -> Features | None:
        """The instructions, None where nothing is said; each distinct one is embedded once.

        Where the text tower learns, that is once in a batch, with gradients; else once for as long as its weights last.

        Raises:
            ValueError: an instruction is no text, too long, or missing although the policy never learned to do without.
        """
        tasks = check_tasks(obs.get(TASK), batch_size, may_be_empty=TASK in self.droppable)
        said = [task for task in tasks if task]
        if not said:
            return None
        distinct = {task: i for i, task in enumerate(dict.fromkeys(said))}
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.text_tower.parameters())
        if learns or (self.training and self._tunings["text_tower"] != "frozen"):
            ids = torch.stack([self.tokenizer(self.config.prompt.replace("{}", task)) for task in distinct])
            embedded = self.read(ids.to(like.device))
        else:
            each = [self.remembered(task, like.device) for task in distinct]
            embedded = [torch.cat(of_all) for of_all in zip(*each, strict=True)]
        row = torch.tensor([distinct.get(task, 0) for task in tasks], device=like.device)
        vector, words, mask = (x[row] for x in embedded)
        present = None
        if len(said) < batch_size:
            present = torch.tensor([bool(task) for task in tasks], device=like.device)
        padding = mask if self.config.text == "tokens" else None
        return Features(vector.unsqueeze(1), words.unsqueeze(1), token_mask=padding, present=present)

    def read(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids (n, C) -> pooled (n, E), tokens (n, C, W) with their mask (n, C); pooled as the one token (n, 1, E) unless
        text=tokens."""
        if self.config.text == "tokens":
            return self._embed_text(self.text_tower, ids)
        pooled = self.text_tower(ids)
        return pooled, pooled.unsqueeze(1), torch.ones(len(ids), 1, dtype=torch.bool, device=ids.device)

    def remembered(self, task: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """One instruction as `read` gives it, embedded alone, so that its neighbours in a batch do not count."""
        bits = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        weights = (bits, *((p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.text_tower.parameters()))
        if weights != self._embedded_by:
            self._embedded, self._embedded_by = {}, weights
        if task not in self._embedded:
            ids = self.tokenizer(self.config.prompt.replace("{}", task))
            with torch.inference_mode(False), torch.no_grad():  # a later training step may use it
                self._embedded[task] = tuple(x.clone() for x in self.read(ids[None].to(device)))
        return self._embedded[task]


def check_tasks(tasks: object, batch_size: int, *, may_be_empty: bool = False) -> list[str]:
    """The instructions, one for each observation, "" for none.

    Raises:
        ValueError: one is no text, or there is none although there must be.
    """
    fix = (
        "record demonstrations with an instruction, or set encoder.text=none; a policy trained with encoder.task_dropout "
        "can do without"
    )
    if tasks is None:
        if may_be_empty:
            return [""] * batch_size
        raise ValueError(f"observation must have {TASK!r}, the instruction that encoder.text=pooled reads; {fix}")
    if isinstance(tasks, str) or len(tasks) != batch_size:
        raise ValueError(f"{TASK} must be a list of B={batch_size} strings, got {tasks!r}")
    for i, task in enumerate(tasks):
        if may_be_empty and task is None:
            continue
        if not isinstance(task, str) or not (task.strip() or may_be_empty):
            raise ValueError(f"{TASK} must hold an instruction for every observation, number {i} has {task!r}; {fix}")
    return [task if task and task.strip() else "" for task in tasks]


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
