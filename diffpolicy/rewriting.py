"""Stores written anew: some episodes dropped, or a store of the field converted to ours.

    source --read--> blocks of rows that fill whole files --fill--> a folder beside the target --rename--> target

Works on ReplayBuffers alone, block by block, so that stores larger than memory can be rewritten.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from diffpolicy.replay import ReplayBuffer, open_root, settle
from diffpolicy.spec import FieldSpec
from diffpolicy.store_folder import appears_whole
from diffpolicy.store_layout import Progress, is_image, to_uint8


def drop_episodes(
    path: str | os.PathLike,
    episodes: Iterable[int],
    out: str | os.PathLike | None = None,
    progress: Progress | None = None,
) -> None:
    """Rewrites a store without some of its episodes, in place or to `out`; the result appears whole or not at all.

    Raises:
        ValueError: an episode that is not there, none left over, or a store that cannot be written in place.
        FileExistsError: something lies at `out`.
    """
    path = Path(path).resolve()
    if out is None and open_root(path).metadata.zarr_format != 3:
        raise ValueError(f"{path} is zarr v2 and can only be read; write the rest elsewhere with --out")
    with ReplayBuffer.open(path, "r" if out is not None else "a") as source:
        dropped = set(episodes)
        if wrong := sorted(e for e in dropped if not 0 <= e < source.num_episodes):
            raise ValueError(f"{path} has episodes 0..{source.num_episodes - 1}, so {wrong} cannot be dropped")
        kept = [i for i in range(source.num_episodes) if i not in dropped]
        if not kept:
            raise ValueError(f"dropping all {source.num_episodes} episodes would leave none; delete {path} instead")
        target = path if out is None else Path(out)
        with appears_whole(target, replace=out is None) as fresh:
            _rewrite(source, fresh, kept, dtypes={}, fps=source.fps, roles=source.roles, task="", progress=progress)


def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    fps: float | None = None,
    roles: Mapping[str, str] | None = None,
    task: str = "",
    progress: Progress | None = None,
) -> None:
    """Writes a store of the field (zarr v2 or v3, folder or zip) anew as ours; `dst` appears whole or not at all.

    Pictures stored as floats become uint8 where they hold nothing but whole numbers in 0..255; all else stays equal
    bit by bit, NaN included (see validation.py). Attributes and other arrays of meta/ come along.

    Args:
        fps: steps per second, where the source does not say.
        roles: key -> role, in addition to what the source says.
        task: the instruction of all episodes that have none.
    Raises:
        FileExistsError: something lies at `dst`.
        ValueError: the source cannot be read, a role names no key of it, or an instruction that is blank or not UTF-8.
    """
    if task and not task.strip():
        raise ValueError(f"an instruction must say something, got {task!r}")
    try:
        task.encode()
    except UnicodeEncodeError as error:  # an argument that the shell did not hand over as UTF-8
        raise ValueError(f"an instruction must be UTF-8 text, got {task!r}") from error
    source = ReplayBuffer.open(src)
    if not source.num_episodes:
        raise ValueError(f"{src} holds no finished episodes, so there is nothing to convert")
    dtypes = {
        key: "uint8"
        for key, spec in source.fields.items()
        if is_image(spec) and np.dtype(spec.dtype).kind == "f" and holds_uint8(source, key, progress)
    }
    roles = {**source.roles, **(roles or {})}
    fps = source.fps if fps is None else fps
    with appears_whole(Path(dst)) as fresh:
        everything = range(source.num_episodes)
        _rewrite(source, fresh, everything, dtypes=dtypes, fps=fps, roles=roles, task=task, progress=progress)


def holds_uint8(source: ReplayBuffer, key: str, progress: Progress | None) -> bool:
    """Whether a float camera can become uint8 without loss; one that cannot usually shows it in its first block."""
    for start, stop in source.blocks(key):
        block = source.read(key, start, stop)
        try:
            to_uint8(block, key, start)
        except ValueError:
            return False
        if progress:
            progress(f"{key} (check)", stop, source.num_steps)
    return True


def _rewrite(
    source: ReplayBuffer,
    path: Path,
    episodes: Sequence[int],
    *,
    dtypes: Mapping[str, str],
    fps: float | None,
    roles: Mapping[str, str],
    task: str,
    progress: Progress | None,
) -> None:
    """Some episodes of a store as a new store, streamed key by key in blocks that fill whole files."""
    fields = {
        key: FieldSpec(shape=spec.shape, dtype=dtypes.get(key, spec.dtype), names=spec.names, units=spec.units)
        for key, spec in source.fields.items()
    }
    spans = [source.episode_slice(i) for i in episodes]
    lengths = [span.stop - span.start for span in spans]
    tasks = [source.episode_task(i) or task for i in episodes]

    def rows(key: str) -> Iterator[np.ndarray]:
        done = 0
        for runs in _runs_of_rows(spans, target.rows_per_file(key)):
            block = np.concatenate([source.read(key, run.start, run.stop) for run in runs])
            yield to_uint8(block, key, runs[0].start) if key in dtypes else block
            done += len(block)
            if progress:
                progress(key, done, sum(lengths))

    try:
        with ReplayBuffer.create(path, fields=fields, fps=fps, roles=roles) as target:
            target.copy_extras(source, episodes)
            target.fill(lengths, tasks, rows)
    except BaseException:
        settle()  # nothing may be written any more where the folder is about to be deleted
        raise


def _runs_of_rows(spans: Sequence[slice], size: int) -> Iterator[list[slice]]:
    """Cuts spans of rows into groups of `size` rows in all (the last may be shorter), joining spans that touch."""
    group: list[slice] = []
    room = size
    for span in spans:
        start = span.start
        while start < span.stop:
            stop = min(span.stop, start + room)
            if group and group[-1].stop == start:
                group[-1] = slice(group[-1].start, stop)
            else:
                group.append(slice(start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield group
                group, room = [], size
    if group:
        yield group
