"""What a replay store may hold: the sizes of its files, and checks of what is put in and of what was found.

Plain numbers and arrays in, one clear ValueError out. The layout itself is drawn in replay.py, which alone opens stores;
nothing here touches a file or knows zarr.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffpolicy.spec import ACTION, IMAGES, STATE, FieldSpec, unknown_name

FORMAT = "diffpolicy-replay"
FORMAT_VERSION = 1
OWN_ATTRS = ("format", "format_version", "fps", "keys", "tasks")

SHARDED_ROW_BYTES = 4096
"""Keys whose steps are at least this large (images) are sharded; smaller ones lie in plain chunks of whole rows."""
INNER_CHUNK_BYTES = 128 * 1024
"""Raw size of a chunk inside a shard: 4 frames of 96x96x3, one of a larger camera. A frame alone reads as fast as from
chunks of one (0.7 ms), all frames read four times faster, and neighbours compress to half the size."""
SHARD_BYTES = 16 * 1024 * 1024
"""Raw size of a shard, which is one file: appending rewrites at most one of them per key."""
PLAIN_CHUNK_BYTES = 128 * 1024
MOST_EPISODES = 100_000_000
"""More than this is a damaged number, not to be allocated for."""

Progress = Callable[[str, int, int], None]
"""progress(key, rows done, rows in all)."""


def chunk_shapes(step_shape: tuple[int, ...], dtype: np.dtype) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Shapes of a chunk and of a shard (None: no shards) of a key of ours; both are whole rows.

    Args:
        step_shape: shape of one step, so that the key is (N, *step_shape).
    """
    row_bytes = int(np.prod(step_shape)) * dtype.itemsize
    if row_bytes < SHARDED_ROW_BYTES:
        return (_power_of_two(PLAIN_CHUNK_BYTES / row_bytes, largest=4096), *step_shape), None
    rows = _power_of_two(INNER_CHUNK_BYTES / row_bytes, largest=16)
    shard_rows = max(4 * rows, _power_of_two(SHARD_BYTES / row_bytes, largest=1024))
    return (rows, *step_shape), (shard_rows, *step_shape)


def _power_of_two(size: float, largest: int) -> int:
    return min(largest, 1 << max(0, int(np.log2(max(1, size)))))


# What is put in ------------------------------------------------------------------------------------------------------


def is_role(name: str) -> bool:
    """Whether a name is one of spec.py's roles, as `action` or `observation.state`."""
    return name == ACTION or name.startswith("observation.")


def is_image(spec: FieldSpec) -> bool:
    """Whether a key holds pictures: (H, W, 3) or (H, W, 1) at each step."""
    return len(spec.shape) == 3 and spec.shape[-1] in (1, 3) and np.dtype(spec.dtype).kind in "uif"


def to_uint8(frames: np.ndarray, key: str, first_row: int) -> np.ndarray:
    """Pictures stored as other numbers, as uint8, provided that nothing is lost.

    Args:
        frames: (n, H, W, C), any real type.
        key: for the error.
        first_row: the row of the store at which `frames` begins, for the error.
    Raises:
        ValueError: a value is not a whole number in 0..255.
    """
    if frames.dtype == np.uint8:
        return frames
    with np.errstate(invalid="ignore"):  # NaN becomes something, and then differs from itself
        exact = frames.astype(np.uint8)
    wrong = exact != frames
    if wrong.any():
        index = np.unravel_index(np.argmax(wrong), wrong.shape)
        where = ", ".join(str(i) for i in (first_row + index[0], *index[1:]))
        raise ValueError(f"{key} must hold whole numbers in 0..255 to become uint8, got [{where}] = {frames[index]}")
    return exact


def check_fields(fields: Mapping[str, FieldSpec], fps: float | None, roles: Mapping[str, str] | None) -> None:
    """Whether a store with these keys can be made.

    Raises:
        ValueError: no keys, or a name, type, size, role or frame rate that cannot be stored.
    """
    if not fields:
        raise ValueError("fields must name at least one key, got none")
    if fps is not None and not (np.isfinite(fps) and fps > 0):
        raise ValueError(f"fps must be a positive number or None, got {fps}")
    for key, spec in fields.items():
        if not key or key.startswith((".", "/")) or key.endswith("/") or "//" in key:
            raise ValueError(f"a key must be a plain name such as 'action' or 'observation.images.front', got {key!r}")
        if np.dtype(spec.dtype).kind not in "biufc":
            raise ValueError(f"{key} must hold numbers or booleans, got dtype {spec.dtype}")
        if any(size < 1 for size in spec.shape):
            raise ValueError(f"{key} must have sizes of at least 1, got shape {spec.shape}")
        size = int(np.prod(spec.shape))
        if spec.names and len(spec.names) != size:
            raise ValueError(f"{key} has {size} numbers in one step, got {len(spec.names)} names {spec.names}")
    for key, role in (roles or {}).items():
        if key not in fields:
            raise unknown_name(f"the key of role {role!r}", key, fields)
        if not is_role(role):
            raise ValueError(f"the role of {key} must be {ACTION!r} or like {STATE!r} or '{IMAGES}front', got {role!r}")


