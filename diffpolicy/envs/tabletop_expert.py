"""A scripted demonstrator of the tabletop that moves somewhat like a person with a joystick."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from diffpolicy.envs.tabletop import BLOCK_HALF, POST_RADIUS, PUSHER_RADIUS, TABLE, TabletopEnv

BLOCK_CLEARANCE = BLOCK_HALF * math.sqrt(2) + PUSHER_RADIUS + 4
"""Distance from a block's centre at which the pusher passes it freely at any angle, px."""
POST_CLEARANCE = POST_RADIUS + PUSHER_RADIUS + 4
BEHIND = BLOCK_CLEARANCE + 4
"""Where a push begins: this far from the block's centre, on the side away from the zone, px."""


@dataclass(frozen=True, kw_only=True)
class TabletopDemonstratorConfig:
    approach_lead: float = 30.0
    """px by which the target runs ahead of the pusher on free ground; sets its speed."""
    push_lead: float = 26.0
    """The same while pushing."""
    speed_spread: float = 0.1
    """Standard deviation of an episode's pace, as a fraction."""
    noise: float = 4.0
    """Standard deviation of the hand's wander on free ground, px."""
    push_noise: float = 2.5
    """The same while pushing: it shows how a block that drifts aside is brought back."""
    noise_memory: float = 0.85
    """Correlation of the wander from one step to the next."""
    detour: tuple[float, float] = (10.0, 35.0)
    """How far beyond the nearest possible way a person passes the post, least and most, px."""


class TabletopDemonstrator:
    """Passes the post left or right by the toss of a coin, gets behind the asked block, pushes it to the asked zone.

    Closed loop: every action follows from what is seen now; remembered are the side, the pace, the hand's wander, and
    whether it is pushing.
    """

    def __init__(self, config: TabletopDemonstratorConfig | None = None):
        self.config = config or TabletopDemonstratorConfig()

    def reset(self, env: TabletopEnv, rng: np.random.Generator) -> None:
        """Begins an episode; `rng` decides the side, the pace and the wander of the hand."""
        self._rng = rng
        self.side = "left" if rng.random() < 0.5 else "right"
        self._pace = float(np.clip(1.0 + self.config.speed_spread * rng.standard_normal(), 0.7, 1.3))
        self._detour = rng.uniform(*self.config.detour)
        self._wander = np.zeros(2)
        self._pushing = False

    def act(self, env: TabletopEnv) -> np.ndarray:
        """The next target of the pusher, shape (2,), px."""
        pusher, block, zone = env.pusher_xy, env.block_xy[env.asked_block], env.zone_xy[env.asked_zone]
        forward = (zone - block) / np.linalg.norm(zone - block)
        sideways = np.array([-forward[1], forward[0]])
        along, aside = (pusher - block) @ forward, (pusher - block) @ sideways  # px; along < 0 is behind the block

        # A push begins close to the line from block to zone and goes on until the pusher slips off a corner.
        near = -BEHIND - 12 < along < -BLOCK_HALF / 2
        self._pushing = near and abs(aside) < (20.0 if self._pushing else 9.0)
        if self._pushing:
            lead, noise = self.config.push_lead, self.config.push_noise
            # The block sticks to the pusher, so it is steered by where the pusher goes; a strong pull back to the line
            # would drag it along, away from the zone.
            target = pusher + self._pace * lead * forward - 0.3 * aside * sideways
        else:
            lead, noise = self.config.approach_lead, self.config.noise
            target = pusher + self._free_motion(env, pusher, block - BEHIND * forward, lead * self._pace)

        memory = self.config.noise_memory
        fresh = math.sqrt(1 - memory**2) * self._rng.standard_normal(2)
        self._wander = memory * self._wander + fresh
        return np.clip(target + noise * self._wander, 0.0, TABLE).astype(np.float32)

    def _free_motion(self, env: TabletopEnv, pusher: np.ndarray, goal: np.ndarray, lead: float) -> np.ndarray:
        """The step (2,), px, towards `goal` that keeps clear of the post and of every block."""
        discs = [(env.post_xy, POST_CLEARANCE), *((xy, BLOCK_CLEARANCE) for xy in env.block_xy)]
        if pusher[1] > env.post_xy[1]:  # still below the post: first to the chosen side of it
            sign = -1.0 if self.side == "left" else 1.0
            goal = env.post_xy + np.array([sign * (POST_CLEARANCE + self._detour), -10.0])
            return lead * heading_past(pusher, goal, discs, post_turn=sign)
        distance = np.linalg.norm(goal - pusher)
        return min(lead, max(distance, 10.0)) * heading_past(pusher, goal, discs)


def heading_past(
    position: np.ndarray, goal: np.ndarray, discs: list[tuple[np.ndarray, float]], post_turn: float = 0.0
) -> np.ndarray:
    """Unit vector towards `goal`, bent along the tangent of the first disc (centre, radius) that is in the way.

    A disc is passed on the side that bends less; discs[0], if `post_turn` is given, on that side (-1 left, 1 right).
    """
    to_goal = goal - position
    reach = np.linalg.norm(to_goal)
    direct = to_goal / max(reach, 1e-6)
    nearest, bent = math.inf, direct
    for i, (centre, radius) in enumerate(discs):
        to_centre = centre - position
        distance = np.linalg.norm(to_centre)
        ahead = to_centre @ direct
        beside = direct[0] * to_centre[1] - direct[1] * to_centre[0]  # > 0: the disc lies to the right of the way
        if ahead <= 0 or ahead - radius > reach or abs(beside) >= radius or distance >= nearest:
            continue
        turn = post_turn if i == 0 and post_turn else -math.copysign(1.0, beside)  # -1 passes it on its left
        angle = math.atan2(to_centre[1], to_centre[0]) + turn * math.asin(min(radius / distance, 1.0))
        tangent = np.array([math.cos(angle), math.sin(angle)])
        if distance < radius:  # too near already: also away from it
            tangent = tangent - (radius - distance) / 10.0 * to_centre / distance
            tangent /= np.linalg.norm(tangent)
        nearest, bent = distance, tangent
    return bent
