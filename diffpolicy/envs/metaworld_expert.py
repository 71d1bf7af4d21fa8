"""Meta-World's scripted policies as demonstrators, with a hand that shakes a little if asked to."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from diffpolicy.envs.metaworld import MetaworldEnv
from diffpolicy.envs.metaworld_scene import load_metaworld


@dataclass(frozen=True, kw_only=True)
class MetaworldDemonstratorConfig:
    noise: float = 0.0
    """Standard deviation of the hand's shake, in units of an action (cm per step); the fingers do not shake."""
    noise_memory: float = 0.9
    """Correlation of the shake from one step to the next."""

    def __post_init__(self):
        if not self.noise >= 0:
            raise ValueError(f"demonstrator.noise must be at least 0, got {self.noise}")
        if not 0 <= self.noise_memory < 1:
            raise ValueError(f"demonstrator.noise_memory must be in [0, 1), got {self.noise_memory}")


class MetaworldDemonstrator:
    """Solves the task of the scene, whatever is asked: do not collect with swap=True.

    Closed loop: every action follows from what is seen now and from the shake, so that a shake is corrected.
    """

    def __init__(self, config: MetaworldDemonstratorConfig | None = None):
        self.config = config or MetaworldDemonstratorConfig()

    def reset(self, env: MetaworldEnv, rng: np.random.Generator) -> None:
        """Begins an episode; `rng` decides the shake."""
        if env.goal not in env.scene_goals:
            raise ValueError(f"the scene of {env.scene_goals[0]!r} cannot show {env.goal!r}; collect without swap")
        self._rng = rng
        self._shake = np.zeros(3)
        self._script = load_metaworld().experts[f"{env.scene.task}-v3"]()

    def act(self, env: MetaworldEnv) -> np.ndarray:
        """The next action, (4,), in [-1, 1]."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "Constant(s) may be too high": we clip as the simulator does
            action = np.asarray(self._script.get_action(env.scene.observation), dtype=np.float64)
        memory = self.config.noise_memory
        self._shake = memory * self._shake + self.config.noise * np.sqrt(1 - memory**2) * self._rng.standard_normal(3)
        action[:3] = np.clip(action[:3], -1, 1) + self._shake
        return np.clip(action, -1, 1).astype(np.float32)
