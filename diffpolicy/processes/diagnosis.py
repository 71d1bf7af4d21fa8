"""What is wrong with a setting, in words: a short label for every table and figure, the reason, and the cure."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from diffpolicy.processes.samplers import Process, SamplerConfig

MAX_TERMINAL_SIGNAL = 0.05
"""A schedule that leaves more of the signal at t = 1 is a finding."""
MAX_ERROR_GAIN = 100
"""Unclipped noise prediction is a finding where an error of the noise becomes an x_0 error so many times as large."""
MAX_WEIGHT_RATIO = 30
"""A loss weight is a finding where one noise level weighs so many times the mean."""
MAX_HEUN_SIGMA = 200
"""Heun's steps are a finding where they begin at a larger sigma / alpha; EDM begins at 80."""
FIXED_PLANS = ("direct", "two_step")
"""Samplers of the baselines: nothing about their times can be chosen."""


@dataclass(frozen=True)
class Finding:
    """One problem of a setting."""

    label: str
    """A few words, for tables and figures."""
    text: str
    """Reason and cure, for a warning."""


def process_findings(
    *, described: str, terminal_signal: float, prediction_type: str, cures: tuple[str, ...]
) -> list[Finding]:
    """What is wrong with a schedule and a prediction type, whatever samples them."""
    found = []
    if terminal_signal > MAX_TERMINAL_SIGNAL:
        found.append(
            Finding(
                f"terminal signal {terminal_signal:.0%}",
                f"{described} leaves {terminal_signal:.0%} of the signal at t=1, but sampling starts from pure noise, so even a "
                f"perfect network is biased; use {' or '.join(cures)}",
            )
        )
    if terminal_signal == 0 and prediction_type == "epsilon":
        found.append(
            Finding(
                "zero SNR with epsilon",
                "process.prediction_type=epsilon with zero terminal SNR: at t=1 the noise is all there is, so the first call of "
                "the network says nothing about x_0 (taken as 0); use process.prediction_type=v_prediction or sample",
            )
        )
    return found


def weight_findings(loss_weight: str, weights: Tensor | None) -> list[Finding]:
    """What is wrong with a loss weight: cosmap, made for velocities, grows without bound for epsilon at pure noise, and for x_0 at
    the data.

    Args:
        weights: of the prediction's squared error, at times evenly spread over (0, 1]; None where all count alike.
    """
    if weights is None or (ratio := float(weights.max() / weights.mean())) <= MAX_WEIGHT_RATIO:
        return []
    return [
        Finding(
            f"one noise level weighs {ratio:,.0f} x the mean",
            f"process.loss_weight={loss_weight} gives one noise level {ratio:,.0f} times the mean weight, so that the network learns "
            "little else; predict v_prediction (a flow: velocity), or use process.loss_weight=min_snr(5)",
        )
    ]


def sampler_findings(
    process: Process, config: SamplerConfig, times: tuple[float, ...], *, action_limit: float | None = None
) -> list[Finding]:
    """What is wrong with sampling a process so.

    Args:
        times: at which the network is called, from noise to data.
        action_limit: largest normalised action of the training data, None if unknown.
    """
    found = []
    if config.name not in FIXED_PLANS and times[0] < 1 - 1e-9:
        given = "sampler.timesteps" if config.timesteps is not None else f"sampler.spacing={config.spacing}"
        found.append(
            Finding(
                f"starts at t={times[0]:.2g}",
                f"{given} with {len(times)} calls begins at t={times[0]:.2g}, yet the first x_t is pure noise, which belongs to "
                "t=1: the network is told that it sees signal where there is none; use sampler.spacing=trailing",
            )
        )
    if config.name == "heun" and len(times) > 2 and (sigma := _noise_over_signal(process, times[0])) > MAX_HEUN_SIGMA:
        found.append(
            Finding(
                f"Heun from sigma {sigma:,.0f}",
                f"the schedule begins at sigma / alpha = {sigma:,.0f}, from where Heun's first steps overshoot when they are few: the "
                "chunks spread too far; use sampler.name=dpmpp_2m, or train with process.schedule=karras",
            )
        )
    crowd = _most_calls_in_one_step(process, times)
    if crowd > 2:
        found.append(
            Finding(
                f"{crowd} calls in one training step",
                f"sampler.spacing={config.spacing} puts {crowd} of {len(times)} calls between two training steps, where the schedule "
                "jumps (a capped last step): the network was trained at neither; use sampler.spacing=trailing",
            )
        )
    if config.clip_sample is not None and action_limit is not None and config.clip_sample < action_limit * 0.999:
        found.append(
            Finding(
                f"clips at {config.clip_sample:g} of {action_limit:.3g}",
                f"sampler.clip_sample={config.clip_sample:g} cuts off normalised actions, which reach {action_limit:.3g}; set "
                "sampler.clip_sample=null (or higher), or normalizer.action=limits",
            )
        )
    if config.clip_sample is None and process.prediction_type == "epsilon":
        if (gain := _noise_over_signal(process, times[0])) > MAX_ERROR_GAIN:
            found.append(
                Finding(
                    f"unclipped epsilon (error x {gain:,.0f})",
                    f"an error of the predicted noise becomes an error of x_0 {gain:,.0f} times as large at the first call, and "
                    "nothing clips it; set sampler.clip_sample=1.0, or predict sample or v_prediction",
                )
            )
    return found


def _noise_over_signal(process: Process, t: float) -> float:
    """sigma / alpha at a time; 0 for a flow, whose samplers do not step in it, and where alpha is 0."""
    if not hasattr(process, "num_train_timesteps"):
        return 0.0
    alpha, sigma = process.levels(torch.tensor(t, dtype=torch.float64, device="cpu"))
    return float(sigma / alpha) if alpha > 0 else 0.0


def _most_calls_in_one_step(process: Process, times: tuple[float, ...]) -> int:
    """The largest number of calls that lie between two neighbouring training steps; 0 for a process in continuous time."""
    T = getattr(process, "num_train_timesteps", None)
    if T is None:
        return 0
    at = [math.floor(t * T - 1e-6) for t in times if abs(t * T - round(t * T)) > 1e-3]  # those that fall between
    return max((at.count(k) for k in set(at)), default=0)


def ignored_choices(config: SamplerConfig, name: str) -> list[str]:
    """Choices that the sampler `name` does not look at although they differ from their defaults, as `sampler.eta=0.5`."""
    looked_at = {"ddim": {"eta"}, "diffusers": {"eta", "scheduler"}}.get(name, set())
    watched = {"eta", "scheduler"}
    if name in FIXED_PLANS:
        watched |= {"spacing", "timesteps", "final_sigma"}
    if config.timesteps is not None:
        watched |= {"spacing"}  # the list says where to look
    default = type(config)()
    return [
        f"sampler.{f.name}={getattr(config, f.name)}"
        for f in dataclasses.fields(config)
        if f.name in watched - looked_at and getattr(config, f.name) != getattr(default, f.name)
    ]
