"""Flow matching on the straight path between data (t = 0) and noise (t = 1)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffpolicy.processes.densities import DENSITIES, OF_LOG_SIGMA, Named
from diffpolicy.processes.diagnosis import Finding, weight_findings
from diffpolicy.processes.weighting import LOSS_WEIGHTS, error_gain, loss_weight
from diffpolicy.spec import unknown_name

PREDICTION_TYPES = ("velocity", "sample")


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    prediction_type: str = "velocity"
    """What the network predicts: velocity (noise - x_0) or sample (x_0)."""
    time_scale: float = 1000.0
    """The network's time embedding sees t * time_scale."""
    time_density: str = "uniform"
    """Training times: uniform, beta(1.5, 1), logit_normal(0, 1), u_shaped(4), log_normal(-1.2, 1.2), log_logistic(0.5, 2)."""
    loss_weight: str = "none"
    """none, min_snr(5), soft(5) or cosmap: the same weight of x_0 for every prediction type."""
    shift: float = 1.0
    """Training times and sampling grids move to shift t / (1 + (shift - 1) t); above 1 spends more time in noise."""

    def __post_init__(self):
        if self.prediction_type not in PREDICTION_TYPES:
            raise unknown_name("process.prediction_type", self.prediction_type, PREDICTION_TYPES)
        for name in ("time_scale", "shift"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"process.{name} must be positive, got {getattr(self, name)}")
        Named.parse("process.time_density", self.time_density, DENSITIES)
        Named.parse("process.loss_weight", self.loss_weight, LOSS_WEIGHTS)


class Flow(nn.Module):
    """x_t = (1 - t) x_0 + t noise, velocity = dx_t/dt = noise - x_0. Lipman et al. 2023, arXiv:2210.02747, with t reversed."""

    samplers = (
        "euler", "heun", "midpoint", "ddim", "ddpm", "dpmpp", "dpmpp_2m", "dpmpp_sde", "dpmpp_2m_sde", "unipc",
    )  # fmt: skip
    """Samplers that can solve this process; the first is the default."""
    initial_scale = 1.0
    terminal_signal = 0.0
    smallest_time = 0.001
    """Where grids that name their last time end: 1 / 1000, as in diffusers."""

    def __init__(self, config: FlowConfig):
        super().__init__()
        self.config = config
        self._density = Named.parse("process.time_density", config.time_density, DENSITIES)
        self._weight = Named.parse("process.loss_weight", config.loss_weight, LOSS_WEIGHTS)
        for finding in self.findings():
            warnings.warn(finding.text, stacklevel=2)

    @property
    def prediction_type(self) -> str:
        return self.config.prediction_type

    def findings(self) -> list[Finding]:
        """What is wrong with the loss weight; the path starts where sampling starts."""
        times = torch.arange(1, 101, dtype=torch.float64, device="cpu") / 100
        return weight_findings(self.config.loss_weight, self.loss_weight(times))

    def fit(self, x_0: Tensor) -> None:
        """The straight path needs to know nothing of the data."""

    def sample_time(self, batch_size: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """Training times (B,) in (0, 1]: 1, where sampling starts, is included and 0, where nothing is asked, is not."""
        u = 1 - torch.rand(batch_size, device=device, generator=generator)
        t = DENSITIES[self._density.name](u, *self._density.parameters)
        if self._density.name in OF_LOG_SIGMA:
            t = torch.sigmoid(t).to(u.dtype)  # sigma / alpha = t / (1 - t)
        return self.shifted(t)

    def shifted(self, t: Tensor) -> Tensor:
        """Esser et al. 2024, arXiv:2403.03206, Eq. 23."""
        shift = self.config.shift
        return t if shift == 1 else shift * t / (1 + (shift - 1) * t)

    def network_time(self, t: Tensor) -> Tensor:
        """What the network's time embedding sees, same shape."""
        return t * self.config.time_scale

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of x_t = alpha x_0 + sigma noise at t in [0, 1], any shape, in t's type."""
        return 1 - t, t

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t (B, T_pred, D_act); t is (B,) or (B, T_pred)."""
        t = t.view(t.shape + (1,) * (x_0.ndim - t.ndim))
        return (1 - t) * x_0 + t * noise

    def network_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """What the network sees of x_t: x_t itself."""
        return x_t

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should answer at x_t."""
        return x_0 if self.prediction_type == "sample" else noise - x_0

    def loss_weight(self, t: Tensor) -> Tensor | None:
        """Weight of the squared error of the prediction at t, same shape; None where every time counts alike."""
        if self._weight.name == "none":
            return None
        alpha, sigma = self.levels(t)
        gain = error_gain(self.prediction_type, alpha, sigma)
        return loss_weight(
            lambda snr: LOSS_WEIGHTS[self._weight.name](snr, *self._weight.parameters), gain, alpha, sigma
        )

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The one sampling currency: x_0 as the network's prediction implies it, unclipped."""
        if self.prediction_type == "sample":
            return prediction
        t = t.view(t.shape + (1,) * (x_t.ndim - t.ndim))
        return x_t - t * prediction

    def from_x0(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The prediction that means this x_0: the inverse of to_x0; needs t > 0."""
        if self.prediction_type == "sample":
            return x_0
        t = t.view(t.shape + (1,) * (x_t.ndim - t.ndim))
        return (x_t - x_0) / t
