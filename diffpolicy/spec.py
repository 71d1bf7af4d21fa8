"""The contract: what every room of the house means by an observation, a batch and a horizon.

Shape legend, used in every comment and docstring of the package:

    B        batch, or environments stepped side by side
    T_obs    observed frames           horizons.obs
    T_pred   predicted actions         horizons.pred
    T_act    executed actions          horizons.act
    D_act    numbers in one action
    D_state  numbers in one low-dimensional observation
    D_cond   numbers in the global condition vector
    V        cameras
    L        condition tokens

Time: `step` counts environment steps, `t` is diffusion time only (1 = noise, 0 = data).

This file imports nothing heavy, so that environments in worker processes need not load torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

STATE = "observation.state"
"""Role of what the robot measures of itself (joints, gripper, pusher position)."""
ENVIRONMENT_STATE = "observation.environment_state"
"""Role of what a simulator knows and a robot would have to see (object poses, keypoints)."""
IMAGES = "observation.images."
"""Prefix of camera roles: observation.images.<camera>."""
ACTION = "action"
TASK = "task"
"""Role of the instruction in words."""
GOAL_IMAGE = "goal.image"
"""Role of a picture of what is wanted, (B, 1, H, W, 3): in demonstrations the last frame of the episode."""
EMBEDDING = "embedding."
"""Prefix of what a frozen tower said of a picture once, in place of its pixels: embedding.<role>.pooled (B, T_obs, E) and
embedding.<role>.patches (B, T_obs, P, W)."""

Observation = dict[str, "Tensor | list[str]"]
"""role -> (B, T_obs, ...) tensor: float for states, uint8 (B, T_obs, H, W, 3) for images; `task` -> list of B strings."""


class MissingExtraError(ImportError):
    """An optional dependency is not installed; the message holds the pip command that installs it."""

    def __init__(self, package: str, extra: str):
        super().__init__(f"{package} is not installed; install it with: pip install 'diffpolicy[{extra}]'")


def unknown_name(what: str, got: object, known: Iterable[str]) -> ValueError:
    """The error for a name that is not in a family: lists what is known and suggests the nearest."""
    known = sorted(known)
    near = difflib.get_close_matches(str(got), known, n=1, cutoff=0.4)
    hint = f". Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"{what} must be one of {known}, got {got!r}{hint}")


@dataclass(frozen=True, kw_only=True)
class Horizons:
    """How many steps are observed, predicted and executed.

    step            -1   0   1   2   3   4   5   6   7   8  ...  14
    observed         o   o                                              obs  = 2
    predicted        a   a   a   a   a   a   a   a   a   a  ...   a     pred = 16
    executed             x   x   x   x   x   x   x   x                  act  = 8
                     ^ past = 1: predicted steps that lie before now
    """

    obs: int = 2
    """Observed frames, T_obs."""
    pred: int = 16
    """Predicted actions, T_pred."""
    act: int = 8
    """Executed actions, T_act: those of chunk[past : past + act]."""
    past: int | None = None
    """Predicted steps that lie before now; None means obs - 1, as Diffusion Policy and LeRobot."""

    def __post_init__(self):
        if self.past is None:
            object.__setattr__(self, "past", self.obs - 1)
        for name in ("obs", "pred", "act"):
            if getattr(self, name) < 1:
                raise ValueError(f"horizons.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.past < self.pred:
            raise ValueError(f"horizons.past must be in [0, horizons.pred - 1 = {self.pred - 1}], got {self.past}")
        if self.past > self.obs - 1:
            raise ValueError(
                f"horizons.past must be in [0, horizons.obs - 1 = {self.obs - 1}] "
                f"(no action before the first observed frame is predicted), got {self.past}"
            )
        if self.act > self.pred - self.past:
            raise ValueError(
                f"horizons.act must be in [1, horizons.pred - horizons.past = {self.pred - self.past}], got {self.act}"
            )

    @property
    def executed(self) -> slice:
        """The part of a chunk that a receding-horizon executor plays."""
        return slice(self.past, self.past + self.act)


@dataclass(frozen=True, kw_only=True)
class FieldSpec:
    """One key of a dataset or an environment: shape of one step, type, and what its numbers are called."""

    shape: tuple[int, ...]
    dtype: str
    names: tuple[str, ...] = ()
    units: str = ""

    def __post_init__(self):
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "names", tuple(self.names))


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """What a policy sees and does: role -> FieldSpec, saved with the policy and compared before every rollout."""

    fields: dict[str, FieldSpec]
    fps: float | None = None
    """Control rate in Hz."""
    tasks: tuple[str, ...] = field(default=())
    """Instructions of the training set, in words."""

    def __post_init__(self):
        fields = {k: FieldSpec(**v) if isinstance(v, dict) else v for k, v in self.fields.items()}
        object.__setattr__(self, "fields", fields)
        object.__setattr__(self, "tasks", tuple(self.tasks))

    @property
    def action_dim(self) -> int:
        """D_act."""
        return self.fields[ACTION].shape[0]

    @property
    def state_keys(self) -> tuple[str, ...]:
        """Low-dimensional observation roles, in the order in which they are concatenated."""
        return tuple(k for k in self.fields if k.startswith("observation.") and not k.startswith(IMAGES))

    @property
    def image_keys(self) -> tuple[str, ...]:
        """Camera roles, in order."""
        return tuple(k for k in self.fields if k.startswith(IMAGES))

    @property
    def goal_keys(self) -> tuple[str, ...]:
        """Roles that show what is wanted: one frame an episode, not T_obs of them."""
        return tuple(k for k in self.fields if k.startswith("goal."))

    @property
    def input_keys(self) -> tuple[str, ...]:
        """Every role that an encoder looks at, apart from the words."""
        return (*(k for k in self.fields if k.startswith("observation.")), *self.goal_keys)

    @property
    def state_dim(self) -> int:
        """D_state: numbers in all low-dimensional observations of one step."""
        total = 0
        for key in self.state_keys:
            size = 1
            for n in self.fields[key].shape:
                size *= n
            total += size
        return total


TOKEN_KINDS = ("frame", "state", "image", "goal", "text")
"""What a token of a condition speaks of: all that was observed at one time, or one modality alone."""


@dataclass(frozen=True)
class TokenGroup:
    """Neighbouring tokens of a condition that speak of the same thing."""

    kind: str
    """One of TOKEN_KINDS."""
    count: int
    frame: int | None = None
    """The observed frame they belong to, 0 the oldest; None: no frame (words, a goal)."""

    def __post_init__(self):
        assert self.kind in TOKEN_KINDS and self.count >= 1, self


def frame_tokens(obs_horizon: int) -> tuple[TokenGroup, ...]:
    """The groups of an encoder that makes one token of each observed frame."""
    return tuple(TokenGroup("frame", 1, frame) for frame in range(obs_horizon))


@dataclass(frozen=True, kw_only=True)
class ConditionSpec:
    """Sizes of a Condition, known when the encoder is built and needed to build the denoiser."""

    global_dim: int
    """D_cond, width of the global vector."""
    token_dim: int
    """Width of one token."""
    groups: tuple[TokenGroup, ...] = ()
    """What the tokens are, in order."""

    @property
    def num_tokens(self) -> int:
        """L, number of tokens."""
        return sum(group.count for group in self.groups)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each of the L tokens."""
        return tuple(group.kind for group in self.groups for _ in range(group.count))

    @property
    def frames(self) -> tuple[int | None, ...]:
        """The observed frame of each of the L tokens; None for those of no frame."""
        return tuple(group.frame for group in self.groups for _ in range(group.count))


