"""Time grids: which times a sampler visits, from noise to data. spacing -> function; the one place to add one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from diffpolicy.processes.diffusion import Diffusion
from diffpolicy.processes.flow import Flow

RHO = 7.0
"""Curvature of the karras grid. Karras et al. 2022, arXiv:2206.00364, Eq. 5."""


def visited_steps(num_train_timesteps: int, num_inference_steps: int, spacing: str) -> list[int]:
    """The integer training steps of a discrete process, from noise to data, as Lin et al. 2024, arXiv:2305.08891, Table 2.

    T = 100, N = 4:   trailing 99 74 49 24    linspace 99 66 33 0    leading 75 50 25 0 (never sees pure noise)

    Raises:
        ValueError: more steps than were trained.
    """
    T, N = num_train_timesteps, num_inference_steps
    if N > T:
        raise ValueError(f"sampler.num_inference_steps must be in [1, process.num_train_timesteps = {T}], got {N}")
    if spacing == "trailing":
        return [round(T - i * T / N) - 1 for i in range(N)]
    if spacing == "linspace":
        return [round(float(k)) for k in _ramp(T - 1, 0, N)]
    return [i * (T // N) for i in reversed(range(N))]


def trailing(process: Diffusion | Flow, num: int) -> list[float]:
    """Even steps from pure noise; the last ends on the data. The default: it always starts where sampling starts."""
    if isinstance(process, Flow):
        return [1 - i / num for i in range(num)]
    return _of_steps(process, visited_steps(process.num_train_timesteps, num, "trailing"))


def linspace(process: Diffusion | Flow, num: int) -> list[float]:
    """Even times from pure noise to the least noise that was trained; the last call is spent there."""
    if isinstance(process, Flow):
        return _ramp(1, process.smallest_time, num).tolist()
    return _of_steps(process, visited_steps(process.num_train_timesteps, num, "linspace"))


def leading(process: Diffusion | Flow, num: int) -> list[float]:
    """Even times from the data upwards: never sees pure noise. diffusers' default for DDPM and DDIM; kept to be compared with."""
    if isinstance(process, Flow):
        return [i / num + process.smallest_time for i in reversed(range(num))]
    return _of_steps(process, visited_steps(process.num_train_timesteps, num, "leading"))


def karras(process: Diffusion | Flow, num: int) -> list[float]:
    """sigma^(1/7) even between the most and the least noise that was trained. Karras et al. 2022, arXiv:2206.00364, Eq. 5."""
    return _of_sigma_ramp(process, num, lambda x: x ** (1 / RHO), lambda y: y**RHO)


def exponential(process: Diffusion | Flow, num: int) -> list[float]:
    """log(sigma) even between the most and the least noise that was trained (k-diffusion's get_sigmas_exponential)."""
    return _of_sigma_ramp(process, num, torch.log, torch.exp)


def _of_sigma_ramp(process: Diffusion | Flow, num: int, bend: Callable, unbend: Callable) -> list[float]:
    """Even in bend(sigma); sigma is noise over signal for diffusion and t itself for flow, where that ratio has no end."""
    if isinstance(process, Flow):
        ends = torch.tensor([1.0, process.smallest_time], dtype=torch.float64, device="cpu")
        return unbend(_ramp(*bend(ends).tolist(), num)).tolist()
    if process.terminal_signal == 0:
        raise ValueError(
            "sampler.spacing=karras and exponential need a largest sigma, but zero terminal SNR has none; use "
            "trailing, or process.terminal_snr=as_is or scaled"
        )
    T = process.num_train_timesteps
    alpha, sigma = process.levels(torch.tensor([1, 1 / T], dtype=torch.float64, device="cpu"))
    ramp = unbend(_ramp(*bend(sigma / alpha).tolist(), num))
    times = process.time_of_sigma(ramp).tolist()
    return [1.0, *times[1:]]


def _ramp(first: float, last: float, num: int) -> torch.Tensor:
    """Even numbers (num,), float64, on the CPU even where a policy is built without memory (torch.device("meta"))."""
    return torch.linspace(first, last, num, dtype=torch.float64, device="cpu")


def _of_steps(process: Diffusion, steps: Sequence[float]) -> list[float]:
    return [(k + 1) / process.num_train_timesteps for k in steps]


SPACINGS: dict[str, Callable[[Diffusion | Flow, int], list[float]]] = {
    "trailing": trailing,
    "leading": leading,
    "linspace": linspace,
    "karras": karras,
    "exponential": exponential,
}
"""spacing -> N falling times in (0, 1]."""


def time_grid(
    process: Diffusion | Flow, num: int, *, spacing: str, timesteps: Sequence[float] | None, final_sigma: str
) -> list[float]:
    """The N times of a spacing (or those of an explicit list) and where the last step ends, N + 1 falling times.

    Args:
        timesteps: instead of a spacing: steps 0 .. T - 1 of a diffusion, times in (0, 1] of a flow.
        final_sigma: zero ends on the data, sigma_min on the least noise that was trained (set_alpha_to_one=False in diffusers).
    """
    if timesteps is None:
        times = SPACINGS[spacing](process, num)
        if isinstance(process, Flow):  # the spacing places t, a shift then moves it
            times = [process.shifted(t) for t in times]
    elif isinstance(process, Flow):
        if max(timesteps) > 1 or min(timesteps) <= 0:
            raise ValueError(f"sampler.timesteps of a flow must lie in (0, 1], got {list(timesteps)}")
        times = list(timesteps)
    else:
        T = process.num_train_timesteps
        if max(timesteps) > T - 1 or min(timesteps) < 0:
            raise ValueError(f"sampler.timesteps must lie in [0, {T - 1}] (T = {T}), got {list(timesteps)}")
        times = _of_steps(process, timesteps)
    return [*times, 0.0 if final_sigma == "zero" else min(process.smallest_time, times[-1])]
