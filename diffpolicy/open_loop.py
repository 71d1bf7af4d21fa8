"""Open-loop replay: play recorded actions in the simulator and see how far its states drift from the recorded ones.

It answers, before any training, whether a data set and an environment describe the same world: same units, same action
convention, same control rate, same physics.

    recorded   state[0]      state[1]      state[2]   ...  state[n-1]          state[i] was seen before action[i]
                  | reset       |             |               |
    replayed   state[0] -a[0]-> s_1  -a[1]->  s_2     ...    s_{n-1} -a[n-1]-> score only: no recorded state follows
    drift                   |s_1-state[1]| ...
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from diffpolicy.envs.base import RobotEnv
from diffpolicy.metrics import percentiles, wilson_interval
from diffpolicy.spec import KeySelection, unknown_name

if TYPE_CHECKING:
    from rich.table import Table


class RecordedEpisodes(Protocol):
    """What is replayed: a ReplayBuffer, or anything like it."""

    num_episodes: int

    def episode(self, index: int, keys: Sequence[str]) -> Mapping[str, np.ndarray]:
        """key -> (steps, ...) of one episode, holding at least `keys`."""


@dataclass(frozen=True)
class ReplayedEpisode:
    episode: int
    """Index in the store."""
    steps: int
    """Recorded actions, all of them played."""
    drift: dict[str, float]
    """Largest distance to the recording: per body in the environment's unit of length, per angle in radians."""
    drift_step: dict[str, int]
    """The recorded step at which that distance is reached."""
    score: float
    """Largest reward, in [0, 1]."""
    success: bool
    """info["is_success"] at some step; the replay goes on to the last recorded action all the same."""


@dataclass(frozen=True)
class OpenLoopResult:
    episodes: tuple[ReplayedEpisode, ...]
    unit: str
    """Unit of length of the drift of bodies."""

    def summary(self, *, tolerance: float = 1.0, angle_tolerance: float = 0.05) -> dict:
        """Plain data over all episodes.

        Args:
            tolerance: an episode stays with its recording if a body drifts by no more than this, in `unit`.
            angle_tolerance: the same for angles, radians.
        """
        bodies = {}
        for name in self.episodes[0].drift:
            drifts = np.array([e.drift[name] for e in self.episodes])
            limit = angle_tolerance if _is_angle(name) else tolerance
            worst = self.episodes[int(drifts.argmax())]
            bodies[name] = {
                "unit": "rad" if _is_angle(name) else self.unit,
                "tolerance": limit,
                "episodes_within": int((drifts <= limit).sum()),
                **percentiles(drifts, (50, 95)),
                "max": float(drifts.max()),
                "worst_episode": worst.episode,
                "worst_step": worst.drift_step[name],
            }
        num_episodes, successes = len(self.episodes), sum(e.success for e in self.episodes)
        return {
            "episodes": num_episodes,
            "steps": sum(e.steps for e in self.episodes),
            "drift": bodies,
            "mean_score": sum(e.score for e in self.episodes) / num_episodes,
            "successes": successes,
            "success_interval_95": list(wilson_interval(successes, num_episodes)),
        }

    def to_dict(self, **tolerances: float) -> dict:
        """Plain data for a JSON file: the summary (see there for the tolerances) and every episode."""
        return {"summary": self.summary(**tolerances), "episodes": [dataclasses.asdict(e) for e in self.episodes]}

    def worst_episodes(self, count: int = 3) -> list[tuple[ReplayedEpisode, str]]:
        """The episodes that drift furthest, each with the body that does so; bodies before angles."""
        bodies = [name for name in self.episodes[0].drift if not _is_angle(name)] or list(self.episodes[0].drift)
        ranked = sorted(self.episodes, key=lambda e: max(e.drift[name] for name in bodies), reverse=True)
        return [(e, max(bodies, key=e.drift.__getitem__)) for e in ranked[:count]]

    def table(self, **tolerances: float) -> Table:
        """The summary as a table for the terminal; see summary() for the tolerances."""
        from rich.table import Table

        summary = self.summary(**tolerances)
        num_episodes = summary["episodes"]
        table = Table(title=f"Open-loop replay of {num_episodes} episodes, {summary['steps']} steps")
        for heading in ("drift of", "tolerance", "within", "p50", "p95", "max"):
            table.add_column(heading, justify="left" if heading == "drift of" else "right", no_wrap=True)
        for name, body in summary["drift"].items():
            table.add_row(
                name,
                f"{body['tolerance']:g} {body['unit']}",
                f"{body['episodes_within']}/{num_episodes}",
                *(f"{body[column]:.2g}" for column in ("p50", "p95", "max")),
            )
        low, high = summary["success_interval_95"]
        worst = "; ".join(
            f"episode {e.episode} ({name} {e.drift[name]:.3g} {self.unit} at step {e.drift_step[name]})"
            for e, name in self.worst_episodes()
        )
        table.caption = (
            f"mean score {summary['mean_score']:.4f}; success {summary['successes']} of {num_episodes} "
            f"(95 % interval {low:.1%} to {high:.1%})\nfurthest: {worst}"
        )
        return table


