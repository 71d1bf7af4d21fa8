"""Push-T with two goals, where words alone say which: the world, physics and start states of pusht.py.

    "push the T to the centre"          the block belongs at (256, 256, pi/4), as in the classic demonstrations
    "push the T to the lower right"     the block belongs at (356, 356, pi/4), as in the second human set

Neither the observed numbers nor (unless show_goal) the observed images hold the goal, so that a policy that does not
understand the words cannot do better than guess. `diffpolicy data merge --wordings pusht_language` deals the seen
wordings out to demonstrations; the unseen ones are other sentences made of the same words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType

import gymnasium as gym
import numpy as np

from diffpolicy.envs.base import LanguageEnv, Wordings
from diffpolicy.envs.pusht import SUCCESS_COVERAGE, TOP_CAMERA, PushtConfig, PushtEnv, tee_coverage
from diffpolicy.spec import GOAL_IMAGE, unknown_name

CENTRE = Wordings(
    seen=(
        "push the T to the centre",
        "move the T to the middle of the table",
        "bring the block to the centre of the table",
        "slide the T-shaped block into the middle",
        "the T belongs in the centre of the table",
        "put the T in the middle",
        "shove the block towards the centre of the board",
        "place the T-shaped block in the middle of the board",
        "take the T to the centre",
        "the block should end up in the middle",
        "please push the block to the middle of the table",
        "get the T-shaped block to the centre of the board",
    ),
    unseen=(
        "place the block in the centre",
        "please slide the T to the middle of the board",
        "the T-shaped block should end up in the centre of the table",
        "move the block towards the middle",
        "get the T into the centre of the board",
        "the block belongs in the middle of the table",
    ),
)
LOWER_RIGHT = Wordings(
    seen=(
        "push the T to the lower right",
        "move the T to the bottom right of the table",
        "bring the block to the lower right of the table",
        "slide the T-shaped block into the bottom right",
        "the T belongs in the lower right of the table",
        "put the T in the bottom right",
        "shove the block towards the lower right of the board",
        "place the T-shaped block in the bottom right of the board",
        "take the T to the lower right",
        "the block should end up in the bottom right",
        "please push the block to the bottom right of the table",
        "get the T-shaped block to the lower right of the board",
    ),
    unseen=(
        "place the block in the lower right",
        "please slide the T to the bottom right of the board",
        "the T-shaped block should end up in the lower right of the table",
        "move the block towards the bottom right",
        "get the T into the lower right of the board",
        "the block belongs in the bottom right of the table",
    ),
)
GOAL_POSES = MappingProxyType(
    {CENTRE.seen[0]: (256.0, 256.0, math.pi / 4), LOWER_RIGHT.seen[0]: (356.0, 356.0, math.pi / 4)}
)
"""Name of each goal -> x, y in pixels and the angle in radians."""
PUSHER_IN_GOAL_IMAGE = (-100.0, 100.0)
"""Where a goal image shows the pusher, from the goal, pixels: at the foot of the stem, where many demonstrations end."""
GOAL_STREAM, WORDS_STREAM = 1, 2
"""What seeds the draws of goal and wording, besides the seed of the episode."""


@dataclass(frozen=True, kw_only=True)
class PushtLanguageConfig:
    goal: str = ""
    """Always ask for this goal, by its name; "" draws one of those that `goals` allows."""
    goals: str = "train"
    """`train` or `all`, which is the same here: no goal is held out, so that `held_out` allows none."""
    wordings: str = "seen"
    """`seen`: sentences that demonstrations use; `unseen`: others; `first`: the goal's name."""
    swap: bool = False
    """Ask for the other goal than without swap, from the same start state."""
    environment_state: str = "keypoints"
    """`keypoints`: the 9 keypoints of the block, x0 y0 x1 y1 ... (18); `pose`: block x, y, angle in [0, 2 pi) (3)."""
    pixels: bool = False
    """Also observe the world from above, in colour."""
    image_size: int = 96
    """Height and width of the observed image and of the goal image, pixels."""
    show_goal: bool = False
    """Draw the asked goal into observed images; then a policy with a camera need not understand a word."""
    goal_image: bool = False
    """Also observe a picture of the block at the asked goal, the same at every step."""
    start_states: str = "published"
    """`published`: RandomState(seed), as in the published scores; `gym_pusht`: what gym-pusht's reset(seed) draws."""
    action_noise: float = 0.0
    """Standard deviation, pixels, of Gaussian noise added to every target; drawn from the episode's seed."""
    render_size: int = 512
    """Height and width of the picture of render(), pixels."""

    def __post_init__(self):
        if self.goal and self.goal not in GOAL_POSES:
            raise unknown_name("env.goal", self.goal, GOAL_POSES)
        if self.goals not in ("train", "held_out", "all"):
            raise unknown_name("env.goals", self.goals, ("train", "held_out", "all"))
        if self.goals == "held_out" and not self.goal:
            raise ValueError("env.goals=held_out allows no goal: pusht_language holds none out; use train or all")
        if self.wordings not in ("seen", "unseen", "first"):
            raise unknown_name("env.wordings", self.wordings, ("seen", "unseen", "first"))
        self.world()  # checks what the two have in common

    def world(self, **choices) -> PushtConfig:
        """The Push-T world that these choices describe."""
        return PushtConfig(
            environment_state=self.environment_state,
            image_size=self.image_size,
            start_states=self.start_states,
            action_noise=self.action_noise,
            render_size=self.render_size,
            **{"pixels": self.pixels, "show_goal": self.show_goal, **choices},
        )


