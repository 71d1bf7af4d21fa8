"""DiffusionPolicy: observation -> action chunk in physical units, by denoising."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection

import torch
from torch import Tensor, nn

from diffpolicy.encoders.parts import part_of
from diffpolicy.guidance import GuidanceConfig, classifier_free
from diffpolicy.normalizer import Normalizer
from diffpolicy.processes import (
    Finding,
    Generators,
    Process,
    SamplerConfig,
    draw_noise,
    ignored_choices,
    make_plan,
    resolve_sampler,
    sample,
    sampler_findings,
)
from diffpolicy.spec import ACTION, EMBEDDING, TASK, Batch, Condition, DataSpec, Horizons, Observation


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
        guidance: GuidanceConfig = GuidanceConfig(),  # noqa: B008 (frozen)
    ):
        super().__init__()
        self.encoder, self.denoiser, self.process, self.normalizer = encoder, denoiser, process, normalizer
        self.horizons, self.spec = horizons, spec
        self.use_sampler(sampler)
        self.use_guidance(guidance)

    @property
    def droppable(self) -> frozenset[str]:
        """Parts of an observation that may be missing, as training hid them now and then; see encoders/parts.py."""
        return getattr(self.encoder, "droppable", frozenset())

    def use_guidance(self, config: GuidanceConfig) -> DiffusionPolicy:
        """Chooses how much the words and the goal image count from here on; no retraining.

        Raises:
            ValueError: a weight other than 1 for a part that training never hid.
        """
        for part in config.parts:
            if part not in self.droppable:
                raise ValueError(
                    f"guidance.{part}={getattr(config, part):g} needs a policy that was trained with encoder.{part}_dropout "
                    f"above 0; this one can do without {sorted(self.droppable) or 'nothing'}"
                )
        self.guidance = config
        return self

    def use_sampler(self, config: SamplerConfig) -> DiffusionPolicy:
        """Chooses sampler, steps, spacing and clipping from here on; no retraining.

        Raises:
            ValueError: the sampler cannot solve this policy's process, or not with so many steps.
        """
        self.sampler = resolve_sampler(self.process, config)
        self.plan = make_plan(self.process, self.sampler)
        ignored = ignored_choices(config, self.sampler.name)
        if ignored:
            warnings.warn(f"{', '.join(ignored)} is ignored: {self.sampler.name} does not use it", stacklevel=2)
        for finding in sampler_findings(self.process, self.sampler, self.plan.times, action_limit=self.action_limit()):
            warnings.warn(finding.text, stacklevel=2)
        return self

    def findings(self) -> list[Finding]:
        """What is wrong with the process and the sampler of this policy: label, reason and cure; empty where nothing is."""
        return [
            *self.process.findings(),
            *sampler_findings(self.process, self.sampler, self.plan.times, action_limit=self.action_limit()),
        ]

    def action_limit(self) -> float | None:
        """Largest normalised action of the training data; None before the normaliser knows."""
        if self.normalizer.stat(ACTION, "min").is_meta:
            return None
        ends = [self.normalizer.normalize(ACTION, self.normalizer.stat(ACTION, end)) for end in ("min", "max")]
        largest = torch.stack(ends).abs().max().item()
        return largest if math.isfinite(largest) else None

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def encode(self, obs: Observation, *, drop: Collection[str] = ()) -> Condition:
        """Observation in physical units -> Condition; the only place where the encoder runs, once, also under guidance.

        Args:
            obs: may lack what is droppable: roles, or words (""). An image of the goal has one frame, (B, 1, H, W, 3).
            drop: droppable parts that are not to be looked at although they are here.
        Raises:
            ValueError: a key is missing that the policy needs, or has another shape than it was trained on.
        """
        ready: Observation = {}
        for key in self.spec.input_keys:
            if embedded := {name: obs[name] for name in obs if name.startswith(f"{EMBEDDING}{key}.")}:
                ready |= embedded
                continue
            if key not in obs:
                if part_of(key) in self.droppable:
                    continue
                raise ValueError(f"the policy needs {key!r}; the observation holds {sorted(obs)}")
            value, field = obs[key], self.spec.fields[key]
            num_frames = 1 if key in self.spec.goal_keys else self.horizons.obs
            if value.shape[1] != num_frames or tuple(value.shape[2:]) != field.shape:
                wanted = ", ".join(map(str, (f"T_obs={num_frames}", *field.shape)))
                raise ValueError(f"{key} must be (B, {wanted}), got {tuple(value.shape)}")
            ready[key] = self.normalizer.normalize(key, value) if key in self.spec.state_keys else value
        if TASK in obs:
            ready[TASK] = obs[TASK]
        if not ready:
            raise ValueError(f"the observation holds nothing that the policy looks at: {sorted(obs)}")
        without = () if self.training else self.guidance.parts
        choices = {name: parts for name, parts in (("drop", drop), ("without", without)) if parts}
        if choices and not self.droppable:
            raise ValueError(f"this policy can do without nothing, got {choices}")
        return self.encoder(ready, **choices)

    def denoise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The one sampling currency: x_0 (B, T_pred, D_act), normalised and unclipped, from x_t at t (B,)."""
        prediction = self.denoiser(self.process.network_input(x_t, t), self.process.network_time(t), condition)
        return self.process.to_x0(prediction.float(), x_t, t)

    def compute_loss(self, batch: Batch, generator: torch.Generator | None = None) -> Tensor:
        """Mean squared error of the network's prediction over the unpadded steps, scalar.

        Differs from the reference code, which also learns the repeated actions at the edges of an episode.
        """
        x_0 = self.normalizer.normalize(ACTION, batch.actions)
        noise = torch.randn(x_0.shape, device=x_0.device, generator=generator)
        t = self.process.sample_time(len(x_0), x_0.device, generator)
        x_t = self.process.add_noise(x_0, noise, t)
        x_in = self.process.network_input(x_t, t)
        prediction = self.denoiser(x_in, self.process.network_time(t), self.encode(batch.obs))
        error = (prediction.float() - self.process.target(x_0, noise, t)).square().mean(dim=-1)  # (B, T_pred)
        weight = self.process.loss_weight(t)  # (B,)
        if weight is not None:
            error = weight[:, None] * error
        return (error * batch.mask).sum() / batch.mask.sum()

    @torch.no_grad()
    def sample(
        self,
        condition: Condition,
        *,
        num_samples: int = 1,
        generators: Generators = None,
        start: Tensor | None = None,
        x_start: Tensor | None = None,
    ) -> Tensor:
        """Chunks in physical units for an encoded observation.

        Args:
            start, x_start: begin somewhere else than in pure noise: times in [0, 1], (B * num_samples,) or (B * num_samples,
                T_pred), and x there, (B * num_samples, T_pred, D_act), normalised and noised (`process.add_noise`). A time of 0
                keeps what is given. Times per action need a denoiser that takes them.
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
        if (start is None) != (x_start is None):
            raise ValueError("start (times) and x_start (chunks at these times) belong together; give both or neither")
        if x_start is not None and tuple(x_start.shape) != shape:
            raise ValueError(f"x_start must be (B * num_samples, T_pred, D_act) = {shape}, got {tuple(x_start.shape)}")
        x_T = draw_noise(shape, self.device, generators) if x_start is None else x_start
        denoise, condition = classifier_free(self.denoise, condition, self.guidance)
        if hasattr(self.denoiser, "prepare"):
            condition = self.denoiser.prepare(condition)
        x_0 = sample(self.process, denoise, x_T, condition, self.sampler, generators, plan=self.plan, start=start)
        chunk = self.normalizer.unnormalize(ACTION, x_0)
        return chunk if num_samples == 1 else chunk.unflatten(0, (batch_size, num_samples))

    @torch.no_grad()
    def sample_actions(self, obs: Observation, *, num_samples: int = 1, generators: Generators = None) -> Tensor:
        """Observation -> chunk (B, T_pred, D_act), physical units; executed are chunk[:, horizons.executed]."""
        return self.sample(self.encode(obs), num_samples=num_samples, generators=generators)