def check_episode(path: Path, fields: Mapping[str, FieldSpec], data: Mapping[str, np.ndarray]) -> int:
    """Length T of an episode (key -> (T, ...)) that fits a store with these fields.

    Raises:
        ValueError: keys, shapes, types or lengths that differ, or numbers that are not finite.
    """
    for key in data:
        if key not in fields:
            raise unknown_name(f"key of {path}", key, fields)
    if missing := [key for key in fields if key not in data]:
        raise ValueError(f"an episode of {path} must have the keys {list(fields)}, {missing} missing")
    lengths = {key: len(value) if value.ndim else 0 for key, value in data.items()}
    if len(set(lengths.values())) != 1 or not all(lengths.values()):
        raise ValueError(f"all keys of an episode must have the same length of at least 1, got {lengths}")
    for key, spec in fields.items():
        value = data[key]
        if value.shape[1:] != spec.shape:
            raise ValueError(f"a step of {key} must have shape {spec.shape}, got {value.shape[1:]} ({path})")
        if value.dtype.name != spec.dtype:
            fix = f"convert with .astype({spec.dtype!r})"
            raise ValueError(f"{key} must be {spec.dtype} as in {path}, got {value.dtype}; {fix}")
        if value.dtype.kind in "fc" and not np.isfinite(value).all():
            index = tuple(int(i) for i in np.argwhere(~np.isfinite(value))[0])
            where = f"row {index[0]} of the episode, position {index[1:]}"
            raise ValueError(f"{key} must be finite, got {value[index]} at {where}")
    return next(iter(lengths.values()))


# What was found ------------------------------------------------------------------------------------------------------


def own_attrs(path: Path, attrs: Mapping[str, Any]) -> tuple[dict[str, dict], list[str]]:
    """(key -> role, names and units; tasks) of a store of ours; both empty for others.

    Raises:
        ValueError: a later format, or attributes of another type.
    """
    if attrs.get("format") != FORMAT:
        return {}, []
    version, keys, tasks = (attrs.get(name) for name in ("format_version", "keys", "tasks"))
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(f"{path} has format_version {version}; this diffpolicy reads up to {FORMAT_VERSION}")
    if not isinstance(keys, dict) or not all(isinstance(known, dict) for known in keys.values()):
        raise ValueError(f"{path}: attrs['keys'] must map keys to role, names and units, got {keys!r:.100}")
    if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
        raise ValueError(f"{path}: attrs['tasks'] must be a list of instructions, got {tasks!r:.100}")
    return keys, list(tasks)


def finished_ends(path: Path, ends: np.ndarray) -> np.ndarray:
    """(E,) int64 ends of finished episodes; a single 0 at the end is an episode whose end was about to be written.

    Raises:
        ValueError: ends that do not increase.
    """
    ends = ends.astype(np.int64)
    if len(ends) and ends[-1] == 0:
        ends = ends[:-1]
    wrong = np.diff(ends, prepend=0) <= 0
    if wrong.any():
        i = int(np.argmax(wrong))
        before = ends[i - 1] if i else 0
        raise ValueError(
            f"{path}: meta/episode_ends must increase from above 0, got {before} then {ends[i]} at [{i}]; "
            f"see what else is wrong with: diffpolicy data validate {path}"
        )
    return ends


def check_task_ids(path: Path, ids: np.ndarray, num_episodes: int, num_tasks: int) -> None:
    """Whether every episode has the index of a task, or -1 for none."""
    if len(ids) < num_episodes:
        raise ValueError(f"{path}: meta/episode_task has {len(ids)} entries for {num_episodes} episodes")
    if len(ids) and not -1 <= ids.min() <= ids.max() < num_tasks:
        raise ValueError(f"{path}: meta/episode_task must be in -1..{num_tasks - 1}, got {ids.min()}..{ids.max()}")
