"""Push-T: a round pusher moves a T-shaped block onto a goal pose, as published, without a display and faster.

Chi et al. 2023, Diffusion Policy, arXiv:2303.04137; the simulator is gym-pusht (an extra). Bodies, colours and pens are
gym-pusht's; the control loop and the coverage are written in plain floats, which leaves every state identical to the
last bit (tested). Positions are pixels of a 512 x 512 world with y downwards, angles are radians. The file is longer
than most because it holds all of one world: episodes, physics, pictures, then the geometry of the T.

    world 512 x 512                           the T in its own frame, position = (0, 0), y downwards
    +-------------------+                       (-60, 0) +-----------+ (60, 0)
    |   goal (light T)  |                                |    bar    |
    |     o agent       |                      (-60, 30) +---+---+---+ (60, 30)
    |       T block     |                                    | s |
    +-------------------+                          (-15, 120) +---+ (15, 120)      centre of gravity (0, 45)
"""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pymunk
from pymunk.space_debug_draw_options import SpaceDebugColor

from diffpolicy.envs.base import RobotEnv
from diffpolicy.spec import ENVIRONMENT_STATE, IMAGES, STATE, MissingExtraError, unknown_name

WORLD_SIZE = 512
"""Width and height of the world, pixels; also the range of an action."""
SUCCESS_COVERAGE = 0.95
"""An episode is solved when more than this fraction of the goal is covered."""
TOP_CAMERA = IMAGES + "top"
CANVAS_SIZE, WHITE = (WORLD_SIZE, WORLD_SIZE), (255, 255, 255)

TEE_RECTANGLES = ((-60.0, 60.0, 0.0, 30.0), (-15.0, 15.0, 30.0, 120.0))
"""(x_min, x_max, y_min, y_max) of bar and stem in the block's frame, pixels; they touch, so areas add."""
TEE_AREA = sum((x_max - x_min) * (y_max - y_min) for x_min, x_max, y_min, y_max in TEE_RECTANGLES)

KEYPOINTS = np.array(
    [
        (9.26979, 90.04097),
        (-60.98347, -1.18673),
        (60.91276, -1.39336),
        (-0.27050, 25.54363),
        (-14.06493, 122.81585),
        (39.00274, 32.85740),
        (-39.96641, 32.72966),
        (-16.82434, 62.86318),
        (23.54146, -1.70029),
    ]
)
"""(9, 2) keypoints in the block's frame, pixels: the medians of R(-angle) (keypoint - position) over recorded steps."""


