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
from diffpolicy.spec import ENVIRONMENT_STATE, IMAGES, STATE

GOAL = "observation.goal"
TOP_CAMERA = IMAGES + "top"

TABLE = 512.0
PUSHER_RADIUS = 16.0
BLOCK_HALF = 24.0
"""Half the side of a square block."""
POST_RADIUS = 45.0
RAIL_INSET = 40.0
"""Distance of the rail from the table's edge; more than the pusher's width, so that it fits behind a block there."""

PHYSICS_HZ = 100
STIFFNESS, DAMPING = 100.0, 20.0
"""Position control of the pusher, in 1/s^2 and 1/s: critically damped, as in Push-T."""
MAX_SPEED = 500.0
"""Speed limit of the pusher's drive, px/s: 5 px in one physics step, so that it never jumps into a block."""
PUSHER_MASS = 10.0
"""In block masses: heavy enough to hardly notice a block, finite so that the post and the edges stop it."""
FRICTION = 1.2
"""Of pusher and blocks; a contact has the product of the two. Rubber: a push at an angle does not slip off."""
TURN_RESISTANCE = 4.0
"""Times the moment of inertia of a uniform square: a block pushed beside its middle goes on rather than turning away."""

BLOCK_COLOURS = {"red": (208, 40, 42), "blue": (38, 92, 204), "yellow": (238, 190, 24), "purple": (128, 60, 170)}
ZONE_COLOURS = {"green": (46, 160, 70), "orange": (248, 130, 22), "pink": (236, 106, 180), "cyan": (36, 186, 206)}
TABLE_COLOUR, RAIL_COLOUR, POST_COLOUR = (240, 238, 232), (214, 211, 203), (128, 124, 120)
PUSHER_COLOUR, TARGET_COLOUR = (34, 34, 40), (230, 0, 120)

_PUSHER, _BLOCK, _FIXED = 1, 2, 4


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
        self._space: pymunk.Space | None = None
        self._target: tuple[float, float] | None = None
        self._backgrounds: dict[int, np.ndarray] = {}
        self._build_bodies()

    # ---------------------------------------------------------------------------------------------- episodes

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Starts an episode drawn from `seed`, or from a recorded `options["state"]`, and returns (obs, info)."""
        super().reset(seed=seed)
        if options and "state" in options:
            self._set_state(options["state"])
        else:
            self._set_state(self._random_start(self.np_random))
        self._step, self._target = 0, None
        return self._observe(), {"is_success": self._asked_distance() <= self.config.zone_radius}

    def step(self, action):
        """Moves towards `action` (2,), px, for one control step; returns obs, reward, terminated, truncated, info.

        Raises:
            ValueError: the action is not two finite numbers.
        """
        if self._space is None:
            raise ValueError("call reset() before step()")
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (2,) or not np.isfinite(action).all():
            raise ValueError(f"action must be 2 finite numbers (target x, y in px), got {action!r}")
        self._target = (float(action[0]), float(action[1]))
        self._simulate(*self._target)
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
        self._post.unsafe_set_offset(self.post_xy.tolist())
        self._renew_space()

    # ------------------------------------------------------------------------------------------------- physics

    def _build_bodies(self) -> None:
        self._pusher = pymunk.Body(PUSHER_MASS, math.inf)
        disc = pymunk.Circle(self._pusher, PUSHER_RADIUS)
        disc.filter = pymunk.ShapeFilter(categories=_PUSHER, mask=_BLOCK | _FIXED)
        self._blocks = []
        shapes = [disc]
        for _ in range(self.config.num_blocks):
            side = 2 * BLOCK_HALF
            body = pymunk.Body(1.0, TURN_RESISTANCE * pymunk.moment_for_box(1.0, (side, side)))
            square = pymunk.Poly.create_box(body, (side, side))
            square.filter = pymunk.ShapeFilter(categories=_BLOCK, mask=_PUSHER | _BLOCK | _FIXED)
            self._blocks.append(body)
            shapes.append(square)
        ground = pymunk.Body(body_type=pymunk.Body.STATIC)
        for inset, stops in ((0.0, _PUSHER), (RAIL_INSET, _BLOCK)):
            low, high, thick = inset - 20, TABLE - inset + 20, 20.0
            for a, b in (((0, 0), (0, 1)), ((0, 1), (1, 1)), ((1, 1), (1, 0)), ((1, 0), (0, 0))):
                ends = [tuple(high if corner else low for corner in point) for point in (a, b)]
                wall = pymunk.Segment(ground, *ends, thick)
                wall.filter = pymunk.ShapeFilter(categories=_FIXED, mask=stops)
                shapes.append(wall)
        self._post = pymunk.Circle(ground, POST_RADIUS)
        self._post.filter = pymunk.ShapeFilter(categories=_FIXED, mask=_PUSHER | _BLOCK)
        shapes.append(self._post)
        for shape in shapes[: 1 + self.config.num_blocks]:
            shape.friction = FRICTION
        self._things = [self._pusher, *self._blocks, ground, *shapes]

    def _renew_space(self) -> None:
        """Puts everything into an empty space: no contact is remembered, so get_state() is all there is to know."""
        if self._space is not None:
            self._space.remove(*self._things)
        self._space = pymunk.Space()
        self._space.damping = 0.0  # quasi-static: what is not pushed stops at once
        self._space.add(*self._things)
        for body in (self._pusher, *self._blocks):
            # A step of no time clears the solver's hidden push-apart velocity and moves nothing.
            pymunk.Body.update_position(body, 0.0)

    def _simulate(self, target_x: float, target_y: float) -> None:
        """One control step of the pusher's position control and the physics."""
        pusher, space, dt = self._pusher, self._space, 1.0 / PHYSICS_HZ
        for _ in range(round(PHYSICS_HZ / self.fps)):
            (x, y), (vx, vy) = pusher.position, pusher.velocity
            vx += (STIFFNESS * (target_x - x) - DAMPING * vx) * dt
            vy += (STIFFNESS * (target_y - y) - DAMPING * vy) * dt
            slow = min(1.0, MAX_SPEED / max(math.hypot(vx, vy), 1e-9)) * PUSHER_MASS / dt
            pusher.force = (vx * slow, vy * slow)  # velocities start at 0 (damping): this force gives (vx, vy)
            space.step(dt)
        self._renew_space()

    # ------------------------------------------------------------------------------------------------ pictures

    def render(self) -> np.ndarray:
        """The table, with a ring at the last action: uint8 (render_size, render_size, 3)."""
        picture = self._draw(self.config.render_size)
        if self._target is not None:
            scale = self.config.render_size / TABLE
            _paint_disc(picture, scale, self._target, 7.0, TARGET_COLOUR, ring=3.0)
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
            _paint_square(picture, scale, body.position, BLOCK_HALF, body.angle, BLOCK_COLOURS[name])
        _paint_disc(picture, scale, self._pusher.position, PUSHER_RADIUS, PUSHER_COLOUR)
        return picture

    def _paint_background(self, size: int) -> np.ndarray:
        scale = size / TABLE
        picture = np.empty((size, size, 3), dtype=np.uint8)
        picture[:] = TABLE_COLOUR
        centre, half = (TABLE / 2, TABLE / 2), TABLE / 2 - RAIL_INSET
        _paint_square(picture, scale, centre, half, 0.0, RAIL_COLOUR, ring=2.5)
        for name, xy in zip(self.zone_names, self.zone_xy, strict=True):
            _paint_disc(picture, scale, xy, self.config.zone_radius, ZONE_COLOURS[name], opacity=0.45)
            _paint_disc(picture, scale, xy, self.config.zone_radius, ZONE_COLOURS[name], ring=5.0)
        _paint_disc(picture, scale, self.post_xy, POST_RADIUS, POST_COLOUR)
        return picture


