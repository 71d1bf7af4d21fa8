"""Runs an executor in an environment over seeds -> RolloutResult: per-episode results, honest statistics, pictures."""

from __future__ import annotations

import dataclasses
import json
import os
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from diffpolicy import plots
from diffpolicy.encoders.parts import GOAL_PART, part_of
from diffpolicy.envs import make_env
from diffpolicy.envs.players import LocalPlayers, Played, ProcessPlayers
from diffpolicy.executors import RecedingHorizon
from diffpolicy.metrics import bootstrap_interval, percentiles, wilson_interval
from diffpolicy.spec import ACTION, TASK, DataSpec

Change = Callable[[dict, Sequence[int]], dict]
"""Observations role -> (B, T_obs, ...) (`task` -> B strings) and the B episodes' seeds -> observations for the policy."""


@dataclass(frozen=True)
class Episode:
    seed: int
    """Seed of the environment: decides the start state."""
    score: float
    """Largest reward of the episode, in [0, 1]."""
    success: bool
    steps: int
    task: str
    """The instruction in words, as the policy got it."""
    chunk_latency_ms: float
    """Mean wall time of the policy calls that this episode took part in, milliseconds (the call serves a whole batch)."""
    goal: str = ""
    """Name of the goal that the words ask for; only where the environment judges several goals, as the next two."""
    goal_scores: dict[str, float] = field(default_factory=dict)
    """Goal of the scene -> its largest reward, in [0, 1]; without goals that were fulfilled from the start."""
    goals_reached: tuple[str, ...] = ()
    """Goals that were fulfilled at some step, in this order; without those that were so from the start."""

    @property
    def other_goals_reached(self) -> tuple[str, ...]:
        """Goals that were fulfilled though the words did not name them."""
        return tuple(name for name in self.goals_reached if name != self.goal)

    @property
    def best_other_score(self) -> float | None:
        """Largest reward at any goal that the words did not name; None where the scene has no other."""
        return max((score for name, score in self.goal_scores.items() if name != self.goal), default=None)

    def to_dict(self) -> dict:
        """Plain data; of goals only where there are some."""
        plain = dataclasses.asdict(self)
        if not self.goal:
            del plain["goal"], plain["goal_scores"], plain["goals_reached"]
        return plain


@dataclass
class RolloutResult:
    episodes: list[Episode]
    """In the order of their seeds."""
    call_ms: list[float]
    """Wall time of every policy call: encode, sample, unnormalise; the whole batch, first call left out."""
    batch_size: int
    """Rows of one policy call."""
    seconds: float
    """Wall time of the whole rollout."""
    planned: int
    """Episodes that were asked for; more than len(episodes) when the rollout was interrupted."""
    films: dict[int, list[np.ndarray]] = field(default_factory=dict)
    """seed -> frames (H, W, 3) uint8 of the filmed episodes."""
    pictures: dict[int, np.ndarray] = field(default_factory=dict)
    """seed -> last frame."""

    def summary(self) -> dict:
        """Rates with 95 % intervals (Wilson for success, bootstrap for the mean score), steps and latency percentiles."""
        successes = sum(e.success for e in self.episodes)
        scores = np.array([e.score for e in self.episodes])
        num_steps = sum(e.steps for e in self.episodes)
        goals = {"goals": goal_summary(self.episodes)} if all(e.goal for e in self.episodes) else {}
        return {
            "episodes": len(self.episodes),
            "episodes_planned": self.planned,
            "success_rate": successes / len(self.episodes),
            "success_interval_95": list(wilson_interval(successes, len(self.episodes))),
            "mean_score": float(scores.mean()),
            "mean_score_interval_95": list(bootstrap_interval(scores)),
            **goals,
            "mean_steps": num_steps / len(self.episodes),
            "call_latency_ms": percentiles(np.array(self.call_ms)) if self.call_ms else None,
            "call_batch_size": self.batch_size,
            "env_steps_per_second": num_steps / self.seconds,
            "seconds": self.seconds,
        }

    def to_dict(self) -> dict:
        """Plain data for results.json."""
        return {"summary": self.summary(), "episodes": [e.to_dict() for e in self.episodes]}


def goal_summary(episodes: Sequence[Episode]) -> dict:
    """Whether episodes with words did what the words said (that is their success) or something else.

    Returns:
        ignores: how many of them fulfilled a goal that was not named: {count, trials, rate, interval_95}, Wilson's.
        followed_share: of those that fulfilled any goal, how many fulfilled the one that was named and no other; likewise,
            rate and interval None where none fulfilled any.
        other_score: mean over episodes of the best score at a goal that was not named; None where no scene has one.
    """
    some = [e for e in episodes if e.goals_reached]
    others = [score for e in episodes if (score := e.best_other_score) is not None]
    return {
        "ignores": counted(sum(bool(e.other_goals_reached) for e in episodes), len(episodes)),
        "followed_share": counted(sum(e.goals_reached == (e.goal,) for e in some), len(some)),
        "other_score": float(np.mean(others)) if others else None,
    }


