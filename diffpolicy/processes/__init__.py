"""How actions are noised and un-noised. A process: name -> (Config, Class); schedules and samplers have their own dicts."""

from __future__ import annotations

from torch import Tensor

from diffpolicy.processes.diffusion import Diffusion, DiffusionConfig
from diffpolicy.processes.flow import Flow, FlowConfig
from diffpolicy.processes.samplers import (
    SAMPLERS,
    Denoise,
    Generators,
    SamplerConfig,
    clip_x0,
    draw_noise,
    visited_steps,
)
from diffpolicy.processes.schedules import SCHEDULES
from diffpolicy.spec import Condition

PROCESSES = {
    "diffusion": (DiffusionConfig, Diffusion),
    "flow": (FlowConfig, Flow),
}

Process = Diffusion | Flow


def resolve_sampler(process: Process, config: SamplerConfig) -> str:
    """The sampler's name for this process.

    Raises:
        ValueError: the sampler cannot solve the process, with those that can; or more steps than were trained.
    """
    name = process.samplers[0] if config.name == "auto" else config.name
    if name not in process.samplers:
        kind = next(n for n, (_, cls) in PROCESSES.items() if isinstance(process, cls))
        raise ValueError(
            f"sampler.name={name} cannot sample process {kind!r}; it takes one of {list(process.samplers)}"
        )
    if isinstance(process, Diffusion):
        visited_steps(process.num_train_timesteps, config.num_inference_steps, config.spacing)  # raises now, not later
    return name


def sample(
    process: Process,
    denoise: Denoise,
    x_T: Tensor,
    condition: Condition,
    config: SamplerConfig,
    generators: Generators = None,
) -> Tensor:
    """Runs the configured sampler from noise x_T (B, T_pred, D_act) to x_0, normalised."""
    solve = SAMPLERS[resolve_sampler(process, config)]
    return solve(process, clip_x0(denoise, config.clip_sample), x_T, condition, config, generators)


__all__ = [
    "PROCESSES",
    "SAMPLERS",
    "SCHEDULES",
    "Denoise",
    "Generators",
    "Process",
    "SamplerConfig",
    "draw_noise",
    "resolve_sampler",
    "sample",
]
