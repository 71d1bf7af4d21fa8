"""Noise schedules: name -> alpha_bar(t), the fraction of signal power left at diffusion time t. The one place to add one.

Every schedule is written in closed form over continuous t in [0, 1] and is handed to every diffusers scheduler as the
discrete betas of `trained_betas`, so that every schedule meets every sampler. Integer step k of T is t = (k + 1) / T.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffpolicy.spec import unknown_name

MAX_BETA = 0.999
"""Cap on one step's noise (Nichol & Dhariwal 2021): keeps alpha_bar above zero where the closed form reaches it."""


def cosine_alpha_bar(t: Tensor, num_train_timesteps: int = 100, s: float = 0.008) -> Tensor:
    """Cosine schedule (`squaredcos_cap_v2` in diffusers, where MAX_BETA is the cap).

    Nichol & Dhariwal 2021, arXiv:2102.09672, Eq. 17. Does not depend on num_train_timesteps.

    Args:
        t: diffusion time in [0, 1], shape (...).
        s: offset that keeps the first steps from being noise-free.
    Returns:
        alpha_bar in [0, 1], shape (...); 1 at t=0, decreasing.
    """
    start = math.cos(s / (1 + s) * math.pi / 2) ** 2
    return torch.cos((t + s) / (1 + s) * math.pi / 2).square() / start


def linear_alpha_bar(
    t: Tensor, num_train_timesteps: int = 100, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Tensor:
    """Linear betas, Ho et al. 2020, arXiv:2006.11239, section 4.

    The product of n = t T factors 1 - beta_start - i step is a ratio of gamma functions; between two steps its logarithm
    is a straight line (the gamma functions themselves would rise above 1 before the first step). The betas were tuned
    for T = 1000: at T = 100 alpha_bar(1) = .36, 60 % of the signal is left.

    Args and returns as cosine_alpha_bar.
    """
    step = (beta_end - beta_start) / max(num_train_timesteps - 1, 1)
    return _falling_product(1 - beta_start, step, t * num_train_timesteps).exp()


def scaled_linear_alpha_bar(
    t: Tensor, num_train_timesteps: int = 100, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Tensor:
    """Betas linear in their square root, Rombach et al. 2022, arXiv:2112.10752 (latent diffusion).

    1 - b_i^2 = (1 - b_i)(1 + b_i) with b_i linear: two ratios of gamma functions. The terminal signal at T = 100 is .70.

    Args and returns as cosine_alpha_bar.
    """
    low, high = math.sqrt(beta_start), math.sqrt(beta_end)
    step, n = (high - low) / max(num_train_timesteps - 1, 1), t * num_train_timesteps
    return (_falling_product(1 - low, step, n) + _rising_product(1 + low, step, n)).exp()


def _falling_product(first: float, step: float, n: Tensor) -> Tensor:
    """log of first (first - step) (first - 2 step) ... with n factors; linear between whole n; float64 inside."""
    n = n.double()
    whole = n.floor()
    top = torch.as_tensor(first / step, dtype=torch.float64, device=n.device)
    product = whole * math.log(step) + torch.lgamma(top + 1) - torch.lgamma(top + 1 - whole)
    return product + (n - whole) * (first - whole * step).log()


def _rising_product(first: float, step: float, n: Tensor) -> Tensor:
    """log of first (first + step) (first + 2 step) ... with n factors; linear between whole n; float64 inside."""
    n = n.double()
    whole = n.floor()
    bottom = torch.as_tensor(first / step, dtype=torch.float64, device=n.device)
    product = whole * math.log(step) + torch.lgamma(bottom + whole) - torch.lgamma(bottom)
    return product + (n - whole) * (first + whole * step).log()


def schedule_betas(name: str, num_train_timesteps: int) -> Tensor:
    """Discrete betas of a schedule, (T,) float64: beta_k = 1 - alpha_bar((k + 1) / T) / alpha_bar(k / T), capped at MAX_BETA.

    Raises:
        ValueError: unknown schedule (with the nearest name) or no steps.
    """
    if name not in SCHEDULES:
        raise unknown_name("process.schedule", name, SCHEDULES)
    if num_train_timesteps < 1:
        raise ValueError(f"process.num_train_timesteps must be at least 1, got {num_train_timesteps}")
    # on the CPU even where a policy is built without memory (torch.device("meta")): these are known numbers, no weights
    t = torch.arange(num_train_timesteps + 1, dtype=torch.float64, device="cpu") / num_train_timesteps
    alpha_bar = SCHEDULES[name](t, num_train_timesteps)
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(0, MAX_BETA)


def terminal_signal(betas: Tensor) -> float:
    """sqrt(alpha_bar) after the last step: how much of x_0 the sampler's pure-noise start pretends not to know."""
    return float((1 - betas).log().sum().mul(0.5).exp())


SCHEDULES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "cosine": cosine_alpha_bar,
    "linear": linear_alpha_bar,
    "scaled_linear": scaled_linear_alpha_bar,
}
