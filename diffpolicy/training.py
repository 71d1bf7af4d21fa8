"""PolicyModule and ReplayDataModule: what Lightning needs to train a policy; no maths lives here.

Everything random in a training step (order of windows, times, noise, dropout, crops) is a pure function of
(seed, step, rank). Resuming at a step therefore repeats exactly what an uninterrupted run would have done.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from diffpolicy.policies import DiffusionPolicy
from diffpolicy.spec import ACTION, Batch
from diffpolicy.windows import WindowDataset


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int = 5000
    """Optimiser steps; the cosine schedule ends here."""
    batch_size: int = 256
    """Windows per step and device."""
    lr: float = 1e-3
    betas: tuple[float, float] = (0.95, 0.999)
    weight_decay: float = 1e-6
    warmup_steps: int = 200
    """Steps over which the learning rate rises linearly."""
    grad_clip: float | None = 1.0
    """Largest gradient norm; null leaves it free."""
    ema_power: float = 0.75
    """EMA decay after n updates is 1 - (1 + n)^-power, up to ema_max."""
    ema_max: float = 0.9999
    val_every: int = 1000
    """Steps between validations on the held-out episodes."""
    val_windows: int = 512
    """Held-out windows that are looked at, spread evenly."""
    log_every: int = 50
    checkpoint_every: int = 1000

    def __post_init__(self):
        for name in ("steps", "batch_size", "val_every", "val_windows", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"train.warmup_steps must be in [0, train.steps = {self.steps}], got {self.warmup_steps}")
        if self.lr <= 0:
            raise ValueError(f"train.lr must be positive, got {self.lr}")
        if self.grad_clip is not None and self.grad_clip <= 0:
            raise ValueError(f"train.grad_clip must be positive, or null for no clipping, got {self.grad_clip}")
        if self.weight_decay < 0:
            raise ValueError(f"train.weight_decay must not be negative, got {self.weight_decay}")
        if len(self.betas) != 2:
            raise ValueError(f"train.betas must have length 2, got {tuple(self.betas)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.betas must lie in [0, 1), got {tuple(self.betas)}")
        if self.ema_power <= 0:
            raise ValueError(f"train.ema_power must be positive, got {self.ema_power}")
        if not 0 <= self.ema_max < 1:
            raise ValueError(f"train.ema_max must be in [0, 1), got {self.ema_max}")


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """One seed for everything random in a training step."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, dtype=np.uint32)[0])


