"""Any scheduler of diffusers on our schedules: for those that we do not have, and to compare ours with."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from diffpolicy.processes.diffusion import Diffusion
from diffpolicy.processes.samplers import Denoise, Generators, SamplerConfig, noise_generators
from diffpolicy.spec import Condition, unknown_name


def make_scheduler(process: Diffusion, config: SamplerConfig) -> Any:
    """A fresh scheduler (it holds step state) on the process's betas that takes x_0, with the config's spacing set.

    Raises:
        ValueError: diffusers has no such class, or it does not take betas, x_0, the spacing or zero terminal SNR; more steps
            than were trained.
    """
    import diffusers.schedulers as stock

    # those of Flax are not torch's, the inverse ones go from data to noise, and dir() names some that are not there
    names = [n for n in dir(stock) if n.endswith("Scheduler") and not n.startswith("Flax") and "Inverse" not in n]
    names = [n for n in names if hasattr(stock, n)]
    if config.scheduler not in names:
        raise unknown_name("sampler.scheduler", config.scheduler, names)
    scheduler_class = getattr(stock, config.scheduler)
    takes = inspect.signature(scheduler_class.__init__).parameters
    if not {"trained_betas", "prediction_type"} <= set(takes):
        raise ValueError(
            f"sampler.scheduler={config.scheduler} takes no betas or no x_0 prediction; it cannot step here"
        )
    T, N = process.num_train_timesteps, config.num_inference_steps
    if config.timesteps is None and N > T:  # some of diffusers would fail in the middle of sampling
        raise ValueError(f"sampler.num_inference_steps must be in [1, process.num_train_timesteps = {T}], got {N}")
    choices = {
        "num_train_timesteps": process.num_train_timesteps,
        "trained_betas": process.exact_betas.numpy(),
        "prediction_type": "sample",
        "timestep_spacing": config.spacing,
        "use_karras_sigmas": config.spacing == "karras",
        "use_exponential_sigmas": config.spacing == "exponential",
        "clip_sample": False,  # clipping is done once, by clip_x0
        "set_alpha_to_one": config.final_sigma == "zero",
        "final_sigmas_type": config.final_sigma,
        "rescale_betas_zero_snr": False,
    }
    if config.spacing in ("karras", "exponential"):
        if f"use_{config.spacing}_sigmas" not in takes:
            raise ValueError(f"sampler.scheduler={config.scheduler} has no spacing {config.spacing!r}")
        choices["timestep_spacing"] = "linspace"
    scheduler = scheduler_class(**{k: v for k, v in choices.items() if k in takes})
    if config.timesteps is not None:
        if "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"sampler.scheduler={config.scheduler} takes no explicit sampler.timesteps")
        scheduler.set_timesteps(timesteps=[round(k) for k in config.timesteps])
    else:
        scheduler.set_timesteps(config.num_inference_steps)
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and not torch.as_tensor(sigmas).isfinite().all():  # its chunks would be NaN, in silence
        raise ValueError(
            f"sampler.scheduler={config.scheduler} steps in sigma / alpha, which has no largest value with zero terminal SNR; "
            "use process.terminal_snr=as_is or scaled, DDIMScheduler, or another sampler.name than diffusers"
        )
    return scheduler


def sample_with_diffusers(
    process: Diffusion,
    denoise: Denoise,
    x_T: Tensor,
    condition: Condition,
    config: SamplerConfig,
    generators: Generators,
) -> Tensor:
    """Steps a scheduler of diffusers, as its documentation shows, from noise x_T (B, T_pred, D_act) to x_0."""
    scheduler = make_scheduler(process, config)
    takes = inspect.signature(scheduler.step).parameters
    fresh = noise_generators(generators)
    choices = {"eta": config.eta} if "eta" in takes else {}
    if "generator" in takes and fresh is not None:
        choices["generator"] = fresh if isinstance(fresh, torch.Generator) else list(fresh)
    x_t = x_T * (config.temperature * float(scheduler.init_noise_sigma))
    T = process.num_train_timesteps
    for k in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x_t, k)
        t = torch.full((len(x_T),), (float(k) + 1) / T, device=x_T.device)
        x_0 = denoise(x_in, t, condition)
        try:
            x_t = scheduler.step(x_0, k, x_t, **choices).prev_sample
        except (NotImplementedError, IndexError, AssertionError, TypeError) as error:
            raise ValueError(
                f"sampler.scheduler={config.scheduler} of diffusers fails at step {float(k):g} with spacing {config.spacing} "
                f"({type(error).__name__}: {error}); choose another"
            ) from error
    return x_t


__all__ = ["make_scheduler", "sample_with_diffusers"]
