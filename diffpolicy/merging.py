"""Several sets of demonstrations as one store, each set with its instructions.

    sources --read--> blocks --check, bring to one type, rewrite--> files' worth of rows --fill--> a folder beside --rename--> out

Works on ReplayBuffers alone, block by block, so that sets larger than memory can be merged.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffpolicy.replay import ReplayBuffer, settle
from diffpolicy.rewriting import holds_uint8
from diffpolicy.spec import ACTION, FieldSpec, unknown_name
from diffpolicy.store_folder import appears_whole
from diffpolicy.store_layout import Progress, is_image, to_uint8

WORDINGS_BAR = " | "
"""Stands between several wordings of one instruction."""

Repaint = Callable[[np.ndarray], np.ndarray]
"""Frames (n, H, W, 3) uint8 -> the same frames, changed."""


@dataclass(frozen=True)
class Merged:
    """What merge() did, beyond writing the store."""

    num_episodes: tuple[int, ...]
    """Episodes of each source, in order: the first so many of the store are the first source's."""
    left_out: dict[str, str]
    """Keys that are not in the store -> why."""
    notes: tuple[str, ...]
    """What else is worth knowing, a sentence each: types that changed, instructions that were replaced, ..."""


def read_wordings(text: str) -> tuple[str, ...]:
    """`push it | shove it` -> both; `@FILE` -> its lines, blank ones left out.

    Raises:
        ValueError: nothing is said, a wording is empty or given twice, or the file is not UTF-8.
        FileNotFoundError: no such file.
    """
    if text.startswith("@"):
        file = Path(text[1:])
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist; @FILE names a text file with one wording on each line")
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()  # some editors mark the beginning
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} must be UTF-8 text, got {error.reason} at byte {error.start}") from error
        wordings = tuple(line.strip() for line in lines if line.strip())
        where = str(file)
    else:
        wordings, where = tuple(part.strip() for part in text.split(WORDINGS_BAR.strip())), repr(text)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # an argument that the shell did not hand over as UTF-8
        raise ValueError(f"an instruction must be UTF-8 text, got {text!r}") from error
    if not wordings or not all(wordings):
        raise ValueError(f"an instruction must say something, got {where} with an empty wording")
    if twice := sorted({w for w in wordings if wordings.count(w) > 1}):
        raise ValueError(
            f"a wording may be given once, as each gets its share of the episodes; {where} has {twice[0]!r} twice"
        )
    return wordings


def deal(wordings: Sequence[str], num_episodes: int, seed: Sequence[int]) -> list[str]:
    """One wording for each episode: each as often as any other, give or take one, in an order that the seed decides."""
    hands = [wordings[i % len(wordings)] for i in range(num_episodes)]
    return [hands[i] for i in np.random.default_rng(seed).permutation(num_episodes)]


