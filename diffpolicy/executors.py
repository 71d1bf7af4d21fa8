"""Chunk -> one action per control step. Executors own time; policies hold no state between calls.

An executor is asked `plan(obs, generators)` whenever an environment has played all that was promised, and answers with the
actions to play before it looks again. To add one: a class here and its line in EXECUTORS.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from diffpolicy.encoders.parts import part_of
from diffpolicy.policies import DiffusionPolicy
from diffpolicy.spec import TASK, Observation


class RecedingHorizon:
    """Plays chunk[past : past + T_act], then looks again. Chi et al. 2023, arXiv:2303.04137, section 4.1.

    Args:
        batch_size: rows of one policy call; fewer observations are padded by repetition. A matrix product may round
            a row differently when the batch has another size, and contact dynamics amplify that: with a fixed size the
            result of an episode does not depend on how many environments run beside it. None calls with what there is.
    """

    def __init__(self, policy: DiffusionPolicy, *, batch_size: int | None = None):
        self.policy = policy
        self.batch_size = batch_size
        self.observation_keys = policy.spec.input_keys
        self.reset()

    def reset(self) -> None:
        """Forgets the history and the promised actions of `select_action`; call it when an episode begins."""
        self._history: deque[dict[str, np.ndarray | str]] = deque(maxlen=self.policy.horizons.obs)
        self._promised: deque[np.ndarray] = deque()

    def plan(
        self, obs: dict[str, np.ndarray | list[str]], generators: Sequence[torch.Generator] | None = None
    ) -> np.ndarray:
        """Actions to play before the next look.

        Args:
            obs: role -> (B, T_obs, ...) arrays in physical units, (B, 1, ...) for what is wanted; `task` -> B strings.
            generators: one for each of the B environments.
        Returns:
            (B, T_act, D_act) float64, physical units.
        Raises:
            ValueError: an observation is missing, or has another shape than the policy was trained on.
        """
        self._looked_at(obs)
        batch = len(next(iter(obs.values())))
        size = self.batch_size or batch
        parts = [self._plan_rows(obs, generators, lo, min(lo + size, batch), size) for lo in range(0, batch, size)]
        return np.concatenate(parts)

    def _looked_at(self, obs: dict) -> list[str]:
        """Roles of an observation that the policy looks at; ValueError where one is missing that it needs."""
        missing = [k for k in self.observation_keys if k not in obs and part_of(k) not in self.policy.droppable]
        if missing:
            raise ValueError(f"the policy needs {missing}; the observation holds {sorted(obs)}")
        return [k for k in self.observation_keys if k in obs]

    def tensors(self, obs: dict[str, np.ndarray | list[str]], rows: np.ndarray) -> Observation:
        """Some rows of an observation, as `policy.encode` takes them: on its device, only what it looks at."""
        ready: Observation = {k: torch.from_numpy(obs[k][rows]).to(self.policy.device) for k in self._looked_at(obs)}
        ready = {k: v.float() if k in self.policy.spec.state_keys else v for k, v in ready.items()}
        if TASK in obs:
            ready[TASK] = [obs[TASK][i] for i in rows]
        return ready

    def _plan_rows(self, obs, generators, lo: int, hi: int, size: int) -> np.ndarray:
        ready = self.tensors(obs, np.minimum(np.arange(lo, lo + size), hi - 1))  # the last row fills up
        row_generators = None
        if generators is not None:
            # padding rows draw from generators of their own, so that no environment's stream advances twice
            row_generators = [generators[i] for i in range(lo, hi)]
            row_generators += [torch.Generator().manual_seed(0) for _ in range(size - (hi - lo))]
        chunk = self.policy.sample_actions(ready, generators=row_generators)  # (size, T_pred, D_act)
        return chunk[: hi - lo, self.policy.horizons.executed].cpu().double().numpy()

    def select_action(self, obs: dict[str, np.ndarray | str], generator: torch.Generator | None = None) -> np.ndarray:
        """The next action (D_act,) for one robot, physical units: the call inside a control loop.

        Args:
            obs: role -> one frame (...), the newest; the history is kept here. A role that one of the T_obs frames lacks is
                missing, as in plan.
        """
        self._history.append(obs)
        if not self._promised:
            frames = list(self._history)
            frames = [frames[0]] * (self.policy.horizons.obs - len(frames)) + frames
            goals = self.policy.spec.goal_keys
            # a camera that was blind in one of the frames is a missing camera
            seen = {k: obs[k] for k in obs if k in goals or all(k in frame for frame in frames)}
            kept = {k: frames[-1:] if k in goals else frames for k in self._looked_at(seen)}
            stacked = {k: np.stack([f[k] for f in frames])[None] for k, frames in kept.items()}
            if TASK in obs:
                stacked[TASK] = [obs[TASK]]
            self._promised.extend(self.plan(stacked, None if generator is None else [generator])[0])
        return self._promised.popleft()


EXECUTORS = {
    "receding_horizon": RecedingHorizon,
}

__all__ = ["EXECUTORS", "RecedingHorizon"]
