"""Samplers: noise -> x_0 by asking denoise(x_t, t, condition) -> x_0 a few times. Chosen at run time, on any checkpoint.

To add one, write a function here and its line in SAMPLERS at the end, and name it in the `samplers` of its process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffpolicy.processes.diffusion import Diffusion
from diffpolicy.processes.flow import Flow
from diffpolicy.spec import Condition, unknown_name

Denoise = Callable[[Tensor, Tensor, Condition], Tensor]
"""(x_t (B, T_pred, D_act), t (B,), condition) -> x_0 (B, T_pred, D_act)."""
Generators = torch.Generator | Sequence[torch.Generator] | None
"""One generator for the batch, or one for each sample, so that a sample's noise does not depend on its neighbours."""

SPACINGS = ("trailing", "leading", "linspace")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    name: str = "auto"
    """ddim or ddpm for a diffusion process, euler for flow; auto takes the process's first."""
    num_inference_steps: int = 10
    """Network calls per chunk."""
    spacing: str = "trailing"
    """Which of the T training steps ddim and ddpm visit. trailing starts at pure noise; leading (diffusers' default) does not."""
    clip_sample: float | None = 1.0
    """Every x_0 estimate is clipped to +- this, in normalised units; null leaves it free."""
    eta: float = 0.0
    """Noise added by ddim: 0 is deterministic, 1 has DDPM's variance. Song et al. 2021, arXiv:2010.02502, Eq. 16."""

    def __post_init__(self):
        if self.name != "auto" and self.name not in SAMPLERS:
            raise unknown_name("sampler.name", self.name, ["auto", *SAMPLERS])
        if self.spacing not in SPACINGS:
            raise unknown_name("sampler.spacing", self.spacing, SPACINGS)
        if self.num_inference_steps < 1:
            raise ValueError(f"sampler.num_inference_steps must be at least 1, got {self.num_inference_steps}")
        if self.clip_sample is not None and not self.clip_sample > 0:
            raise ValueError(f"sampler.clip_sample must be positive or null, got {self.clip_sample}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"sampler.eta must be in [0, 1], got {self.eta}")


def draw_noise(shape: tuple[int, ...], device: torch.device, generators: Generators) -> Tensor:
    """Standard normal noise (B, ...), drawn where the generators live, so that a seed gives the same chunk on any device."""
    if generators is None:
        return torch.randn(shape, device=device)
    if isinstance(generators, torch.Generator):
        return torch.randn(shape, generator=generators, device=generators.device).to(device)
    if len(generators) != shape[0]:
        raise ValueError(f"{len(generators)} generators for a batch of {shape[0]}; give one, or one for each sample")
    return torch.stack([torch.randn(shape[1:], generator=g, device=g.device) for g in generators]).to(device)


def clip_x0(denoise: Denoise, limit: float | None) -> Denoise:
    """The same denoise with every estimate clipped to +- limit: the one visible place where x_0 is clipped."""
    if limit is None:
        return denoise
    return lambda x_t, t, condition: denoise(x_t, t, condition).clamp(-limit, limit)


def visited_steps(num_train_timesteps: int, num_inference_steps: int, spacing: str) -> list[int]:
    """The integer training steps that a discrete sampler visits, from noise to data, as Lin et al. 2024, arXiv:2305.08891, Table 2.

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
        return [round(float(k)) for k in torch.linspace(T - 1, 0, N, dtype=torch.float64)]
    return [i * (T // N) for i in reversed(range(N))]


def sample_ddim(
    process: Diffusion,
    denoise: Denoise,
    x_T: Tensor,
    condition: Condition,
    config: SamplerConfig,
    generators: Generators,
) -> Tensor:
    """DDIM, Song et al. 2021, arXiv:2010.02502, Eq. 12 and 16.

    Ours and not diffusers', which takes every step to be T // N long: wrong for linspace, and wherever N does not
    divide T. Where the stride is constant both agree. Where x_0 was clipped, the noise direction follows from the
    clipped x_0 (diffusers' use_clipped_model_output=True).
    """
    steps = visited_steps(process.num_train_timesteps, config.num_inference_steps, config.spacing)
    alpha_bar = torch.cat([process.alpha_bar, process.alpha_bar.new_ones(1)])  # index -1: no noise left
    x_t = x_T
    for k, k_next in zip(steps, [*steps[1:], -1], strict=True):
        t = torch.full((len(x_t),), (k + 1) / process.num_train_timesteps, device=x_t.device)
        x_0 = denoise(x_t, t, condition)
        now, after = alpha_bar[k], alpha_bar[k_next]
        noise = (x_t - now.sqrt() * x_0) / (1 - now).sqrt()
        fresh = config.eta * ((1 - after) / (1 - now) * (1 - now / after)).sqrt()  # sd of the noise drawn anew
        x_t = after.sqrt() * x_0 + (1 - after - fresh.square()).clamp_min(0).sqrt() * noise
        if config.eta > 0 and k_next >= 0:
            x_t = x_t + fresh * draw_noise(x_t.shape, x_t.device, generators)
    return x_t


def sample_ddpm(
    process: Diffusion,
    denoise: Denoise,
    x_T: Tensor,
    condition: Condition,
    config: SamplerConfig,
    generators: Generators,
) -> Tensor:
    """Ancestral sampling, Ho et al. 2020, arXiv:2006.11239, Eq. 7, with the posterior variance (fixed_small), by diffusers."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    scheduler = DDPMScheduler(  # made anew for every call: it holds step state
        num_train_timesteps=process.num_train_timesteps,
        trained_betas=process.betas.double().cpu().numpy(),
        prediction_type="sample",
        variance_type="fixed_small",
        clip_sample=False,
    )
    T = process.num_train_timesteps
    scheduler.set_timesteps(timesteps=visited_steps(T, config.num_inference_steps, config.spacing), device=x_T.device)
    if generators is not None and not isinstance(generators, torch.Generator):
        generators = list(generators)
    x_t = x_T
    for k in scheduler.timesteps:
        x_0 = denoise(x_t, ((k + 1) / T).expand(len(x_t)), condition)
        x_t = scheduler.step(x_0, k, x_t, generator=generators).prev_sample
    return x_t


def sample_euler(
    process: Flow, denoise: Denoise, x_T: Tensor, condition: Condition, config: SamplerConfig, generators: Generators
) -> Tensor:
    """Euler steps along the flow's velocity on the uniform grid 1, 1 - 1/N, ..., 1/N, 0; the last step lands on x_0.

    With x_0 as currency a step is x_s = (s/t) x_t + (1 - s/t) x_0; no grid point lies at t = 0, so no call is wasted.
    """
    x_t, steps = x_T, config.num_inference_steps
    for i in range(steps):
        t, s = 1 - i / steps, 1 - (i + 1) / steps
        x_0 = denoise(x_t, torch.full((len(x_t),), t, device=x_t.device), condition)
        x_t = x_0 if i == steps - 1 else (s / t) * x_t + (1 - s / t) * x_0
    return x_t


SAMPLERS = {
    "ddim": sample_ddim,
    "ddpm": sample_ddpm,
    "euler": sample_euler,
}
