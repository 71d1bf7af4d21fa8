"""One Meta-World task as a world that can be drawn, saved and set back exactly; metaworld.py makes episodes of it.

A scene is decided by the task's random numbers (where objects and goal lie): Meta-World's reset measures a dozen lengths
that its rewards need, so we set back to a saved state by resetting with the same numbers and putting the physics on top.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np

from diffpolicy.spec import MissingExtraError

NUM_RANDOM = 6
"""Most random numbers that a task draws."""
NUM_POSITIONS, NUM_VELOCITIES = 18, 17
"""Most generalised positions and velocities of a task; smaller ones are padded with zeros."""
PHYSICS_NAMES = (
    "time",
    *(f"qpos_{i}" for i in range(NUM_POSITIONS)),
    *(f"qvel_{i}" for i in range(NUM_VELOCITIES)),
    *(f"warmstart_{i}" for i in range(NUM_VELOCITIES)),
    *(f"hand_target_{i}" for i in range(7)),
)
"""What get_physics() holds: MuJoCo's state, its solver's last accelerations, and the pose that drags the hand."""
CAMERA = "corner2"
CAMERA_POSITION = (0.75, 0.075, 0.7)
"""Metres. Nearer than Meta-World's own (1.3, -0.2, 1.1), as usual for learning from pictures: the table fills them."""


class MissingGraphicsError(MissingExtraError):
    """MuJoCo finds no OpenGL to draw with; the message says what to install."""

    def __init__(self, cause: BaseException):
        backend = os.environ.get("MUJOCO_GL") or "glfw, which needs a display"
        ImportError.__init__(
            self,
            f"MuJoCo cannot draw here (MUJOCO_GL: {backend}; {type(cause).__name__}); install Debian's "
            "libegl1 libegl-mesa0 libgl1-mesa-dri and set MUJOCO_GL=egl, or libosmesa6 and MUJOCO_GL=osmesa",
        )


def load_metaworld() -> SimpleNamespace:
    """The parts of metaworld and mujoco that we use, imported on first demand.

    Raises:
        MissingExtraError: metaworld is not installed, with the pip command.
        MissingGraphicsError: MUJOCO_GL names a library that is not there.
    """
    # MuJoCo chooses how to draw when it is imported; its default needs a display. What the user chose stays.
    if sys.platform == "linux" and not os.environ.get("DISPLAY") and "MUJOCO_GL" not in os.environ:
        for backend, library in (("egl", "libEGL.so.1"), ("osmesa", "libOSMesa.so.8")):
            try:
                ctypes.CDLL(library)
            except OSError:
                continue
            os.environ["MUJOCO_GL"] = backend
            break
    try:
        import mujoco
    except ModuleNotFoundError as error:
        raise MissingExtraError("metaworld", "metaworld") from error
    except (ImportError, AttributeError) as error:  # PyOpenGL without its library fails with an AttributeError
        raise MissingGraphicsError(error) from error
    try:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP
    except ModuleNotFoundError as error:
        raise MissingExtraError("metaworld", "metaworld") from error
    return SimpleNamespace(mujoco=mujoco, worlds=ALL_V3_ENVIRONMENTS, experts=ENV_POLICY_MAP)


