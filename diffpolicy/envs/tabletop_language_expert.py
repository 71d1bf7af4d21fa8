"""A scripted demonstrator of the tabletop that is told what to do."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from diffpolicy.envs.table_world import TABLE
from diffpolicy.envs.tabletop_expert import heading_past
from diffpolicy.envs.tabletop_language import CLEARANCE, TabletopLanguageEnv

BEHIND = CLEARANCE + 2
"""Where a push begins: this far from the block's centre, on the side away from where it belongs, px."""


@dataclass(frozen=True, kw_only=True)
class TabletopLanguageDemonstratorConfig:
    approach_lead: float = 60.0
    """px by which the target runs ahead of the pusher on free ground; sets its speed."""
    push_lead: float = 50.0
    """The same while pushing."""
    speed_spread: float = 0.05
    """Standard deviation of an episode's pace, as a fraction."""
    noise: float = 6.0
    """Standard deviation of the hand's wander, px."""
    noise_memory: float = 0.6
    """Correlation of the wander from one step to the next."""
    coin_angle: float = 35.0
    """Degrees: a pusher that begins in front of the block, so far from straight at most, goes round it on either side."""


class TabletopLanguageDemonstrator:
    """Gets behind the asked block and pushes it straight to where it belongs; other blocks are left where they are.

    Closed loop: every action follows from what is seen now and what is asked; remembered are the side on which a block is
    passed that lies in the way, the pace, the hand's wander, and whether it is pushing. The side is the toss of a coin
    where both are about as long, else the shorter one.
    """

    def __init__(self, config: TabletopLanguageDemonstratorConfig | None = None):
        self.config = config or TabletopLanguageDemonstratorConfig()

    def reset(self, env: TabletopLanguageEnv, rng: np.random.Generator) -> None:
        """Begins an episode; `rng` decides the side, the pace and the wander of the hand."""
        self._rng = rng
        self._pace = float(np.clip(1.0 + self.config.speed_spread * rng.standard_normal(), 0.8, 1.2))
        self._wander = np.zeros(2)
        self._pushing = False
        forward, from_block = self._forward(env), env.pusher_xy - env.block_xy[env.asked_block]
        ahead = math.degrees(math.acos(np.clip(forward @ from_block / np.linalg.norm(from_block), -1.0, 1.0)))
        coin = -1.0 if rng.random() < 0.5 else 1.0
        self.turn = coin if ahead < self.config.coin_angle else 0.0
        """-1 and 1: the asked block is passed on its left or right, as seen by the pusher; 0: on the shorter side."""

    def act(self, env: TabletopLanguageEnv) -> np.ndarray:
        """The next target of the pusher, shape (2,), px."""
        pusher, block, forward = env.pusher_xy, env.block_xy[env.asked_block], self._forward(env)
        sideways = np.array([-forward[1], forward[0]])
        along, aside = (pusher - block) @ forward, (pusher - block) @ sideways  # px; along < 0 is behind the block
        near = -BEHIND - 16 < along < -16
        self._pushing = near and abs(aside) < (24.0 if self._pushing else 14.0)
        if self._pushing:
            self.turn = 0.0
            target = pusher + self._pace * self.config.push_lead * forward - 0.3 * aside * sideways
        else:
            target = pusher + self._free_motion(env, pusher, block - BEHIND * forward)
        memory = self.config.noise_memory
        self._wander = memory * self._wander + math.sqrt(1 - memory**2) * self._rng.standard_normal(2)
        return np.clip(target + self.config.noise * self._wander, 0.0, TABLE).astype(np.float32)

    def _forward(self, env: TabletopLanguageEnv) -> np.ndarray:
        """Unit vector from the asked block to where it belongs."""
        way = env.asked_target - env.block_xy[env.asked_block]
        return way / max(float(np.linalg.norm(way)), 1e-6)

    def _free_motion(self, env: TabletopLanguageEnv, pusher: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """The step (2,), px, towards `goal` that keeps clear of every block."""
        asked = env.asked_block
        others = [i for i in range(len(env.block_xy)) if i != asked]
        discs = [(env.block_xy[i], CLEARANCE) for i in (asked, *others)]
        lead = min(self._pace * self.config.approach_lead, max(2.0 * float(np.linalg.norm(goal - pusher)), 20.0))
        return lead * heading_past(pusher, goal, discs, post_turn=self.turn)