class PushtLanguageEnv(PushtEnv, LanguageEnv):
    """Push-T whose words say to which of two goals the block belongs; both are judged at every step.

    The same seed gives the same start state, action noise, goal and wording, each from a stream of its own: for one seed
    the start is that of `pusht`, whatever is asked. Observations are those of `pusht`, and with goal_image=True
    `goal.image` (image_size, image_size, 3) uint8, without a drawn goal.
    """

    wordings = MappingProxyType({words.seen[0]: words for words in (CENTRE, LOWER_RIGHT)})
    scene_goals = tuple(GOAL_POSES)

    def __init__(self, config: PushtLanguageConfig | None = None):
        self.choices = config or PushtLanguageConfig()
        super().__init__(self.choices.world())
        self._goal_images: dict[str, np.ndarray] = {}
        if self.choices.goal_image:
            size = self.choices.image_size
            spaces = {**self.observation_space.spaces, GOAL_IMAGE: gym.spaces.Box(0, 255, (size, size, 3), np.uint8)}
            self.observation_space = gym.spaces.Dict(spaces)
        self._goal_stream, self._words_stream = np.random.default_rng(), np.random.default_rng()

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Starts an episode as PushtEnv does, and says what is asked in `task` and `goal`.

        Raises:
            ValueError: as PushtEnv.reset; or swap where the block lies at the other goal already.
        """
        if seed is not None:
            self._goal_stream = np.random.default_rng([GOAL_STREAM, seed])
            self._words_stream = np.random.default_rng([WORDS_STREAM, seed])
        self._start_episode(seed, options)
        self._ask()
        return self._observe(), self._judge()[2]

    def _ask(self):
        """Draws goal and wording; always one number of each stream, so that no option changes another's draw."""
        drawn = self.scene_goals[int(self._goal_stream.integers(len(self.scene_goals)))]
        self.goal = self.choices.goal or drawn
        if self.choices.swap:
            reached = self._judge()[2]["goals_reached"]
            others = [name for name in self.scene_goals if name != self.goal and name not in reached]
            if not others:
                raise ValueError(
                    f"env.swap asks for another goal than {self.goal!r}, but the block lies there from the start; "
                    "choose another start state"
                )
            self.goal = others[0]
        self.goal_pose = GOAL_POSES[self.goal]
        position = self._words_stream.random()  # in [0, 1), so that it is drawn alike from lists of different lengths
        wordings = self.wordings[self.goal]
        sentences = {"seen": wordings.seen, "unseen": wordings.unseen, "first": wordings.seen[:1]}[
            self.choices.wordings
        ]
        self.task = sentences[int(position * len(sentences))]

    def _judge(self) -> tuple[float, bool, dict]:
        """(reward, success, info) of the asked goal; info holds the rewards of both."""
        pose = self._block_pose()
        coverages = {name: tee_coverage(pose, goal_pose) for name, goal_pose in GOAL_POSES.items()}
        rewards = {name: min(coverage / SUCCESS_COVERAGE, 1.0) for name, coverage in coverages.items()}
        reached = tuple(name for name, coverage in coverages.items() if coverage > SUCCESS_COVERAGE)
        success, coverage = self.goal in reached, coverages[self.goal]
        info = {"is_success": success, "coverage": coverage, "goal_rewards": rewards, "goals_reached": reached}
        return rewards[self.goal], success, info

    def _observe(self) -> dict[str, np.ndarray]:
        obs = super()._observe()
        if self.choices.goal_image:
            obs[GOAL_IMAGE] = self._goal_image().copy()  # (96, 96, 3)
        return obs

    def _goal_image(self) -> np.ndarray:
        if self.goal not in self._goal_images:
            x, y, _ = self.goal_pose
            pusher = (x + PUSHER_IN_GOAL_IMAGE[0], y + PUSHER_IN_GOAL_IMAGE[1])
            world = PushtEnv(self.choices.world(pixels=True, show_goal=False))
            obs, _ = world.reset(options={"state": [*pusher, *self.goal_pose]})
            self._goal_images[self.goal] = obs[TOP_CAMERA]
        return self._goal_images[self.goal]
