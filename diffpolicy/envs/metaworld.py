"""Meta-World: a Sawyer arm over a table, 50 tasks, each asked for in words.

Yu et al. 2019, arXiv:1910.10897; McLean et al. 2025, Meta-World+, arXiv:2505.11289, whose v3 tasks, physics, rewards and
scripted policies (the extra `metaworld`) are used as they are. Lengths are metres: x to the robot's right, y away from
it, z up.

    seed -- task stream --> task ------------- decides the scene: an open drawer, a window, ...
         -- place stream -> random numbers --- where object and goal lie
         -- words stream -> wording ---------- "slide the drawer shut"

The scene of Meta-World gives its task away, so that a policy may ignore the words and still do well. With swap=True the
words are those of another task: what is asked cannot be fulfilled then, and a scene that is solved all the same shows
that the policy did not listen (info["goals_reached"]).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import gymnasium as gym
import numpy as np

from diffpolicy.envs.base import LanguageEnv
from diffpolicy.envs.metaworld_scene import (
    CAMERA,
    NUM_RANDOM,
    PHYSICS_NAMES,
    Scene,
    borrow_scene,
    load_metaworld,
    return_scene,
)
from diffpolicy.envs.metaworld_sentences import SENTENCES
from diffpolicy.spec import ENVIRONMENT_STATE, IMAGES, STATE, unknown_name

GOAL = "observation.goal"
CORNER_CAMERA = IMAGES + CAMERA

TASKS = tuple(SENTENCES)
TASK_SETS = MappingProxyType(
    {
        "all": TASKS,
        "mt5": ("button-press-topdown", "drawer-close", "drawer-open", "window-close", "window-open"),
        "mt10": (
            "button-press-topdown",
            "door-open",
            "drawer-close",
            "drawer-open",
            "peg-insert-side",
            "pick-place",
            "push",
            "reach",
            "window-close",
            "window-open",
        ),
    }
)
"""Names that stand for several tasks; `mt10` is Meta-World's, `mt5` the half of it whose goal does not move by itself."""
ALMOST = 0.99
"""Reward that nothing but success exceeds: Meta-World's own may reach 10 of 10 before it."""
TASK_STREAM, PLACE_STREAM, WORDS_STREAM, SWAP_STREAM = 0, 1, 2, 3
"""What seeds a draw besides the seed of the episode."""


