"""What an environment promises: gymnasium's interface, role-named observations, a state one can set and compare."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Wordings:
    """Sentences that all ask for the same goal."""

    seen: tuple[str, ...]
    """Those that demonstrations use; the first is the goal's name."""
    unseen: tuple[str, ...] = ()
    """Those that no demonstration uses: what the paraphrase probe says."""


class LanguageEnv(RobotEnv):
    """An environment that is told in words which of several goals is meant, and that judges all of them at once.

    A goal goes by its name, the first wording of it. `reset(seed=...)` alone decides scene, goal and wording, in this order
    and from streams of their own: two environments whose options differ only in what is asked, or in how, show the same
    scene for the same seed. `env.task` holds the words, `env.goal` the name of what they ask for.

    The options of such an environment, with these names and meanings, are what the instruction probes turn:
        goal: str = ""           always ask for this goal; "" draws one of those that `goals` allows
        goals: str = "train"     draw among `train` (all but held_out), `held_out`, or `all`
        wordings: str = "seen"   draw among the `seen` wordings, the `unseen` ones, or always say the `first` (the name)
        swap: bool = False       ask for another goal than the one that the same seed asks without swap, in the same scene,
                                 one that this scene allows and that is not fulfilled at the start

    Reward, `terminated` and info["is_success"] are those of the goal that the words ask for. In addition, info of `reset` and `step` holds
        goal_rewards    dict: name of each goal that this scene allows -> its reward in [0, 1] now
        goals_reached   tuple: the names of those that are fulfilled now
    """

    wordings: Mapping[str, Wordings]
    """Every goal that this environment knows: name -> wordings."""
    held_out: tuple[str, ...] = ()
    """Goals that demonstrations never show, each made of parts (a colour, a direction) that others do show."""
    goal: str = ""
    """Name of the goal that is asked now; set by reset."""
    scene_goals: tuple[str, ...] = ()
    """Names of the goals that could be asked in this scene; set by reset."""
