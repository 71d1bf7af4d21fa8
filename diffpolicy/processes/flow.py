"""Flow matching on the straight path between data (t = 0) and noise (t = 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffpolicy.spec import unknown_name

PREDICTION_TYPES = ("velocity", "sample")


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    prediction_type: str = "velocity"
    """What the network predicts: velocity (noise - x_0) or sample (x_0)."""
    time_scale: float = 1000.0
    """The network's time embedding sees t * time_scale."""

    def __post_init__(self):
        if self.prediction_type not in PREDICTION_TYPES:
            raise unknown_name("process.prediction_type", self.prediction_type, PREDICTION_TYPES)


class Flow(nn.Module):
    """x_t = (1 - t) x_0 + t noise, velocity = dx_t/dt = noise - x_0. Lipman et al. 2023, arXiv:2210.02747, with t reversed."""

    samplers = ("euler",)
    """Samplers that can solve this process; the first is the default."""

    def __init__(self, config: FlowConfig):
        super().__init__()
        self.config = config

    def sample_time(self, batch_size: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """Training times (B,), uniform in (0, 1]: 1, where sampling starts, is included and 0, where nothing is asked, is not."""
        return 1 - torch.rand(batch_size, device=device, generator=generator)

    def network_time(self, t: Tensor) -> Tensor:
        """What the network's time embedding sees, same shape."""
        return t * self.config.time_scale

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t (B, T_pred, D_act); t is (B,) or (B, T_pred)."""
        t = t.view(t.shape + (1,) * (x_0.ndim - t.ndim))
        return (1 - t) * x_0 + t * noise

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should answer at x_t."""
        return x_0 if self.config.prediction_type == "sample" else noise - x_0

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The one sampling currency: x_0 as the network's prediction implies it, unclipped."""
        if self.config.prediction_type == "sample":
            return prediction
        t = t.view(t.shape + (1,) * (x_t.ndim - t.ndim))
        return x_t - t * prediction
