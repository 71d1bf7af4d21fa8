"""Many environments side by side, in this process or in workers; an environment plays several actions between two looks.

Only what a policy will see travels between processes: the last T_obs frames after the last action played.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import traceback
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from diffpolicy.envs import make_env
from diffpolicy.envs.base import LanguageEnv
from diffpolicy.spec import GOAL_IMAGE, TASK


@dataclass
class Played:
    """What is known after some actions of one episode."""

    obs: dict[str, np.ndarray | str]
    """role -> (T_obs, ...), the newest frame last; `goal.image` -> (1, H, W, 3); `task` -> the instruction."""
    steps: int = 0
    score: float = 0.0
    """Largest reward so far, in [0, 1]."""
    success: bool = False
    goal: str = ""
    """Name of the goal that the words of a LanguageEnv ask for; empty elsewhere, as the next two."""
    goal_scores: dict[str, float] = field(default_factory=dict)
    """Goal that could be asked in this scene -> its largest reward so far; without those fulfilled from the start."""
    goals_reached: tuple[str, ...] = ()
    """Goals that were fulfilled at some step, in this order; without those that were so from the start."""
    done: bool = False
    frames: list[np.ndarray] = field(default_factory=list)
    """Once done: pictures of the episode where they were asked for, else only the last if `picture` was."""


class EpisodePlayer:
    """One environment with the history that a policy looks at."""

    def __init__(self, name: str, choices: dict, obs_horizon: int):
        self.env = make_env(name, **choices)
        self._history: deque[dict[str, np.ndarray]] = deque(maxlen=obs_horizon)
        self._judges_goals = isinstance(self.env, LanguageEnv)

    def start(self, seed: int, film: bool, picture: bool) -> Played:
        obs, info = self.env.reset(seed=seed)
        # before the first step the first frame is repeated, as in training windows
        self._history.extend([obs] * self._history.maxlen)
        self._film, self._picture = film, picture
        self._played = Played(obs=self._look())
        if self._judges_goals:
            self._played.goal = self.env.goal
            self._at_start = self._kept = info.get("goals_reached")
        if film:
            self._played.frames.append(self.env.render())
        return self._answer()

    def play(self, actions: np.ndarray) -> Played:
        """Plays actions (n, D_act) until they or the episode end."""
        played = self._played
        for action in actions:
            obs, reward, terminated, truncated, info = self.env.step(action)
            self._history.append(obs)
            played.steps += 1
            played.score = max(played.score, float(reward))
            played.success = played.success or bool(info["is_success"])
            if self._judges_goals:
                self._judge(info)
            if self._film:
                played.frames.append(self.env.render())
            if terminated or truncated:
                played.done = True
                break
        if played.done and self._picture and not self._film:
            played.frames.append(self.env.render())
        played.obs = self._look()
        return self._answer()

    def _judge(self, info: dict) -> None:
        """Notes how far each goal of the scene is, and which were fulfilled by what was done.

        A goal fulfilled from the start (a block that lies left of another anyway) says nothing of the policy: its reward
        is left out, and it counts as reached only when it was undone and is fulfilled again. The asked one always counts,
        unless this scene does not even allow it: then it has no score.
        """
        played, reached = self._played, info["goals_reached"]
        if self._at_start is None:  # reset said nothing of goals: the first step tells
            self._at_start = self._kept = reached
        self._kept = [name for name in self._kept if name in reached and name != played.goal]
        possible = self.env.scene_goals or info["goal_rewards"]
        for name, reward in info["goal_rewards"].items():
            if name in possible and (name == played.goal or name not in self._at_start):
                played.goal_scores[name] = max(played.goal_scores.get(name, 0.0), float(reward))
        new = [name for name in reached if name not in self._kept and name not in played.goals_reached]
        played.goals_reached = (*played.goals_reached, *new)

    def _answer(self) -> Played:
        """What is known now, apart from what comes later; pictures travel once, when the episode is over."""
        return dataclasses.replace(self._played, frames=self._played.frames if self._played.done else [])

    def _look(self) -> dict[str, np.ndarray | str]:
        newest = self._history[-1]
        looked: dict = {k: np.stack([frame[k] for frame in self._history]) for k in newest if k != GOAL_IMAGE}
        if GOAL_IMAGE in newest:  # what is wanted has one frame, not T_obs
            looked[GOAL_IMAGE] = newest[GOAL_IMAGE][None]
        looked[TASK] = self.env.task
        return looked


class LocalPlayers:
    """All environments in this process: best where a step is cheap."""

    def __init__(self, name: str, choices: dict, obs_horizon: int, num_envs: int):
        self._players = [EpisodePlayer(name, choices, obs_horizon) for _ in range(num_envs)]

    def call(self, method: str, arguments: dict[int, tuple]) -> dict[int, Played]:
        """Calls `start` or `play` on the environments slot -> arguments."""
        return {slot: getattr(self._players[slot], method)(*args) for slot, args in arguments.items()}

    def close(self) -> None:
        for player in self._players:
            player.env.close()


DIED = "an environment worker died; run again with --workers 0 to see why"


class ProcessPlayers:
    """Environments dealt out to worker processes: best where a step is dear, as with pixels."""

    def __init__(self, name: str, choices: dict, obs_horizon: int, num_envs: int, num_workers: int):
        context = multiprocessing.get_context("spawn")  # never fork a process that runs threads
        self._slots = [list(range(w, num_envs, num_workers)) for w in range(num_workers)]
        self._pipes, self._processes = [], []
        for slots in self._slots:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, name, choices, obs_horizon, slots), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def call(self, method: str, arguments: dict[int, tuple]) -> dict[int, Played]:
        """Calls `start` or `play` on the environments slot -> arguments; workers run at the same time.

        Raises:
            RuntimeError: a worker failed or died, with its traceback.
        """
        asked = []
        for pipe, slots in zip(self._pipes, self._slots, strict=True):
            mine = {slot: arguments[slot] for slot in slots if slot in arguments}
            if mine:
                try:
                    pipe.send((method, mine))
                except OSError:
                    raise RuntimeError(DIED) from None
                asked.append(pipe)
        result: dict[int, Played] = {}
        for pipe in asked:
            try:
                answer = pipe.recv()
            except (EOFError, OSError):
                raise RuntimeError(DIED) from None
            if isinstance(answer, str):
                raise RuntimeError(f"an environment worker failed:\n{answer}")
            result.update(answer)
        return result

    def close(self) -> None:
        for pipe in self._pipes:
            try:
                pipe.send(None)
            except OSError:  # the worker is gone already
                pass
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.terminate()


def _serve(pipe, name: str, choices: dict, obs_horizon: int, slots: list[int]) -> None:
    """A worker: plays what it is told until it is told nothing."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    try:
        players = {slot: EpisodePlayer(name, choices, obs_horizon) for slot in slots}
        while (message := pipe.recv()) is not None:
            method, arguments = message
            pipe.send({slot: getattr(players[slot], method)(*args) for slot, args in arguments.items()})
    except EOFError:
        pass  # the parent is gone
    except Exception:
        pipe.send(traceback.format_exc())