@dataclass(frozen=True, kw_only=True)
class MetaworldConfig:
    tasks: tuple[str, ...] = ("mt10",)
    """Which tasks there are: names as `drawer-open`, or `mt5`, `mt10`, `all`."""
    goal: str = ""
    """Always ask for this goal, by its name (the task's first wording); "" draws one."""
    goals: str = "train"
    """`train` or `all`, which is the same here: no goal is held out, so that `held_out` allows none."""
    wordings: str = "seen"
    """`seen`: sentences that demonstrations use; `unseen`: others; `first`: the goal's name."""
    swap: bool = False
    """Say the words of another task than that of the scene."""
    max_steps: int = 300
    """Steps after which an episode is truncated; scripted policies mostly need 35 to 140, the slowest 200."""
    pixels: bool = False
    """Observe observation.images.corner2 as well."""
    image_size: int = 96
    """Side of the observed image, pixels."""
    render_size: int = 384
    """Side of the picture of render(), pixels."""

    def __post_init__(self):
        if not self.tasks:
            raise ValueError(f"env.tasks must name at least one of {sorted((*TASK_SETS, *TASKS))}")
        for name in self.tasks:
            if name not in TASKS and name not in TASK_SETS:
                raise unknown_name("env.tasks", name, (*TASK_SETS, *TASKS))
        known = [SENTENCES[task].seen[0] for task in self.task_names]
        if self.goal and self.goal not in known:
            raise unknown_name("env.goal", self.goal, known)
        if self.goals not in ("train", "held_out", "all"):
            raise unknown_name("env.goals", self.goals, ("train", "held_out", "all"))
        if self.goals == "held_out" and not self.goal:
            raise ValueError("env.goals=held_out allows no goal: metaworld holds none out; use train or all")
        if self.wordings not in ("seen", "unseen", "first"):
            raise unknown_name("env.wordings", self.wordings, ("seen", "unseen", "first"))
        if self.swap and len(self.task_names) < 2:
            raise ValueError(f"env.swap needs a second task whose words can be said, got env.tasks={list(self.tasks)}")
        for name in ("max_steps", "image_size", "render_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"env.{name} must be at least 1, got {getattr(self, name)}")

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks that `tasks` stands for, each once."""
        return tuple(dict.fromkeys(task for name in self.tasks for task in TASK_SETS.get(name, (name,))))


class MetaworldEnv(LanguageEnv):
    """One arm over one table; which task it is changes from episode to episode.

    An action is (dx, dy, dz, grip), each in [-1, 1] and clipped to it, as in Meta-World: the pose that drags the hand moves
    by dx, dy, dz centimetres, and the fingers push together with grip (negative: apart). Observations, float32:
        observation.state              (4,) the hand's x, y, z (m) and how far the fingers are open, 0..1
        observation.environment_state  (14,) x, y, z (m) and a quaternion of the task's object and of its second one; zeros
                                       for what the task does not have
        observation.goal               (3,) where the object, or the hand, is to go (m): visible, as in Meta-World's
                                       multi-task benchmarks, since no words say where; a task YAML may leave it out
        observation.images.corner2     (96, 96, 3) uint8, with pixels=True
    Reward is 1 on success and Meta-World's / 10, at most 0.99, before. Each run of len(tasks) seeds, from a multiple of it
    on, asks every task once. With swap the reward of what is asked is always 0, since its object is not there.
    """

    fps = 80.0  # 5 physics steps of 2.5 ms
    action_names = ("dx", "dy", "dz", "grip")
    action_units = "cm"
    observation_names = MappingProxyType(
        {
            STATE: ("hand_x", "hand_y", "hand_z", "gripper_opening"),
            ENVIRONMENT_STATE: tuple(f"{o}_{n}" for o in ("object", "second") for n in "x y z qx qy qz qw".split()),
            GOAL: ("goal_x", "goal_y", "goal_z"),
        }
    )
    observation_units = MappingProxyType({STATE: "m", ENVIRONMENT_STATE: "m", GOAL: "m"})
    state_names = (
        *(f"{body}_{axis}" for body in ("hand", "object") for axis in "xyz"),  # cm; follow from the rest, for comparison
        "task", "asked_task", "wording", *(f"random_{i}" for i in range(NUM_RANDOM)), *PHYSICS_NAMES,
    )  # fmt: skip

    def __init__(self, config: MetaworldConfig | None = None):
        load_metaworld()  # a missing simulator is told now, not at the first reset
        self.config = config = config or MetaworldConfig()
        self.max_steps = config.max_steps
        self.wordings = MappingProxyType({SENTENCES[t].seen[0]: SENTENCES[t] for t in config.task_names})
        box = {
            key: gym.spaces.Box(-np.inf, np.inf, (len(names),), np.float32)
            for key, names in self.observation_names.items()
        }
        if config.pixels:
            box[CORNER_CAMERA] = gym.spaces.Box(0, 255, (config.image_size, config.image_size, 3), np.uint8)
        self.observation_space = gym.spaces.Dict(box)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (4,), np.float32)
        self._scene: Scene | None = None
        self._step = 0

    # --- episodes ---

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Starts the episode of `seed`, or goes on from a recorded options["state"]; returns (obs, info).

        Raises:
            ValueError: an unknown option, or a state that is not one of this environment's tasks.
        """
        super().reset(seed=seed)
        options = dict(options or {})
        state = options.pop("state", None)
        if options:
            raise unknown_name("reset option", next(iter(options)), ["state"])
        if state is not None:
            self._set_state(state)
        else:
            self._draw_episode(int(self.np_random.integers(2**31)) if seed is None else seed)
        self._step = 0
        solved = self._scene.is_solved()
        return self._observe(), self._judge(0.0, solved)[2]

    def step(self, action):
        """Plays `action` (4,) for 12.5 ms; returns obs, reward, terminated, truncated, info.

        Raises:
            ValueError: the action is not four finite numbers.
        """
        scene = self._running_scene("step()")
        action = np.asarray(action, dtype=np.float32)
        if action.shape != (4,) or not np.isfinite(action).all():
            raise ValueError(f"action must be 4 finite numbers (dx, dy, dz, grip), got {action!r}")
        reward, success, info = self._judge(*scene.step(np.clip(action, -1, 1)))
        self._step += 1
        return self._observe(), reward, success, self._step >= self.max_steps, info

    def get_state(self) -> np.ndarray:
        scene = self._running_scene("get_state()")
        seen = scene.observation
        asked = [TASKS.index(scene.task), TASKS.index(self._asked_task), self._wording]
        return np.concatenate([100 * seen[:3], 100 * seen[4:7], asked, self._numbers, scene.get_physics()])

    def close(self):
        if self._scene is not None:
            return_scene(self._scene)
            self._scene = None

    # --- what is asked ---

    def _draw_episode(self, seed: int) -> None:
        """Task, placement and words of a seed, each from a stream of its own."""
        tasks, config = self.config.task_names, self.config
        order = np.random.default_rng([TASK_STREAM, seed // len(tasks)]).permutation(len(tasks))
        drawn = tasks[order[seed % len(tasks)]]  # every task equally often
        task = next(t for t in tasks if SENTENCES[t].seen[0] == config.goal) if config.goal else drawn
        asked = task
        if config.swap:
            others = [t for t in tasks if t != task]
            asked = others[int(np.random.default_rng([SWAP_STREAM, seed]).integers(len(others)))]
        words = SENTENCES[asked]
        first = len(words.seen) if config.wordings == "unseen" else 0
        count = {"seen": len(words.seen), "unseen": len(words.unseen), "first": 1}[config.wordings]
        position = np.random.default_rng([WORDS_STREAM, seed]).random()  # in [0, 1)
        self._ask(task, asked, first + int(position * count))
        place = int(np.random.SeedSequence([PLACE_STREAM, seed]).generate_state(1)[0])
        self._numbers = self._scene.draw(place)
        self._scene.begin(self._numbers)

    def _ask(self, task: str, asked: str, wording: int) -> None:
        """Takes the scene of `task` and says sentence number `wording` of the task `asked`."""
        if self._scene is None or self._scene.task != task:
            self.close()
            self._scene = borrow_scene(task)
        self._asked_task, self._wording = asked, wording
        words = SENTENCES[asked]
        self.goal, self.task = words.seen[0], (*words.seen, *words.unseen)[wording]
        self.scene_goals = (SENTENCES[task].seen[0],)

    def _set_state(self, state) -> None:
        state = np.asarray(state, dtype=np.float64)
        if state.shape != (len(self.state_names),) or not np.isfinite(state).all():
            raise ValueError(
                f"options['state'] must be {len(self.state_names)} finite numbers (env.state_names), got shape {state.shape}"
            )
        _, (task, asked, wording), numbers, physics = np.split(state, np.cumsum([6, 3, NUM_RANDOM]))
        for name, index in (("task", task), ("asked_task", asked)):
            if index not in range(len(TASKS)):
                raise ValueError(f"{name} must be an integer in [0, {len(TASKS) - 1}], got {index}")
        words = SENTENCES[TASKS[int(asked)]]
        if wording not in range(len(words.seen) + len(words.unseen)):
            raise ValueError(
                f"wording must be an integer in [0, {len(words.seen) + len(words.unseen) - 1}], got {wording}"
            )
        self._ask(TASKS[int(task)], TASKS[int(asked)], int(wording))
        self._numbers = numbers
        self._scene.begin(numbers)
        self._scene.is_solved()  # rewards of bin-picking remember the first distance they saw: that of the start
        self._scene.set_physics(physics)

    def _judge(self, raw_reward: float, solved: bool) -> tuple[float, bool, dict]:
        """(reward, success, info) of what is asked; info holds the scene's own task too."""
        (scene_goal,) = self.scene_goals
        scene_reward = 1.0 if solved else min(max(raw_reward / 10, 0.0), ALMOST)
        rewards = {self.goal: 0.0, scene_goal: scene_reward}
        success = solved and self.goal == scene_goal
        info = {"is_success": success, "goal_rewards": rewards, "goals_reached": self.scene_goals if solved else ()}
        return rewards[self.goal], success, info

    # --- what there is to see ---

    @property
    def scene(self) -> Scene:
        """The world of this episode, for scripted policies."""
        return self._running_scene("scene")

    def _observe(self) -> dict[str, np.ndarray]:
        seen = self._scene.observation.astype(np.float32)
        obs = {STATE: seen[:4], ENVIRONMENT_STATE: seen[4:18], GOAL: seen[36:]}
        if self.config.pixels:
            obs[CORNER_CAMERA] = self._scene.picture(self.config.image_size)  # (96, 96, 3)
        return obs

    def render(self) -> np.ndarray:
        """The table from the corner: uint8 (render_size, render_size, 3).

        Raises:
            MissingGraphicsError: MuJoCo has nothing to draw with here; the message says what to install.
        """
        return self._running_scene("render()").picture(self.config.render_size)

    def action_to_pixels(self, actions: np.ndarray) -> np.ndarray:
        """Where actions (..., T, 4), played one after the other from now on, take the fingers: (..., T, 2), pixels.

        One action (4,) gives one point (2,). Points are columns and rows in the picture of render().
        """
        scene = self._running_scene("action_to_pixels()")
        actions = np.asarray(actions, dtype=np.float64)
        path = scene.tool_path(actions[None] if actions.ndim == 1 else actions)
        return scene.to_pixels(path[0] if actions.ndim == 1 else path, self.config.render_size)

    def _running_scene(self, what: str) -> Scene:
        if self._scene is None:
            raise ValueError(f"call reset() before {what}")
        return self._scene