def replay_open_loop(
    buffer: RecordedEpisodes,
    env: RobotEnv,
    *,
    state_key: str,
    action_key: str,
    episodes: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> OpenLoopResult:
    """Starts each recorded episode at its first recorded state and plays its recorded actions to the end.

    Names in env.state_names that end in _x, _y, _z are positions (those of one body make one distance), names in _angle
    are angles (compared around the circle); the rest, such as velocities, is set at the start but not compared.

    Args:
        buffer: the recording.
        env: the environment whose get_state() should follow it.
        state_key: key of the recorded states (steps, len(env.state_names)); may select dimensions, `state[0:5]`.
        action_key: key of the recorded actions (steps, D_act), in the environment's units; may select dimensions.
        episodes: which to replay; None means all.
        progress: called with (episodes done, episodes in all) after each.
    Raises:
        ValueError: no episodes, an index or a key that the store does not have, or states or actions of another size
            than the environment's.
    """
    parts = _state_parts(env)
    state_selection, action_selection = KeySelection.parse(state_key), KeySelection.parse(action_key)
    chosen = list(range(buffer.num_episodes)) if episodes is None else [int(index) for index in episodes]
    if not chosen:
        raise ValueError("there is nothing to replay: the store, or the list of episodes, is empty")
    for index in chosen:
        if not 0 <= index < buffer.num_episodes:
            raise ValueError(f"episodes must be in [0, {buffer.num_episodes - 1}], got {index}")

    replayed = []
    for done, index in enumerate(chosen, start=1):
        arrays = buffer.episode(index, keys=tuple(dict.fromkeys((state_selection.key, action_selection.key))))
        states = _steps_by_dims(arrays, state_selection, "state_key")  # (steps, len(env.state_names))
        actions = _steps_by_dims(arrays, action_selection, "action_key")  # (steps, D_act)
        _check_sizes(env, index, states, actions, state_key, action_key)
        replayed.append(_replay_episode(env, index, states, actions, parts))
        if progress is not None:
            progress(done, len(chosen))
    return OpenLoopResult(tuple(replayed), env.action_units)


def _replay_episode(env: RobotEnv, index: int, states, actions, parts: dict[str, list[int]]) -> ReplayedEpisode:
    env.reset(seed=index, options={"state": states[0]})
    drift, drift_step = dict.fromkeys(parts, 0.0), dict.fromkeys(parts, 0)
    score, success = 0.0, False
    for step, action in enumerate(actions):
        _, reward, _, _, info = env.step(action)
        score, success = max(score, float(reward)), success or bool(info["is_success"])
        if step + 1 == len(states):
            break  # no recorded state follows the last action
        error = env.get_state() - states[step + 1]
        for name, dims in parts.items():
            distance = math.hypot(*error[dims])
            if _is_angle(name):
                distance = abs((distance + math.pi) % math.tau - math.pi)
            if distance > drift[name]:
                drift[name], drift_step[name] = distance, step + 1
    return ReplayedEpisode(index, len(actions), drift, drift_step, score, success)


def _is_angle(name: str) -> bool:
    return name.endswith("_angle")


def _state_parts(env: RobotEnv) -> dict[str, list[int]]:
    # body -> its dimensions in get_state(), and angle -> its one dimension
    parts: dict[str, list[int]] = {}
    for dim, name in enumerate(env.state_names):
        if _is_angle(name):
            parts[name] = [dim]
        elif name.endswith(("_x", "_y", "_z")):
            parts.setdefault(name[:-2], []).append(dim)
    if not parts:
        raise ValueError(
            f"{type(env).__name__}.state_names must hold positions (named ..._x, _y, _z) or angles (..._angle) "
            f"to compare, got {list(env.state_names)}"
        )
    return parts


def _steps_by_dims(arrays: Mapping[str, np.ndarray], selection: KeySelection, argument: str) -> np.ndarray:
    if selection.key not in arrays:
        raise unknown_name(argument, selection.key, arrays)
    values = np.asarray(arrays[selection.key], dtype=np.float64)
    values = values.reshape(len(values), -1)
    return values if selection.dims is None else values[:, selection.dims]


def _check_sizes(env: RobotEnv, index: int, states, actions, state_key: str, action_key: str):
    name, state_dim, action_dim = type(env).__name__, len(env.state_names), env.action_space.shape[0]
    if states.shape[1] != state_dim:
        raise ValueError(
            f"recorded {state_key!r} has {states.shape[1]} dims, {name} needs {state_dim} {list(env.state_names)}; "
            f"choose dims with state_key='{state_key}[...]' or another environment"
        )
    if actions.shape[1] != action_dim:
        raise ValueError(
            f"recorded {action_key!r} has {actions.shape[1]} dims, {name} takes {action_dim} {list(env.action_names)}"
        )
    if len(states) != len(actions):
        raise ValueError(f"episode {index} must have as many states as actions, got {len(states)} and {len(actions)}")
    for key, values in ((state_key, states), (action_key, actions)):
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            step, dim = bad[0].tolist()
            raise ValueError(
                f"episode {index}: {key}[{step}, {dim}] is {values[step, dim]}; replay others with episodes=..."
            )
