"""Demonstrations on disk: episodes in a zarr store, safe to append to, readable by the field's own tools.

    demos.zarr/
      data/<key>           (N, ...)   every episode, one after the other in time
      meta/episode_ends    (E,)       int64; episode i is rows [episode_ends[i-1], episode_ends[i])
      meta/episode_task    (E,)       int64; index into attrs["tasks"], -1 for none           (ours)
      attrs                           format, format_version, fps, tasks, and per key role, names, units (ours)

`data/` and `meta/episode_ends` are the classic layout of Diffusion Policy (Chi et al. 2023, arXiv:2303.04137); its
stores in zarr v2 are read as they come, new ones are zarr v3. Only this file and the importers know zarr: store_layout.py
says what a store may hold, store_folder.py guards the folder it lies in, rewriting.py drops episodes and converts. Nothing
here imports torch.

**Crash safety.** `append_episode` writes the arrays, then episode_task, then episode_ends; an episode exists once its
end does. Every file is replaced by rename (zarr's LocalStore since 3.1.3), so that rewriting the shard in which an
earlier episode ends either happens or does not: kill -9 loses the episode being written and nothing else. Rows beyond
the last end are its leftovers: readers ignore them, the next writer trims them, and both say so. Nothing is fsynced: a
power cut may lose more than a killed process.

This file is longer than most, because everything that touches zarr is meant to be found in it: opening, ReplayBuffer
(what is in it, reading, writing), and the parts they are made of.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.sync import sync
from zarr.storage import ZipStore

from diffpolicy.spec import FieldSpec, unknown_name
from diffpolicy.store_folder import WriterLock, check_is_store
from diffpolicy.store_layout import (
    FORMAT,
    FORMAT_VERSION,
    MOST_EPISODES,
    OWN_ATTRS,
    Progress,
    check_episode,
    check_fields,
    check_task_ids,
    chunk_shapes,
    finished_ends,
    is_image,
    is_role,
    own_attrs,
    to_uint8,
)

BLOCK_BYTES = 64 * 1024 * 1024
"""How much of a key is held in memory at once when a whole store is streamed."""


def settle() -> None:
    """Waits until zarr has no reads or writes under way; call it when one has failed.

    zarr works on many chunks at once and raises at the first that fails, while the others go on in its background
    thread. Such a write could land on top of a later one, and tasks still pending when Python exits fill the screen.
    """

    async def wait() -> None:
        for _ in range(10):  # what is under way may start more; other threads may go on reading for ever
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            if not tasks:
                return
            await asyncio.wait(tasks)

    sync(wait())


# Opening -------------------------------------------------------------------------------------------------------------


def open_root(path: str | os.PathLike, *, writable: bool = False) -> zarr.Group:
    """The root group of a zarr v2 or v3 store, in a folder or (read-only) in a zip file.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: something else lies there; says what.
    """
    path = Path(path)
    check_is_store(path, writable)
    store = str(path) if path.is_dir() else ZipStore(path, mode="r")
    try:
        # Consolidated metadata is a copy that goes stale; the truth lies beside each array.
        return zarr.open_group(store, mode="r+" if writable else "r", use_consolidated=False)
    except OSError as error:
        if isinstance(error, FileNotFoundError) or isinstance(error, ValueError):  # zarr: no group here
            raise ValueError(f"{path} has no zarr group at its top, so it is not a replay store") from error
        raise OSError(error.errno, f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # zarr raises KeyError, TypeError, JSONDecodeError, ... for damaged metadata
        raise ValueError(f"{path} has unreadable zarr metadata at its top: {_one_line(error)}") from error


def file_shape(array: zarr.Array) -> tuple[int, ...]:
    """Shape of the part of an array that lies in one file: a shard, or a chunk where there are no shards."""
    return array.shards or array.chunks


class ReplayBuffer:
    """Episodes in a zarr store; make one with `open` or `create`.

    ```python
    buffer = ReplayBuffer.open("data/pusht.zarr")
    buffer.episode_ends                      # (E,) int64
    buffer.read("action")                    # (N, D_act), in the store's units
    buffer.episode(3)["action"]              # (T, D_act)
    ```
    A buffer in mode "a" holds the store's writer lock until `close()`, the end of a `with` block, or its process's end.
    """

    def __init__(self, path: Path, root: zarr.Group, *, lock: WriterLock | None = None):
        self.path = path
        self._root = root
        self._lock = lock
        self._attrs = dict(root.attrs)
        self._described, self._tasks = own_attrs(path, self._attrs)
        self._arrays = _data_arrays(path, root)
        self._ends_array = _meta_array(path, root, "episode_ends")
        if self._ends_array is None:
            raise ValueError(f"{path} has no meta/episode_ends; a replay store says there where its episodes end")
        self._ends = _read_ends(path, self._ends_array)
        for key, array in self._arrays.items():
            if array.shape[0] < self.num_steps:
                raise ValueError(
                    f"{path}: data/{key} has {array.shape[0]} rows, but episode_ends says {self.num_steps}; "
                    f"see what else is wrong with: diffpolicy data validate {path}"
                )
        self._said_missing: set[str] = set()
        self._task_array = _meta_array(path, root, "episode_task") if self.is_ours else None
        self._task_ids = _read_task_ids(path, self._task_array, len(self._ends), len(self._tasks))

    @classmethod
    def open(cls, path: str | os.PathLike, mode: str = "r") -> ReplayBuffer:
        """Opens a store to read ("r": zarr v2 or v3, folder or zip) or to append to ("a": stores made by `create`).

        Leftovers of a killed writer are ignored in mode "r" and trimmed in mode "a", with a warning either way.

        Raises:
            FileNotFoundError: nothing at `path`.
            ValueError: no replay store there (says what is missing), or one that cannot be appended to.
            BlockingIOError: mode "a", and another writer is at work.
        """
        path = Path(path)
        if mode not in ("r", "a"):
            raise ValueError(f"mode must be 'r' or 'a', got {mode!r}")
        root = open_root(path, writable=mode == "a")
        if mode == "r":
            buffer = cls(path, root)
            buffer._warn_of_leftovers("ignored")
            return buffer
        if root.metadata.zarr_format != 3 or root.attrs.get("format") != FORMAT:
            what = "zarr v2" if root.metadata.zarr_format == 2 else "not written by diffpolicy"
            raise ValueError(f"{path} is {what} and can only be read; to append: diffpolicy data convert {path} DST")
        lock = WriterLock(path)  # taken before reading, so that what is read stays true
        try:
            buffer = cls(path, open_root(path, writable=True), lock=lock)
            buffer._trim()
        except BaseException:
            lock.release()
            raise
        return buffer

    @classmethod
    def create(
        cls,
        path: str | os.PathLike,
        *,
        fields: Mapping[str, FieldSpec],
        fps: float | None,
        roles: Mapping[str, str] | None = None,
    ) -> ReplayBuffer:
        """A new, empty zarr v3 store, opened to append to.

        Args:
            path: a folder that does not exist yet, or is empty.
            fields: key -> shape of one step, type, names and units.
            fps: steps per second; None if unknown.
            roles: key -> role (spec.py); a key that is named like a role needs none.
        Raises:
            FileExistsError: something lies at `path`.
            ValueError: a field or role that cannot be stored.
        """
        path = Path(path)
        if path.exists() and (path.is_file() or any(path.iterdir())):
            raise FileExistsError(f"{path} exists already; append with ReplayBuffer.open(path, mode='a'), or delete it")
        check_fields(fields, fps, roles)
        described = {
            key: {"role": (roles or {}).get(key, ""), "names": list(spec.names), "units": spec.units}
            for key, spec in fields.items()
        }
        path.mkdir(parents=True, exist_ok=True)
        lock = WriterLock(path)
        try:
            root = zarr.create_group(str(path), zarr_format=3)
            data, meta = root.create_group("data"), root.create_group("meta")
            for key, spec in fields.items():
                _create_array(data, key, (0, *spec.shape), np.dtype(spec.dtype))
            for key in ("episode_ends", "episode_task"):
                _create_array(meta, key, (0,), np.dtype(np.int64))
            attrs = {"format": FORMAT, "format_version": FORMAT_VERSION, "fps": fps, "keys": described, "tasks": []}
            root.update_attributes(attrs)
            return cls(path, root, lock=lock)
        except BaseException:
            lock.release()
            raise

    # What is in it ---------------------------------------------------------------------------------------------------

    @property
    def zarr_format(self) -> int:
        return self._root.metadata.zarr_format

    @property
    def is_ours(self) -> bool:
        """Whether `create` made it, so that it can be appended to and carries roles and instructions."""
        return self._attrs.get("format") == FORMAT

    @property
    def keys(self) -> tuple[str, ...]:
        """Names under data/, sorted."""
        return tuple(self._arrays)

    @property
    def fps(self) -> float | None:
        """Steps per second; None if the store does not say."""
        fps = self._attrs.get("fps")
        return fps if isinstance(fps, (int, float)) and not isinstance(fps, bool) else None

    @property
    def tasks(self) -> tuple[str, ...]:
        """The distinct instructions, in order of first use."""
        return tuple(self._tasks)

    @property
    def roles(self) -> dict[str, str]:
        """key -> role, for keys that have one; a key named like a role has that role."""
        roles = {}
        for key in self.keys:
            if role := self._described.get(key, {}).get("role") or (key if is_role(key) else ""):
                roles[key] = role
        return roles

    @property
    def fields(self) -> dict[str, FieldSpec]:
        """key -> shape of one step and type, with names and units where the store has them."""
        fields = {}
        for key, array in self._arrays.items():
            known = self._described.get(key, {})
            names, units = tuple(known.get("names", ())), known.get("units", "")
            fields[key] = FieldSpec(shape=array.shape[1:], dtype=array.dtype.name, names=names, units=units)
        return fields

    @property
    def extras(self) -> tuple[str, ...]:
        """Names of what lies beside the episodes: attributes that are not ours, and further arrays of meta/."""
        arrays = (key for key, _ in self._root["meta"].arrays() if key not in ("episode_ends", "episode_task"))
        return (*(name for name in self._attrs if name not in OWN_ATTRS), *(f"meta/{key}" for key in arrays))

    @property
    def episode_ends(self) -> np.ndarray:
        """(E,) int64, row after the last of each finished episode."""
        return self._ends.copy()

    @property
    def num_episodes(self) -> int:
        return len(self._ends)

    @property
    def num_steps(self) -> int:
        """Rows in finished episodes, N."""
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def episode_lengths(self) -> np.ndarray:
        """(E,) steps in each episode."""
        return np.diff(self._ends, prepend=0)

    def episode_slice(self, index: int) -> slice:
        """Rows of an episode; negative indices count from the end."""
        if not -self.num_episodes <= index < self.num_episodes:
            raise IndexError(f"{self.path} has episodes 0..{self.num_episodes - 1}, got {index}")
        index %= self.num_episodes
        return slice(int(self._ends[index - 1]) if index else 0, int(self._ends[index]))

    def episode_task(self, index: int) -> str:
        """The instruction of an episode; "" where there is none."""
        self.episode_slice(index)  # raises for an index out of range
        task = int(self._task_ids[index])
        return self._tasks[task] if task >= 0 else ""

    def __len__(self) -> int:
        return self.num_episodes

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self.episode(i) for i in range(self.num_episodes))

    def __repr__(self) -> str:
        return f"ReplayBuffer({str(self.path)!r}, {self.num_episodes} episodes, {self.num_steps} steps)"

    # Reading ---------------------------------------------------------------------------------------------------------

    def read(self, key: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of a key, shape (stop - start, ...), type and units as stored.

        Raises:
            ValueError: unknown key, rows that are not there, no episodes yet, or damaged data (names the key and rows).
        """
        array = self._array(key)
        stop = self.num_steps if stop is None else stop
        if not 0 <= start <= stop <= self.num_steps:
            raise ValueError(f"{self.path}: rows of {key} must lie in 0..{self.num_steps}, got [{start}, {stop})")
        try:
            self._require_files(key, array, start, stop)
            return np.asarray(array[start:stop])
        except Exception as error:  # codecs raise RuntimeError, ValueError, ... for damaged chunks
            settle()
            raise ValueError(
                f"{self.path}: {key}[{start}:{stop}] cannot be read ({_one_line(error)}); "
                f"find the damage with: diffpolicy data validate {self.path}"
            ) from error

    def _require_files(self, key: str, array: zarr.Array, start: int, stop: int) -> None:
        """zarr reads a missing chunk as its fill value without a word: damage in a store of ours, else worth a warning."""
        if not self.path.is_dir() or key in self._said_missing:
            return
        sizes = file_shape(array)
        rows = range(start // sizes[0], -(-stop // sizes[0]))
        columns = (range(-(-length // size)) for length, size in zip(array.shape[1:], sizes[1:], strict=True))
        for coords in itertools.product(rows, *columns):
            name = f"{array.path}/{array.metadata.encode_chunk_key(coords)}"
            if (self.path / name).exists():
                continue
            if self.is_ours:
                raise FileNotFoundError(f"{name} is missing")
            self._said_missing.add(key)
            warnings.warn(
                f"{self.path}: {name} is missing and is read as {array.fill_value}; some writers leave out chunks of "
                f"nothing else, see diffpolicy data validate {self.path}",
                stacklevel=3,
            )
            return

    def rows_per_file(self, key: str) -> int:
        """Rows of a key in one of its files; what reads or writes that many together opens each file once."""
        return file_shape(self._arrays[key])[0]

    def blocks(self, key: str) -> Iterator[tuple[int, int]]:
        """(start, stop) of runs of rows that cover a key, aligned with its files, about 64 MiB each."""
        array = self._array(key)
        rows_per_file = self.rows_per_file(key)
        row_bytes = max(1, int(np.prod(array.shape[1:])) * array.dtype.itemsize)
        step = max(1, BLOCK_BYTES // (rows_per_file * row_bytes)) * rows_per_file
        for start in range(0, self.num_steps, step):
            yield start, min(start + step, self.num_steps)

    def read_images_uint8(self, key: str, progress: Progress | None = None) -> np.ndarray:
        """All frames of a camera, (N, H, W, C) uint8; a float store is converted block by block.

        Raises:
            ValueError: a value is not a whole number in 0..255 (names the key and row), or `key` holds no pictures.
        """
        self._array(key)
        spec = self.fields[key]
        if not is_image(spec):
            raise ValueError(f"{self.path}: {key} must hold pictures (H, W, 1 or 3), got {spec.shape} at each step")
        frames = np.empty((self.num_steps, *spec.shape), np.uint8)
        for start, stop in self.blocks(key):
            frames[start:stop] = to_uint8(self.read(key, start, stop), key, start)
            if progress:
                progress(key, stop, self.num_steps)
        return frames

    def episode(self, index: int, keys: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """One episode: key -> (T, ...)."""
        rows = self.episode_slice(index)
        return {key: self.read(key, rows.start, rows.stop) for key in (self.keys if keys is None else keys)}

    def _array(self, key: str) -> zarr.Array:
        if key not in self._arrays:
            raise unknown_name(f"key of {self.path}", key, self._arrays)
        if not self.num_episodes:
            raise ValueError(f"{self.path} holds no finished episodes, so there is nothing to read")
        return self._arrays[key]

    # Writing ---------------------------------------------------------------------------------------------------------

    def append_episode(self, data: Mapping[str, np.ndarray], task: str = "") -> None:
        """Adds one episode at the end; a killed process loses at most this one.

        Args:
            data: key -> (T, ...), every key of the store, shapes and types exactly as in `fields`.
            task: the instruction in words.
        Raises:
            ValueError: keys, shapes, types or lengths that differ from the store's, or numbers that are not finite.
            OSError: the disk is full or may not be written; earlier episodes are intact and the buffer can be used on.
        """
        self._check_writable()
        data = {key: np.asarray(value) for key, value in data.items()}
        length = check_episode(self.path, self.fields, data)
        index, start, stop = self.num_episodes, self.num_steps, self.num_steps + length
        try:
            task_id = self._task_id(task)
            for key, array in self._arrays.items():
                array.resize((stop, *array.shape[1:]))
                array[start:stop] = data[key]
            # zarr resizes, then fills in: between the two this episode ends at 0, which finished_ends knows.
            for meta, value in ((self._task_array, task_id), (self._ends_array, stop)):
                meta.resize((index + 1,))
                meta[index] = value
        except BaseException as error:
            settle()
            if not isinstance(error, OSError):
                raise
            raise OSError(
                error.errno,
                f"{self.path}: episode {index} could not be written ({error.strerror or error}); "
                f"the {index} earlier episodes are intact",
            ) from error
        self._ends = np.append(self._ends, stop)
        self._task_ids = np.append(self._task_ids, task_id)

    def fill(self, lengths: Sequence[int], tasks: Sequence[str], rows: Callable[[str], Iterable[np.ndarray]]) -> None:
        """Writes all episodes of a store that has none yet, key by key; much faster than one by one.

        A killed process leaves a store that cannot be opened: build it aside (store_folder.appears_whole).

        Args:
            lengths: steps of each episode.
            tasks: the instruction of each episode, "" for none.
            rows: key -> its rows in order, as blocks (n, ...) that add up to sum(lengths). Blocks of rows_per_file(key)
                write each file once; numbers are stored as they are, NaN included.
        Raises:
            ValueError: the store is open to read only or holds episodes, or rows that do not add up.
        """
        self._check_writable()
        if self.num_episodes:
            raise ValueError(f"{self.path} must be empty to be filled, got {self.num_episodes} episodes; append to it")
        ends = np.cumsum(lengths)
        for key, array in self._arrays.items():
            array.resize((int(ends[-1]), *array.shape[1:]))
            start = 0
            for block in rows(key):
                array[start : start + len(block)] = block
                start += len(block)
            if start != ends[-1]:
                raise ValueError(f"{self.path}: the lengths add up to {ends[-1]} steps, got {start} rows of {key}")
        task_ids = np.array([self._task_id(task) for task in tasks], np.int64)
        for meta, values in ((self._task_array, task_ids), (self._ends_array, ends)):
            meta.resize(values.shape)
            meta[:] = values
        self._ends, self._task_ids = ends, task_ids

    def copy_extras(self, source: ReplayBuffer, episodes: Sequence[int]) -> None:
        """Takes over what a store holds beside its episodes: attributes, and arrays of meta/ that are not ours.

        Of arrays with one entry per episode those of `episodes` are taken.
        """
        self._root.update_attributes({k: v for k, v in source._attrs.items() if k not in OWN_ATTRS})
        for key, array in self._arrays.items():
            array.update_attributes(dict(source._arrays[key].attrs))
        for key, array in source._root["meta"].arrays():
            if key in ("episode_ends", "episode_task"):
                continue
            values = np.asarray(array[...])
            if values.ndim and len(values) == source.num_episodes:
                values = values[list(episodes)]
            copy = self._root["meta"].create_array(key, shape=values.shape, dtype=values.dtype)
            copy[...] = values
            copy.update_attributes(dict(array.attrs))

    def _check_writable(self) -> None:
        if self._lock is None or self._lock.released:
            raise ValueError(f"{self.path} is open to read only; to append: ReplayBuffer.open(path, mode='a')")

    def _task_id(self, task: str) -> int:
        if not task:
            return -1
        if task not in self._tasks:
            tasks = [*self._tasks, task]
            self._root.update_attributes({"tasks": tasks})
            self._tasks = tasks
        return self._tasks.index(task)

    def _warn_of_leftovers(self, fate: str) -> None:
        rows = max(array.shape[0] for array in self._arrays.values()) - self.num_steps
        if rows > 0 or self._ends_array.shape[0] > self.num_episodes:
            why = "its writer was stopped, or is still at work"
            warnings.warn(
                f"{self.path}: episode {self.num_episodes} was not finished ({why}); its {rows} rows are {fate}",
                stacklevel=4 if fate == "trimmed" else 3,
            )

    def _trim(self) -> None:
        """Removes what a killed writer left: rows without an end, and files that were never renamed."""
        self._warn_of_leftovers("trimmed")
        for array in self._arrays.values():
            if array.shape[0] > self.num_steps:
                array.resize((self.num_steps, *array.shape[1:]))
        for array in (self._task_array, self._ends_array):
            if array.shape[0] > self.num_episodes:
                array.resize((self.num_episodes,))
        for partial in self.path.rglob("*.partial"):
            partial.unlink()

    def close(self) -> None:
        """Releases the writer lock; reading goes on to work."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> ReplayBuffer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


# Parts ---------------------------------------------------------------------------------------------------------------


def _create_array(group: zarr.Group, key: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """An array of ours: zstd and crc32c; pictures in shards of small chunks, so that one frame reads alone."""
    chunks, shards = chunk_shapes(shape[1:], dtype)
    compressors = [ZstdCodec(level=3), Crc32cCodec()]
    group.create_array(
        key, shape=shape, dtype=dtype, chunks=chunks, shards=shards, compressors=compressors, fill_value=0
    )


def _writes_all_chunks(array: zarr.Array) -> zarr.Array:
    """zarr leaves out chunks of zeros by default; ours are always written, so that a missing file means damage."""
    return array.with_config({"write_empty_chunks": True})


def _data_arrays(path: Path, root: zarr.Group) -> dict[str, zarr.Array]:
    """key -> array, sorted; keys in nested groups read like `robot/joints`."""
    try:
        group = root["data"]
        nodes = group.members(max_depth=None) if isinstance(group, zarr.Group) else ()
        arrays = {name: node for name, node in nodes if isinstance(node, zarr.Array)}
    except KeyError as error:
        raise ValueError(f"{path} has no data group; a replay store keeps its arrays in data/ and meta/") from error
    except Exception as error:
        raise ValueError(f"{path}: an array of data/ cannot be opened: {_one_line(error)}") from error
    if not arrays:
        raise ValueError(f"{path} has no arrays in data/")
    for key, array in arrays.items():
        if array.ndim == 0:
            raise ValueError(f"{path}: data/{key} must have a time axis, got a single number")
    return {key: _writes_all_chunks(arrays[key]) for key in sorted(arrays)}


def _meta_array(path: Path, root: zarr.Group, key: str) -> zarr.Array | None:
    try:
        array = root[f"meta/{key}"]
    except KeyError:
        return None
    except Exception as error:
        raise ValueError(f"{path}: meta/{key} cannot be opened: {_one_line(error)}") from error
    if not isinstance(array, zarr.Array) or array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{path}: meta/{key} must be a list of whole numbers, got {array}")
    return _writes_all_chunks(array)


def _read_ends(path: Path, array: zarr.Array) -> np.ndarray:
    """(E,) ends of finished episodes."""
    if array.shape[0] > MOST_EPISODES:
        raise ValueError(f"{path}: meta/episode_ends claims {array.shape[0]} episodes; its metadata must be damaged")
    return finished_ends(path, _read_meta(path, array))


def _read_task_ids(path: Path, array: zarr.Array | None, num_episodes: int, num_tasks: int) -> np.ndarray:
    """(E,) index into tasks, -1 for none."""
    if array is None:
        return np.full(num_episodes, -1)
    ids = _read_meta(path, array, num_episodes)
    check_task_ids(path, ids, num_episodes, num_tasks)
    return ids


def _read_meta(path: Path, array: zarr.Array, stop: int | None = None) -> np.ndarray:
    try:
        return np.asarray(array[:stop])
    except Exception as error:
        raise ValueError(f"{path}: {array.path} cannot be read: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:200]}"
