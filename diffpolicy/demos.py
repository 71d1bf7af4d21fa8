"""Records demonstrations, scripted or teleoperated, into a ReplayBuffer.

    env.reset(seed)  --observation-->  demonstrator.act(env)  --action-->  env.step  ... until solved or out of time
                            |                                   |
                            +---- one row: observation.*, action, reward, sim_state, episode_seed ----> ReplayBuffer

Row k holds what was seen before action k, the action, and the reward that it brought.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from diffpolicy.envs.base import RobotEnv
from diffpolicy.envs.metaworld_expert import MetaworldDemonstrator, MetaworldDemonstratorConfig
from diffpolicy.envs.tabletop_expert import TabletopDemonstrator, TabletopDemonstratorConfig
from diffpolicy.envs.tabletop_language_expert import TabletopLanguageDemonstrator, TabletopLanguageDemonstratorConfig
from diffpolicy.replay import ReplayBuffer
from diffpolicy.spec import ACTION, FieldSpec, unknown_name

SIM_STATE = "sim_state"
"""Key of env.get_state() before each action: env.reset(options={"state": episode["sim_state"][0]}) starts it again."""
REWARD = "reward"
EPISODE_SEED = "episode_seed"
"""Key of the seed that the episode was reset with, the same in each of its rows."""

MAX_FAILURES_IN_A_ROW = 50
"""Failed attempts, one after the other, at which a collection gives up."""


class Demonstrator(Protocol):
    """Whoever shows the task: a script, or a person at a device."""

    def reset(self, env: RobotEnv, rng: np.random.Generator) -> None:
        """Called after env.reset; a script takes all its randomness from `rng`."""

    def act(self, env: RobotEnv) -> np.ndarray:
        """The next action, shape (D_act,), in the environment's units."""


@dataclass(frozen=True, kw_only=True)
class CollectResult:
    path: Path
    num_episodes: int
    """Episodes in the store."""
    num_steps: int
    """Rows in the store."""
    num_added: int
    """Episodes that this call recorded; the others were there before."""
    discarded_seeds: tuple[int, ...]
    """Seeds from the first to the last one tried that are not in the store: their attempts failed."""