@dataclass(frozen=True, kw_only=True)
class PushtConfig:
    environment_state: str = "keypoints"
    """`keypoints`: the 9 keypoints of the block, x0 y0 x1 y1 ... (18); `pose`: block x, y, angle in [0, 2 pi) (3)."""
    pixels: bool = False
    """Also observe the world from above, in colour."""
    image_size: int = 96
    """Height and width of the observed image, pixels."""
    goal: tuple[float, float, float] = (256.0, 256.0, math.pi / 4)
    """Pose that the block must reach: x, y in pixels and the angle in radians."""
    show_goal: bool = True
    """Draw the goal into observed images too, not only into the pictures of render(), which are for people."""
    task: str = "push the T-shaped block onto the goal"
    """The instruction in words; name the goal here when several are in play."""
    start_states: str = "published"
    """`published`: RandomState(seed), as in the published scores; `gym_pusht`: what gym-pusht's reset(seed) draws."""
    action_noise: float = 0.0
    """Standard deviation, pixels, of Gaussian noise added to every target; drawn from the episode's seed."""
    render_size: int = 512
    """Height and width of the picture of render(), pixels."""

    def __post_init__(self):
        object.__setattr__(self, "goal", tuple(float(number) for number in self.goal))
        if self.environment_state not in ("keypoints", "pose"):
            raise unknown_name("env.environment_state", self.environment_state, ("keypoints", "pose"))
        if self.start_states not in ("published", "gym_pusht"):
            raise unknown_name("env.start_states", self.start_states, ("published", "gym_pusht"))
        if len(self.goal) != 3 or not all(map(math.isfinite, self.goal)):
            raise ValueError(f"env.goal must be three finite numbers (x, y, angle; pixels, radians), got {self.goal}")
        for name in ("image_size", "render_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"env.{name} must be at least 1 pixel, got {getattr(self, name)}")
        if not (math.isfinite(self.action_noise) and self.action_noise >= 0):
            raise ValueError(f"env.action_noise must be a standard deviation in pixels >= 0, got {self.action_noise}")


class PushtEnv(RobotEnv):
    """One Push-T world. `terminated` and success: coverage > 0.95; reward: clip(coverage / 0.95, 0, 1).

    Actions are the target (x, y) of the pusher in pixels, tracked by a PD controller at 100 Hz. As in the original they
    are not clipped: a target outside [0, 512] makes the pusher run towards it. `step` may be called after success.
    get_state() holds poses and no velocities, like the recordings: a reset to it continues from rest.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 (gymnasium's interface)
    render_mode = "rgb_array"
    fps = 10.0
    max_steps = 300
    action_names = ("target_x", "target_y")
    action_units = "pixels"
    state_names = ("agent_x", "agent_y", "block_x", "block_y", "block_angle")

    substeps, dt = 10, 0.01  # physics at 100 Hz
    stiffness, damping = 100.0, 20.0  # of the pusher, 1/s^2 and 1/s

    def __init__(self, config: PushtConfig | None = None):
        self.config = config or PushtConfig()
        self.task = self.config.task
        self.goal_pose = self.config.goal
        self._sim = _load_simulator()
        self._canvas = None  # made when the first picture is drawn
        self._target = None  # (x, y) of the last action, for render()
        block_names, block_units = ("block_x", "block_y", "block_angle"), "pixels, pixels, radians"
        if self.config.environment_state == "keypoints":
            block_names = tuple(f"keypoint{i}_{axis}" for i in range(len(KEYPOINTS)) for axis in "xy")
            block_units = "pixels"
        self.observation_names = {STATE: ("agent_x", "agent_y"), ENVIRONMENT_STATE: block_names}
        self.observation_units = {STATE: "pixels", ENVIRONMENT_STATE: block_units}
        spaces = {
            key: gym.spaces.Box(-np.inf, np.inf, (len(names),), np.float32)
            for key, names in self.observation_names.items()
        }
        if self.config.pixels:
            size = self.config.image_size
            spaces[TOP_CAMERA] = gym.spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.observation_space = gym.spaces.Dict(spaces)
        self.action_space = gym.spaces.Box(0.0, float(WORLD_SIZE), (2,), np.float32)

    # --- episodes ---

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Starts an episode from the start state of `seed`, or from options["state"] (5,): agent xy, block xy, angle.

        Without a seed the start state (and the action noise) follows from the last seed that was given.

        Raises:
            ValueError: a state that is not five finite numbers, or an unknown option.
        """
        self._start_episode(seed, options)
        return self._observe(), self._judge()[2]

    def _start_episode(self, seed: int | None, options: dict | None):
        super().reset(seed=seed)
        options = dict(options or {})
        state = options.pop("state", None)
        if options:
            raise unknown_name("reset option", next(iter(options)), ["state"])
        self._build_world()
        if state is not None:
            agent_x, agent_y, block_x, block_y, angle = _five_numbers(state)
            # The angle turns the block about its centre of gravity, so it must come first for the position to hold.
            self._agent.position = agent_x, agent_y
            self._block.angle = angle
            self._block.position = block_x, block_y
        else:
            agent_x, agent_y, block_x, block_y, angle = self._draw_start(seed)
            # The published protocol sets the angle last ("legacy"), which moves the block by up to 90 px.
            self._agent.position = agent_x, agent_y
            self._block.position = block_x, block_y
            self._block.angle = angle
        # Nothing moves yet, but contacts are found: without it one recorded episode in thirty drifts apart.
        self._space.step(self.dt)
        self._velocity = (0.0, 0.0)
        self._target = None
        self._num_steps = 0

    def step(self, action):
        """Moves the target of the pusher to `action` (2,), pixels, for a tenth of a second.

        Raises:
            ValueError: an action that is not two finite numbers.
        """
        target = np.asarray(action, dtype=np.float64)
        if target.shape != (2,):
            raise ValueError(f"action must be (2,): target x and y in pixels, got shape {target.shape}")
        target_x, target_y = target.tolist()
        if not (math.isfinite(target_x) and math.isfinite(target_y)):
            raise ValueError(
                f"action must be two finite numbers (target x and y, pixels), got ({target_x}, {target_y}) "
                f"at step {self._num_steps}; check the policy's output for NaN"
            )
        if self.config.action_noise:
            noise_x, noise_y = self.np_random.normal(0.0, self.config.action_noise, 2).tolist()
            target_x, target_y = target_x + noise_x, target_y + noise_y
        self._target = (target_x, target_y)
        self._move_towards(target_x, target_y)
        self._num_steps += 1

        reward, success, info = self._judge()
        return self._observe(), reward, success, self._num_steps >= self.max_steps, info

    def _judge(self) -> tuple[float, bool, dict]:
        """(reward, success, info) of the block where it lies now."""
        coverage = tee_coverage(self._block_pose(), self.goal_pose)
        success = coverage > SUCCESS_COVERAGE
        return min(coverage / SUCCESS_COVERAGE, 1.0), success, {"is_success": success, "coverage": coverage}

    def get_state(self) -> np.ndarray:
        """(5,) agent x, y, block x, y in pixels, block angle in [0, 2 pi): what the recordings call `state`."""
        return np.array([*self._agent.position, *self._block.position, self._block.angle % math.tau])

    # --- physics ---

    def _build_world(self):
        # A new space for each episode, bodies in gym-pusht's order: pymunk's contact solver depends on both.
        sim = self._sim
        self._space = space = pymunk.Space()
        space.damping = 0.0  # the block stops as soon as nobody pushes it
        walls = ((5, 506), (5, 5)), ((5, 5), (506, 5)), ((506, 5), (506, 506)), ((5, 506), (506, 506))
        self._walls = [sim.env.add_segment(space, start, end, 2) for start, end in walls]
        space.add(*self._walls)
        self._agent = sim.env.add_circle(space, (256, 400), 15)
        self._block, self._tee = sim.env.add_tee(space, (256, 300), 0)

    def _draw_start(self, seed: int | None) -> tuple[float, ...]:
        if self.config.start_states == "gym_pusht":
            rng = self.np_random
            xy = [rng.integers(50, 450), rng.integers(50, 450), rng.integers(100, 400), rng.integers(100, 400)]
            return (*map(float, xy), float(rng.uniform(-np.pi, np.pi)))
        if seed is None:
            seed = int(self.np_random.integers(2**32))
        legacy_rng = np.random.RandomState(seed)
        xy = [legacy_rng.randint(*limits) for limits in ((50, 450), (50, 450), (100, 400), (100, 400))]
        return (*map(float, xy), float(legacy_rng.randn() * 2 * np.pi - np.pi))

    def _move_towards(self, target_x: float, target_y: float):
        agent, space, dt = self._agent, self._space, self.dt
        k_p, k_v = self.stiffness, self.damping
        vx, vy = self._velocity
        for _ in range(self.substeps):
            x, y = agent.position
            # Terms in gym-pusht's order: floating-point sums then agree to the last bit.
            vx += (k_p * (target_x - x) + k_v * (0.0 - vx)) * dt
            vy += (k_p * (target_y - y) + k_v * (0.0 - vy)) * dt
            agent.velocity = vx, vy
            space.step(dt)
        self._velocity = (vx, vy)

    def _block_pose(self) -> tuple[float, float, float]:
        x, y = self._block.position
        return x, y, self._block.angle

    # --- observations and pictures ---

    def _observe(self) -> dict[str, np.ndarray]:
        pose = self._block_pose()
        if self.config.environment_state == "keypoints":
            block = block_keypoints(*pose).ravel()  # (18,)
        else:
            block = np.array([pose[0], pose[1], pose[2] % math.tau])  # (3,)
        obs = {
            STATE: np.array(self._agent.position, dtype=np.float32),  # (2,)
            ENVIRONMENT_STATE: block.astype(np.float32),
        }
        if self.config.pixels:
            obs[TOP_CAMERA] = self._draw(self.config.image_size, show_goal=self.config.show_goal)  # (96, 96, 3)
        return obs

    def render(self) -> np.ndarray:
        """The world from above, a red cross at the last action's target: uint8 (render_size, render_size, 3)."""
        size = self.config.render_size
        picture = self._draw(size, show_goal=True)
        if self._target is not None:
            column, row = (int(number) for number in self.action_to_pixels(self._target))
            self._sim.cv2.drawMarker(
                picture,
                (column, row),
                color=(255, 0, 0),
                markerType=self._sim.cv2.MARKER_CROSS,
                markerSize=max(8 * size // 96, 1),
                thickness=max(size // 96, 1),
            )
        return picture

    def action_to_pixels(self, actions: np.ndarray) -> np.ndarray:
        """Where targets (..., 2) lie in the picture of render(): (..., 2) columns and rows, in pixels."""
        return np.asarray(actions, dtype=np.float64) * (self.config.render_size / WORLD_SIZE)

    def _draw(self, size: int, *, show_goal: bool) -> np.ndarray:
        # The same picture as gym-pusht's, bit for bit; what never moves is drawn once.
        if self._canvas is None:
            self._canvas = _Canvas(self._sim, self._walls, self._agent, self._tee)
        canvas, block = self._canvas, self._block
        canvas.surface.blit(canvas.background(self.goal_pose if show_goal else None), (0, 0))
        for vertices in canvas.tee:
            corners = [block.local_to_world(vertex) for vertex in vertices]
            canvas.pen.draw_polygon(corners, 0.0, canvas.tee_color, canvas.tee_color)
        canvas.pen.draw_circle(self._agent.position, 0.0, 15.0, canvas.agent_color, canvas.agent_color)
        canvas.surface.blit(canvas.foreground, (0, 0))
        self._space.debug_draw(canvas.contact_pen)
        # get_view("2") is (512, 512) uint32, column first, without a copy; its bytes are blue, green, red, unused.
        pixels = np.asarray(canvas.surface.get_view("2")).T.view(np.uint8).reshape(WORLD_SIZE, WORLD_SIZE, 4)
        cv2 = self._sim.cv2
        return cv2.cvtColor(cv2.resize(pixels, (size, size)), cv2.COLOR_BGRA2RGB)


def block_keypoints(x: float, y: float, angle: float) -> np.ndarray:
    """The 9 keypoints of a block at (x, y) in pixels, turned by angle in radians: (9, 2), pixels."""
    cos, sin = math.cos(angle), math.sin(angle)
    return KEYPOINTS @ np.array([[cos, sin], [-sin, cos]]) + (x, y)


def tee_coverage(block: tuple[float, float, float], goal: tuple[float, float, float]) -> float:
    """Fraction of the goal's area that the block covers, exactly; poses are (x, y, angle) in pixels and radians.

    In the goal's frame the goal is two upright rectangles, and four cuts leave what a block rectangle shares with each.
    """
    turn = block[2] - goal[2]
    cos, sin = math.cos(turn), math.sin(turn)
    goal_cos, goal_sin = math.cos(goal[2]), math.sin(goal[2])
    dx, dy = block[0] - goal[0], block[1] - goal[1]
    x, y = goal_cos * dx + goal_sin * dy, goal_cos * dy - goal_sin * dx  # the block's position in the goal's frame
    area = 0.0
    for left, right, low, high in TEE_RECTANGLES:
        corners = [
            (x + cos * u - sin * v, y + sin * u + cos * v)
            for u, v in ((left, low), (right, low), (right, high), (left, high))
        ]
        for x_min, x_max, y_min, y_max in TEE_RECTANGLES:
            part = _cut(corners, 0, 1.0, x_min)
            part = _cut(part, 0, -1.0, -x_max)
            part = _cut(part, 1, 1.0, y_min)
            part = _cut(part, 1, -1.0, -y_max)
            area += _polygon_area(part)
    return area / TEE_AREA


def _cut(polygon: list[tuple[float, float]], axis: int, sign: float, bound: float) -> list[tuple[float, float]]:
    # The part of a convex polygon where sign * coordinate >= bound (Sutherland & Hodgman 1974).
    if not polygon:
        return polygon
    kept = []
    previous = polygon[-1]
    depth_before = sign * previous[axis] - bound
    for point in polygon:
        depth = sign * point[axis] - bound
        if (depth < 0) != (depth_before < 0):
            s = depth_before / (depth_before - depth)
            kept.append((previous[0] + s * (point[0] - previous[0]), previous[1] + s * (point[1] - previous[1])))
        if depth >= 0:
            kept.append(point)
        previous, depth_before = point, depth
    return kept


def _polygon_area(polygon: list[tuple[float, float]]) -> float:
    if len(polygon) < 3:
        return 0.0
    twice = 0.0
    x0, y0 = polygon[-1]
    for x, y in polygon:
        twice += x0 * y - x * y0
        x0, y0 = x, y
    return 0.5 * abs(twice)


def _five_numbers(state) -> list[float]:
    vector = np.asarray(state, dtype=np.float64)
    if vector.shape != (5,) or not np.isfinite(vector).all():
        raise ValueError(
            "options['state'] must be five finite numbers (agent x, y, block x, y in pixels, block angle in radians), "
            f"got {vector.tolist()}"
        )
    return vector.tolist()


class _Simulator(NamedTuple):
    env: type
    """gym-pusht's PushTEnv, which makes the bodies."""
    pen: type
    """gym-pusht's DrawOptions, which draws shapes on a pygame surface."""
    pygame: object
    cv2: object


def _load_simulator() -> _Simulator:
    # pygame draws in memory; without a display it must not look for one. A driver that the user chose stays.
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="pkg_resources is deprecated")  # raised inside pygame
            import cv2
            import gym_pusht.envs.pusht as gym_pusht
            import pygame
    except ModuleNotFoundError as error:
        raise MissingExtraError("gym-pusht", "pusht") from error
    return _Simulator(gym_pusht.PushTEnv, gym_pusht.DrawOptions, pygame, cv2)


class _Canvas:
    """The pygame surface of one environment and what is drawn once: goals below the bodies, walls above them."""

    def __init__(self, sim: _Simulator, walls, agent: pymunk.Body, tee):
        pygame = self._pygame = sim.pygame
        self.surface = pygame.Surface(CANVAS_SIZE, depth=32)
        self.pen = sim.pen(self.surface)
        self.contact_pen = sim.pen(self.surface)  # short red strokes where bodies touch: the recordings show them too
        self.contact_pen.flags = pymunk.SpaceDebugDrawOptions.DRAW_COLLISION_POINTS
        self.tee = [shape.get_vertices() for shape in tee]
        self.tee_color = _color(tee[0].color)
        self.agent_color = _color(next(iter(agent.shapes)).color)
        self._backgrounds: dict[tuple[float, float, float] | None, object] = {}

        self.foreground = pygame.Surface(CANVAS_SIZE, depth=32)
        self.foreground.fill(WHITE)
        self.foreground.set_colorkey(WHITE, pygame.RLEACCEL)
        pen = sim.pen(self.foreground)
        for wall in walls:
            pen.draw_fat_segment(wall.a, wall.b, wall.radius, _color(wall.color), _color(wall.color))

    def background(self, goal: tuple[float, float, float] | None):
        """White with a goal at this pose, or without one; each is drawn once."""
        if goal not in self._backgrounds:
            pygame = self._pygame
            background = self._backgrounds[goal] = pygame.Surface(CANVAS_SIZE, depth=32)
            background.fill(WHITE)
            if goal is not None:
                body = pymunk.Body()
                body.position, body.angle = goal[:2], goal[2]
                for vertices in self.tee:
                    corners = [body.local_to_world(vertex) for vertex in vertices]
                    rounded = [(round(x), round(y)) for x, y in corners]
                    pygame.draw.polygon(background, pygame.Color("LightGreen"), rounded)
        return self._backgrounds[goal]


def _color(color) -> SpaceDebugColor:
    return SpaceDebugColor(*map(float, color))
