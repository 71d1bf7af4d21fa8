"""Episodes -> windows of (observed frames, predicted actions); the index arithmetic is pure, the data lives in RAM or on the GPU.

row          start                      now                                      stop - 1
episode        |--------------------------|----------------------------------------|
observed                        [now - T_obs + 1 .. now]
predicted                  [now - past .. now - past + T_pred - 1]
mask           False where a row lies outside the episode; there the edge row is repeated
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffpolicy.replay import ReplayBuffer
from diffpolicy.spec import (
    ACTION,
    EMBEDDING,
    GOAL_IMAGE,
    IMAGES,
    TASK,
    Batch,
    DataSpec,
    FieldSpec,
    Horizons,
    KeySelection,
    Observation,
)


@dataclass(frozen=True)
class WindowIndices:
    """One row per window; all rows count over the whole store."""

    now: np.ndarray
    """(n,) row of the latest observed frame."""
    start: np.ndarray
    """(n,) first row of the window's episode."""
    stop: np.ndarray
    """(n,) row after the last of the window's episode."""
    episode: np.ndarray
    """(n,) index of the episode."""

    def __len__(self) -> int:
        return len(self.now)


def window_indices(
    episode_ends: np.ndarray,
    horizons: Horizons,
    *,
    episodes: Sequence[int] | None = None,
    pad_after: int | None = None,
) -> WindowIndices:
    """All windows of the chosen episodes.

    As in Diffusion Policy, at most horizons.past predicted steps lie before the episode and at most pad_after behind it.
    Unlike there, an episode shorter than that still gives one window, so that no demonstration is dropped unseen.

    Args:
        episode_ends: (num_episodes,) cumulative ends, increasing.
        episodes: indices to take; None takes all.
        pad_after: padded steps allowed behind the end; None means horizons.act - 1.
    """
    pad_after = horizons.act - 1 if pad_after is None else pad_after
    ends = np.asarray(episode_ends, dtype=np.int64)
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    episodes = np.arange(len(ends)) if episodes is None else np.asarray(episodes, dtype=np.int64)
    counts = np.maximum(1, ends[episodes] - starts[episodes] - horizons.pred + horizons.past + pad_after + 1)
    counts = np.minimum(counts, ends[episodes] - starts[episodes])
    episode = np.repeat(episodes, counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    now = starts[episode] + np.arange(counts.sum()) - first
    return WindowIndices(now=now, start=starts[episode], stop=ends[episode], episode=episode)


def split_episodes(
    num_episodes: int, *, val_ratio: float = 0.0, max_train: int | None = None, seed: int = 42
) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation episodes; whole episodes, so that no window of one leaks into the other.

    The draws are those of Diffusion Policy (numpy default_rng), so that its splits are reproduced: 206 episodes,
    val_ratio 0.02, seed 42 hold out {18, 90, 134, 157}.
    """
    if not 0 <= val_ratio < 1:
        raise ValueError(f"data.val_ratio must be in [0, 1), got {val_ratio}")
    held_out = np.zeros(num_episodes, dtype=bool)
    if val_ratio > 0 and num_episodes > 1:
        num_val = min(max(1, round(num_episodes * val_ratio)), num_episodes - 1)
        held_out[np.random.default_rng(seed).choice(num_episodes, size=num_val, replace=False)] = True
    train = np.nonzero(~held_out)[0]
    if max_train is not None and max_train < len(train):
        if max_train < 1:
            raise ValueError(f"data.max_train_episodes must be at least 1, got {max_train}")
        train = np.sort(train[np.random.default_rng(seed).choice(len(train), size=max_train, replace=False)])
    return train, np.nonzero(held_out)[0]


def read_role(
    buffer: ReplayBuffer, role: str, selection: str, progress: Callable[[int, int], None] | None = None
) -> np.ndarray:
    """All steps of one role: float32 (N, D), flattened, for numbers; uint8 (N, H, W, 3) for images.

    Raises:
        ValueError: the store lacks the key, the dimensions do not exist, or an image is not (H, W, 3) of 0..255.
    """
    chosen = KeySelection.parse(selection)
    if role.startswith(IMAGES) or role == GOAL_IMAGE:
        if chosen.dims is not None:
            raise ValueError(f"data.keys.{role} is an image; dimensions cannot be chosen from it, got {selection!r}")
        return buffer.read_images_uint8(chosen.key)
    values = np.asarray(buffer.read(chosen.key), dtype=np.float32)
    if chosen.dims is not None:
        flat = values.reshape(len(values), -1)
        values = flat[:, chosen.dims]
        if values.shape[1] == 0:
            raise ValueError(
                f"data.keys.{role}: {selection!r} takes nothing; {chosen.key} has {flat.shape[1]} numbers a step"
            )
    return values.reshape(len(values), -1)


class WindowDataset:
    """Windows gathered by index from tensors in RAM or on the GPU: T_obs frames, never T_pred frames; no copies, no workers."""

    def __init__(
        self,
        arrays: dict[str, Tensor],
        indices: WindowIndices,
        horizons: Horizons,
        *,
        episode_tasks: Sequence[str] | None = None,
    ):
        """episode_tasks: the instruction of every episode of the store, "" for none; it stands in obs["task"]."""
        self.arrays = arrays
        self.episode_tasks = episode_tasks
        self.indices = indices
        self.horizons = horizons
        self._now, self._start, self._last = (
            torch.from_numpy(x) for x in (indices.now, indices.start, indices.stop - 1)
        )
        self._obs_offsets = torch.arange(horizons.obs) - (horizons.obs - 1)
        self._action_offsets = torch.arange(horizons.pred) - horizons.past

    def __len__(self) -> int:
        return len(self.indices)

    def to(self, device: torch.device | str) -> WindowDataset:
        """Moves data and indices to a device, where batches are then gathered."""
        moved = {id(v): v.to(device) for v in self.arrays.values()}  # a goal image shares its camera's frames
        self.arrays = {k: moved[id(v)] for k, v in self.arrays.items()}
        for name in ("_now", "_start", "_last", "_obs_offsets", "_action_offsets"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def batch(self, window: Tensor) -> Batch:
        """The windows with these indices (B,), as one Batch in physical units."""
        tasks = {}
        if self.episode_tasks is not None:  # before the indices go to the device: words are looked up on the CPU
            tasks[TASK] = [self.episode_tasks[episode] for episode in self.indices.episode[window.cpu().numpy()]]
        window = window.to(self._now.device)
        now, start, last = (x[window, None] for x in (self._now, self._start, self._last))  # (B, 1)
        obs_rows = torch.minimum(torch.maximum(now + self._obs_offsets, start), last)  # (B, T_obs)
        wanted = now + self._action_offsets  # (B, T_pred)
        action_rows = torch.minimum(torch.maximum(wanted, start), last)
        obs: Observation = {}
        for key, array in self.arrays.items():
            if key != ACTION:  # what was wanted is what the episode ended with, (B, 1, H, W, 3)
                obs[key] = array[last if key.removeprefix(EMBEDDING).startswith(GOAL_IMAGE) else obs_rows]
        obs |= tasks
        return Batch(obs=obs, actions=self.arrays[ACTION][action_rows], mask=wanted == action_rows, window=window)

    def describe(self, window: int) -> str:
        """Names a window by episode and row, for error messages."""
        i = self.indices
        return f"episode {i.episode[window]}, step {i.now[window] - i.start[window]} (row {i.now[window]})"


def load_windows(
    buffer: ReplayBuffer,
    keys: dict[str, str],
    horizons: Horizons,
    splits: Sequence[Sequence[int]],
    *,
    embedded: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> tuple[list[WindowDataset], DataSpec]:
    """Reads the roles once and gives a dataset for each split, sharing the memory, with the spec of what was read.

    Args:
        keys: role -> key of the store, or some of its dimensions, e.g. {"observation.state": "state[0:2]"}.
        splits: lists of episode indices.
        embedded: role -> features of all its frames, read in place of its pixels; the spec has the camera all the same.
    """
    embedded = embedded or {}
    if ACTION not in keys:
        raise ValueError(f"data.keys must name the action, got only {sorted(keys)}")
    if not any(role.startswith("observation.") for role in keys):
        raise ValueError(f"data.keys must name at least one observation.*, got only {sorted(keys)}")
    for role in keys:
        if role not in (ACTION, GOAL_IMAGE) and not role.startswith("observation."):
            raise ValueError(
                f"data.keys must be action, {GOAL_IMAGE} or observation.*, got {role!r}, which no policy would look at"
            )
    arrays = {
        role: read_role(buffer, role, selection)
        for role, selection in keys.items()
        if role != GOAL_IMAGE and role not in embedded
    }
    camera = None
    if GOAL_IMAGE in keys and GOAL_IMAGE not in embedded:  # frames that a camera has already are not read twice
        camera = next((r for r in arrays if r.startswith(IMAGES) and keys[r] == keys[GOAL_IMAGE]), None)
        arrays[GOAL_IMAGE] = arrays[camera] if camera else read_role(buffer, GOAL_IMAGE, keys[GOAL_IMAGE])
    fields = {}
    for role, array in arrays.items():
        chosen = KeySelection.parse(keys[role])
        known = buffer.fields[chosen.key]
        names = known.names[chosen.dims] if chosen.dims is not None else known.names
        names = names if len(names) == int(np.prod(array.shape[1:])) else ()
        fields[role] = FieldSpec(shape=array.shape[1:], dtype=str(array.dtype), names=names, units=known.units)
    fields |= {role: FieldSpec(shape=buffer.fields[keys[role]].shape, dtype="uint8") for role in embedded}
    fields = {role: fields[role] for role in keys}
    spec = DataSpec(fields=fields, fps=buffer.fps, tasks=buffer.tasks)
    tensors = {role: torch.from_numpy(np.ascontiguousarray(array)) for role, array in arrays.items()}
    if camera:
        tensors[GOAL_IMAGE] = tensors[camera]
    shared = {id(array): torch.from_numpy(array) for features in embedded.values() for array in features.values()}
    for role, features in embedded.items():
        tensors |= {f"{EMBEDDING}{role}.{name}": shared[id(array)] for name, array in features.items()}
    episode_tasks = [buffer.episode_task(i) for i in range(len(buffer.episode_ends))] if buffer.tasks else None
    datasets = [
        WindowDataset(
            dict(tensors),
            window_indices(buffer.episode_ends, horizons, episodes=split),
            horizons,
            episode_tasks=episode_tasks,
        )
        for split in splits
    ]
    return datasets, spec
