"""A table that is told in words what to do: four coloured blocks, four coloured zones, a round pusher, 80 goals.

    y = 0   +--------------------------+   All lengths are pixels of a 512 x 512 table: x to the right, y down.
            | (zone)            (zone) |   "push the red block to the cyan zone"
            |    [red]    (blue)       |   "bring the disc to the left edge"
            |        o                 |   "the purple block goes above the yellow block"
            |   /yellow\\    <purple>   |   o: the pusher, anywhere at the start
            | (zone)            (zone) |   The four zones take the corners in any order.
    y = 512 +--------------------------+

tabletop_goals.py has all goals, the rules by which they are reached, and the words. Physics and pictures are those of
the tabletop, except that blocks keep their heading: a block goes where the pusher behind it goes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType

import gymnasium as gym
import numpy as np

from diffpolicy.envs import table_picture
from diffpolicy.envs.base import LanguageEnv
from diffpolicy.envs.table_picture import BLOCK_COLOURS, ZONE_COLOURS, paint_disc, paint_polygon, paint_square
from diffpolicy.envs.table_world import PUSHER_RADIUS, TABLE, TableWorld, disc, polygon, square
from diffpolicy.envs.tabletop_goals import (
    BLOCKS,
    GOALS,
    HELD_OUT,
    MOVED,
    NAMES,
    WORDINGS,
    ZONE_RADIUS,
    ZONES,
    allowed_goals,
    shortfalls,
    targets,
)
from diffpolicy.spec import ENVIRONMENT_STATE, GOAL_IMAGE, IMAGES, STATE, unknown_name

TOP_CAMERA = IMAGES + "top"

SQUARE_HALF, DISC_RADIUS = 25.0, 27.0
TRIANGLE = tuple((32 * math.sin(a), 4 - 32 * math.cos(a)) for a in (0.0, 2 * math.pi / 3, 4 * math.pi / 3))
DIAMOND = ((0.0, -32.0), (32.0, 0.0), (0.0, 32.0), (-32.0, 0.0))
BLOCK_REACH = 36.0
"""No corner of a block is farther from its centre."""
CLEARANCE = BLOCK_REACH + PUSHER_RADIUS + 2
"""Distance from a block's centre at which the pusher passes it freely, and at which a push begins, px."""
ZONE_INSET = 92.0
"""Of the zones' centres from the table's edges, give or take ZONE_SHIFT."""
ZONE_SHIFT = 6.0
BLOCK_INSET = 120.0
"""Blocks start at least this far from the table's edges."""
BLOCK_GAP = 120.0
"""Least distance of two blocks at the start, centre to centre."""
MIN_TRAIN_GOALS, MIN_HELD_OUT_GOALS = 8, 2
"""Goals that every scene allows at least."""
TABLES = MappingProxyType(
    {
        "light": (table_picture.TABLE_COLOUR, table_picture.RAIL_COLOUR, table_picture.PUSHER_COLOUR),
        "grey": ((122, 116, 104), (104, 99, 88), (250, 250, 250)),
    }
)
"""Colours of table, rail and pusher. The grey is the mean colour that CLIP's towers take off, so that the table is 0 to them."""
SCENE_STREAM, GOAL_STREAM, WORDS_STREAM = 0, 1, 2
"""What seeds the draws of scene, goal and wording, besides the seed of the episode."""
MAX_SCENES = 10_000


