"""A condition made of parts: the state, each camera, a goal image, the words; with a learned null for what is missing.

part        kind    frames   in the global vector        tokens
state       state   T_obs    the numbers of each frame   one a frame
a camera    image   T_obs    one vector a frame          pooled: one a frame; patches: N a frame
goal        goal    1        one vector                  as a camera
task        text    1        one vector                  one, or one for each word

global_cond = [frame 0: state, cameras; ...; frame T_obs - 1: state, cameras; goal; task]
tokens      = [state tokens frame by frame; image tokens frame by frame, camera by camera; goal; task]
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffpolicy.spec import GOAL_IMAGE, IMAGES, TASK, Condition, ConditionSpec, TokenGroup

STATE_PART, GOAL_PART = "state", "goal"
EMBEDDING_STD = 0.02
"""Spread of nulls and embeddings at the start, GPT-2's."""


def part_of(key: str) -> str:
    """The part that a role belongs to: all state roles are one, every camera is its own."""
    if key == GOAL_IMAGE:
        return GOAL_PART
    return key if key == TASK or key.startswith(IMAGES) else STATE_PART


@dataclass(frozen=True)
class Part:
    """One source of a condition, as the encoder is built."""

    name: str
    """`state`, a camera's role, `goal` or `task`."""
    kind: str
    """Of its tokens: one of spec.TOKEN_KINDS."""
    num_frames: int
    """T_obs, or 1 for what belongs to no frame."""
    vector_dim: int
    """Numbers of one frame in the global vector."""
    num_tokens: int
    """Tokens of one frame."""
    feature_dim: int
    """Width of these tokens before their projection."""
    dropout: float
    """Share of training samples in which the part is replaced by its null; 0: it must always be there."""
    framed: bool
    """Whether the frames are the observed ones."""


@dataclass
class Features:
    """What an encoder found in one part of an observation."""

    vector: Tensor
    """(B, num_frames, vector_dim)"""
    tokens: Tensor
    """(B, num_frames, num_tokens, feature_dim)"""
    token_mask: Tensor | None = None
    """(B, num_tokens) bool, False for padding; None: all are real."""
    present: Tensor | None = None
    """(B,) bool, False where this observation lacks the part; None: all have it."""