def cosine_warmup(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """Factor on the learning rate: linear rise, then half a cosine down to 0. Loshchilov & Hutter 2017, arXiv:1608.03983."""
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def ema_decay(update: int, *, power: float, maximum: float) -> float:
    """Decay of the update-th EMA update: 0 for the first two, then 1 - (1 + n)^-power, as Diffusion Policy's EMAModel."""
    n = max(0, update - 1)
    return 0.0 if n == 0 else min(maximum, 1 - (1 + n) ** -power)


class BatchStream:
    """Batches from `start_step` on, without end: each epoch is a permutation drawn from (seed, epoch)."""

    def __init__(
        self,
        dataset: WindowDataset,
        *,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.dataset, self.seed, self.start_step = dataset, seed, start_step
        self.rank, self.world_size = rank, world_size
        self.batch_size = min(batch_size, max(1, len(dataset) // world_size))
        self.batches_per_epoch = max(1, len(dataset) // (self.batch_size * world_size))
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.long)

    def windows(self, step: int) -> Tensor:
        """Indices (B,) of the windows of this step; the last few of a permutation that fill no batch are left out."""
        epoch, position = divmod(step, self.batches_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(step_seed(self.seed, epoch))
            self._epoch, self._permutation = epoch, torch.randperm(len(self.dataset), generator=generator)
        first = (position * self.world_size + self.rank) * self.batch_size
        return self._permutation[first : first + self.batch_size]

    def __iter__(self) -> Iterator[Batch]:
        step = self.start_step
        while True:
            yield self.dataset.batch(self.windows(step))
            step += 1


class FixedBatches:
    """The same few windows every time, spread evenly over a dataset."""

    def __init__(self, dataset: WindowDataset, *, num_windows: int, batch_size: int):
        chosen = np.unique(np.linspace(0, len(dataset) - 1, num_windows).round().astype(np.int64))
        self.dataset, self._batches = dataset, torch.from_numpy(chosen).split(batch_size)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return (self.dataset.batch(window) for window in self._batches)


class ReplayDataModule(L.LightningDataModule):
    """Training and validation windows, on the training device; resumes at the trainer's step."""

    def __init__(self, train: WindowDataset, val: WindowDataset, *, config: TrainConfig, seed: int):
        super().__init__()
        self.train, self.val, self.config, self.seed = train, val, config, seed

    def state_dict(self) -> dict:
        return {
            "num_windows": len(self.train),
            "precision": self.trainer.precision,
            "world_size": self.trainer.world_size,
        }

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError where the data have changed since: every batch from here on would be another."""
        if state["num_windows"] != len(self.train):
            raise ValueError(
                f"the data give {len(self.train)} training windows, the run began with {state['num_windows']}; "
                "resume with the data it began with (--data, if they moved), or start a new run"
            )
        for what, flag in (("precision", "--precision"), ("world_size", "--num-devices")):
            if what in state and state[what] != getattr(self.trainer, what):
                raise ValueError(
                    f"the run began with {what} {state[what]}, this is {getattr(self.trainer, what)}: "
                    f"it would not go on as it began; resume with the same {flag}"
                )

    def stream(self, start_step: int = 0) -> BatchStream:
        trainer = self.trainer
        return BatchStream(
            self.train,
            batch_size=self.config.batch_size,
            seed=self.seed,
            start_step=start_step,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
        )

    def train_dataloader(self) -> BatchStream:
        # Data goes to the device once; small sets of numbers or images fit there and batches are gathered by index.
        self.train.to(self.trainer.strategy.root_device)
        return self.stream(self.trainer.global_step)

    def val_dataloader(self) -> FixedBatches | list:
        if len(self.val) == 0:
            return []
        self.val.to(self.trainer.strategy.root_device)
        return FixedBatches(self.val, num_windows=self.config.val_windows, batch_size=self.config.batch_size)


class PolicyModule(L.LightningModule):
    """Loss, optimiser and EMA around a policy. `ema` is the policy to use; `policy` is the one that learns."""

    def __init__(self, policy: DiffusionPolicy, *, config: TrainConfig, seed: int):
        super().__init__()
        self.policy, self.config, self.seed = policy, config, seed
        self.ema = copy.deepcopy(policy).eval().requires_grad_(False)
        self.policy.normalizer.require_fitted()
        self.last_loss: Tensor | None = None

    def train(self, mode: bool = True) -> PolicyModule:
        super().train(mode)
        self.ema.eval()  # the EMA is never trained: no dropout, no random crop
        return self

    def forward(self, batch: Batch) -> Tensor:
        return self.policy.compute_loss(batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        torch.manual_seed(step_seed(self.seed, self.global_step, self.global_rank))
        loss = self.policy.compute_loss(batch)
        self.last_loss = loss.detach()
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """EMA policy in eval mode, the same noise every time: curves show learning, not luck."""
        generator = torch.Generator(self.device).manual_seed(batch_idx)
        loss = self.ema.compute_loss(batch, generator=generator)
        chunk = self.ema.sample_actions(batch.obs, generators=torch.Generator().manual_seed(batch_idx))
        normalize = self.ema.normalizer.normalize
        error = (normalize(ACTION, chunk) - normalize(ACTION, batch.actions)).square().mean(dim=-1)  # (B, T_pred)
        error = (error * batch.mask).sum() / batch.mask.sum()
        self.log_dict({"val/loss": loss, "val/action_mse": error}, batch_size=len(batch.window), sync_dist=True)

    def optimizer_step(self, *args, **kwargs) -> None:
        super().optimizer_step(*args, **kwargs)
        self._update_ema()

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        # Lightning's own way refuses fused optimisers under bf16 too, where nothing is scaled
        if gradient_clip_val is not None:
            nn.utils.clip_grad_norm_(self.policy.parameters(), gradient_clip_val)

    @torch.no_grad()
    def _update_ema(self) -> None:
        # in this hook global_step still counts the updates before this one, as the reference does
        decay = ema_decay(self.global_step, power=self.config.ema_power, maximum=self.config.ema_max)
        pairs = list(zip(self.ema.parameters(), self.policy.parameters(), strict=True))
        torch._foreach_lerp_([e for e, _ in pairs], [p.detach() for _, p in pairs], 1 - decay)
        for ema_buffer, buffer in zip(self.ema.buffers(), self.policy.buffers(), strict=True):
            ema_buffer.copy_(buffer)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(
            parameter_groups(self.policy, self.config.weight_decay, lr=self.config.lr),
            lr=self.config.lr,
            betas=tuple(self.config.betas),
            # under fp16 a fused optimiser would unscale the gradients itself, after they were clipped
            fused=self._trainer is None or self._trainer.precision != "16-mixed",
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: cosine_warmup(step, warmup_steps=self.config.warmup_steps, total_steps=self.config.steps),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def parameter_groups(policy: nn.Module, weight_decay: float, *, lr: float) -> list[dict]:
    """Two groups: with weight decay, and without it where the denoiser says so (`no_weight_decay`).

    Where the encoder wants another learning rate for some of its parameters (`lr_scales`), each such rate has two groups of
    its own behind them, as a factor on `lr`.
    """
    exempt = {f"denoiser.{name}" for name in policy.denoiser.no_weight_decay()}
    wanted = getattr(policy.encoder, "lr_scales", dict)()
    scales = {f"encoder.{name}": scale for name, scale in wanted.items() if scale != 1.0}
    named = [(name, p) for name, p in policy.named_parameters() if p.requires_grad]
    groups = []
    for scale in (1.0, *sorted(set(scales.values()))):
        members = [(name, p) for name, p in named if scales.get(name, 1.0) == scale]
        rate = {} if scale == 1.0 else {"lr": lr * scale}
        groups += [
            {"params": [p for name, p in members if name not in exempt], "weight_decay": weight_decay, **rate},
            {"params": [p for name, p in members if name in exempt], "weight_decay": 0.0, **rate},
        ]
    return [group for group in groups if group["params"]]
