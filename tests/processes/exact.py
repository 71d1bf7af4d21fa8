"""What the tests of processes share: noise by seed, processes without their warnings, exact denoisers of known data."""

import warnings

import torch

from diffpolicy.processes.diffusion import Diffusion, DiffusionConfig
from diffpolicy.processes.samplers import Denoise, Process

MEAN, SPREAD = 0.3, 0.2
"""Of the Gaussian data, normalised units."""


def noise_of(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def diffusion(**choices) -> Diffusion:
    """A diffusion whose schedule may be a bad one: what it warns of is tested elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Diffusion(DiffusionConfig(**choices))


def shaped(level: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A level (B,) or (B, T_pred) to multiply x (B, T_pred, D_act)."""
    return level.view(level.shape + (1,) * (x.ndim - level.ndim)).to(x.dtype)


def exact_denoise(process: Process, spread: float = SPREAD, mean: float = MEAN) -> Denoise:
    """E[x_0 | x_t] of data ~ Normal(mean, spread), every number alike: what a perfect network would answer."""

    def denoise(x_t, t, condition):
        alpha, sigma = (shaped(level, x_t) for level in process.levels(t.double()))
        gain = spread**2 * alpha / (spread**2 * alpha**2 + sigma**2)
        return mean + gain * (x_t - alpha * mean)

    return denoise
