"""A frozen image tower looks at every frame of a store once; training then reads what it said in place of pixels.

    store: pixels (N, H, W, 3) -- centre crop, resize, tower --> pooled (N, E), patches (N, P, W) --> store, embedding/
    train: data.embedded=true  -- windows of features --> encoder, whose tower does not run
    rollout:                      pixels, and the tower runs as always

There is one set of features per frame, so that the crop is the centre one: encoder.crop_ratio says how much of the frame is
seen, but not where, also in training.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import nn

from diffpolicy.checkpoint import resolve_device
from diffpolicy.config import Config
from diffpolicy.embedding_store import PATCHES, POOLED, open_embedding, write_embedding
from diffpolicy.encoders.clip import ClipConfig, ClipEncoder
from diffpolicy.progress import progress_bar
from diffpolicy.replay import ReplayBuffer
from diffpolicy.spec import GOAL_IMAGE, IMAGES, DataSpec, FieldSpec, KeySelection, unknown_name
from diffpolicy.store_layout import is_image, to_uint8

DTYPES = ("float16", "float32")
DESCRIBED = ("model", "pretrained", "open_clip")
"""Entries of a recipe that say where the tower came from; what it computes is in the others, and these alone are compared."""


@dataclass(frozen=True)
class Embedded:
    """What `embed` wrote."""

    keys: tuple[str, ...]
    num_frames: int
    """Of each camera."""
    shapes: dict[str, tuple[int, ...]]
    """`pooled` and perhaps `patches` -> shape of one frame's."""
    num_bytes: int


def picture_keys(config: Config) -> dict[str, str]:
    """Role of each camera and of the goal image -> key of the store."""
    keys = {}
    for role, selection in config.data.keys.items():
        if role.startswith(IMAGES) or role == GOAL_IMAGE:
            chosen = KeySelection.parse(selection)
            if chosen.dims is not None:
                raise ValueError(
                    f"data.keys.{role} is an image; dimensions cannot be chosen from it, got {selection!r}"
                )
            keys[role] = chosen.key
    return keys


def require_frozen_clip(config: Config, why: str) -> ClipConfig:
    """The encoder's options; ValueError where it has no image tower that stays as it is."""
    options = config.encoder.options
    if not isinstance(options, ClipConfig):
        raise ValueError(f"{why} needs encoder.name=clip, got {config.encoder.name}")
    if options.tuning != "frozen":
        raise ValueError(
            f"{why} needs encoder.tuning=frozen, got {options.tuning}: features of a tower that learns are out of date at once"
        )
    if not picture_keys(config):
        raise ValueError(f"{why} needs a camera among data.keys, got only {sorted(config.data.keys)}")
    return options


def embed(
    path: str | Path,
    config: Config,
    *,
    dtype: str = "float32",
    batch_size: int = 64,
    device: str = "auto",
    console: Console | None = None,
) -> Embedded:
    """Computes what the config's image tower says of every frame of a store and writes it there, all or nothing.

    Args:
        path: the store; data.path of the config is not looked at.
        dtype: float32, or float16 for half the room and a relative error of 5e-4.
        batch_size: frames that the tower sees at a time.
    Raises:
        ValueError: the encoder has no frozen tower with weights, the store cannot be written, or the disk has no room.
    """
    if dtype not in DTYPES:
        raise unknown_name("--dtype", dtype, DTYPES)
    if batch_size < 1:
        raise ValueError(f"--batch must be at least 1, got {batch_size}")
    console, device = console or Console(), resolve_device(device)
    options = require_frozen_clip(config, "data embed")
    if not options.begins_with_weights:
        raise ValueError(
            "data embed needs a tower with weights, got encoder.pretrained=null; a frozen random tower would be another one "
            "in training"
        )
    with ReplayBuffer.open(path, "a") as buffer:
        if not buffer.num_episodes:
            raise ValueError(f"{path} holds no finished episodes, so there is nothing to embed")
        roles = {
            key: role for role, key in reversed(picture_keys(config).items())
        }  # a goal image is some camera's frame
        encoder = frozen_encoder(options, buffer, roles).to(device)
        with torch.no_grad():
            shapes = {name: tuple(x.shape[1:]) for name, x in _look(encoder, buffer, *_first(roles), 0, 1).items()}
        numbers = sum(int(np.prod(shape)) for shape in shapes.values())
        num_bytes = numbers * np.dtype(dtype).itemsize * buffer.num_steps * len(roles)
        _say_size(buffer, shapes, dtype, num_bytes, len(roles), console)
        if (free := shutil.disk_usage(buffer.path).free) < num_bytes:
            raise ValueError(
                f"{path} lies on a disk with {free / 1e9:.1f} GB free, the features take {num_bytes / 1e9:.1f}"
            )
        with progress_bar("embed", console) as bar:
            task = bar.add_task("embed", total=buffer.num_steps * len(roles), shown="")

            def rows(key: str) -> Iterator[dict[str, np.ndarray]]:
                bar.update(task, shown=key)
                for block, end in buffer.blocks(key):
                    for start in range(block, end, batch_size):
                        stop = min(start + batch_size, end)
                        with torch.no_grad():
                            yield _look(encoder, buffer, key, roles[key], start, stop)
                        bar.update(task, advance=stop - start)

            write_embedding(buffer, recipe_of(encoder), shapes, dtype, tuple(roles), rows)
        return Embedded(tuple(roles), buffer.num_steps, shapes, num_bytes)


