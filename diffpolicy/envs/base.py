"""What an environment promises: gymnasium's interface, role-named observations, a state one can set and compare."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from types import MappingProxyType

import gymnasium as gym
import numpy as np


class RobotEnv(gym.Env, abc.ABC):
    """A simulator behind one interface; knows nothing of policies.

    Observations are a dict of roles (spec.py): float32 vectors, and uint8 (H, W, 3) images when built with pixels=True.
    `step` returns a reward in [0, 1] (an episode's score is its largest), `terminated` on success, `truncated` after
    `max_steps`, and info["is_success"]. `reset(seed=...)` alone decides the episode; `reset(options={"state": vector})`
    starts from a recorded state. `render()` returns a uint8 (H, W, 3) picture and needs no display.
    """

    fps: float
    """Control rate in Hz."""
    max_steps: int
    """Steps after which an episode is truncated."""
    task: str = ""
    """The instruction in words; may change at reset."""
    action_names: tuple[str, ...] = ()
    action_units: str = ""
    observation_names: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    """role -> names of its numbers, in order; recorded with demonstrations. Images have none."""
    observation_units: Mapping[str, str] = MappingProxyType({})
    """role -> what its numbers are measured in."""
    state_names: tuple[str, ...] = ()
    """Names of the numbers in get_state(), in order."""

    @abc.abstractmethod
    def get_state(self) -> np.ndarray:
        """Everything that reset(options={"state": ...}) needs to start from here, shape (len(state_names),), float64."""

    @abc.abstractmethod
    def action_to_pixels(self, actions: np.ndarray) -> np.ndarray:
        """Where actions (..., D_act) lie in the picture of render(): (..., 2) columns and rows, in pixels."""
