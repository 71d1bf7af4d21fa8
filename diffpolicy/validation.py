"""What is wrong with a replay store, named by file, episode, key and row, before any training starts.

Every chunk file is read, so that damage is found now and not at hour six. zarr reads a missing chunk as its fill value
without a word; missing files are therefore found by listing the store. A damaged store never raises: everything becomes
a Finding.
"""

from __future__ import annotations

import itertools
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffpolicy.replay import file_shape, open_root, settle
from diffpolicy.spec import ACTION, FieldSpec
from diffpolicy.store_folder import LOCK_FILE, list_files
from diffpolicy.store_layout import FORMAT, MOST_EPISODES, Progress, is_image

if TYPE_CHECKING:
    import zarr

METADATA_FILES = ("zarr.json", ".zgroup", ".zarray", ".zattrs", ".zmetadata")
MOST_PER_KIND = 10
"""Findings of one kind and key that are listed one by one; the rest are counted."""
LARGEST_CHUNK_BYTES = 4 * 1024**3
"""A chunk that claims more is damaged metadata, not to be allocated for."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    level: str
    """"error": training on it would fail or learn nonsense. "warning": worth a look."""
    file: str
    """Relative to the store's top; "" for the store as a whole."""
    episode: int | None
    key: str | None
    row: int | None
    """Row of the store's array, as `read(key, row, row + 1)` takes it."""
    message: str


@dataclass(frozen=True)
class ChunkFile:
    """One file of an array and the part of the array that lies in it."""

    name: str
    """Relative to the store's top, e.g. data/action/c/0/0 or data/action/0.0."""
    selection: tuple[slice, ...]