def frozen_encoder(options: ClipConfig, buffer: ReplayBuffer, roles: dict[str, str]) -> ClipEncoder:
    """An encoder of the cameras alone, one frame at a time, in eval mode: without words nothing but the image tower is built."""
    fields = {}
    for key, role in roles.items():
        if key not in buffer.fields:
            raise unknown_name(f"data.keys.{role}: the key of {buffer.path}", key, buffer.fields)
        if not is_image(buffer.fields[key]):
            raise ValueError(f"data.keys.{role}: {key} holds no pictures, but {buffer.fields[key].shape} at each step")
        fields[role] = FieldSpec(shape=buffer.fields[key].shape, dtype="uint8")
    alone = {"text": "none", "text_tuning": None, "text_too_long": "error", "share_towers": True}
    alone |= dict.fromkeys(("task_dropout", "goal_dropout", "camera_dropout", "state_dropout"), 0.0)
    return ClipEncoder(dataclasses.replace(options, **alone), spec=DataSpec(fields=fields), obs_horizon=1).eval()


def recipe_of(encoder: ClipEncoder) -> dict:
    """Everything that the features of a frame depend on, and where the tower came from, as plain data."""
    config = encoder.config
    return {
        "model": config.model,
        "pretrained": config.pretrained,
        "open_clip": version("open_clip_torch"),
        "weights_sha256": hash_of_weights(encoder.image_tower),
        "architecture": encoder.architecture["model"]["vision_cfg"],
        "preprocess": encoder.architecture["preprocess"],
        "image_size": encoder.image_size,
        "crop": {"where": "centre", "crop_ratio": config.crop_ratio, "square_crop": config.square_crop},
        "layers": [layer % encoder.num_layers for layer in encoder.image_layers] if config.wants_patches else None,
    }


def hash_of_weights(tower: nn.Module) -> str:
    """sha256 over name, type, shape and bytes of everything that a tower's state dict holds."""
    digest = hashlib.sha256()
    for name, value in sorted(tower.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def embedded_windows(config: Config, buffer: ReplayBuffer) -> dict[str, dict[str, np.ndarray]]:
    """Role of each picture -> its features in the store, of frames that are still those that were looked at.

    Raises:
        ValueError: the encoder has no frozen tower, or the features are missing or stale; says how to make them anew.
    """
    options, remake = require_frozen_clip(config, "data.embedded=true"), _remake(buffer.path)
    embedding = open_embedding(buffer.path)
    if embedding is None:
        raise ValueError(f"data.embedded=true, but {buffer.path} has no features of its cameras; {remake}")
    roles = picture_keys(config)
    embedding.require_unchanged(buffer, sorted(set(roles.values())), remake)
    names = (POOLED, PATCHES) if options.wants_patches else (POOLED,)
    read = {key: embedding.read(key, names, remake) for key in sorted(set(roles.values()))}
    if options.crop_ratio not in (None, 1.0):
        warnings.warn(
            f"data.embedded=true: encoder.crop_ratio={options.crop_ratio} means the centre crop, also in training, as there is "
            "one set of features per frame; encoder.crop_ratio=null sees all of it",
            stacklevel=2,
        )
    return {role: read[key] for role, key in roles.items()}


def require_same_tower(encoder: ClipEncoder, path: Path) -> None:
    """ValueError where the features in a store are not what this encoder's tower would say; names what differs."""
    embedding = open_embedding(path)
    made, wanted = embedding.recipe, recipe_of(encoder)
    compared = [name for name in wanted if name not in DESCRIBED]
    if wanted["layers"] is None:  # the pooled vector is the same whatever else was kept
        compared.remove("layers")
    for name in compared:
        if made.get(name) != wanted[name]:
            raise ValueError(
                f"the features in {path} were made with {name} {made.get(name)}, the policy has {wanted[name]} "
                f"({made.get('model')}, {made.get('pretrained')}); {_remake(path)}"
            )


def _remake(path: Path) -> str:
    return f"make them anew: diffpolicy data embed {path} CONF.yaml ... (the same as for train)"


def _first(roles: dict[str, str]) -> tuple[str, str]:
    return next(iter(roles.items()))


def _look(
    encoder: ClipEncoder, buffer: ReplayBuffer, key: str, role: str, start: int, stop: int
) -> dict[str, np.ndarray]:
    """pooled (n, E), and patches (n, P, W) where wanted, of rows [start, stop) of a camera."""
    frames = torch.from_numpy(to_uint8(buffer.read(key, start, stop), key, start))
    pixels = encoder.pixels({role: frames[:, None].to(next(encoder.parameters()).device)}, role)
    pooled, patches = encoder.look(encoder.image_tower, pixels)
    found = {POOLED: pooled.float().cpu().numpy()}
    return found if patches is None else found | {PATCHES: patches.float().cpu().numpy()}


def _say_size(
    buffer: ReplayBuffer,
    shapes: dict[str, Sequence[int]],
    dtype: str,
    num_bytes: int,
    num_cameras: int,
    console: Console,
) -> None:
    each = " and ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
    half = ", half with --dtype float16" if dtype == "float32" else ""
    cameras = f" of {num_cameras} cameras" if num_cameras > 1 else ""
    console.print(
        f"{buffer.num_steps:,} frames{cameras}: {each} in {dtype}, {num_bytes / 1e6:,.1f} MB in {buffer.path}{half}",
        soft_wrap=True,
        highlight=False,
    )