def collect(
    env: RobotEnv,
    demonstrator: Demonstrator,
    *,
    out: str | os.PathLike,
    episodes: int,
    seed: int = 0,
    keep_failures: bool = False,
    progress: Callable[[int, int, int], None] | None = None,
) -> CollectResult:
    """Records until `out` holds that many episodes; attempt i is reset with seed + i, failed attempts are left out.

    An existing store is continued. A collection that was interrupted and called again ends with the same rows as one
    that was not, provided that the demonstrator's actions follow from what it sees and its generator.

    Args:
        env: images are recorded if it observes them.
        out: the store; made if nothing is there.
        seed: of the first attempt; also decides the demonstrator's generator.
        keep_failures: record failed attempts too; their largest reward is below 1.
        progress: progress(episodes in the store, episodes asked for, attempts of this call that failed).
    Raises:
        ValueError: the store holds other keys or shapes, begins at another seed, or was recorded in another
            environment; or the demonstrator fails MAX_FAILURES_IN_A_ROW times.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    out = Path(out)
    fields = _fields(env)
    exists = out.is_file() or (out.is_dir() and any(out.iterdir()))
    with ReplayBuffer.open(out, mode="a") if exists else ReplayBuffer.create(out, fields=fields, fps=env.fps) as buffer:
        seeds = _seeds(buffer) if exists else []
        if exists:
            _check_same_collection(buffer, env, fields, seeds, seed)
        num_before = buffer.num_episodes
        attempt = seeds[-1] + 1 if seeds else seed
        failed_in_a_row = num_failed = 0
        while buffer.num_episodes < episodes:
            data, task, success = record_episode(env, demonstrator, attempt)
            num_failed += not success
            failed_in_a_row = 0 if success else failed_in_a_row + 1
            if success or keep_failures:
                buffer.append_episode(data, task=task)
                seeds.append(attempt)
            elif failed_in_a_row == MAX_FAILURES_IN_A_ROW:
                raise ValueError(
                    f"{type(demonstrator).__name__} failed {MAX_FAILURES_IN_A_ROW} times in a row (seeds "
                    f"{attempt - MAX_FAILURES_IN_A_ROW + 1} to {attempt}); {out} holds {buffer.num_episodes} episodes"
                )
            attempt += 1
            if progress:
                progress(buffer.num_episodes, episodes, num_failed)
        return CollectResult(
            path=out,
            num_episodes=buffer.num_episodes,
            num_steps=buffer.num_steps,
            num_added=buffer.num_episodes - num_before,
            discarded_seeds=tuple(sorted(set(range(seed, seeds[-1] + 1)) - set(seeds))),
        )


def record_episode(env: RobotEnv, demonstrator: Demonstrator, seed: int) -> tuple[dict[str, np.ndarray], str, bool]:
    """One attempt: its rows (key -> (T, ...)), the instruction, and whether it succeeded."""
    obs, _ = env.reset(seed=seed)
    demonstrator.reset(env, np.random.default_rng([seed, 1]))  # not the stream that drew the start
    rows: dict[str, list] = {key: [] for key in (*obs, ACTION, REWARD, SIM_STATE)}
    done = False
    while not done:
        rows[SIM_STATE].append(env.get_state())
        action = np.asarray(demonstrator.act(env), dtype=np.float32)  # stored as it is executed, so that it replays
        next_obs, reward, terminated, truncated, info = env.step(action)
        for key, value in obs.items():
            rows[key].append(value)
        rows[ACTION].append(action)
        rows[REWARD].append(np.float32(reward))
        obs, done = next_obs, terminated or truncated
    data = {key: np.stack(values) for key, values in rows.items()}
    data[REWARD] = data[REWARD][:, None]  # (T, 1)
    data[EPISODE_SEED] = np.full((len(data[ACTION]), 1), seed, dtype=np.int64)
    return data, env.task, bool(info["is_success"])


def _fields(env: RobotEnv) -> dict[str, FieldSpec]:
    """What one row of `env` looks like."""
    fields = {}
    for key, space in env.observation_space.items():
        names, units = env.observation_names.get(key, ()), env.observation_units.get(key, "")
        fields[key] = FieldSpec(shape=space.shape, dtype=space.dtype.name, names=names, units=units)
    fields[ACTION] = FieldSpec(
        shape=env.action_space.shape, dtype="float32", names=env.action_names, units=env.action_units
    )
    fields[REWARD] = FieldSpec(shape=(1,), dtype="float32")
    fields[SIM_STATE] = FieldSpec(shape=(len(env.state_names),), dtype="float64", names=env.state_names)
    fields[EPISODE_SEED] = FieldSpec(shape=(1,), dtype="int64")
    return fields


def _seeds(buffer: ReplayBuffer) -> list[int]:
    """The seed of every episode, in order; empty for a store without episodes or without seeds."""
    if EPISODE_SEED not in buffer.keys or not buffer.num_episodes:
        return []
    return buffer.read(EPISODE_SEED)[buffer.episode_ends - 1, 0].tolist()


def _check_same_collection(
    buffer: ReplayBuffer, env: RobotEnv, fields: dict[str, FieldSpec], seeds: list[int], seed: int
) -> None:
    """Whether going on with the store gives what one collection from `seed` in `env` would have given."""
    for key in sorted({*fields, *buffer.fields}):
        ours, theirs = fields.get(key), buffer.fields.get(key)
        if ours is None or theirs is None:
            here, there = (buffer.path, "this collection") if ours is None else ("this collection", buffer.path)
            raise ValueError(f"{key} is recorded in {here}, not in {there}; choose the same options or another --out")
        if ours != theirs:
            raise ValueError(f"{key} must be as in {buffer.path}, {theirs}, got {ours}; choose another --out")
    if buffer.fps != env.fps:
        raise ValueError(f"{buffer.path} was recorded at {buffer.fps} Hz, this environment runs at {env.fps} Hz")
    if not seeds:
        return
    if not seed <= seeds[0] < seed + MAX_FAILURES_IN_A_ROW:
        raise ValueError(
            f"{buffer.path} begins with seed {seeds[0]}, so it was not collected from seed {seed}; "
            f"go on with --seed {seeds[0]}, or choose another --out"
        )
    env.reset(seed=seeds[-1])
    first = buffer.episode_slice(-1).start
    if not np.array_equal(env.get_state(), buffer.read(SIM_STATE, first, first + 1)[0]):
        raise ValueError(
            f"{buffer.path} was recorded in another environment: seed {seeds[-1]} starts elsewhere in this one; "
            f"choose the same options or another --out"
        )


DEMONSTRATORS: dict[str, tuple[type, type[Demonstrator]]] = {
    "metaworld": (MetaworldDemonstratorConfig, MetaworldDemonstrator),
    "tabletop": (TabletopDemonstratorConfig, TabletopDemonstrator),
    "tabletop_language": (TabletopLanguageDemonstratorConfig, TabletopLanguageDemonstrator),
}
"""Environment -> (Config, Class) of its scripted demonstrator. To add one, write them and a line here."""


def make_demonstrator(env_name: str, **choices) -> Demonstrator:
    """The scripted demonstrator of an environment; choices are fields of its Config.

    Raises:
        ValueError: the environment has none, with those that have one; or an unknown choice, with the nearest right one.
    """
    if env_name not in DEMONSTRATORS:
        raise unknown_name("environment with a scripted demonstrator", env_name, DEMONSTRATORS)
    config_class, demonstrator_class = DEMONSTRATORS[env_name]
    known = {field.name for field in dataclasses.fields(config_class)}
    for choice in choices:
        if choice not in known:
            raise unknown_name(f"option of the demonstrator of {env_name!r}", choice, known)
    return demonstrator_class(config_class(**choices))