def counted(count: int, trials: int) -> dict:
    """A rate as plain data, with its Wilson interval; of no trials nothing is known."""
    interval = list(wilson_interval(count, trials)) if trials else None
    return {"count": count, "trials": trials, "rate": count / trials if trials else None, "interval_95": interval}


def episode_generator(sampling_seed: int, episode_seed: int) -> torch.Generator:
    """The noise of one episode: depends on both seeds and on nothing else."""
    state = np.random.SeedSequence([sampling_seed, episode_seed]).generate_state(2, dtype=np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


def check_fit(spec: DataSpec, env_name: str, env_choices: dict, droppable: Collection[str] = ()) -> None:
    """Compares what the policy was trained on with what the environment gives.

    Args:
        droppable: parts that the policy can do without (policy.droppable); that they are missing is only said aloud.
    Raises:
        ValueError: a missing observation or another shape, naming both.
    """
    env = make_env(env_name, **env_choices)
    try:
        obs, _ = env.reset(seed=0)
        for key, wanted in spec.fields.items():
            if key == ACTION:
                got = tuple(env.action_space.shape)
            elif key not in obs and part_of(key) in droppable:
                warnings.warn(f"environment {env_name!r} gives no {key}; the policy plays without it", stacklevel=2)
                continue
            elif key not in obs:
                raise ValueError(f"the checkpoint needs {key}; environment {env_name!r} gives {sorted(obs)}")
            else:
                got = tuple(obs[key].shape)
            if got != wanted.shape:
                raise ValueError(f"{key}: the checkpoint has shape {wanted.shape}, environment {env_name!r} has {got}")
        if spec.fps is not None and abs(spec.fps - env.fps) > 1e-6:
            warnings.warn(
                f"the policy was trained at {spec.fps:g} Hz, environment {env_name!r} runs at {env.fps:g} Hz",
                stacklevel=2,
            )
    finally:
        env.close()


def rollout(
    executor: RecedingHorizon,
    env_name: str,
    env_choices: dict | None = None,
    *,
    seeds: Sequence[int],
    num_envs: int = 16,
    num_workers: int | None = None,
    sampling_seed: int = 0,
    num_films: int = 0,
    num_pictures: int = 0,
    on_episode: Callable[[Episode], None] | None = None,
    change: Change | None = None,
) -> RolloutResult:
    """Plays one episode per seed, many side by side with one batched policy call.

    An episode depends on its seed and sampling_seed alone: not on num_envs, num_workers or its neighbours
    (given an executor with a fixed batch_size).

    Args:
        num_workers: processes that step the environments; 0 steps them here; None picks: processes for pixels only.
        num_films: the first so many seeds are filmed frame by frame.
        num_pictures: of the first so many seeds the last frame is kept.
        on_episode: called at the end of each episode, for progress.
        change: what the policy gets in place of what the environment gives; the scene stays as it is.
    Raises:
        ValueError: no seeds, or an environment that does not fit the policy.
    """
    policy = executor.policy
    env_choices = dict(env_choices or {})
    if policy.spec.image_keys:
        env_choices.setdefault("pixels", True)
    if policy.spec.goal_keys and GOAL_PART not in policy.droppable:
        env_choices.setdefault("goal_image", True)
    if not len(seeds):
        raise ValueError("a rollout needs at least one seed (--episodes must be at least 1)")
    if len(set(seeds)) != len(seeds):
        raise ValueError("seeds repeat; every episode needs a seed of its own")
    check_fit(policy.spec, env_name, env_choices, policy.droppable)
    num_envs = min(num_envs, len(seeds))
    if num_workers is None:
        num_workers = min(os.cpu_count() or 1, num_envs) if policy.spec.image_keys and num_envs > 1 else 0
    obs_horizon = policy.horizons.obs
    if num_workers > 0:
        players = ProcessPlayers(env_name, env_choices, obs_horizon, num_envs, min(num_workers, num_envs))
    else:
        players = LocalPlayers(env_name, env_choices, obs_horizon, num_envs)
    policy.eval()
    began = time.perf_counter()
    result = RolloutResult([], [], executor.batch_size or num_envs, 0.0, len(seeds))
    waiting = list(reversed(list(enumerate(seeds))))
    current: dict[int, tuple[int, int, torch.Generator, list[float]]] = {}  # slot -> index, seed, noise, latencies
    looks: dict[int, Played] = {}

    def fill(free: list[int]) -> None:
        starts = {}
        for slot in free:
            if waiting:
                index, seed = waiting.pop()
                current[slot] = (index, seed, episode_generator(sampling_seed, seed), [])
                starts[slot] = (seed, index < num_films, index < num_pictures)
        looks.update(players.call("start", starts))

    try:
        fill(list(range(num_envs)))
        began = time.perf_counter()  # the start of worker processes is not counted
        first_call = True
        while current:
            slots = sorted(current)
            obs = {key: [looks[s].obs[key] for s in slots] for key in looks[slots[0]].obs}
            obs = {key: np.stack(v) if isinstance(v[0], np.ndarray) else v for key, v in obs.items()}
            if change:
                obs = change(obs, [current[s][1] for s in slots])
            words = dict(zip(slots, obs[TASK], strict=True))
            called = time.perf_counter()
            actions = executor.plan(obs, [current[s][2] for s in slots])
            elapsed_ms = (time.perf_counter() - called) * 1e3
            if not first_call:  # the first call warms up kernels
                result.call_ms.append(elapsed_ms)
            first_call = False
            for slot, played in players.call("play", {s: (a,) for s, a in zip(slots, actions, strict=True)}).items():
                looks[slot] = played
                current[slot][3].append(elapsed_ms)
                if played.done:
                    index, seed, _, latencies = current.pop(slot)
                    episode = Episode(
                        seed,
                        played.score,
                        played.success,
                        played.steps,
                        words[slot],
                        float(np.mean(latencies)),
                        played.goal,
                        dict(played.goal_scores),
                        played.goals_reached,
                    )
                    result.episodes.append(episode)
                    if index < num_films:
                        result.films[seed] = played.frames
                    if index < num_pictures:
                        result.pictures[seed] = played.frames[-1]
                    if on_episode:
                        on_episode(episode)
            fill([s for s in slots if s not in current])
    except KeyboardInterrupt:
        if not result.episodes:
            raise
        warnings.warn(
            f"interrupted: {len(result.episodes)} of {len(seeds)} episodes are in the result; short ones end first, so its "
            "rates are biased",
            stacklevel=2,
        )
    finally:
        players.close()
    result.seconds = time.perf_counter() - began
    order = {seed: i for i, seed in enumerate(seeds)}
    result.episodes.sort(key=lambda e: order[e.seed])
    return result


def measure_latency(
    executor: RecedingHorizon, env_name: str, env_choices: dict | None = None, num_calls: int = 30
) -> dict:
    """Wall time of a policy call for one observation, what a robot would wait for: percentiles in milliseconds."""
    policy = executor.policy
    choices = dict(env_choices or {}) | ({"pixels": True} if policy.spec.image_keys else {})
    choices |= {"goal_image": True} if policy.spec.goal_keys and GOAL_PART not in policy.droppable else {}
    player = LocalPlayers(env_name, choices, policy.horizons.obs, 1)
    look = player.call("start", {0: (0, False, False)})[0].obs
    player.close()
    obs = {k: v[None] if isinstance(v, np.ndarray) else [v] for k, v in look.items()}
    alone = type(executor)(policy)
    times = []
    for i in range(num_calls + 3):
        began = time.perf_counter()
        alone.plan(obs, [torch.Generator().manual_seed(i)])
        times.append((time.perf_counter() - began) * 1e3)
    return percentiles(np.array(times[3:]))


def write_rollout(result: RolloutResult, out: Path, described: dict, *, fps: float) -> Path:
    """Writes results.json, videos/seed_*.mp4 and contact_sheet.png into the folder `out`.

    Args:
        described: how the rollout came about (checkpoint, environment, sampler, command), stored with the results.
    """
    out.mkdir(parents=True, exist_ok=True)
    partial = out / ".results.json.partial"
    partial.write_text(json.dumps({**described, **result.to_dict()}, indent=2))
    partial.replace(out / "results.json")
    by_seed = {episode.seed: episode for episode in result.episodes}
    for seed, frames in result.films.items():
        plots.write_film(out / "videos" / f"seed_{seed}.mp4", frames, fps)
    shown = [seed for seed in by_seed if seed in result.pictures]
    if shown:
        sheet = plots.contact_sheet(
            [result.pictures[s] for s in shown],
            [f"{s}  {by_seed[s].score:.2f}" for s in shown],
            [by_seed[s].success for s in shown],
        )
        plots.write_png(out / "contact_sheet.png", sheet)
    return out
