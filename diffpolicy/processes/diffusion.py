"""Discrete-time diffusion: how actions are noised, and what the network's prediction says about x_0."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffpolicy.processes.schedules import SCHEDULES, schedule_betas, terminal_signal
from diffpolicy.spec import unknown_name

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    schedule: str = "cosine"
    """Noise schedule, a name in processes/schedules.py."""
    num_train_timesteps: int = 100
    prediction_type: str = "epsilon"
    """What the network predicts: epsilon (the noise), sample (x_0) or v_prediction."""

    def __post_init__(self):
        if self.prediction_type not in PREDICTION_TYPES:
            raise unknown_name("process.prediction_type", self.prediction_type, PREDICTION_TYPES)
        if self.schedule not in SCHEDULES:
            raise unknown_name("process.schedule", self.schedule, SCHEDULES)


class Diffusion(nn.Module):
    """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise at t in {1/T, ..., 1}. Ho et al. 2020, arXiv:2006.11239, Eq. 4."""

    samplers = ("ddim", "ddpm")
    """Samplers that can solve this process; the first is the default."""

    def __init__(self, config: DiffusionConfig):
        super().__init__()
        self.config = config
        betas = schedule_betas(config.schedule, config.num_train_timesteps)
        self.register_buffer("betas", betas.float(), persistent=False)
        self.register_buffer("alpha_bar", (1 - betas).cumprod(dim=0).float(), persistent=False)
        self.terminal_signal = terminal_signal(betas)
        if self.terminal_signal > 0.05:
            warnings.warn(
                f"process.schedule={config.schedule} with {config.num_train_timesteps} steps leaves "
                f"{self.terminal_signal:.0%} of the signal at t=1, but sampling starts from pure noise, so even a perfect "
                "network is biased; use process.schedule=cosine or process.num_train_timesteps=1000",
                stacklevel=2,
            )

    @property
    def num_train_timesteps(self) -> int:
        return self.config.num_train_timesteps

    def sample_time(self, batch_size: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """Training times (B,), uniform over the T steps, in (0, 1]."""
        k = torch.randint(0, self.num_train_timesteps, (batch_size,), device=device, generator=generator)
        return (k + 1) / self.num_train_timesteps

    def step_index(self, t: Tensor) -> Tensor:
        """Integer step k of t = (k + 1) / T, same shape."""
        return (t * self.num_train_timesteps).round().long() - 1

    def network_time(self, t: Tensor) -> Tensor:
        """What the network's time embedding sees: the integer step 0 .. T - 1, as Diffusion Policy."""
        return self.step_index(t).float()

    def signal_and_noise(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar) and sqrt(1 - alpha_bar) at t (B,) or (B, T_pred), shaped to multiply x (B, T_pred, D_act)."""
        alpha_bar = self.alpha_bar[self.step_index(t)]
        alpha_bar = alpha_bar.view(t.shape + (1,) * (x.ndim - t.ndim))
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t (B, T_pred, D_act)."""
        signal, sigma = self.signal_and_noise(t, x_0)
        return signal * x_0 + sigma * noise

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should answer at x_t; v as Salimans & Ho 2022, arXiv:2202.00512, appendix D."""
        if self.config.prediction_type == "epsilon":
            return noise
        if self.config.prediction_type == "sample":
            return x_0
        signal, sigma = self.signal_and_noise(t, x_0)
        return signal * noise - sigma * x_0

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The one sampling currency: x_0 as the network's prediction implies it, unclipped."""
        if self.config.prediction_type == "sample":
            return prediction
        signal, sigma = self.signal_and_noise(t, x_t)
        if self.config.prediction_type == "epsilon":
            return (x_t - sigma * prediction) / signal
        return signal * x_t - sigma * prediction