def merge(
    sources: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    wordings: Sequence[Sequence[str]] | None = None,
    keys: Sequence[str] | None = None,
    roles: Mapping[str, str] | None = None,
    fps: float | None = None,
    seed: int = 0,
    repaint: Callable[[ReplayBuffer, str], Repaint] | None = None,
    progress: Progress | None = None,
) -> Merged:
    """Writes the episodes of several stores (zarr v2 or v3, folders or zips), one after the other, as one of ours.

    `out` appears whole or not at all. Pictures become uint8 where they hold nothing but whole numbers in 0..255, other
    types become the smallest that holds both. Attributes and other arrays of meta/ do not come along, which a note says.

    Args:
        wordings: for each source, sentences that mean the same, dealt out to its episodes; None keeps the sources' own.
        keys: what to keep; None: all that every source has with the same shape, names and units.
        roles: key -> role, in addition to what the sources say.
        fps: steps per second, where the sources do not say.
        seed: decides which episode gets which wording.
        repaint: called with each source and camera; what it returns is applied to that camera's frames.
    Raises:
        FileExistsError: something lies at `out`.
        ValueError: sources that do not go together (shapes, frame rates, roles, instructions, keys), numbers that are not
            finite, or a source that cannot be read; names the source, and the episode and row.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists already; choose another name, or delete it")
    if not sources:
        raise ValueError("merge needs at least one store, got none")
    buffers = [ReplayBuffer.open(path) for path in sources]
    for buffer in buffers:
        if not buffer.num_episodes:
            raise ValueError(f"{buffer.path} holds no finished episodes, so there is nothing to merge")
    notes: list[str] = []
    tasks = _tasks(buffers, wordings, seed, notes)
    rate = _rate(buffers, fps, notes)
    kept, left_out = _common_keys(buffers, keys)
    all_roles = _roles(buffers, kept, roles or {})
    fields = {key: _field(buffers, key, notes, progress) for key in kept}
    repaints = {
        key: [repaint(buffer, key) for buffer in buffers]
        for key in kept
        if repaint is not None and _is_camera(fields[key])
    }
    if repaint is not None and not repaints:
        raise ValueError(f"there is no camera to repaint: none of {list(kept)} holds pictures of 0..255 (H, W, 3)")

    notes += [f"{key} is repainted" for key in repaints]
    notes += [f"{', '.join(b.extras)} of {b.path} do not come along" for b in buffers if b.extras]
    lengths = [int(length) for buffer in buffers for length in buffer.episode_lengths]

    def rows(key: str) -> Iterator[np.ndarray]:
        blocks = _blocks(buffers, key, fields[key].dtype, repaints.get(key))
        done = 0
        for block in _regrouped(blocks, target.rows_per_file(key)):
            yield block
            done += len(block)
            if progress:
                progress(key, done, sum(lengths))

    with appears_whole(out) as fresh:
        try:
            with ReplayBuffer.create(fresh, fields=fields, fps=rate, roles=all_roles) as target:
                target.fill(lengths, tasks, rows)
        except BaseException:
            settle()  # nothing may be written any more where the folder is about to be deleted
            raise
    return Merged(tuple(buffer.num_episodes for buffer in buffers), left_out, tuple(notes))


# What goes into the store --------------------------------------------------------------------------------------------


def _tasks(
    buffers: Sequence[ReplayBuffer], wordings: Sequence[Sequence[str]] | None, seed: int, notes: list[str]
) -> list[str]:
    """The instruction of every episode, in order."""
    own = [[buffer.episode_task(i) for i in range(buffer.num_episodes)] for buffer in buffers]
    if wordings is None:
        if not any(task for tasks in own for task in tasks):
            return [task for tasks in own for task in tasks]
        for buffer, tasks in zip(buffers, own, strict=True):
            if without := tasks.count(""):
                raise ValueError(
                    f"{buffer.path} has {without} episodes without an instruction, while other episodes have one; "
                    "give one --instruction for each source, in order"
                )
        return [task for tasks in own for task in tasks]
    if len(wordings) != len(buffers):
        raise ValueError(
            f"there must be one instruction for each of the {len(buffers)} sources, in order, got {len(wordings)}; "
            f"several wordings of one read 'push it{WORDINGS_BAR}shove it' or @FILE"
        )
    dealt = []
    for i, (buffer, sentences) in enumerate(zip(buffers, wordings, strict=True)):
        if any(own[i]):
            notes.append(f"the instructions that {buffer.path} had are replaced")
        if len(sentences) > buffer.num_episodes:
            count = len(sentences) - buffer.num_episodes
            notes.append(
                f"{count} of {len(sentences)} wordings for {buffer.path} find no episode; it has {buffer.num_episodes}"
            )
        dealt += deal(sentences, buffer.num_episodes, (seed, i))
    return dealt


def _rate(buffers: Sequence[ReplayBuffer], fps: float | None, notes: list[str]) -> float | None:
    """The frame rate that all sources share."""
    known = {str(buffer.path): buffer.fps for buffer in buffers if buffer.fps is not None}
    if fps is not None:
        known["--fps"] = fps
    if len(set(known.values())) > 1:
        told = ", ".join(f"{source} says {rate:g}" for source, rate in known.items())
        raise ValueError(f"all sources must have the same frame rate: {told}")
    rate = next(iter(known.values()), None)
    if rate is not None and fps is None:
        for buffer in buffers:
            if buffer.fps is None:
                notes.append(f"{buffer.path} does not say its frame rate; it is taken to be {rate:g} Hz as the others'")
    return rate


def _common_keys(
    buffers: Sequence[ReplayBuffer], wanted: Sequence[str] | None
) -> tuple[tuple[str, ...], dict[str, str]]:
    """(keys to keep, keys left out -> why)."""
    known = {key: None for buffer in buffers for key in buffer.keys}
    for key in wanted or ():
        if key not in known:
            raise unknown_name("a key to keep", key, known)
    faults = {key: fault for key in known if (fault := _difference(buffers, key))}
    for key, fault in faults.items():
        needed = key == ACTION or any(buffer.roles.get(key) == ACTION for buffer in buffers)
        if needed or key in (wanted or ()):
            raise ValueError(f"{key} cannot be merged: {fault}")
    if wanted is not None:
        dropped = {key: "not among the keys to keep" for key in known if key not in wanted}
        return tuple(dict.fromkeys(wanted)), dropped
    kept = tuple(key for key in known if key not in faults)
    if not kept:
        raise ValueError(f"the sources have no key in common: {'; '.join(f'{k}: {why}' for k, why in faults.items())}")
    return kept, faults


def _difference(buffers: Sequence[ReplayBuffer], key: str) -> str:
    """Why the sources do not agree on a key; "" where they do."""
    if without := [str(buffer.path) for buffer in buffers if key not in buffer.keys]:
        return f"{', '.join(without)} does not have it"
    for what in ("shape", "names", "units"):
        told = {str(buffer.path): getattr(buffer.fields[key], what) for buffer in buffers}
        told = {source: value for source, value in told.items() if value or what == "shape"}
        if len(set(told.values())) > 1:
            return f"its {what} differs, " + ", ".join(f"{value} in {source}" for source, value in told.items())
    return ""


def _roles(buffers: Sequence[ReplayBuffer], kept: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    """key -> role: what is given, else what the sources say."""
    for key in given:
        if key not in kept:
            raise unknown_name(f"the key of role {given[key]!r}", key, kept)
    roles = {}
    for key in kept:
        told = {role: buffer.path for buffer in buffers if (role := buffer.roles.get(key))}
        if key not in given and len(told) > 1:
            said = ", ".join(f"{role} in {path}" for role, path in told.items())
            raise ValueError(f"the role of {key} differs: {said}; choose one with --role {key}=ROLE")
        if role := given.get(key) or next(iter(told), ""):
            roles[key] = role
    return roles


def _field(buffers: Sequence[ReplayBuffer], key: str, notes: list[str], progress: Progress | None) -> FieldSpec:
    """Shape, type, names and units of a key in the store."""
    specs = [buffer.fields[key] for buffer in buffers]
    types = list(dict.fromkeys(spec.dtype for spec in specs))
    if (
        is_image(specs[0])
        and any(np.dtype(spec.dtype).kind == "f" for spec in specs)
        and ("uint8" in types or all(holds_uint8(buffer, key, progress) for buffer in buffers))
    ):
        dtype = "uint8"
    else:
        dtype = np.result_type(*map(np.dtype, types)).name
    if types != [dtype]:
        notes.append(f"{key} becomes {dtype} ({' and '.join(types)} in the sources)")
    names = next((spec.names for spec in specs if spec.names), ())
    units = next((spec.units for spec in specs if spec.units), "")
    return FieldSpec(shape=specs[0].shape, dtype=dtype, names=names, units=units)


def _is_camera(spec: FieldSpec) -> bool:
    return is_image(spec) and spec.shape[-1] == 3 and spec.dtype == "uint8"


# Rows ----------------------------------------------------------------------------------------------------------------


def _blocks(
    buffers: Sequence[ReplayBuffer], key: str, dtype: str, repaints: Sequence[Repaint] | None
) -> Iterator[np.ndarray]:
    """All rows of a key, checked and of one type, source after source, as blocks (n, ...)."""
    for i, buffer in enumerate(buffers):
        for start, stop in buffer.blocks(key):
            block = buffer.read(key, start, stop)
            _check_finite(buffer, key, start, block)
            if dtype == "uint8" and is_image(buffer.fields[key]):
                block = to_uint8(block, f"{buffer.path}: {key}", start)
            block = block.astype(dtype, copy=False)
            yield block if repaints is None else repaints[i](block)


def _check_finite(buffer: ReplayBuffer, key: str, start: int, block: np.ndarray) -> None:
    if block.dtype.kind not in "fc":
        return
    finite = np.isfinite(block).reshape(len(block), -1).all(axis=1)
    if finite.all():
        return
    row = start + int(np.argmin(finite))
    episode = int(np.searchsorted(buffer.episode_ends, row, side="right"))
    raise ValueError(
        f"{buffer.path}: {key} is NaN or infinite in row {row}, step {row - buffer.episode_slice(episode).start} of episode "
        f"{episode}; drop it with `diffpolicy data drop {buffer.path} --episodes {episode} --out REST`"
    )


def _regrouped(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same rows in blocks of `size` (the last may be shorter), so that every file is written once."""
    waiting: list[np.ndarray] = []
    count = 0
    for block in blocks:
        while len(block):
            part, block = block[: size - count], block[size - count :]
            waiting.append(part)
            count += len(part)
            if count == size:
                yield np.concatenate(waiting)
                waiting, count = [], 0
    if waiting:
        yield np.concatenate(waiting)
