"""What a noise schedule does, in numbers that can be compared: its ends, where its log-SNR spends the time, what samplers visit."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from diffpolicy.processes.diffusion import Diffusion, DiffusionConfig
from diffpolicy.processes.samplers import SamplerConfig
from diffpolicy.processes.time_grids import SPACINGS

BANDS = (("nearly clean", 2.0, float("inf")), ("between", -2.0, 2.0), ("nearly noise", -float("inf"), -2.0))
"""Bands of log-SNR (natural logarithm): at +-2 the ratio of signal to noise amplitude is e = 2.7 or 1 / e."""


@dataclass(frozen=True)
class ScheduleDescription:
    """One schedule at one T."""

    name: str
    """Schedule with what was done to it, as `linear, scaled`."""
    num_train_timesteps: int
    alpha_bar: tuple[float, ...]
    """After each step, (T,)."""
    log_snr: tuple[float, ...]
    """Natural logarithm of alpha_bar / (1 - alpha_bar), (T,); -inf at zero SNR."""
    terminal_signal: float
    band_shares: tuple[float, float, float]
    """Share of the steps in each of BANDS."""
    visited: dict[str, tuple[float, ...] | str]
    """spacing -> training steps 0 .. T - 1 that a sampler of N calls visits (fractions between two steps), or why it cannot."""
    findings: tuple[str, ...]
    """What is wrong with it, a few words each."""


def describe_schedule(config: DiffusionConfig, num_inference_steps: int = 10) -> ScheduleDescription:
    """Numbers of a schedule and the steps that each spacing visits with num_inference_steps calls.

    Raises:
        ValueError: num_inference_steps below 1.
    """
    SamplerConfig(num_inference_steps=num_inference_steps)  # says what is wrong with the number
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the findings say the same
        process = Diffusion(config)
    T = process.num_train_timesteps
    t = torch.arange(1, T + 1, dtype=torch.float64) / T
    alpha, sigma = process.levels(t)
    log_snr = 2 * (alpha.log() - sigma.log())
    visited: dict[str, tuple[float, ...] | str] = {}
    for spacing, times_of in SPACINGS.items():
        try:
            visited[spacing] = tuple(round(u * T - 1, 1) for u in times_of(process, num_inference_steps))
        except ValueError as error:
            visited[spacing] = str(error)
    name = config.schedule
    name += f", {config.terminal_snr}" if config.terminal_snr != "as_is" else ""
    name += f", shift {config.shift:g}" if config.shift != 1 else ""
    return ScheduleDescription(
        name=name,
        num_train_timesteps=T,
        alpha_bar=tuple(alpha.square().tolist()),
        log_snr=tuple(log_snr.tolist()),
        terminal_signal=process.terminal_signal,
        band_shares=tuple(float(((log_snr >= low) & (log_snr < high)).double().mean()) for _, low, high in BANDS),
        visited=visited,
        findings=tuple(f.label for f in process.findings()),
    )
