"""Cameras through a ResNet-18 with group norm and spatial softmax, trained from scratch with the policy."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffpolicy.encoders.state import concatenate_states, take_observation
from diffpolicy.spec import Condition, ConditionSpec, DataSpec, Observation, frame_tokens, unknown_name

PIXEL_STATS = {
    "centered": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # 0..255 onto [-1, 1], as the reference's image recipe
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Name -> mean and standard deviation per colour, of pixels in [0, 1]."""

CHANNELS_PER_GROUP = 16
BACKBONE_DIM = 512
"""Channels that a ResNet-18 ends with."""
BACKBONE_STRIDE = 32
"""Pixels a side that become one."""


@dataclass(frozen=True, kw_only=True)
class ResnetConfig:
    """Choices of ResnetEncoder; the defaults are the recipe for Push-T from images."""

    resize: tuple[int, int] | None = None
    """Height and width in pixels that every frame is brought to before it is cropped; None: as it is."""
    crop_size: tuple[int, int] | None = None
    """Height and width in pixels of the crop; None: crop_ratio decides."""
    crop_ratio: float | None = 0.875
    """Crop's height over frame's height (and width over width): 84 of 96; None: no crop. crop_size goes before it."""
    feature_dim: int = 64
    """Numbers per camera and frame."""
    num_keypoints: int = 32
    """Channels of the spatial softmax; each gives a place (x, y)."""
    share_towers: bool = False
    """One ResNet for all cameras; False: one each."""
    weights: str | None = None
    """Where the ResNet starts: None (random), `imagenet` (torchvision fetches it), or a file of its state dict."""
    group_norm: bool = True
    """Group norm for batch norm, which a moving average of the weights spoils; False: batch norm, frozen."""
    pixel_stats: str = "centered"
    """How pixels are scaled: `centered` or `imagenet`; weights trained on ImageNet want the latter."""

    def __post_init__(self):
        for name in ("resize", "crop_size"):
            size = getattr(self, name)
            if size is not None:
                object.__setattr__(self, name, tuple(size))
                if len(size) != 2 or min(size) < 1:
                    raise ValueError(f"encoder.{name} must be (height, width) in pixels, got {tuple(size)}")
        if self.crop_ratio is not None and not 0 < self.crop_ratio <= 1:
            raise ValueError(f"encoder.crop_ratio must be in (0, 1] or null, got {self.crop_ratio}")
        for name in ("feature_dim", "num_keypoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"encoder.{name} must be at least 1, got {getattr(self, name)}")
        if self.pixel_stats not in PIXEL_STATS:
            raise unknown_name("encoder.pixel_stats", self.pixel_stats, PIXEL_STATS)
        if not self.group_norm and self.weights is None:
            raise ValueError(
                "encoder.group_norm=false freezes batch norm at the statistics of encoder.weights, got weights=null; "
                "set encoder.weights=imagenet or encoder.group_norm=true"
            )


def crop_frames(frames: Tensor, size: tuple[int, int], *, random: bool) -> Tensor:
    """Cuts a window out of every frame: one place per sample, the same in all of its T_obs frames.

    Where we differ from the reference: its random offset never reaches the last row and column, ours does; and its crop
    moves between the frames of one sample, so that a still scene seems to jump.

    Args:
        frames: (B, T_obs, H, W, 3).
        size: (h, w), at most (H, W).
        random: places drawn from torch's global generator; otherwise the centre.
    Returns:
        (B, T_obs, h, w, 3)
    """
    batch, height, width = frames.shape[0], frames.shape[2], frames.shape[3]
    h, w = size
    if not random:
        top, left = (height - h) // 2, (width - w) // 2
        return frames[:, :, top : top + h, left : left + w]
    device = frames.device
    top = torch.randint(height - h + 1, (batch, 1), device=device)
    left = torch.randint(width - w + 1, (batch, 1), device=device)
    rows = top + torch.arange(h, device=device)  # (B, h)
    columns = left + torch.arange(w, device=device)  # (B, w)
    sample = torch.arange(batch, device=device)[:, None, None]
    # Time last while indexing, so that one (B, h, w) grid serves all frames of a sample.
    return frames.movedim(1, 3)[sample, rows[:, :, None], columns[:, None, :]].movedim(3, 1)


class SpatialSoftmax(nn.Module):
    """Where each channel looks: the mean place under a softmax over pixels, x and y in [-1, 1].

    Finn et al. 2016, arXiv:1509.06113, section V-B, behind a 1x1 convolution that picks the channels.
    """

    def __init__(self, in_channels: int, num_keypoints: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, num_keypoints, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, 2 * K): x of keypoint 0, y of keypoint 0, x of keypoint 1, ..."""
        maps = self.conv(x)  # (N, K, h, w)
        height, width = maps.shape[-2:]
        attention = maps.flatten(2).softmax(dim=-1).view_as(maps)
        ys = torch.linspace(-1, 1, height, device=x.device, dtype=x.dtype)
        xs = torch.linspace(-1, 1, width, device=x.device, dtype=x.dtype)
        place = torch.stack([attention.sum(2) @ xs, attention.sum(3) @ ys], dim=-1)  # (N, K, 2)
        return place.flatten(1)


class CameraTower(nn.Module):
    """ResNet-18 without its head, spatial softmax, one linear layer, ReLU: (N, 3, h, w) -> (N, feature_dim)."""

    def __init__(self, config: ResnetConfig):
        super().__init__()
        self.backbone = build_backbone(config)
        self.pool = SpatialSoftmax(BACKBONE_DIM, config.num_keypoints)
        self.linear = nn.Linear(2 * config.num_keypoints, config.feature_dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.linear(self.pool(self.backbone(x))))


def build_backbone(config: ResnetConfig) -> nn.Sequential:
    """The convolutional part of torchvision's ResNet-18: (N, 3, h, w) -> (N, 512, h/32, w/32).

    With group norm, only the convolutions of `weights` are used and the norms start afresh, as in the reference. On the
    meta device nothing is loaded: whoever builds there brings a state dict.

    Raises:
        ValueError: the file of weights is missing, or does not hold a ResNet-18.
    """
    from torchvision.models import ResNet18_Weights, resnet18  # a second of import that state policies need not pay
    from torchvision.ops import FrozenBatchNorm2d

    def group_norm(channels: int) -> nn.GroupNorm:
        return nn.GroupNorm(channels // CHANNELS_PER_GROUP, channels)

    resnet = resnet18(weights=None, norm_layer=group_norm if config.group_norm else FrozenBatchNorm2d)
    if config.weights is not None and not resnet.conv1.weight.is_meta:
        if config.weights == "imagenet":
            weights = ResNet18_Weights.IMAGENET1K_V1.get_state_dict(progress=False)
        elif Path(config.weights).is_file():
            weights = torch.load(config.weights, map_location="cpu", weights_only=True)
        else:
            raise ValueError(f"encoder.weights must be null, 'imagenet' or an existing file, got {config.weights!r}")
        wanted = {key for key in resnet.state_dict() if not key.startswith("fc.")}
        if config.group_norm:
            wanted = {key for key in wanted if "conv" in key or "downsample.0" in key}
        if missing := sorted(wanted - weights.keys()):
            raise ValueError(f"encoder.weights={config.weights!r} does not hold a ResNet-18: no {missing[0]!r} in it")
        resnet.load_state_dict({key: weights[key] for key in wanted}, strict=False)  # the rest is checked above
    return nn.Sequential(*list(resnet.children())[:-2])  # without average pooling and classifier


class ResnetEncoder(nn.Module):
    """Cameras and states of each observed frame as one token; the global vector is all of them in a row.

    The vision encoder of Diffusion Policy's image recipe (Chi et al. 2023, arXiv:2303.04137, section IV-B).

        uint8 (B, T_obs, H, W, 3) - resize - crop -> tower -> (B, T_obs, 64) per camera --+-- tokens (B, T_obs, D)
        states (B, T_obs, D_state) --------------------------------------------------------+   global (B, T_obs * D)
    """

    def __init__(self, config: ResnetConfig, *, spec: DataSpec, obs_horizon: int):
        super().__init__()
        if not spec.image_keys:
            raise ValueError(
                f"encoder.name=resnet needs a camera, the data has only {sorted(spec.fields)}; use encoder.name=state"
            )
        if spec.goal_keys:
            warnings.warn(
                f"encoder.name=resnet does not look at {spec.goal_keys}; drop it from data.keys, or use encoder.name=clip",
                stacklevel=2,
            )
        self.config = config
        self.spec = spec
        self.obs_horizon = obs_horizon
        self.crop_sizes = {key: crop_size(config, key, spec.fields[key].shape) for key in spec.image_keys}
        num_towers = 1 if config.share_towers else len(spec.image_keys)
        self.towers = nn.ModuleList([CameraTower(config) for _ in range(num_towers)])
        token_dim = len(spec.image_keys) * config.feature_dim + spec.state_dim
        self.cond = ConditionSpec(
            global_dim=obs_horizon * token_dim, groups=frame_tokens(obs_horizon), token_dim=token_dim
        )

    def forward(self, obs: Observation) -> Condition:
        """obs: role -> (B, T_obs, ...), states normalised, images uint8 -> Condition."""
        features = []
        for camera, key in enumerate(self.spec.image_keys):
            pixels = self.pixels(obs, key)  # (B*T_obs, 3, h, w)
            tower = self.towers[0 if self.config.share_towers else camera]
            features.append(tower(pixels).unflatten(0, (-1, self.obs_horizon)))  # (B, T_obs, feature_dim)
        if self.spec.state_keys:
            features.append(concatenate_states(obs, self.spec, self.obs_horizon))
        tokens = torch.cat(features, dim=-1)  # (B, T_obs, D)
        return Condition(global_cond=tokens.flatten(1), tokens=tokens)

    def pixels(self, obs: Observation, key: str) -> Tensor:
        """What a tower sees of one camera: (B*T_obs, 3, h, w) floats; a random crop in training, else the centre.

        Raises:
            ValueError: the camera is missing, of another size, or not uint8.
        """
        frames = take_observation(obs, key, (self.obs_horizon, *self.spec.fields[key].shape))
        if frames.dtype != torch.uint8:
            raise ValueError(f"{key} must be uint8 in 0..255 (it is scaled here), got {frames.dtype}")
        dtype = self.towers[0].linear.weight.dtype
        if self.config.resize is not None:
            x = frames.flatten(0, 1).permute(0, 3, 1, 2).to(dtype)
            x = F.interpolate(x, size=self.config.resize, mode="bilinear", antialias=True)
            frames = x.permute(0, 2, 3, 1).unflatten(0, frames.shape[:2])  # (B, T_obs, H, W, 3), 0..255
        if self.crop_sizes[key] is not None:
            frames = crop_frames(frames, self.crop_sizes[key], random=self.training)  # uint8: a quarter of the traffic
        # Colours stay last in memory (channels_last), where convolutions are fastest.
        x = frames.flatten(0, 1).permute(0, 3, 1, 2).to(dtype)
        mean, std = (x.new_tensor(stats).view(3, 1, 1) for stats in PIXEL_STATS[self.config.pixel_stats])
        return (x / 255 - mean) / std


def crop_size(config: ResnetConfig, key: str, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """(h, w) in pixels that a camera of this shape is cropped to; None: it is not cropped.

    Raises:
        ValueError: not a colour image, a crop that does not fit, or one so small that the spatial softmax is left
            with a single row or column, which says nothing of the picture.
    """
    if len(shape) != 3 or shape[2] != 3:
        raise ValueError(f"{key} must be (H, W, 3) in the data's spec, got {shape}")
    height, width = config.resize or shape[:2]
    if config.crop_size is not None:
        h, w = config.crop_size
        if h > height or w > width:
            raise ValueError(f"encoder.crop_size must fit into {key} of {(height, width)} pixels, got {(h, w)}")
    elif config.crop_ratio is not None:
        h, w = round(height * config.crop_ratio), round(width * config.crop_ratio)
    else:
        h, w = height, width
    if min(h, w) <= BACKBONE_STRIDE:
        raise ValueError(
            f"{key} must have more than {BACKBONE_STRIDE} pixels a side after resize and crop, got {(h, w)}; "
            "set encoder.resize to enlarge it"
        )
    return None if (h, w) == (height, width) else (h, w)
