"""What a frozen image tower says of every frame of a store, kept in the store beside its demonstrations.

    demos.zarr/
      data/, meta/                     the demonstrations (replay.py); appending to them leaves this as it is
      embedding/                       attrs: recipe, and of each camera what it was when it was looked at
        <key>/pooled    (N, E)         one vector a frame
        <key>/patches   (N, P, W)      where they were asked for

There is at most one embedding in a store. A new one is built in a hidden folder beside it and renamed, so that a process
killed in the middle leaves the store as it was; the next one clears away what was left. Knows zarr, but no towers.
"""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from diffpolicy.replay import ReplayBuffer, open_root, settle
from diffpolicy.store_folder import appears_whole, list_files
from diffpolicy.store_layout import chunk_shapes

GROUP = "embedding"
FORMAT, FORMAT_VERSION = "diffpolicy-embedding", 1
POOLED, PATCHES = "pooled", "patches"
FRAMES_COMPARED = 32
"""Frames of a camera that are compared with those that were looked at, spread evenly over the store."""


@dataclass(frozen=True)
class Embedding:
    """The features in a store."""

    path: Path
    recipe: dict
    """How they were made, as embed.py describes it."""
    cameras: dict[str, str]
    """key -> fingerprint of the frames that were looked at."""

    def require_unchanged(self, buffer: ReplayBuffer, keys: Sequence[str], remake: str) -> None:
        """ValueError where a camera is not here, or its frames are no longer those that were looked at."""
        for key in keys:
            if key not in self.cameras:
                raise ValueError(f"{self.path} has features of {sorted(self.cameras)}, not of {key}; {remake}")
            if self.cameras[key] != fingerprint(buffer, key):
                raise ValueError(f"{self.path} has changed since the features of {key} were made; {remake}")

    def read(self, key: str, names: Sequence[str], remake: str) -> dict[str, np.ndarray]:
        """name (`pooled`, `patches`) -> features of all frames of a camera, float16 or float32.

        Raises:
            ValueError: they were not made, or are damaged.
        """
        features = {}
        group = open_root(self.path)[f"{GROUP}/{key}"]
        for name in names:
            if name not in group:
                raise ValueError(f"{self.path} has no {name} of {key} among its features; {remake}")
            try:
                features[name] = np.asarray(group[name][:])
            except Exception as error:  # codecs raise RuntimeError, ValueError, ... for damaged chunks
                settle()
                raise ValueError(f"{self.path}: {GROUP}/{key}/{name} cannot be read ({error}); {remake}") from error
        return features


def open_embedding(path: Path) -> Embedding | None:
    """The embedding of a store; None where there is none.

    Raises:
        ValueError: it was written by a later version, or is damaged.
    """
    root = open_root(path)
    if GROUP not in root:
        return None
    attrs = dict(root[GROUP].attrs)
    if attrs.get("format") != FORMAT or attrs.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}/{GROUP} must have the format {FORMAT} {FORMAT_VERSION}, got {attrs.get('format')!r} "
            f"{attrs.get('format_version')}; delete that folder and make the features anew"
        )
    return Embedding(path, attrs["recipe"], attrs["cameras"])


def fingerprint(buffer: ReplayBuffer, key: str) -> str:
    """A hash of where a camera's episodes end, of the sizes of its files, and of some of its frames."""
    digest = hashlib.sha256(buffer.episode_ends.tobytes())
    if buffer.path.is_dir():
        sizes = list_files(buffer.path)
    else:
        with zipfile.ZipFile(buffer.path) as archive:
            sizes = {info.filename: info.file_size for info in archive.infolist()}
    for name, size in sorted(sizes.items()):
        if name.startswith(f"data/{key}/") and not name.endswith(".json"):
            digest.update(f"{name} {size}\n".encode())
    for row in np.unique(np.linspace(0, buffer.num_steps - 1, FRAMES_COMPARED).astype(int)):
        digest.update(buffer.read(key, row, row + 1).tobytes())
    return digest.hexdigest()


def write_embedding(
    buffer: ReplayBuffer,
    recipe: dict,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    keys: Sequence[str],
    rows: Callable[[str], Iterator[dict[str, np.ndarray]]],
) -> None:
    """Writes features of some cameras into their store, in place of those it had; all of them or nothing.

    Args:
        buffer: the store, opened to append to, so that nobody else writes.
        recipe: how the features are made, plain data.
        shapes: name (`pooled`, `patches`) -> shape of one frame's.
        keys: the cameras.
        rows: key -> its features in order, as blocks name -> (n, *shape) that add up to all steps.
    Raises:
        ValueError: features that do not fit `dtype`, or are not finite.
    """
    target = buffer.path / GROUP
    for left in buffer.path.glob(f".{GROUP}.*-*"):  # by a process that was killed
        shutil.rmtree(left)
    cameras = {key: fingerprint(buffer, key) for key in keys}
    with appears_whole(target, replace=target.exists()) as fresh:
        try:
            root = zarr.create_group(str(fresh), zarr_format=3)
            for key in keys:
                arrays = {
                    name: _create(root, f"{key}/{name}", (buffer.num_steps, *shape), np.dtype(dtype))
                    for name, shape in shapes.items()
                }
                _fill(arrays, key, rows(key))
            root.update_attributes(
                {"format": FORMAT, "format_version": FORMAT_VERSION, "recipe": recipe, "cameras": cameras}
            )
        except BaseException:
            settle()  # nothing may be written any more where the folder is about to be deleted
            raise


def _create(root: zarr.Group, name: str, shape: tuple[int, ...], dtype: np.dtype) -> zarr.Array:
    chunks, shards = chunk_shapes(shape[1:], dtype)
    compressors = [ZstdCodec(level=1), Crc32cCodec()]  # features hardly compress
    array = root.create_array(name, shape=shape, dtype=dtype, chunks=chunks, shards=shards, compressors=compressors)
    return array.with_config({"write_empty_chunks": True})


def _fill(arrays: dict[str, zarr.Array], key: str, blocks: Iterator[dict[str, np.ndarray]]) -> None:
    """Writes blocks one after the other, several at a time so that each file is written once or twice."""
    rows_per_file = max((array.shards or array.chunks)[0] for array in arrays.values())
    total = next(iter(arrays.values())).shape[0]
    held: list[dict[str, np.ndarray]] = []
    start = stop = 0
    for block in blocks:
        held.append(block)
        stop += len(block[POOLED])
        if stop - start < rows_per_file and stop < total:
            continue
        for name, array in arrays.items():
            with np.errstate(over="ignore"):
                values = np.concatenate([block[name] for block in held]).astype(array.dtype)
            if not np.isfinite(values).all():
                raise ValueError(f"{name} of {key} has numbers that {array.dtype} cannot hold; use --dtype float32")
            array[start:stop] = values
        held, start = [], stop
    assert start == total, f"{start} of {total} frames were embedded"