@dataclass
class Condition:
    """What an encoder hands to a denoiser; computed once per chunk and shared by all denoising steps."""

    global_cond: Tensor
    """(B, D_cond)"""
    tokens: Tensor
    """(B, L, D_token), in the order of ConditionSpec.groups."""
    token_mask: Tensor | None = None
    """(B, L) bool, False where a token is padding that nobody may look at; None: all are real."""
    without: dict[str, Condition] = field(default_factory=dict)
    """part -> the same condition with that part (`task`, `goal`) replaced by its learned null, where guidance asked for it."""

    def repeat(self, num_samples: int) -> Condition:
        """The same condition for num_samples chunks of each observation: (B * num_samples, ...)."""
        return Condition(
            self.global_cond.repeat_interleave(num_samples, dim=0),
            self.tokens.repeat_interleave(num_samples, dim=0),
            None if self.token_mask is None else self.token_mask.repeat_interleave(num_samples, dim=0),
            {part: condition.repeat(num_samples) for part, condition in self.without.items()},
        )


@dataclass
class Batch:
    """One training batch, in physical units; the policy normalises."""

    obs: Observation
    """role -> (B, T_obs, ...)"""
    actions: Tensor
    """(B, T_pred, D_act)"""
    mask: Tensor
    """(B, T_pred) bool; False where the window runs past its episode and repeats the edge."""
    window: Tensor
    """(B,) index of each window, so that a bad batch can be named."""


@dataclass(frozen=True)
class KeySelection:
    """A key of a store, or some of its dimensions: what a task YAML writes as `state[0:2]`."""

    key: str
    dims: slice | None = None

    @classmethod
    def parse(cls, text: str) -> KeySelection:
        """Reads `key`, `key[3]`, `key[0:2]`, `key[2:]`; dimensions count after the step's array is flattened."""
        match = re.fullmatch(r"([^\[\]\s]+)(?:\[(-?\d*)(?:(:)(-?\d*))?\])?", text.strip())
        if not match or (match[2] == "" and match[3] is None and "[" in text):
            raise ValueError(f"a key must read like `state`, `state[3]` or `state[0:2]`, got {text!r}")
        key, start, colon, stop = match.groups()
        if "[" not in text:
            return cls(key)
        if colon is None:
            return cls(key, slice(int(start), int(start) + 1 or None))
        return cls(key, slice(int(start) if start else None, int(stop) if stop else None))
