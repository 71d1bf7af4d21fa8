"""A table seen from above: a round pusher, coloured blocks, coloured zones, and a post to be passed left or right.

    y = 0   +--------------------------+   All lengths are pixels of a 512 x 512 table: x to the right, y down.
            |  .--------------------.  |   The task in words: "push the red block to the green zone".
            |  : (zone)      (zone) :  |   The post stands between the pusher's start and the blocks, so that every
            |  :                    :  |   start has two good ways, and a policy that averages them runs into it.
            |  :   [block] [block]  :  |   The rail (dotted here, a thin line in pictures) stops blocks but not the
            |  :         ( ) post   :  |   pusher, which can therefore always get behind a block: none is ever lost
            |  '----------o---------'  |   at an edge.
    y = 512 +--------------------------+   o: the pusher

The physics is quasi-static, as in Push-T (Chi et al. 2023, arXiv:2303.04137): a block moves only while it is pushed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import pymunk

from diffpolicy.envs.base import RobotEnv
from diffpolicy.envs.table_picture import (
    BLOCK_COLOURS,
    PUSHER_COLOUR,
    TABLE_COLOUR,  # noqa: F401 - whoever looks at its pictures asks for their colours here
    TARGET_COLOUR,
    ZONE_COLOURS,
    empty_table,
    paint_disc,
    paint_square,
    paint_zone,
)
from diffpolicy.envs.table_world import PUSHER_RADIUS, TABLE, TableWorld, square
from diffpolicy.spec import ENVIRONMENT_STATE, IMAGES, STATE

GOAL = "observation.goal"
TOP_CAMERA = IMAGES + "top"

BLOCK_HALF = 24.0
"""Half the side of a square block."""
POST_RADIUS = 45.0
TURN_RESISTANCE = 4.0
"""Times the moment of inertia of a uniform square: a block pushed beside its middle goes on rather than turning away."""

POST_COLOUR = (128, 124, 120)


def instruction(block: str, zone: str) -> str:
    """The task in words, from the names of the asked block and zone."""
    return f"push the {block} block to the {zone} zone"


def passing_side(pusher_xy: np.ndarray, post_xy: np.ndarray) -> str:
    """On which side of the post a trajectory first passes it: "left" (smaller x), "right", or "none".

    Args:
        pusher_xy: positions of the pusher over one episode, shape (steps, 2), px.
        post_xy: centre of the post, shape (2,), px.
    """
    pusher_xy, (post_x, post_y) = np.asarray(pusher_xy, dtype=np.float64), post_xy
    if pusher_xy.ndim != 2 or pusher_xy.shape[1] != 2:
        raise ValueError(f"pusher_xy must be (steps, 2), got {pusher_xy.shape}")
    above = pusher_xy[:, 1] < post_y  # starts are below the post, blocks above it
    crossings = np.flatnonzero(above[1:] & ~above[:-1])
    if len(crossings) == 0:
        return "none"
    (x0, y0), (x1, y1) = pusher_xy[crossings[0] : crossings[0] + 2]
    return "left" if x0 + (x1 - x0) * (post_y - y0) / (y1 - y0) < post_x else "right"


@dataclass(frozen=True, kw_only=True)
class TabletopConfig:
    num_blocks: int = 2
    """Blocks on the table, 1 to 4: red, blue, yellow, purple."""
    num_zones: int = 2
    """Zones, 1 to 4: green, orange, pink, cyan."""
    zone_radius: float = 60.0
    """px; the task is done when the asked block's centre lies inside the asked zone."""
    max_steps: int = 120
    """Steps after which an episode is truncated; a demonstration takes about 40."""
    pixels: bool = False
    """Observe observation.images.top as well."""
    image_size: int = 96
    """Side of the observed image, in image pixels."""
    render_size: int = 384
    """Side of the picture of render()."""

    def __post_init__(self):
        for name, known in (("num_blocks", BLOCK_COLOURS), ("num_zones", ZONE_COLOURS)):
            if not 1 <= getattr(self, name) <= len(known):
                raise ValueError(f"env.{name} must be in [1, {len(known)}], got {getattr(self, name)}")
        if not 20 <= self.zone_radius <= 60:
            raise ValueError(f"env.zone_radius must be in [20, 60] px (larger zones meet), got {self.zone_radius}")
        for name in ("max_steps", "image_size", "render_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"env.{name} must be at least 1, got {getattr(self, name)}")


class TabletopEnv(RobotEnv):
    """The table; an action is the position (x, y) that the pusher is to go to, in px.

    Observations, float32:
        observation.state              (2,) pusher x, y, px
        observation.environment_state  (4*num_blocks + 2*num_zones + 2,) each block's x, y (px), cos, sin; each zone's
                                       x, y; the post's x, y
        observation.goal               (4,) asked block's x, y and asked zone's x, y: the task in numbers
        observation.images.top         (96, 96, 3) uint8, with pixels=True; does not show what is asked
    The reward is the fraction of the way from the asked block's start to the asked zone that is done: 1 on success.
    """

    fps = 10.0
    action_names = ("target_x", "target_y")
    action_units = "px"

    def __init__(self, config: TabletopConfig | None = None):
        self.config = config = config or TabletopConfig()
        self.max_steps = config.max_steps
        self.block_names = tuple(BLOCK_COLOURS)[: config.num_blocks]
        self.zone_names = tuple(ZONE_COLOURS)[: config.num_zones]
        self.tasks = tuple(instruction(b, z) for b in self.block_names for z in self.zone_names)
        self.state_names = (
            "pusher_x", "pusher_y", "pusher_vx", "pusher_vy",
            *(f"{b}_block_{n}" for b in self.block_names for n in ("x", "y", "angle", "vx", "vy", "spin")),
            *(f"{z}_zone_{n}" for z in self.zone_names for n in "xy"),
            "post_x", "post_y", "asked_block", "asked_zone", "start_distance",
        )  # fmt: skip
        self.observation_names = {
            STATE: ("pusher_x", "pusher_y"),
            ENVIRONMENT_STATE: (
                *(f"{b}_block_{n}" for b in self.block_names for n in ("x", "y", "cos", "sin")),
                *(f"{z}_zone_{n}" for z in self.zone_names for n in "xy"),
                "post_x", "post_y",
            ),
            GOAL: ("asked_block_x", "asked_block_y", "asked_zone_x", "asked_zone_y"),
        }  # fmt: skip
        self.observation_units = dict.fromkeys(self.observation_names, "px")

        shapes = {key: (len(names),) for key, names in self.observation_names.items()}
        box = {key: gym.spaces.Box(-np.inf, np.inf, shape, np.float32) for key, shape in shapes.items()}
        if config.pixels:
            box[TOP_CAMERA] = gym.spaces.Box(0, 255, (config.image_size, config.image_size, 3), np.uint8)
        self.observation_space = gym.spaces.Dict(box)
        self.action_space = gym.spaces.Box(0.0, TABLE, (2,), np.float32)

        self._step = 0
        self._target: tuple[float, float] | None = None
        self._backgrounds: dict[int, np.ndarray] = {}
        moment = TURN_RESISTANCE * pymunk.moment_for_box(1.0, (2 * BLOCK_HALF, 2 * BLOCK_HALF))
        shapes = [square(BLOCK_HALF)] * config.num_blocks
        self._world = TableWorld(shapes, moment=moment, control_hz=self.fps, post_radius=POST_RADIUS)
        self._pusher, self._blocks = self._world.pusher, self._world.blocks
        self._started = False

    # ---------------------------------------------------------------------------------------------- episodes

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Starts an episode drawn from `seed`, or from a recorded `options["state"]`, and returns (obs, info)."""
        super().reset(seed=seed)
        if options and "state" in options:
            self._set_state(options["state"])
        else:
            self._set_state(self._random_start(self.np_random))
        self._step, self._target, self._started = 0, None, True
        return self._observe(), {"is_success": self._asked_distance() <= self.config.zone_radius}

    def step(self, action):
        """Moves towards `action` (2,), px, for one control step; returns obs, reward, terminated, truncated, info.

        Raises:
            ValueError: the action is not two finite numbers.
        """
        if not self._started:
            raise ValueError("call reset() before step()")
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (2,) or not np.isfinite(action).all():
            raise ValueError(f"action must be 2 finite numbers (target x, y in px), got {action!r}")
        self._target = (float(action[0]), float(action[1]))
        self._world.drive(*self._target)
        self._step += 1
        distance = self._asked_distance()
        success = distance <= self.config.zone_radius
        reward = 1.0 if success else self._progress(distance)
        return self._observe(), reward, success, self._step >= self.max_steps, {"is_success": success}

    def get_state(self) -> np.ndarray:
        numbers = [*self._pusher.position, *self._pusher.velocity]
        for body in self._blocks:
            numbers += [*body.position, body.angle, *body.velocity, body.angular_velocity]
        numbers += [*self.zone_xy.ravel(), *self.post_xy, self.asked_block, self.asked_zone, self._start_distance]
        return np.array(numbers, dtype=np.float64)

    # ------------------------------------------------------------------------------------ what there is to see

    @property
    def pusher_xy(self) -> np.ndarray:
        """Centre of the pusher, shape (2,), px."""
        return np.array(self._pusher.position)

    @property
    def block_xy(self) -> np.ndarray:
        """Centres of all blocks, shape (num_blocks, 2), px."""
        return np.array([body.position for body in self._blocks])

    def _observe(self) -> dict[str, np.ndarray]:
        poses = [(*b.position, math.cos(b.angle), math.sin(b.angle)) for b in self._blocks]  # num_blocks x 4
        asked = self._blocks[self.asked_block].position
        obs = {
            STATE: np.array(self._pusher.position, dtype=np.float32),
            ENVIRONMENT_STATE: np.array([*(n for p in poses for n in p), *self._fixed_numbers], dtype=np.float32),
            GOAL: np.array([*asked, *self._asked_zone_xy], dtype=np.float32),
        }
        if self.config.pixels:
            obs[TOP_CAMERA] = self._draw(self.config.image_size)
        return obs

    def _asked_distance(self) -> float:
        """From the asked block's centre to the asked zone's centre, px."""
        (x, y), (zone_x, zone_y) = self._blocks[self.asked_block].position, self._asked_zone_xy
        return math.hypot(x - zone_x, y - zone_y)

    def _progress(self, distance: float) -> float:
        """Share of the way to the zone's edge that is done, in [0, 1]."""
        radius = self.config.zone_radius
        return min(max(1.0 - (distance - radius) / (self._start_distance - radius), 0.0), 1.0)

    # -------------------------------------------------------------------------------------------------- starts

    def _random_start(self, rng: np.random.Generator) -> np.ndarray:
        """A state vector in which the asked block can be pushed straight to the asked zone."""
        num_blocks, num_zones = self.config.num_blocks, self.config.num_zones
        asked_block, asked_zone = rng.integers(num_blocks), rng.integers(num_zones)
        pusher = (TABLE / 2 + rng.uniform(-40, 40), rng.uniform(455, 475))
        post = (TABLE / 2 + rng.uniform(-20, 20), rng.uniform(370, 385))
        slot = min(TABLE / num_zones, 210.0)
        shift = min(15.0, slot / 2 - self.config.zone_radius)
        zones_x = TABLE / 2 + (rng.permutation(num_zones) - (num_zones - 1) / 2) * slot
        zones = np.column_stack([zones_x + rng.uniform(-shift, shift, num_zones), rng.uniform(72, 90, num_zones)])
        # Blocks lie apart, and none stands in the way of the pusher behind the asked one or of the asked one.
        blocks = np.empty((num_blocks, 2))
        others = [i for i in range(num_blocks) if i != asked_block]
        spread, gap, clearance = (105, 130, 100) if num_blocks <= 2 else (180, 85, 80)  # more need the room, px
        while True:
            blocks[:, 0] = TABLE / 2 + rng.uniform(-spread, spread, num_blocks)
            blocks[:, 1] = rng.uniform(195, 240, num_blocks)
            gaps = np.linalg.norm(blocks[:, None] - blocks[None], axis=-1) + TABLE * np.eye(num_blocks)
            if gaps.min() < gap:
                continue
            way = zones[asked_zone] - blocks[asked_block]
            behind = blocks[asked_block] - 60 * way / np.linalg.norm(way)
            if all(_distance_to_segment(blocks[i], behind, zones[asked_zone]) >= clearance for i in others):
                break
        angles = rng.uniform(-0.5, 0.5, num_blocks)
        zeros = np.zeros(num_blocks)
        poses = np.column_stack([blocks, angles, zeros, zeros, zeros])  # (num_blocks, 6)
        start_distance = np.linalg.norm(zones[asked_zone] - blocks[asked_block])
        fixed = [*zones.ravel(), *post, asked_block, asked_zone, start_distance]
        return np.array([*pusher, 0.0, 0.0, *poses.ravel(), *fixed], dtype=np.float64)

    def _set_state(self, state) -> None:
        state = np.asarray(state, dtype=np.float64)
        if state.shape != (len(self.state_names),) or not np.isfinite(state).all():
            raise ValueError(
                f"options['state'] must be {len(self.state_names)} finite numbers (env.state_names) for "
                f"num_blocks={self.config.num_blocks}, num_zones={self.config.num_zones}; got shape {state.shape}"
            )
        num_blocks, num_zones = self.config.num_blocks, self.config.num_zones
        asked_block, asked_zone = state[-3], state[-2]
        if asked_block not in range(num_blocks) or asked_zone not in range(num_zones):
            raise ValueError(
                f"asked_block must be an integer in [0, {num_blocks - 1}] and asked_zone one in [0, {num_zones - 1}], "
                f"got {asked_block} and {asked_zone}"
            )
        if state[-1] <= self.config.zone_radius:
            raise ValueError(
                f"start_distance must be above env.zone_radius = {self.config.zone_radius} px (else the episode began "
                f"solved), got {state[-1]}"
            )
        poses, zones = np.split(state[4:-5], [6 * num_blocks])
        self.asked_block, self.asked_zone, self._start_distance = int(asked_block), int(asked_zone), float(state[-1])
        self.zone_xy, self.post_xy = zones.reshape(num_zones, 2), state[-5:-3].copy()
        self.task = instruction(self.block_names[self.asked_block], self.zone_names[self.asked_zone])
        self._asked_zone_xy = tuple(self.zone_xy[self.asked_zone].tolist())
        self._fixed_numbers = [*zones.tolist(), *self.post_xy.tolist()]
        self._backgrounds = {}

        self._pusher.position, self._pusher.velocity = state[0:2].tolist(), state[2:4].tolist()
        for body, (x, y, angle, vx, vy, spin) in zip(self._blocks, poses.reshape(num_blocks, 6).tolist(), strict=True):
            body.position, body.angle, body.velocity, body.angular_velocity = (x, y), angle, (vx, vy), spin
        self._world.place_post(self.post_xy)
        self._world.renew()

    # ------------------------------------------------------------------------------------------------ pictures

    def render(self) -> np.ndarray:
        """The table, with a ring at the last action: uint8 (render_size, render_size, 3)."""
        picture = self._draw(self.config.render_size)
        if self._target is not None:
            scale = self.config.render_size / TABLE
            paint_disc(picture, scale, self._target, 7.0, TARGET_COLOUR, ring=3.0)
        return picture

    def action_to_pixels(self, actions: np.ndarray) -> np.ndarray:
        """Columns and rows (..., 2) of actions (..., 2) in the picture of render()."""
        return np.asarray(actions, dtype=np.float64) * (self.config.render_size / TABLE)

    def _draw(self, size: int) -> np.ndarray:
        """The scene as uint8 (size, size, 3), anti-aliased; what does not move is painted once an episode."""
        scale = size / TABLE
        if size not in self._backgrounds:
            self._backgrounds[size] = self._paint_background(size)
        picture = self._backgrounds[size].copy()
        for name, body in zip(self.block_names, self._blocks, strict=True):
            paint_square(picture, scale, body.position, BLOCK_HALF, body.angle, BLOCK_COLOURS[name])
        paint_disc(picture, scale, self._pusher.position, PUSHER_RADIUS, PUSHER_COLOUR)
        return picture

    def _paint_background(self, size: int) -> np.ndarray:
        scale, picture = size / TABLE, empty_table(size)
        for name, xy in zip(self.zone_names, self.zone_xy, strict=True):
            paint_zone(picture, scale, xy, self.config.zone_radius, ZONE_COLOURS[name])
        paint_disc(picture, scale, self.post_xy, POST_RADIUS, POST_COLOUR)
        return picture


def _distance_to_segment(point: np.ndarray, start: np.ndarray, end: np.ndarray) -> float:
    along = end - start
    share = np.clip((point - start) @ along / (along @ along), 0.0, 1.0)
    return float(np.linalg.norm(point - start - share * along))
