"""Baselines on the same network, data and executor that a claim for generation must beat: one or two calls, little or no noise.

Pan et al. 2025, arXiv:2512.01809 ("Much Ado About Noising"): supervised iteration, not the fitting of a distribution, explains most
of what diffusion gains over regression on 28 benchmarks. Their time runs the other way (0 = noise).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffpolicy.processes.diagnosis import Finding


@dataclass(frozen=True, kw_only=True)
class RegressionConfig:
    time_scale: float = 1000.0
    """The network's time embedding sees t * time_scale, as in flow."""


@dataclass(frozen=True, kw_only=True)
class StraightFlowConfig(RegressionConfig):
    pass


@dataclass(frozen=True, kw_only=True)
class MipConfig(RegressionConfig):
    time_refine: float = 0.1
    """Time of the second call; its training input is (1 - t) x_0 + t noise. The paper's t* = .9 in its reversed time."""

    def __post_init__(self):
        if not 0 < self.time_refine < 1:
            raise ValueError(f"process.time_refine must be in (0, 1), got {self.time_refine}")


class Regression(nn.Module):
    """The network sees zeros for x_t and answers x_0 in one call: least squares, so the mean of what demonstrators do."""

    samplers = ("direct",)
    initial_scale = 0.0
    terminal_signal = 0.0
    prediction_type = "sample"
    smallest_time = 1.0

    def __init__(self, config: RegressionConfig):
        super().__init__()
        self.config = config

    def findings(self) -> list[Finding]:
        """Nothing can be wrong with it: it starts where sampling starts."""
        return []

    def fit(self, x_0: Tensor) -> None:
        """Needs to know nothing of the data."""

    def sample_time(self, batch_size: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """Always 1, (B,): there is nothing but the start."""
        return torch.ones(batch_size, device=device)

    def network_time(self, t: Tensor) -> Tensor:
        """What the network's time embedding sees, same shape."""
        return t * self.config.time_scale

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """What x_t says about x_0, as a straight path: alpha 0 at t = 1, so the exact answer is the mean."""
        return 1 - t, t

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The network's input in training, (B, T_pred, D_act)."""
        return torch.zeros_like(x_0)

    def network_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        return x_t

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should answer."""
        return x_0

    def loss_weight(self, t: Tensor) -> None:
        """Every sample counts alike."""

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return prediction

    def from_x0(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return x_0


class StraightFlow(Regression):
    """Flow matching that is trained and asked at t = 1 only: noise in, velocity noise - x_0 out, one Euler step of length 1."""

    initial_scale = 1.0
    prediction_type = "velocity"

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Pure noise, (B, T_pred, D_act)."""
        return noise

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - x_0

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return x_t - prediction

    def from_x0(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return x_t - x_0


class Mip(Regression):
    """The minimal iterative policy: a regression from zeros, then one refinement of its own, slightly shrunk answer.

    Trained on x_0 at both places: from zeros at t = 1, and from (1 - t) x_0 + t noise at t = time_refine. Where we differ from
    the paper: a window of a batch trains one of the two, by a fair coin, so that a step costs what every other process's costs;
    the expected loss is half of theirs.
    """

    samplers = ("two_step",)

    def __init__(self, config: MipConfig):
        super().__init__(config)
        self.smallest_time = config.time_refine

    def sample_time(self, batch_size: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """1 or time_refine, (B,)."""
        u = torch.rand(batch_size, device=device, generator=generator)
        return torch.where(u < 0.5, torch.ones_like(u), torch.full_like(u, self.config.time_refine))

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Zeros at t = 1, else on the straight path, (B, T_pred, D_act)."""
        t = t.view(t.shape + (1,) * (x_0.ndim - t.ndim))
        return torch.where(t == 1, torch.zeros_like(x_0), (1 - t) * x_0 + t * noise)
