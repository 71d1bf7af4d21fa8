"""DiffusionPolicy: observation -> action chunk in physical units, by denoising."""

from __future__ import annotations

import dataclasses
import warnings

import torch
from torch import Tensor, nn

from diffpolicy.normalizer import Normalizer
from diffpolicy.processes import Generators, Process, SamplerConfig, draw_noise, resolve_sampler, sample
from diffpolicy.spec import ACTION, IMAGES, TASK, Batch, Condition, DataSpec, Horizons, Observation


class DiffusionPolicy(nn.Module):
    """Encoder, denoiser and process behind one interface; holds no state between calls.

        obs (B, T_obs, ...) --normalizer--> --encoder--> Condition --denoiser + process--> x_0 --normalizer--> chunk (B, T_pred, D_act)

    `encode` runs once per chunk, whatever the number of denoising steps and of samples.
    """

    def __init__(
        self,
        *,
        encoder: nn.Module,
        denoiser: nn.Module,
        process: Process,
        normalizer: Normalizer,
        horizons: Horizons,
        spec: DataSpec,
        sampler: SamplerConfig,
    ):
        super().__init__()
        self.encoder, self.denoiser, self.process, self.normalizer = encoder, denoiser, process, normalizer
        self.horizons, self.spec = horizons, spec
        self.use_sampler(sampler)

    def use_sampler(self, config: SamplerConfig) -> DiffusionPolicy:
        """Chooses sampler, steps, spacing and clipping from here on; no retraining.

        Raises:
            ValueError: the sampler cannot solve this policy's process, or not with so many steps.
        """
        self.sampler = dataclasses.replace(config, name=resolve_sampler(self.process, config))
        if config.eta and self.sampler.name != "ddim":
            warnings.warn(
                f"sampler.eta={config.eta} is ignored: only ddim adds noise so, this is {self.sampler.name}", stacklevel=2
            )
        return self

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def encode(self, obs: Observation) -> Condition:
        """Observation in physical units -> Condition; the only place where the encoder runs.

        Raises:
            ValueError: a key is missing, or has another shape than the policy was trained on.
        """
        ready: Observation = {}
        for key, field in self.spec.fields.items():
            if not key.startswith("observation."):
                continue
            if key not in obs:
                raise ValueError(f"the policy needs {key!r}; the observation holds {sorted(obs)}")
            value = obs[key]
            if value.shape[1] != self.horizons.obs or tuple(value.shape[2:]) != field.shape:
                wanted = ", ".join(map(str, (f"T_obs={self.horizons.obs}", *field.shape)))
                raise ValueError(f"{key} must be (B, {wanted}), got {tuple(value.shape)}")
            ready[key] = value if key.startswith(IMAGES) else self.normalizer.normalize(key, value)
        if TASK in obs:
            ready[TASK] = obs[TASK]
        return self.encoder(ready)

    def denoise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The one sampling currency: x_0 (B, T_pred, D_act), normalised and unclipped, from x_t at t (B,)."""
        prediction = self.denoiser(x_t, self.process.network_time(t), condition)
        return self.process.to_x0(prediction.float(), x_t, t)

    def compute_loss(self, batch: Batch, generator: torch.Generator | None = None) -> Tensor:
        """Mean squared error of the network's prediction over the unpadded steps, scalar.

        Differs from the reference code, which also learns the repeated actions at the edges of an episode.
        """
        x_0 = self.normalizer.normalize(ACTION, batch.actions)
        noise = torch.randn(x_0.shape, device=x_0.device, generator=generator)
        t = self.process.sample_time(len(x_0), x_0.device, generator)
        x_t = self.process.add_noise(x_0, noise, t)
        prediction = self.denoiser(x_t, self.process.network_time(t), self.encode(batch.obs))
        error = (prediction.float() - self.process.target(x_0, noise, t)).square().mean(dim=-1)  # (B, T_pred)
        return (error * batch.mask).sum() / batch.mask.sum()

    @torch.no_grad()
    def sample(self, condition: Condition, *, num_samples: int = 1, generators: Generators = None) -> Tensor:
        """Chunks in physical units for an encoded observation.

        Returns:
            (B, T_pred, D_act), or (B, num_samples, T_pred, D_act) when num_samples > 1. With one generator per
            observation, its samples are drawn from it one after another.
        """
        batch_size = len(condition.global_cond)
        if num_samples > 1:
            condition = condition.repeat(num_samples)
            if generators is not None and not isinstance(generators, torch.Generator):
                generators = [g for g in generators for _ in range(num_samples)]
        shape = (batch_size * num_samples, self.horizons.pred, self.spec.action_dim)
        x_T = draw_noise(shape, self.device, generators)
        x_0 = sample(self.process, self.denoise, x_T, condition, self.sampler, generators)
        chunk = self.normalizer.unnormalize(ACTION, x_0)
        return chunk if num_samples == 1 else chunk.unflatten(0, (batch_size, num_samples))

    @torch.no_grad()
    def sample_actions(self, obs: Observation, *, num_samples: int = 1, generators: Generators = None) -> Tensor:
        """Observation -> chunk (B, T_pred, D_act), physical units; executed are chunk[:, horizons.executed]."""
        return self.sample(self.encode(obs), num_samples=num_samples, generators=generators)