def _distance_to_segment(point: np.ndarray, start: np.ndarray, end: np.ndarray) -> float:
    along = end - start
    share = np.clip((point - start) @ along / (along @ along), 0.0, 1.0)
    return float(np.linalg.norm(point - start - share * along))


def _paint_disc(picture, scale, centre, radius, colour, *, opacity=1.0, ring=0.0) -> None:
    """Blends a disc, or its outline of width `ring`, into the picture; lengths in px of the table."""
    (rows, columns), x, y = _patch(picture, scale, centre, radius)
    outside = np.sqrt(x * x + y * y) - radius * scale  # signed distance, in picture pixels
    _blend(picture, rows, columns, outside, scale * ring, colour, opacity)


def _paint_square(picture, scale, centre, half, angle, colour, *, opacity=1.0, ring=0.0) -> None:
    """Blends a square turned by `angle` (radians), or its outline, into the picture."""
    (rows, columns), x, y = _patch(picture, scale, centre, half * math.sqrt(2))
    cos, sin = math.cos(angle), math.sin(angle)
    outside = np.maximum(np.abs(cos * x + sin * y), np.abs(cos * y - sin * x)) - half * scale
    _blend(picture, rows, columns, outside, scale * ring, colour, opacity)


def _patch(picture, scale, centre, reach):
    """The part of the picture within `reach` of a centre, and where its pixels lie from there: x (1, w), y (h, 1)."""
    parts, offsets = [], []
    for middle, size in ((centre[1] * scale, picture.shape[0]), (centre[0] * scale, picture.shape[1])):
        low = min(max(int(middle - reach * scale - 1), 0), size)
        high = min(max(int(middle + reach * scale + 2), low), size)
        parts.append(slice(low, high))
        offsets.append(np.arange(low, high, dtype=np.float32) + np.float32(0.5 - middle))
    return parts, offsets[1][None, :], offsets[0][:, None]


def _blend(picture, rows, columns, outside, ring, colour, opacity) -> None:
    if ring:
        outside = np.abs(outside + ring / 2) - ring / 2
    cover = np.clip(0.5 - outside, 0.0, 1.0)[..., None] * np.float32(opacity)
    patch = picture[rows, columns]
    picture[rows, columns] = np.rint(patch + (np.array(colour, dtype=np.float32) - patch) * cover)