class Scene:
    """The world of one task.

    We differ from Meta-World in two things: derived quantities are brought up to date at the end of a reset (its first
    observation is stale for tasks that move a joint last, such as window-close), and the goal is not clipped.
    """

    def __init__(self, task: str):
        parts = load_metaworld()
        self._mujoco = parts.mujoco
        self.task = task
        self._world = parts.worlds[f"{task}-v3"]()
        self._world._set_task_called = True  # we place objects ourselves, not by one of Meta-World's 50 stored tasks
        self._world._partially_observable = False
        self._world.__dict__.pop("sawyer_observation_space", None)  # a cached property that depends on the line above
        model = self._world.model
        assert model.nq <= NUM_POSITIONS and model.nv <= NUM_VELOCITIES and model.na == 0, (task, model.nq, model.nv)
        self._camera = model.camera(CAMERA).id
        model.cam_pos[self._camera] = CAMERA_POSITION
        self._renderers: dict[int, Any] = {}

    # --- episodes ---

    def draw(self, seed: int) -> np.ndarray:
        """The task's random numbers for a seed, (NUM_RANDOM,), padded with zeros; leaves the world anywhere."""
        world = self._world
        world._freeze_rand_vec, world.seeded_rand_vec = False, True
        world.seed(seed)
        world.reset_model()  # some tasks draw again until goal and object are far enough apart
        drawn = world._last_rand_vec
        return np.concatenate([drawn, np.zeros(NUM_RANDOM - len(drawn))])

    def begin(self, numbers: np.ndarray) -> None:
        """Starts the episode that these random numbers describe; what was before leaves no trace."""
        world = self._world
        world._freeze_rand_vec = True
        world._last_rand_vec = np.array(numbers[: world._random_reset_space.low.size])
        world.reset()
        self._refresh()

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        """Plays one action (4,); returns Meta-World's reward in [0, 10] and whether the task is solved."""
        self._world.curr_path_length = 0  # how long an episode lasts is not the scene's business
        _, reward, _, _, info = self._world.step(action)
        return float(reward), bool(info["success"])

    def is_solved(self) -> bool:
        """Whether the task is solved now, as `step` would judge it."""
        return bool(self._world.evaluate_state(self.observation, np.zeros(4, dtype=np.float32))[1]["success"])

    # --- what there is to see ---

    @property
    def observation(self) -> np.ndarray:
        """Meta-World's 39 numbers, which its scripted policies read: (18,) now, the same again as past, (3,) goal."""
        now = self._world._get_curr_obs_combined_no_goal()
        return np.concatenate([now, now, self.goal_xyz])

    @property
    def goal_xyz(self) -> np.ndarray:
        """Where the object, or the hand, is to go: (3,), m."""
        return np.array(self._world._get_pos_goal(), dtype=np.float64)

    @property
    def tool_xyz(self) -> np.ndarray:
        """The point between the fingers, (3,), m."""
        return np.array(self._world.tcp_center)

    def tool_path(self, actions: np.ndarray) -> np.ndarray:
        """Where the tool is told to be after each of the actions (..., T, 4), played from now on: (..., T, 3), m."""
        world = self._world
        start = np.array(world.data.mocap_pos[0])
        target, path = np.broadcast_to(start, (*actions.shape[:-2], 3)), []
        for k in range(actions.shape[-2]):
            move = np.clip(actions[..., k, :3], -1, 1) * world.action_scale
            target = np.clip(target + move, world.mocap_low, world.mocap_high)
            path.append(target)
        return np.stack(path, axis=-2) + (self.tool_xyz - start)

    # --- physics ---

    def get_physics(self) -> np.ndarray:
        """All that moves, (len(PHYSICS_NAMES),)."""
        data, model = self._world.data, self._world.model
        spare = np.zeros(NUM_VELOCITIES - model.nv)
        return np.concatenate(
            [
                [data.time],
                data.qpos,
                np.zeros(NUM_POSITIONS - model.nq),
                data.qvel,
                spare,
                data.qacc_warmstart,
                spare,
                data.mocap_pos[0],
                data.mocap_quat[0],
            ]
        )

    def set_physics(self, physics: np.ndarray) -> None:
        """Puts everything where get_physics() found it; the episode must have begun with the same random numbers."""
        data, model = self._world.data, self._world.model
        ends = np.cumsum([1, NUM_POSITIONS, NUM_VELOCITIES, NUM_VELOCITIES, 3])
        time, qpos, qvel, warmstart, position, quaternion = np.split(physics, ends)
        data.time = time[0]
        data.qpos[:], data.qvel[:] = qpos[: model.nq], qvel[: model.nv]
        data.mocap_pos[0], data.mocap_quat[0] = position, quaternion
        data.qacc_warmstart[:] = warmstart[: model.nv]
        self._refresh()

    def _refresh(self) -> None:
        """Brings derived quantities up to date; what the next step starts from stays as it is, to the last bit."""
        data = self._world.data
        warmstart = data.qacc_warmstart.copy()
        self._mujoco.mj_forward(self._world.model, data)
        data.qacc_warmstart[:] = warmstart
        self._world._prev_obs = self._world._get_curr_obs_combined_no_goal()

    # --- pictures ---

    def picture(self, size: int) -> np.ndarray:
        """The table from CAMERA, the right way up: uint8 (size, size, 3).

        Raises:
            MissingGraphicsError: no OpenGL here.
        """
        if size not in self._renderers:
            self._renderers[size] = self._make_renderer(size)
        renderer = self._renderers[size]
        renderer.update_scene(self._world.data, camera=self._camera)
        return np.ascontiguousarray(renderer.render()[::-1, ::-1])  # the camera hangs upside down

    @property
    def holds_pictures(self) -> bool:
        """Whether it keeps what it draws with: about 50 MB for each size."""
        return bool(self._renderers)

    def forget_pictures(self) -> None:
        """Frees what it draws with; the next picture makes it anew."""
        for renderer in self._renderers.values():
            atexit.unregister(renderer.close)
            renderer.close()
        self._renderers.clear()

    def to_pixels(self, points: np.ndarray, size: int) -> np.ndarray:
        """Columns and rows (..., 2) of points (..., 3), m, in picture(size)."""
        data = self._world.data
        seen = (points - data.cam_xpos[self._camera]) @ data.cam_xmat[self._camera].reshape(3, 3)  # z points backwards
        focal = size / 2 / np.tan(np.radians(self._world.model.cam_fovy[self._camera]) / 2)  # pixels
        right, up = seen[..., 0] / -seen[..., 2], seen[..., 1] / -seen[..., 2]
        return size / 2 + focal * np.stack([-right, up], axis=-1)  # turned by half a turn, as the picture is

    def _make_renderer(self, size: int):
        mujoco, model = self._mujoco, self._world.model
        # In software these cost ten times the rest of a frame, and an unused shadow map 64 MB.
        model.vis.quality.offsamples = model.vis.quality.shadowsize = 0
        model.vis.global_.offwidth = model.vis.global_.offheight = max(size, model.vis.global_.offwidth)
        # a renderer that could not be made is closed all the same, and asks for these then
        tidy = type("Renderer", (mujoco.Renderer,), {"_mjr_context": None, "_gl_context": None})
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of glfw, before the error
                renderer = tidy(model, height=size, width=size)
        except Exception as error:  # glfw, EGL and OSMesa each have their own way to say that there is nothing
            raise MissingGraphicsError(error) from error
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            renderer.scene.flags[flag] = 0
        atexit.register(renderer.close)  # before MuJoCo closes the display that it draws to
        return renderer


MAX_IDLE_PICTURES = 16
"""Idle scenes that may keep what they draw with."""
_IDLE: defaultdict[str, list[Scene]] = defaultdict(list)
"""Scenes that no environment uses now: building one takes .1 s, with pictures .3 s, beginning an episode .01 s."""


def borrow_scene(task: str) -> Scene:
    """A scene of the task that nobody else uses until it is given back."""
    return _IDLE[task].pop() if _IDLE[task] else Scene(task)


def return_scene(scene: Scene) -> None:
    """Gives a scene back; its caller forgets it."""
    if sum(idle.holds_pictures for scenes in _IDLE.values() for idle in scenes) >= MAX_IDLE_PICTURES:
        scene.forget_pictures()
    _IDLE[scene.task].append(scene)