def chunk_files(array: zarr.Array, num_rows: int) -> Iterator[ChunkFile]:
    """The files in which the first num_rows rows of an array should lie, in order of rows."""
    shape, steps = (num_rows, *array.shape[1:]), file_shape(array)
    for coords in itertools.product(*(range(-(-size // step)) for size, step in zip(shape, steps, strict=True))):
        selection = tuple(
            slice(c * step, min((c + 1) * step, size)) for c, step, size in zip(coords, steps, shape, strict=True)
        )
        yield ChunkFile(f"{array.path}/{array.metadata.encode_chunk_key(coords)}", selection)


def validate(path: str | os.PathLike, progress: Progress | None = None) -> list[Finding]:
    """Reads a whole store and lists what is wrong with it, errors first; [] when nothing is.

    Errors: files that are missing or cannot be decoded, metadata that cannot be read, no `action`, arrays shorter or
    longer than episode_ends, episodes without steps, NaN and infinite numbers.
    Warnings: dimensions that never change, black frames, time stamps that jump, an unfinished episode.
    """
    check = _Check(Path(path), progress)
    try:
        check.run()
    except Exception as error:  # what is damaged in a way nobody thought of is damaged all the same
        check.error("", f"the check itself failed on this store ({type(error).__name__}: {_short(error)})")
    return sorted(check.findings, key=lambda finding: finding.level != "error")


class _Check:
    """The state of one validation: what has been found so far, and what is known of the store."""

    def __init__(self, path: Path, progress: Progress | None):
        self.path = path
        self.progress = progress
        self.findings: list[Finding] = []
        self.files: dict[str, int] = {}
        self.ends = np.zeros(0, np.int64)
        self.undecodable = 0  # files of the key at hand
        self.fps: float | None = None
        self.own = False

    def error(self, file: str, message: str, **where: int | str | None) -> None:
        self._add("error", file, message, **where)

    def warn(self, file: str, message: str, **where: int | str | None) -> None:
        self._add("warning", file, message, **where)

    def _add(self, level: str, file: str, message: str, *, episode=None, key=None, row=None) -> None:
        self.findings.append(Finding(level, file, episode, key, row, message))

    def run(self) -> None:
        try:
            self.files = list_files(self.path) if self.path.exists() else {}
            root = open_root(self.path)
            attrs = dict(root.attrs)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            self.error("", _short(error))
            return
        self.own = attrs.get("format") == FORMAT
        fps = attrs.get("fps")
        self.fps = fps if isinstance(fps, (int, float)) and fps > 0 else None
        arrays = self._arrays(root)
        self._stray_files(arrays)
        self._groups(root)
        self._episode_ends(arrays.pop("meta/episode_ends", None))
        keys = {name.removeprefix("data/"): array for name, array in arrays.items() if name.startswith("data/")}
        self._attrs(attrs, keys)
        self._has_action(attrs, keys)
        for key, array in keys.items():
            self._key(key, array)
        for name, array in arrays.items():
            if name.startswith("meta/") and array.ndim:
                self._meta(name, array, attrs)

    # The store as a whole --------------------------------------------------------------------------------------------

    def _arrays(self, root: zarr.Group) -> dict[str, zarr.Array]:
        """Every array whose metadata can be read, by its path in the store."""
        arrays = {}
        for file in self.files:
            name, _, leaf = file.rpartition("/")
            if leaf not in ("zarr.json", ".zarray") or not name.startswith(("data/", "meta/")):
                continue
            try:
                node = root[name]
                if not hasattr(node, "shape"):
                    continue
                sizes = (*node.shape, *file_shape(node))
                largest = int(np.prod([float(n) for n in file_shape(node)])) * node.dtype.itemsize
            except Exception as error:  # zarr raises KeyError, TypeError, JSONDecodeError, ... for damaged metadata
                self.error(file, f"{name} cannot be opened ({_short(error)})", key=_key_of(name))
                continue
            if min(sizes, default=0) < 0 or min(file_shape(node), default=1) < 1 or largest > LARGEST_CHUNK_BYTES:
                self.error(file, f"{name} claims chunks of {file_shape(node)}, {largest} bytes each", key=_key_of(name))
                continue
            arrays[name] = node
        return arrays

    def _groups(self, root: zarr.Group) -> None:
        for name in ("data", "meta"):
            try:
                root[name]
            except Exception as error:
                what = "is missing" if isinstance(error, KeyError) else f"cannot be read ({_short(error)})"
                self.error(name, f"the group {name} {what}; a replay store keeps its arrays in data/ and meta/")

    def _stray_files(self, arrays: dict[str, zarr.Array]) -> None:
        """Chunks without metadata belong to a key that has lost it; *.partial files were being written when killed."""
        reported = {finding.file.rpartition("/")[0] for finding in self.findings}
        for file in self.files:
            parts = file.split("/")
            folders = ["/".join(parts[:n]) for n in range(1, len(parts))]
            if file.endswith(".partial"):
                self.warn(file, "left by a writer that was killed; the next writer removes it")
            elif parts[-1] in METADATA_FILES or parts[-1] == LOCK_FILE or parts[0] not in ("data", "meta"):
                continue
            elif not any(folder in arrays or folder in reported for folder in folders):
                name = "/".join(parts[:2])
                reported.add(name)
                self.error(name, f"{name} has data but no metadata (zarr.json or .zarray)", key=_key_of(name))

    def _attrs(self, attrs: dict, keys: dict[str, zarr.Array]) -> None:
        """Attributes of ours that ReplayBuffer would refuse."""
        if not self.own:
            return
        for name, kind in (("format_version", int), ("keys", dict), ("tasks", list)):
            if not isinstance(attrs.get(name), kind):
                self.error("zarr.json", f"attrs[{name!r}] must be a {kind.__name__}, got {attrs.get(name)!r:.60}")
        for key in attrs["keys"] if isinstance(attrs.get("keys"), dict) else ():
            if key not in keys:
                self.error(f"data/{key}", f"the attributes describe {key}, which data/ does not have", key=key)

    def _has_action(self, attrs: dict, keys: dict[str, zarr.Array]) -> None:
        described = attrs.get("keys") if self.own and isinstance(attrs.get("keys"), dict) else {}
        roles = {known.get("role") for known in described.values() if isinstance(known, dict)}
        if ACTION not in keys and ACTION not in roles:
            self.error("data", f"there must be a key {ACTION!r} or one with that role, got {sorted(keys)}")

    def _episode_ends(self, array: zarr.Array | None) -> None:
        file = "meta/episode_ends"
        if array is None:
            if not any(finding.file.startswith(file) for finding in self.findings):
                self.error(file, "meta/episode_ends is missing, so nobody knows where episodes end")
            return
        if array.ndim != 1 or array.dtype.kind not in "iu" or array.shape[0] > MOST_EPISODES:
            self.error(file, f"episode_ends must be a list of whole numbers, got {array.dtype} {array.shape}")
            return
        # A killed writer of ours may have grown the array by one entry that was never written.
        values = self._read_meta(file, array, max(array.shape[0] - self.own, 0))
        if values is None:
            return
        ends = values.astype(np.int64)
        if self.own and len(ends) and ends[-1] == 0:
            ends = ends[:-1]  # the end of an unfinished episode, see replay.py
        if not len(ends):
            self.error(file, "the store holds no finished episodes")
        previous = np.concatenate([[0], ends[:-1]])
        for i in np.flatnonzero(ends <= previous)[:MOST_PER_KIND]:
            what = "has no steps" if ends[i] == previous[i] else "ends before it begins"
            self.error(file, f"episode {i} {what}: episode_ends goes from {previous[i]} to {ends[i]}", episode=int(i))
        if np.all(ends > previous):
            self.ends = ends
        if self.own and len(values) > len(ends):
            self.warn(file, f"episode {len(ends)} was not finished; the next writer trims it", episode=len(ends))

    def _meta(self, name: str, array: zarr.Array, attrs: dict) -> None:
        is_task = name == "meta/episode_task" and self.own
        values = self._read_meta(name, array, min(array.shape[0], len(self.ends)) if is_task else array.shape[0])
        if not is_task or values is None or not len(self.ends):
            return
        tasks = attrs.get("tasks")
        ids = values[: len(self.ends)]
        if len(ids) < len(self.ends):
            self.error(name, f"episode_task has {len(ids)} entries for {len(self.ends)} episodes")
        elif isinstance(tasks, list) and (np.any(ids < -1) or np.any(ids >= len(tasks))):
            i = int(np.argmax((ids < -1) | (ids >= len(tasks))))
            self.error(name, f"the task of episode {i} is {ids[i]}, but there are {len(tasks)} tasks", episode=i)

    def _read_meta(self, name: str, array: zarr.Array, num_rows: int) -> np.ndarray | None:
        if not self._all_there(name, array, num_rows):
            return None
        try:
            for chunk in chunk_files(array, num_rows):
                self._check_blosc_size(array, chunk)
            return np.asarray(array[...])
        except Exception as error:
            settle()
            self.error(name, f"{name} cannot be decoded ({_short(error)})")
            return None

    # One key ---------------------------------------------------------------------------------------------------------

    def _all_there(self, name: str, array: zarr.Array, num_rows: int) -> bool:
        """Reports the files of an array that are missing; cheap, as nothing is read."""
        count = 1.0
        for size, step in zip((num_rows, *array.shape[1:]), file_shape(array), strict=True):
            count *= -(-size // step)
        stored = sum(file.startswith(f"{array.path}/") for file in self.files)
        if count > 2 * stored + 1000:  # a damaged shape; listing every missing file would take forever
            self.error(name, f"{name} {array.shape} should lie in {count:.0f} files, got {stored}", key=_key_of(name))
            return False
        fix = f"`diffpolicy data convert {self.path} DST` makes it whole"
        hint = "" if self.own else f" (some writers leave out chunks of nothing else: if this one did, {fix})"
        missing = [chunk for chunk in chunk_files(array, num_rows) if chunk.name not in self.files]
        for chunk in missing[:MOST_PER_KIND]:
            rows = chunk.selection[0]
            self.error(
                chunk.name,
                f"the file is missing; zarr reads rows {rows.start}..{rows.stop - 1} of {name} "
                f"as {array.fill_value}{hint}",
                episode=self._episode(rows.start),
                key=_key_of(name),
                row=rows.start,
            )
        self._count_rest(name, "missing files", len(missing), "files")
        return not missing

    def _key(self, key: str, array: zarr.Array) -> None:
        name = f"data/{key}"
        if array.ndim == 0:
            self.error(name, f"{key} must have a time axis, got a single number", key=key)
            return
        num_steps = int(self.ends[-1]) if len(self.ends) else array.shape[0]
        if array.shape[0] != num_steps:
            rest = array.shape[0] - num_steps
            if self.own and rest > 0:
                message = f"{rest} rows of {key} belong to an unfinished episode; the next writer trims them"
                self.warn(name, message, key=key, row=num_steps)
            else:
                self.error(name, f"{key} has {array.shape[0]} rows, but episode_ends says {num_steps}", key=key)
        num_rows = min(num_steps, array.shape[0])
        if not num_rows:
            return
        self._all_there(name, array, num_rows)
        self._numbers(key, array, num_rows)

    def _numbers(self, key: str, array: zarr.Array, num_rows: int) -> None:
        """Reads a key file by file and looks at its numbers."""
        image = array.ndim == 4 and is_image(FieldSpec(shape=array.shape[1:], dtype=array.dtype.name))
        rows_with: dict[str, list[np.ndarray]] = {"NaN": [], "infinite": [], "black": []}
        stamps = []
        low = high = None
        self.undecodable = 0
        bands = itertools.groupby(chunk_files(array, num_rows), key=lambda chunk: chunk.selection[0].start)
        for start, chunks in bands:
            band = self._band(key, array, list(chunks))  # (rows, ...), all columns
            if band is None:
                continue
            flat = band.reshape(len(band), -1)
            if band.dtype.kind in "fc":
                rows_with["NaN"].append(start + np.flatnonzero(np.isnan(flat).any(axis=1)))
                rows_with["infinite"].append(start + np.flatnonzero(np.isinf(flat).any(axis=1)))
            if image:
                rows_with["black"].append(start + np.flatnonzero(~flat.any(axis=1)))
            elif band.dtype.kind in "biuf":
                low = flat.min(axis=0) if low is None else np.minimum(low, flat.min(axis=0))
                high = flat.max(axis=0) if high is None else np.maximum(high, flat.max(axis=0))
                if key.rpartition(".")[2] == "timestamp" and flat.shape[1] == 1:
                    stamps.append(flat[:, 0].astype(np.float64))
            if self.progress:
                self.progress(key, start + len(band), num_rows)
        self._count_rest(f"data/{key}", "files that cannot be decoded", self.undecodable, "files")
        for what, found in rows_with.items():
            self._rows(what, key, np.concatenate(found) if found else np.zeros(0, int))
        if low is not None and num_rows > 1:
            self._constant(key, low, high)
        if stamps and sum(map(len, stamps)) == num_rows:
            self._time_jumps(key, np.concatenate(stamps))

    def _band(self, key: str, array: zarr.Array, chunks: list[ChunkFile]) -> np.ndarray | None:
        """Whole rows from the files side by side in which they lie; None if one of those is missing or damaged."""
        blocks: list[np.ndarray | None] = []
        for chunk in chunks:
            block = None
            if chunk.name in self.files:
                try:
                    self._check_blosc_size(array, chunk)
                    block = np.asarray(array[chunk.selection])
                except Exception as error:  # codecs raise RuntimeError, ValueError, MemoryError, zlib.error, ...
                    settle()
                    self._undecodable(key, chunk, error)
            blocks.append(block)
        if any(block is None for block in blocks):
            return None
        if len(blocks) == 1:
            return blocks[0]
        rows = chunks[0].selection[0]
        band = np.empty((rows.stop - rows.start, *array.shape[1:]), array.dtype)
        for chunk, block in zip(chunks, blocks, strict=True):
            band[(slice(None), *chunk.selection[1:])] = block
        return band

    def _check_blosc_size(self, array: zarr.Array, chunk: ChunkFile) -> None:
        """Blosc, which classic stores use, decodes a truncated buffer to garbage without complaint (numcodecs 0.16)."""
        is_blosc = array.shards is None and any("Blosc" in type(codec).__name__ for codec in array.compressors[-1:])
        if not is_blosc or not self.path.is_dir():  # a zip file has its own checksums
            return
        with open(self.path / chunk.name, "rb") as file:
            header = file.read(16)
        promised = int.from_bytes(header[12:16], "little")  # cbytes of the Blosc 1 header
        if len(header) < 16 or promised != self.files[chunk.name]:
            raise ValueError(f"its Blosc header promises {promised} bytes")

    def _undecodable(self, key: str, chunk: ChunkFile, error: Exception) -> None:
        self.undecodable += 1
        if self.undecodable > MOST_PER_KIND:
            return
        rows = chunk.selection[0]
        self.error(
            chunk.name,
            f"the file cannot be decoded, so rows {rows.start}..{rows.stop - 1} of {key} are lost "
            f"({self.files[chunk.name]} bytes; {_short(error)})",
            episode=self._episode(rows.start),
            key=key,
            row=rows.start,
        )

    def _rows(self, what: str, key: str, rows: np.ndarray) -> None:
        """One finding per episode with bad rows: the first of them, and how many."""
        if not len(rows):
            return
        level = "warning" if what == "black" else "error"
        episodes = np.searchsorted(self.ends, rows, side="right") if len(self.ends) else np.full(len(rows), -1)
        distinct, first, counts = np.unique(episodes, return_index=True, return_counts=True)
        for episode, i, count in list(zip(distinct, first, counts, strict=True))[:MOST_PER_KIND]:
            row = int(rows[i])
            kind = "black frames" if what == "black" else f"rows with {what} numbers"
            message = f"{count} {kind} in {key}, the first is row {row}"
            known = int(episode) if len(self.ends) else None
            if known is not None:
                start = int(self.ends[known - 1]) if known else 0
                message += f", step {row - start} of episode {known}"
            if level == "error" and known is not None:
                message += f"; drop it with `diffpolicy data drop {self.path} --episodes {known}`"
            self._add(level, f"data/{key}", message, episode=known, key=key, row=row)
        self._count_rest(f"data/{key}", f"episodes with {what} rows", len(distinct), "episodes", level)

    def _constant(self, key: str, low: np.ndarray, high: np.ndarray) -> None:
        dims = np.flatnonzero(low == high)
        if not len(dims):
            return
        shown = ", ".join(f"[{d}] = {low[d]:g}" for d in dims[:6]) + (", ..." if len(dims) > 6 else "")
        plural = "its only dimension is" if len(low) == 1 else f"{len(dims)} of {len(low)} dimensions are"
        self.warn(f"data/{key}", f"{key}: {plural} the same in the whole set: {shown}", key=key)

    def _time_jumps(self, key: str, stamps: np.ndarray) -> None:
        """Steps whose time stamp (seconds) is not one control period after the previous one, within an episode."""
        steps = np.diff(stamps)
        inside = np.ones(len(steps), bool)
        inside[self.ends[:-1] - 1] = False
        if not inside.any():
            return
        period = 1 / self.fps if self.fps else float(np.median(steps[inside]))
        jumps = np.flatnonzero(inside & ((steps > 1.5 * period) | (steps <= 0))) + 1
        if len(jumps):
            row = int(jumps[0])
            first = f"the first is {steps[row - 1]:.3f} s at row {row}"
            message = f"{len(jumps)} jumps in time, {first}; a step takes {period:.3f} s"
            self.warn(f"data/{key}", message, episode=self._episode(row), key=key, row=row)

    def _count_rest(self, file: str, what: str, count: int, unit: str, level: str = "error") -> None:
        if count > MOST_PER_KIND:
            message = f"... and {count - MOST_PER_KIND} more {unit}: {count} {what} in all"
            self._add(level, file, message, key=_key_of(file))

    def _episode(self, row: int) -> int | None:
        return int(np.searchsorted(self.ends, row, side="right")) if len(self.ends) else None


def _key_of(name: str) -> str | None:
    return name.removeprefix("data/") if name.startswith("data/") else None


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
