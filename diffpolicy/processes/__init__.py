"""How actions are noised and un-noised. A process: name -> (Config, Class); every choice inside it has a dict of its own:
SCHEDULES, DENSITIES, LOSS_WEIGHTS for training, SAMPLERS, SPACINGS for sampling."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from diffpolicy.processes.baselines import (
    Mip,
    MipConfig,
    Regression,
    RegressionConfig,
    StraightFlow,
    StraightFlowConfig,
)
from diffpolicy.processes.densities import DENSITIES
from diffpolicy.processes.diagnosis import Finding, ignored_choices, sampler_findings
from diffpolicy.processes.diffusion import Diffusion, DiffusionConfig
from diffpolicy.processes.flow import Flow, FlowConfig
from diffpolicy.processes.samplers import (
    SAMPLERS,
    Denoise,
    Generators,
    Plan,
    Process,
    SamplerConfig,
    clip_x0,
    draw_noise,
    noise_generators,
    run_plan,
)
from diffpolicy.processes.schedules import SCHEDULES
from diffpolicy.processes.time_grids import SPACINGS, time_grid, visited_steps
from diffpolicy.processes.weighting import LOSS_WEIGHTS
from diffpolicy.spec import Condition

PROCESSES = {
    "diffusion": (DiffusionConfig, Diffusion),
    "flow": (FlowConfig, Flow),
    "regression": (RegressionConfig, Regression),
    "straight_flow": (StraightFlowConfig, StraightFlow),
    "mip": (MipConfig, Mip),
}


def resolve_sampler(process: Process, config: SamplerConfig) -> SamplerConfig:
    """The config with everything that `auto` and the process decide filled in: name, and the calls of a fixed plan.

    Raises:
        ValueError: the sampler cannot solve the process, with those that can; or more steps than were trained.
    """
    name = process.samplers[0] if config.name == "auto" else config.name
    if name not in process.samplers:
        kind = next(n for n, (_, cls) in PROCESSES.items() if type(process) is cls)
        raise ValueError(
            f"sampler.name={name} cannot sample process {kind!r}; it takes one of {list(process.samplers)}"
        )
    resolved = dataclasses.replace(config, name=name)
    if name == "diffusers":
        return resolved
    return dataclasses.replace(resolved, num_inference_steps=_plan(process, resolved).num_calls)


def make_plan(process: Process, config: SamplerConfig) -> Plan:
    """What the configured sampler does for this process: times, coefficients, number of calls; the same for every chunk.

    Raises:
        ValueError: as resolve_sampler.
    """
    config = resolve_sampler(process, config)
    if config.name == "diffusers":
        # its coefficients are its own; times and calls are known once its grid is set
        from diffpolicy.processes.samplers import Step
        from diffpolicy.processes.stock import make_scheduler

        T = process.num_train_timesteps
        steps = make_scheduler(process, config).timesteps
        return Plan(tuple(Step((float(k) + 1) / T, ()) for k in steps), config.temperature)
    return _plan(process, config)


def _plan(process: Process, config: SamplerConfig) -> Plan:
    return SAMPLERS[config.name](process, config)


def sample(
    process: Process,
    denoise: Denoise,
    x_T: Tensor,
    condition: Condition,
    config: SamplerConfig,
    generators: Generators = None,
    *,
    plan: Plan | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Runs the configured sampler from noise x_T (B, T_pred, D_act) to x_0, normalised.

    Args:
        plan: `make_plan(process, config)`, if it is at hand.
        start: time (B,) or (B, T_pred) in [0, 1] at which each sample or action starts: x_T is taken to be x_t there, 1 is
            pure noise, 0 is given and stays. For the first-order deterministic samplers (ddim with eta 0, euler, dpmpp).
    Raises:
        ValueError: as resolve_sampler; start with a sampler that cannot.
    """
    denoise = clip_x0(denoise, config.clip_sample)
    if start is not None:
        return _sample_from(process, denoise, x_T, start, condition, resolve_sampler(process, config))
    if config.name == "diffusers":
        from diffpolicy.processes.stock import sample_with_diffusers

        return sample_with_diffusers(process, denoise, x_T, condition, resolve_sampler(process, config), generators)
    return run_plan(plan or make_plan(process, config), denoise, x_T, condition, generators)


def _sample_from(
    process: Process, denoise: Denoise, x: Tensor, start: Tensor, condition: Condition, config: SamplerConfig
) -> Tensor:
    """DDIM's step, x -> (sigma'/sigma) x + (alpha' - alpha sigma'/sigma) x_0, where every element has a grid of its own."""
    if not isinstance(process, Diffusion | Flow) or config.name not in ("ddim", "euler", "dpmpp") or config.eta:
        raise ValueError(
            f"a start time needs a deterministic first-order sampler (ddim with eta 0, euler or dpmpp), got {config.name}"
        )
    if config.temperature != 1:
        raise ValueError(f"a start time takes x as it is; sampler.temperature must be 1, got {config.temperature:g}")
    if start.shape != x.shape[: start.ndim] or start.ndim > 2 or start.min() < 0 or start.max() > 1:
        raise ValueError(f"start must be times in [0, 1] of shape (B,) or (B, T_pred), got {tuple(start.shape)}")
    times = time_grid(
        process,
        config.num_inference_steps,
        spacing=config.spacing,
        timesteps=config.timesteps,
        final_sigma=config.final_sigma,
    )
    given = (start == 0).view(start.shape + (1,) * (x.ndim - start.ndim))
    shaped = lambda level: level.view(given.shape).to(x.dtype)
    for now, after in itertools.pairwise(times):
        x_0 = denoise(x, now * start, condition)
        (a, s), (a_next, s_next) = process.levels(now * start.double()), process.levels(after * start.double())
        kept = torch.where(start == 0, torch.ones_like(s), s_next / s)
        x = torch.where(given, x, shaped(kept) * x + shaped(a_next - kept * a) * x_0)
    return x


def labels(process: Process, config: SamplerConfig, *, action_limit: float | None = None) -> tuple[str, ...]:
    """What is wrong with sampling so, in a few words each; empty where nothing is. For every table and figure."""
    config = resolve_sampler(process, config)
    times = make_plan(process, config).times
    found = [*process.findings(), *sampler_findings(process, config, times, action_limit=action_limit)]
    return tuple(f.label for f in found)


__all__ = [
    "DENSITIES",
    "LOSS_WEIGHTS",
    "PROCESSES",
    "SAMPLERS",
    "SCHEDULES",
    "SPACINGS",
    "Denoise",
    "Finding",
    "Generators",
    "Plan",
    "Process",
    "SamplerConfig",
    "draw_noise",
    "ignored_choices",
    "labels",
    "make_plan",
    "noise_generators",
    "resolve_sampler",
    "sample",
    "sampler_findings",
    "visited_steps",
]