@dataclass(frozen=True, kw_only=True)
class TabletopLanguageConfig:
    goal: str = ""
    """Always ask for this goal, by its name; "" draws one of those that `goals` and the scene allow."""
    goals: str = "train"
    """`train`: goals that demonstrations show; `held_out`: those that they leave out; `all`."""
    wordings: str = "seen"
    """`seen`: sentences that demonstrations use; `unseen`: others; `first`: the goal's name."""
    swap: bool = False
    """Ask for another goal than without swap, in the same scene."""
    max_steps: int = 60
    """Steps after which an episode is truncated; a demonstration takes about 20."""
    pixels: bool = False
    """Also observe the table from above, in colour."""
    goal_image: bool = False
    """Also observe a picture of the scene with the asked block where it belongs, the same at every step."""
    table: str = "light"
    """Colour of the table: `light`, as the tabletop's; `grey`: far easier to see things on for a tower without weights."""
    image_size: int = 64
    """Height and width of the observed image and of the goal image, pixels."""
    render_size: int = 384
    """Height and width of the picture of render(), pixels."""

    def __post_init__(self):
        if self.goal and self.goal not in NAMES:
            raise unknown_name("env.goal", self.goal, NAMES)
        for name, known in (
            ("goals", ("train", "held_out", "all")),
            ("wordings", ("seen", "unseen", "first")),
            ("table", TABLES),
        ):
            if getattr(self, name) not in known:
                raise unknown_name(f"env.{name}", getattr(self, name), known)
        for name in ("max_steps", "image_size", "render_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"env.{name} must be at least 1, got {getattr(self, name)}")


class TabletopLanguageEnv(LanguageEnv):
    """The table; an action is the position (x, y) that the pusher is to go to, in px.

    Observations:
        observation.state              (2,) float32 pusher x, y, px
        observation.environment_state  (16,) float32 x, y of each block, then of each zone, px; nothing of what is asked
        observation.images.top         (64, 64, 3) uint8, with pixels=True; nothing of what is asked
        goal.image                     (64, 64, 3) uint8, with goal_image=True
    The reward of a goal is the share of the block's way there that is done: 1 where it is reached.

    The scene of a seed is the first, of those that its stream draws, that allows MIN_TRAIN_GOALS goals of demonstrations
    and MIN_HELD_OUT_GOALS others; with `goal`, also that one. A goal is allowed where a straight push reaches it, and
    no other allowed one on the way.
    """

    fps = 10.0
    action_names = ("target_x", "target_y")
    action_units = "px"
    wordings = WORDINGS
    held_out = HELD_OUT
    block_names, zone_names = BLOCKS, ZONES
    observation_names = MappingProxyType(
        {
            STATE: ("pusher_x", "pusher_y"),
            ENVIRONMENT_STATE: (
                *(f"{b}_block_{n}" for b in BLOCKS for n in "xy"),
                *(f"{z}_zone_{n}" for z in ZONES for n in "xy"),
            ),
        }
    )
    observation_units = MappingProxyType(dict.fromkeys(observation_names, "px"))
    state_names = (
        "pusher_x", "pusher_y", "pusher_vx", "pusher_vy",
        *(f"{b}_block_{n}" for b in BLOCKS for n in ("x", "y", "vx", "vy")),
        *(f"{b}_block_start_{n}" for b in BLOCKS for n in "xy"),
        *(f"{z}_zone_{n}" for z in ZONES for n in "xy"),
        "asked_goal", "wording",
    )  # fmt: skip

    def __init__(self, config: TabletopLanguageConfig | None = None):
        self.config = config = config or TabletopLanguageConfig()
        self.max_steps = config.max_steps
        box = {
            key: gym.spaces.Box(-np.inf, np.inf, (len(names),), np.float32)
            for key, names in self.observation_names.items()
        }
        for key, shown in ((TOP_CAMERA, config.pixels), (GOAL_IMAGE, config.goal_image)):
            if shown:
                box[key] = gym.spaces.Box(0, 255, (config.image_size, config.image_size, 3), np.uint8)
        self.observation_space = gym.spaces.Dict(box)
        self.action_space = gym.spaces.Box(0.0, TABLE, (2,), np.float32)
        shapes = [square(SQUARE_HALF), disc(DISC_RADIUS), polygon(TRIANGLE), polygon(DIAMOND)]
        self._world = TableWorld(shapes, moment=math.inf, control_hz=self.fps)
        self._pusher, self._blocks = self._world.pusher, self._world.blocks
        self._streams = {s: np.random.default_rng() for s in (SCENE_STREAM, GOAL_STREAM, WORDS_STREAM)}
        self._step, self._target, self._started = 0, None, False

    # ---------------------------------------------------------------------------------------------- episodes

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Starts an episode drawn from `seed`, or from a recorded `options["state"]`, and returns (obs, info).

        Raises:
            ValueError: the state is not one of this table; or no scene allows the goal that is asked.
        """
        super().reset(seed=seed)
        if seed is not None:
            self._streams = {s: np.random.default_rng([s, seed]) for s in self._streams}
        if options and "state" in options:
            self._set_state(options["state"])
        else:
            self._set_state(self._random_start())
        self._step, self._target, self._started = 0, None, True
        return self._observe(), self._judge()[2]

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
        reward, success, info = self._judge()
        return self._observe(), reward, success, self._step >= self.max_steps, info

    def get_state(self) -> np.ndarray:
        numbers = [*self._pusher.position, *self._pusher.velocity]
        for body in self._blocks:
            numbers += [*body.position, *body.velocity]
        numbers += [*self.start_xy.ravel(), *self.zone_xy.ravel(), self.asked, self._wording]
        return np.array(numbers, dtype=np.float64)

    # ------------------------------------------------------------------------------------ what there is to see

    @property
    def pusher_xy(self) -> np.ndarray:
        """Centre of the pusher, shape (2,), px."""
        return np.array(self._pusher.position)

    @property
    def block_xy(self) -> np.ndarray:
        """Centres of all blocks, shape (4, 2), px."""
        return np.array([body.position for body in self._blocks])

    @property
    def asked_block(self) -> int:
        """Index of the block that the words are about."""
        return BLOCKS.index(GOALS[self.asked].block)

    @property
    def asked_target(self) -> np.ndarray:
        """Where the asked block belongs, as things stand now, shape (2,), px."""
        return targets(self.block_xy, self.zone_xy).reshape(-1, 2)[self.asked]

    def _observe(self) -> dict[str, np.ndarray]:
        obs = {
            STATE: np.array(self._pusher.position, dtype=np.float32),
            ENVIRONMENT_STATE: np.concatenate([self.block_xy.ravel(), self.zone_xy.ravel()]).astype(np.float32),
        }
        if self.config.pixels:
            obs[TOP_CAMERA] = self._draw(self.config.image_size, self.pusher_xy, self.block_xy)
        if self.config.goal_image:
            obs[GOAL_IMAGE] = self._goal_image.copy()
        return obs

    def _judge(self) -> tuple[float, bool, dict]:
        """(reward, success, info) of the asked goal; info holds the rewards of all that the scene allows."""
        blocks = self.block_xy
        missing = shortfalls(blocks[:, None], blocks, self.zone_xy).reshape(-1)  # (80,)
        moved = np.linalg.norm(blocks - self.start_xy, axis=-1) >= MOVED  # (4,)
        reached = (missing <= 0) & np.repeat(moved, len(GOALS) // len(BLOCKS))
        shares = np.clip(1.0 - missing[self._allowed] / self._start_missing, 0.0, 1.0)
        rewards = np.where(reached[self._allowed], 1.0, np.minimum(shares, 0.99)).tolist()
        info = {
            "is_success": bool(reached[self.asked]),
            "goal_rewards": dict(zip(self.scene_goals, rewards, strict=True)),
            "goals_reached": tuple(NAMES[i] for i in self._allowed if reached[i]),
        }
        return info["goal_rewards"][self.goal], info["is_success"], info

    # -------------------------------------------------------------------------------------------------- starts

    def _random_start(self) -> np.ndarray:
        """A state vector: scene, goal and wording, each from its own stream."""
        blocks, zones, pusher, allowed = self._random_scene(self._streams[SCENE_STREAM])
        asked = self._draw_goal(self._streams[GOAL_STREAM], allowed)
        words = WORDINGS[NAMES[asked]]
        count = {"seen": len(words.seen), "unseen": len(words.unseen), "first": 1}[self.config.wordings]
        wording = int(self._streams[WORDS_STREAM].random() * count)  # one draw, however many there are
        wording += len(words.seen) if self.config.wordings == "unseen" else 0
        poses = np.column_stack([blocks, np.zeros((len(BLOCKS), 2))])  # (4, 4)
        return np.array([*pusher, 0.0, 0.0, *poses.ravel(), *blocks.ravel(), *zones.ravel(), asked, wording])

    def _random_scene(self, rng: np.random.Generator):
        """Blocks (4, 2), zones (4, 2), pusher (2,), px, and the numbers of the goals that they allow."""
        low, high = ZONE_INSET, TABLE - ZONE_INSET
        corners = np.array([(low, low), (high, low), (low, high), (high, high)])
        for _ in range(MAX_SCENES):
            zones = corners[rng.permutation(len(ZONES))] + rng.uniform(-ZONE_SHIFT, ZONE_SHIFT, (len(ZONES), 2))
            blocks = rng.uniform(BLOCK_INSET, TABLE - BLOCK_INSET, (len(BLOCKS), 2))
            if not _apart(blocks, zones):
                continue
            allowed = allowed_goals(blocks, zones, behind=CLEARANCE, reach=BLOCK_REACH)
            num_held_out = int(allowed[_IS_HELD_OUT].sum())
            if allowed.sum() - num_held_out < MIN_TRAIN_GOALS or num_held_out < MIN_HELD_OUT_GOALS:
                continue
            pusher = rng.uniform(40.0, TABLE - 40.0, 2)
            while np.linalg.norm(blocks - pusher, axis=-1).min() < CLEARANCE:
                pusher = rng.uniform(40.0, TABLE - 40.0, 2)
            if not self.config.goal or allowed[NAMES.index(self.config.goal)]:
                return blocks, zones, pusher, np.flatnonzero(allowed)
        raise AssertionError(f"none of {MAX_SCENES} scenes allows {self.config.goal!r}")

    def _draw_goal(self, rng: np.random.Generator, allowed: np.ndarray) -> int:
        """The number of the asked goal; zones, edges and neighbours come up equally often."""
        among = [
            i for i in allowed if self.config.goals == "all" or _IS_HELD_OUT[i] == (self.config.goals == "held_out")
        ]
        first = NAMES.index(self.config.goal) if self.config.goal else _draw_by_kind(rng, among)
        if not self.config.swap:
            return first
        return _draw_by_kind(rng, [i for i in among if i != first])

    def _set_state(self, state) -> None:
        state = np.asarray(state, dtype=np.float64)
        if state.shape != (len(self.state_names),) or not np.isfinite(state).all():
            raise ValueError(
                f"options['state'] must be {len(self.state_names)} finite numbers (env.state_names), got shape {state.shape}"
            )
        asked, wording = state[-2:]
        if asked not in range(len(GOALS)):
            raise ValueError(f"asked_goal must be an integer in [0, {len(GOALS) - 1}], got {asked}")
        words = WORDINGS[NAMES[int(asked)]]
        sentences = (*words.seen, *words.unseen)
        if wording not in range(len(sentences)):
            raise ValueError(f"wording must be an integer in [0, {len(sentences) - 1}], got {wording}")
        poses, starts, zones = np.split(state[4:-2], [4 * len(BLOCKS), 6 * len(BLOCKS)])
        starts, zones = starts.reshape(-1, 2), zones.reshape(-1, 2)
        allowed = np.flatnonzero(allowed_goals(starts, zones, behind=CLEARANCE, reach=BLOCK_REACH))
        if asked not in allowed:
            raise ValueError(
                f"asked_goal {NAMES[int(asked)]!r} is not one that this scene allows: a straight push does not reach it alone"
            )
        self.start_xy, self.zone_xy, self._allowed = starts, zones, allowed
        self.asked, self._wording = int(asked), int(wording)
        self.goal, self.task = NAMES[self.asked], sentences[self._wording]
        self.scene_goals = tuple(NAMES[i] for i in allowed)
        self._start_missing = shortfalls(starts[:, None], starts, zones).reshape(-1)[allowed]  # px, all above 0
        self._backgrounds: dict[int, np.ndarray] = {}

        self._pusher.position, self._pusher.velocity = state[0:2].tolist(), state[2:4].tolist()
        for body, (x, y, vx, vy) in zip(self._blocks, poses.reshape(-1, 4).tolist(), strict=True):
            body.position, body.angle, body.velocity, body.angular_velocity = (x, y), 0.0, (vx, vy), 0.0
        self._world.renew()
        if self.config.goal_image:
            self._goal_image = self._draw_goal_image()  # (H, W, 3)

    # ------------------------------------------------------------------------------------------------ pictures

    def render(self) -> np.ndarray:
        """The table, with a ring at the last action: uint8 (render_size, render_size, 3)."""
        picture = self._draw(self.config.render_size, self.pusher_xy, self.block_xy)
        if self._target is not None:
            scale = self.config.render_size / TABLE
            paint_disc(picture, scale, self._target, 7.0, table_picture.TARGET_COLOUR, ring=3.0)
        return picture

    def action_to_pixels(self, actions: np.ndarray) -> np.ndarray:
        """Columns and rows (..., 2) of actions (..., 2) in the picture of render()."""
        return np.asarray(actions, dtype=np.float64) * (self.config.render_size / TABLE)

    def _draw(self, size: int, pusher_xy: np.ndarray, block_xy: np.ndarray) -> np.ndarray:
        """The scene as uint8 (size, size, 3), anti-aliased; what does not move is painted once an episode."""
        scale = size / TABLE
        table_colour, rail_colour, pusher_colour = TABLES[self.config.table]
        if size not in self._backgrounds:
            self._backgrounds[size] = table_picture.empty_table(size, table_colour, rail_colour)
            for name, xy in zip(ZONES, self.zone_xy, strict=True):
                table_picture.paint_zone(self._backgrounds[size], scale, xy, ZONE_RADIUS, ZONE_COLOURS[name])
        picture = self._backgrounds[size].copy()
        red, blue, yellow, purple = block_xy
        paint_square(picture, scale, red, SQUARE_HALF, 0.0, BLOCK_COLOURS["red"])
        paint_disc(picture, scale, blue, DISC_RADIUS, BLOCK_COLOURS["blue"])
        paint_polygon(picture, scale, yellow, TRIANGLE, BLOCK_COLOURS["yellow"])
        paint_polygon(picture, scale, purple, DIAMOND, BLOCK_COLOURS["purple"])
        paint_disc(picture, scale, pusher_xy, PUSHER_RADIUS, pusher_colour)
        return picture

    def _draw_goal_image(self) -> np.ndarray:
        """The scene as it was found, but the asked block where it belongs and the pusher behind it."""
        blocks = self.start_xy.copy()
        target = targets(blocks, self.zone_xy).reshape(-1, 2)[self.asked]
        way = target - blocks[self.asked_block]
        pusher = target - (CLEARANCE - 6.0) * way / np.linalg.norm(way)
        blocks[self.asked_block] = target
        return self._draw(self.config.image_size, pusher, blocks)


_IS_HELD_OUT = np.array([goal.is_held_out for goal in GOALS])  # (80,)


def _apart(blocks: np.ndarray, zones: np.ndarray) -> bool:
    """Whether blocks (4, 2) lie apart from each other and outside all zones (4, 2)."""
    points = blocks.tolist()
    pairs = ((p, q) for i, p in enumerate(points) for q in points[:i])
    if any(math.dist(p, q) < BLOCK_GAP for p, q in pairs):
        return False
    return all(math.dist(p, z) >= ZONE_RADIUS + BLOCK_REACH for z in zones.tolist() for p in points)


def _draw_by_kind(rng: np.random.Generator, among: list[int]) -> int:
    """One of these goals by two draws: the kind, then the goal."""
    kinds = sorted({GOALS[i].kind for i in among})
    kind = kinds[int(rng.random() * len(kinds))]
    chosen = [i for i in among if GOALS[i].kind == kind]
    return int(chosen[int(rng.random() * len(chosen))])