class PartsToCondition(nn.Module):
    """Features of all parts -> Condition; replaces what is missing, and what dropout hides in training, by learned nulls.

    A part that is replaced has no influence on any number of the condition: it is selected away, not multiplied by 0.
    """

    def __init__(self, parts: Sequence[Part], *, token_dim: int):
        super().__init__()
        self.parts = tuple(parts)
        self.droppable = frozenset(part.name for part in parts if part.dropout > 0)
        self.null_vectors, self.null_tokens = nn.ParameterDict(), nn.ParameterDict()
        self.part_embeddings, self.projections = nn.ParameterDict(), nn.ModuleDict()
        pictures = [part for part in parts if part.kind in ("image", "goal")]
        for part in parts:
            name = _attribute(part.name)
            if part.dropout > 0:
                self.null_vectors[name] = nn.Parameter(EMBEDDING_STD * torch.randn(part.vector_dim))
                self.null_tokens[name] = nn.Parameter(EMBEDDING_STD * torch.randn(part.feature_dim))
            if part in pictures and len(pictures) > 1:  # what tells the cameras apart
                self.part_embeddings[name] = nn.Parameter(EMBEDDING_STD * torch.randn(token_dim))
            if _projection(part) not in self.projections:  # pictures share one
                self.projections[_projection(part)] = nn.Linear(part.feature_dim, token_dim)
        groups = []
        for run in self._runs():
            for frame in range(run[0].num_frames):
                groups += [TokenGroup(p.kind, p.num_tokens, frame if p.framed else None) for p in run]
        self.cond = ConditionSpec(
            global_dim=sum(part.num_frames * part.vector_dim for part in parts),
            token_dim=token_dim,
            groups=tuple(groups),
        )

    def _runs(self) -> list[list[Part]]:
        """Parts whose tokens stand frame by frame together: all cameras are one run."""
        runs: list[list[Part]] = []
        for part in self.parts:
            if runs and part.framed and runs[-1][0].kind == part.kind:
                runs[-1].append(part)
            else:
                runs.append([part])
        return runs

    def forward(
        self,
        features: dict[str, Features | None],
        *,
        batch_size: int,
        like: Tensor,
        without: Collection[str] = (),
    ) -> Condition:
        """Condition, with one more for each part named in `without`, in which that part is replaced by its null.

        Args:
            features: part -> its features; None: missing in the whole batch.
            like: a tensor of the device and type wanted.
        Raises:
            ValueError: a part is missing, or named in `without`, that was never dropped in training.
        """
        filled, present = {}, {}
        for part in self.parts:
            found = features[part.name]
            if found is None:
                self.require_droppable(part.name)
                found = Features(
                    like.new_zeros(batch_size, part.num_frames, part.vector_dim),
                    like.new_zeros(batch_size, part.num_frames, part.num_tokens, part.feature_dim),
                    present=torch.zeros(batch_size, dtype=torch.bool, device=like.device),
                )
            filled[part.name], present[part.name] = found, found.present
            if self.training and part.dropout > 0:
                kept = torch.rand(batch_size, device=like.device) >= part.dropout
                present[part.name] = kept if found.present is None else kept & found.present
        condition = self._condition(filled, present)
        for name in without:
            self.require_droppable(name)
            nothing = torch.zeros(batch_size, dtype=torch.bool, device=like.device)
            condition.without[name] = self._condition(filled, present | {name: nothing})
        return condition

    def require_droppable(self, name: str) -> None:
        """ValueError where the policy never learned to do without a part."""
        if name not in self.droppable:
            key = {STATE_PART: "state_dropout", GOAL_PART: "goal_dropout", TASK: "task_dropout"}.get(
                name, "camera_dropout"
            )
            have = sorted(self.droppable) or "nothing"
            raise ValueError(
                f"the policy needs {name!r}: it was trained without encoder.{key}, so it can do without {have} only"
            )

    def _condition(self, features: dict[str, Features], present: dict[str, Tensor | None]) -> Condition:
        framed, frameless, tokens, masks = [], [], {}, {}
        for part in self.parts:
            found, here, name = features[part.name], present[part.name], _attribute(part.name)
            vector, token, mask = found.vector, found.tokens, found.token_mask
            if here is not None:
                vector = torch.where(here[:, None, None], vector, self.null_vectors[name].to(vector.dtype))
                token = torch.where(here[:, None, None, None], token, self.null_tokens[name].to(token.dtype))
                if mask is not None:  # the null of the words is one token
                    first = torch.arange(part.num_tokens, device=mask.device) == 0
                    mask = torch.where(here[:, None], mask, first)
            token = self.projections[_projection(part)](token)  # (B, num_frames, num_tokens, token_dim)
            if name in self.part_embeddings:
                token = token + self.part_embeddings[name]
            (framed if part.framed else frameless).append(vector)
            tokens[part.name], masks[part.name] = token, mask
        vectors = [torch.cat(framed, dim=-1).flatten(1)] if framed else []  # (B, T_obs * what a frame has)
        vectors += [vector.flatten(1) for vector in frameless]
        rows = [torch.cat([tokens[p.name] for p in run], dim=2).flatten(1, 2) for run in self._runs()]
        condition = Condition(global_cond=torch.cat(vectors, dim=-1), tokens=torch.cat(rows, dim=1))
        if any(mask is not None for mask in masks.values()):
            real = [
                torch.ones(token.shape[:2], dtype=torch.bool, device=token.device)
                if masks[run[0].name] is None
                else masks[run[0].name]
                for token, run in zip(rows, self._runs(), strict=True)
            ]
            condition.token_mask = torch.cat(real, dim=1)  # (B, L)
        return condition


def _attribute(name: str) -> str:
    """A part's name as one of a parameter, which may hold no dot; `a.b` and `a_b` stay two cameras."""
    return "camera_" + name.removeprefix(IMAGES).replace(".", "/") if name.startswith(IMAGES) else name


def _projection(part: Part) -> str:
    return "image" if part.kind == "goal" else part.kind
