"""Guidance: functions that map denoise to denoise. Classifier-free: how much more than trained the words and the goal count.

A guided denoise is again x_t, t, condition -> x_0, so that every sampler takes it. x_0 is linear in what any network
predicts at the same (x_t, t), so that guiding x_0 is guiding epsilon, v or velocity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from diffpolicy.spec import Condition

Denoise = Callable[[Tensor, Tensor, Condition], Tensor]
"""x_t (B, T_pred, D_act), t (B,) or (B, T_pred), condition -> x_0 (B, T_pred, D_act)."""


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """Weights of classifier-free guidance, one for each part that training hid now and then (encoder.task_dropout, ...)."""

    task: float = 1.0
    """Weight of the instruction. 1: as trained, at no cost; 0: as if nothing had been said; above 1: exaggerated."""
    goal: float = 1.0
    """The same for the goal image."""

    def __post_init__(self):
        for name, weight in asdict(self).items():
            if not math.isfinite(weight) or weight < 0:
                raise ValueError(f"guidance.{name} must be a finite number >= 0 (1 is no guidance), got {weight}")

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts whose weight is not 1; an observation is encoded without each of these as well."""
        return tuple(name for name, weight in asdict(self).items() if weight != 1)


def classifier_free(denoise: Denoise, condition: Condition, config: GuidanceConfig) -> tuple[Denoise, Condition]:
    """Guided denoise, and the condition to call it with: everything known, then without each guided part, in one batch.

    Ho & Salimans 2022, arXiv:2207.12598, Eq. 6, for x_0. With weight w_i of part i,

        x_0 = x_0(all) + sum_i (w_i - 1) (x_0(all) - x_0(all but i)),

    which for a single part is x_0(none) + w (x_0(all) - x_0(none)), and x_0(all) where all weights are 1: then denoise and
    condition come back as they are. Where we differ from Brooks et al. 2022, arXiv:2211.09800, Eq. 3: parts have no order,
    each is judged against everything else that is known.

    Args:
        condition: with condition.without[part] for every part in config.parts, (B, ...).
    Returns:
        denoise for x_t and t of B rows, and the condition with B * (1 + number of guided parts) rows.
    """
    parts = config.parts
    if not parts:
        return denoise, condition
    missing = [part for part in parts if part not in condition.without]
    if missing:
        raise ValueError(f"the condition was not encoded without {missing}; encode it with without={list(parts)}")
    rows = 1 + len(parts)

    def guided(x_t: Tensor, t: Tensor, everything: Condition) -> Tensor:
        x_0 = denoise(x_t.repeat(rows, 1, 1), t.repeat(rows, *[1] * (t.ndim - 1)), everything)
        full, *others = x_0.chunk(rows)
        moved = full
        for part, other in zip(parts, others, strict=True):
            moved = moved + (getattr(config, part) - 1) * (full - other)
        return moved

    return guided, concatenate([condition, *(condition.without[part] for part in parts)])


def concatenate(conditions: list[Condition]) -> Condition:
    """The rows of several conditions, one after the other."""
    masks = [c.token_mask for c in conditions]
    if any(mask is not None for mask in masks):
        masks = [
            torch.ones(c.tokens.shape[:2], dtype=torch.bool, device=c.tokens.device) if mask is None else mask
            for c, mask in zip(conditions, masks, strict=True)
        ]
    return Condition(
        torch.cat([c.global_cond for c in conditions]),
        torch.cat([c.tokens for c in conditions]),
        None if masks[0] is None else torch.cat(masks),
    )
