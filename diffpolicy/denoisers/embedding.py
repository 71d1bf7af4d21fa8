"""Diffusion time as a vector."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sinusoidal_embedding(t: Tensor, dim: int) -> Tensor:
    """Sines, then cosines, of the network time at geometrically spaced frequencies from 1 down to 1/10000.

    Vaswani et al. 2017, arXiv:1706.03762, section 3.5, in Diffusion Policy's layout: all sines before all cosines,
    and log(10000) / (dim/2 - 1), so that the lowest frequency is exactly 1/10000.

    Args:
        t: network time, shape (...); steps 0..99 for a DDPM of 100 steps.
        dim: even, at least 4.
    Returns:
        (..., dim), in the dtype of t.
    """
    half = dim // 2
    exponents = torch.arange(half, device=t.device, dtype=t.dtype) * (-math.log(10000) / (half - 1))
    angles = t.unsqueeze(-1) * exponents.exp()  # (..., dim/2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class SinusoidalEmbedding(nn.Module):
    """sinusoidal_embedding as a layer; it has no parameters, so that it takes no key in a state dict."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        return sinusoidal_embedding(t, self.dim)


def check_embedding_dim(name: str, dim: int) -> None:
    """A sinusoidal embedding needs sines and cosines at two frequencies or more."""
    if dim < 4 or dim % 2:
        raise ValueError(f"{name} must be even and at least 4 (sines and cosines of the diffusion time), got {dim}")


def check_chunk(x_t: Tensor, t: Tensor, pred_horizon: int, action_dim: int, *, per_action: bool = False) -> None:
    """Raises ValueError unless x_t is (B, T_pred, D_act) and t is (B,), or (B, T_pred) where per_action allows it."""
    if x_t.ndim != 3 or x_t.shape[1:] != (pred_horizon, action_dim):
        raise ValueError(
            f"x_t must be (B, T_pred={pred_horizon}, D_act={action_dim}), got {tuple(x_t.shape)}; "
            "the denoiser was built for these horizons.pred and action_dim"
        )
    if t.shape != x_t.shape[:1] and not (per_action and t.shape == x_t.shape[:2]):
        hint = f" (or one per action, (B={x_t.shape[0]}, T_pred={pred_horizon}))" if per_action else ""
        raise ValueError(f"t must hold one network time per sample, (B={x_t.shape[0]},), got {tuple(t.shape)}{hint}")
