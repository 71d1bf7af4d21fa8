"""Diffusion: how actions are noised over T steps, and what the network's prediction says about x_0."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffpolicy.processes.densities import DENSITIES, OF_LOG_SIGMA, Named
from diffpolicy.processes.diagnosis import Finding, process_findings, weight_findings
from diffpolicy.processes.schedules import (
    SCHEDULES,
    TERMINAL_SNRS,
    TUNED_FOR_1000,
    alpha_bar_table,
    alpha_bar_to_sigma,
    check_schedule_table,
    read_schedule,
)
from diffpolicy.processes.weighting import LOSS_WEIGHTS, error_gain, loss_weight
from diffpolicy.spec import unknown_name

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "edm")


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    schedule: str = "cosine"
    """Noise schedule, a name in processes/schedules.py; or table, read from schedule_file."""
    schedule_file: str | None = None
    """CSV file with the columns t,alpha_bar; read once into `table`, so that neither a checkpoint nor a resumed run needs it."""
    table: tuple[tuple[float, float], ...] = ()
    """The (t, alpha_bar) pairs of schedule_file."""
    num_train_timesteps: int = 100
    terminal_snr: str = "as_is"
    """as_is; scaled (betas tuned for 1000 steps times 1000 / T); zero (the last step is pure noise)."""
    shift: float = 1.0
    """The schedule's noise-to-signal ratio is multiplied by this; above 1 spends more time in noise."""
    prediction_type: str = "epsilon"
    """What the network predicts: epsilon (the noise), sample (x_0), v_prediction, or edm (preconditioned by sigma_data)."""
    sigma_data: float | None = None
    """Spread of the normalised actions, for edm; null takes it from the training data."""
    time_density: str = "uniform"
    """Training times: uniform, beta(1.5, 1), logit_normal(0, 1), u_shaped(4), log_normal(-1.2, 1.2), log_logistic(0.5, 2)."""
    loss_weight: str = "none"
    """none, min_snr(5), soft(5) or cosmap: the same weight of x_0 for every prediction type."""

    def __post_init__(self):
        if self.prediction_type not in PREDICTION_TYPES:
            raise unknown_name("process.prediction_type", self.prediction_type, PREDICTION_TYPES)
        if self.schedule not in (*SCHEDULES, "table"):
            raise unknown_name("process.schedule", self.schedule, [*SCHEDULES, "table"])
        if self.terminal_snr not in TERMINAL_SNRS:
            raise unknown_name("process.terminal_snr", self.terminal_snr, TERMINAL_SNRS)
        if self.num_train_timesteps < 1:
            raise ValueError(f"process.num_train_timesteps must be at least 1, got {self.num_train_timesteps}")
        if not 0 < self.shift < float("inf"):
            raise ValueError(f"process.shift must be positive, got {self.shift}")
        if self.sigma_data is not None and not 0 < self.sigma_data < float("inf"):
            raise ValueError(f"process.sigma_data must be positive or null, got {self.sigma_data}")
        Named.parse("process.time_density", self.time_density, DENSITIES)
        Named.parse("process.loss_weight", self.loss_weight, LOSS_WEIGHTS)
        if self.schedule != "table" and (self.schedule_file is not None or self.table):
            raise ValueError(f"process.schedule_file is read by process.schedule=table, this is {self.schedule!r}")
        if self.schedule == "table":
            if self.table and self.schedule_file is not None:
                raise ValueError(
                    f"process.table holds the numbers of an earlier file; add process.table=[] to read {self.schedule_file} instead"
                )
            if not self.table:
                if self.schedule_file is None:
                    raise ValueError(
                        "process.schedule=table needs process.schedule_file, a CSV file with the columns t,alpha_bar"
                    )
                object.__setattr__(self, "table", read_schedule(self.schedule_file))
            object.__setattr__(self, "table", tuple((float(t), float(a)) for t, a in self.table))
            object.__setattr__(self, "schedule_file", None)
            check_schedule_table(self.table)
        if self.terminal_snr == "scaled" and (self.schedule not in TUNED_FOR_1000 or self.num_train_timesteps == 1000):
            # one setting, one name: an ablation sees at once that the two cells are the same
            why = f"{self.schedule} does not depend on the number of steps; only {', '.join(TUNED_FOR_1000)} are scaled"
            if self.schedule in TUNED_FOR_1000:
                why = f"{self.schedule} was made for 1000 steps"
            warnings.warn(f"process.terminal_snr=scaled changes nothing: {why}", stacklevel=3)
            object.__setattr__(self, "terminal_snr", "as_is")


class Diffusion(nn.Module):
    """x_t = alpha x_0 + sigma noise, alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar), t in {1/T, ..., 1}.

    Ho et al. 2020, arXiv:2006.11239, Eq. 4.
    """

    samplers = (
        "ddim", "ddpm", "euler", "heun", "dpmpp", "dpmpp_2m", "dpmpp_sde", "dpmpp_2m_sde", "unipc", "diffusers",
    )  # fmt: skip
    """Samplers that can solve this process; the first is the default."""
    initial_scale = 1.0
    """Sampling starts from noise of this size."""

    def __init__(self, config: DiffusionConfig):
        super().__init__()
        self.config = config
        exact = alpha_bar_table(
            config.schedule,
            config.num_train_timesteps,
            terminal_snr=config.terminal_snr,
            shift=config.shift,
            table=config.table,
        )
        self.terminal_signal = float(exact[-1].sqrt())
        """sqrt(alpha_bar) after the last step: how much of x_0 a start from pure noise pretends not to know."""
        padded = torch.cat([exact.new_ones(1), exact])
        self._exact = (padded, alpha_bar_to_sigma(padded).clamp_max(1e12).log())
        """alpha_bar and log(sigma / alpha) at t = 0, 1/T, ..., 1, each (T + 1,) float64."""
        self.register_buffer("alpha_bar", exact.float(), persistent=False)
        self.register_buffer("betas", (1 - padded[1:] / padded[:-1]).float(), persistent=False)
        for name, values in zip(("_padded", "_log_ratio"), self._exact, strict=True):
            self.register_buffer(name, values.float(), persistent=False)
        if config.prediction_type == "edm":
            self.register_buffer("sigma_data", torch.tensor(config.sigma_data or float("nan")))
        self._density = Named.parse("process.time_density", config.time_density, DENSITIES)
        self._weight = Named.parse("process.loss_weight", config.loss_weight, LOSS_WEIGHTS)
        for finding in self.findings():
            warnings.warn(finding.text, stacklevel=2)

    def findings(self) -> list[Finding]:
        """What is wrong with schedule, prediction type and loss weight: label, reason and cure; empty where nothing is."""
        config = self.config
        cures = ("process.schedule=cosine", "process.num_train_timesteps=1000")
        if config.terminal_snr == "as_is":
            rescaled = "scaled" if config.schedule in TUNED_FOR_1000 else "zero"
            cures = (f"process.terminal_snr={rescaled}", *cures)
        found = process_findings(
            described=f"process.schedule={config.schedule} with {config.num_train_timesteps} steps",
            terminal_signal=self.terminal_signal,
            prediction_type=config.prediction_type,
            cures=cures,
        )
        if config.prediction_type != "edm":  # its weights are bounded, and unknown before sigma_data is
            T = config.num_train_timesteps
            steps = torch.arange(1, T + 1, dtype=torch.float64, device="cpu") / T
            found += weight_findings(config.loss_weight, self.loss_weight(steps))
        return found

    @property
    def num_train_timesteps(self) -> int:
        return self.config.num_train_timesteps

    @property
    def prediction_type(self) -> str:
        return self.config.prediction_type

    @property
    def exact_betas(self) -> Tensor:
        """Noise that each step adds, (T,) float64 on the CPU, as diffusers' trained_betas."""
        alpha_bar = self._exact[0]
        return 1 - alpha_bar[1:] / alpha_bar[:-1]

    @property
    def smallest_time(self) -> float:
        """Time of the least noise that was trained: the first step."""
        return 1 / self.num_train_timesteps

    @torch.no_grad()
    def fit(self, x_0: Tensor) -> None:
        """Takes what the process needs to know of the data, from normalised actions (N, D_act): sigma_data, for edm."""
        if self.prediction_type == "edm" and self.config.sigma_data is None:
            spread = x_0.double().std(unbiased=False)
            if not spread > 0:
                raise ValueError(
                    "process.prediction_type=edm needs actions that vary; all recorded actions are the same"
                )
            self.sigma_data.copy_(spread)

    # --- training ---

    def sample_time(self, batch_size: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """Training times (B,) among the T steps, in (0, 1]."""
        T = self.num_train_timesteps
        if self._density.name == "uniform":
            return (torch.randint(0, T, (batch_size,), device=device, generator=generator) + 1) / T
        u = 1 - torch.rand(batch_size, device=device, generator=generator)
        drawn = DENSITIES[self._density.name](u, *self._density.parameters)
        if self._density.name in OF_LOG_SIGMA:  # the step whose noise is nearest
            t = self._time_of_log_ratio(drawn, self._log_ratio[1:].to(drawn))
            return (t.float() * T).round().clamp(1, T) / T
        # the step whose interval (k/T, (k+1)/T] holds t; rounding up keeps pure noise among the training times
        return (drawn.float() * T).ceil().clamp(1, T) / T

    def _time_of_log_ratio(self, log_ratio: Tensor, table: Tensor) -> Tensor:
        """The time at which log(sigma / alpha) is this; table holds it at the T steps, straight between two of them."""
        if len(table) == 1:
            return torch.ones_like(log_ratio)
        high = torch.searchsorted(table, log_ratio.contiguous()).clamp(1, len(table) - 1)
        share = (log_ratio - table[high - 1]) / (table[high] - table[high - 1])
        return (high + share.clamp(0, 1)) / self.num_train_timesteps

    def time_of_sigma(self, sigma: Tensor) -> Tensor:
        """The time at which sigma / alpha is this, float64, between the steps straight in its logarithm (as diffusers)."""
        return self._time_of_log_ratio(sigma.double().log(), self._exact[1][1:])

    def step_index(self, t: Tensor) -> Tensor:
        """Step k of t = (k + 1) / T, same shape; a whole number wherever t is one of the T steps."""
        k = t * self.num_train_timesteps - 1
        nearest = k.round()
        return torch.where((k - nearest).abs() < 1e-3, nearest, k)

    def network_time(self, t: Tensor) -> Tensor:
        """What the network's time embedding sees: the step 0 .. T - 1, as Diffusion Policy; fractions between two steps.

        For edm too, where Karras et al. 2022 feed log(sigma) / 4: the step is a rising function of it.
        """
        return self.step_index(t).to(torch.get_default_dtype())

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of x_t = alpha x_0 + sigma noise at t in [0, 1], any shape, in t's type.

        Exact at the T steps; between two, log(sigma / alpha) is straight.
        """
        n = self.step_index(t) + 1  # 0 at the data
        if t.dtype == torch.float64:
            alpha_bar, log_ratio = (values.to(t.device) for values in self._exact)
        else:
            alpha_bar, log_ratio = self._padded, self._log_ratio
        low = n.floor().clamp(0, self.num_train_timesteps)
        share = n - low
        low = low.long()
        high = (low + 1).clamp_max(self.num_train_timesteps)
        ratio = torch.where(  # below the first step the ratio itself is straight: its logarithm begins at -inf
            low == 0,
            share * log_ratio[1].exp(),
            torch.lerp(log_ratio[low.clamp_min(1)], log_ratio[high], share).exp(),
        )
        between = 1 / (1 + ratio.square())
        alpha_bar = torch.where(share == 0, alpha_bar[low], between)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def signal_and_noise(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t (B,) or (B, T_pred), shaped to multiply x (B, T_pred, D_act)."""
        alpha, sigma = self.levels(t)
        shape = t.shape + (1,) * (x.ndim - t.ndim)
        return alpha.view(shape), sigma.view(shape)

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t (B, T_pred, D_act)."""
        alpha, sigma = self.signal_and_noise(t, x_0)
        return alpha * x_0 + sigma * noise

    def network_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """What the network sees of x_t: x_t itself, or scaled to unit size for edm (c_in of Karras et al. 2022, table 1)."""
        if self.prediction_type != "edm":
            return x_t
        alpha, sigma = self.signal_and_noise(t, x_t)
        return x_t / (sigma.square() + (alpha * self.sigma_data).square()).sqrt()

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should answer at x_t; v as Salimans & Ho 2022, arXiv:2202.00512, appendix D."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x_0
        if self.prediction_type == "edm":
            return self.from_x0(x_0, self.add_noise(x_0, noise, t), t)
        alpha, sigma = self.signal_and_noise(t, x_0)
        return alpha * noise - sigma * x_0

    def loss_weight(self, t: Tensor) -> Tensor | None:
        """Weight of the squared error of the prediction at t, same shape; None where every time counts alike."""
        if self._weight.name == "none":
            return None
        alpha, sigma = self.levels(t)
        gain = error_gain(self.prediction_type, alpha, sigma, getattr(self, "sigma_data", None))
        return loss_weight(
            lambda snr: LOSS_WEIGHTS[self._weight.name](snr, *self._weight.parameters), gain, alpha, sigma
        )

    # --- what a prediction says about x_0, and back ---

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The one sampling currency: x_0 as the network's prediction implies it, unclipped.

        Where alpha is 0 a predicted noise says nothing about x_0: 0, the middle of the normalised data, is returned.
        """
        if self.prediction_type == "sample":
            return prediction
        alpha, sigma = self.signal_and_noise(t, x_t)
        if self.prediction_type == "epsilon":
            x_0 = (x_t - sigma * prediction) / alpha
            return x_0 if self.terminal_signal > 0 else torch.where(alpha > 0, x_0, torch.zeros_like(x_0))
        if self.prediction_type == "edm":
            kept, gain = self._preconditioning(alpha, sigma)
            return kept * x_t + gain * prediction
        return alpha * x_t - sigma * prediction

    def from_x0(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The prediction that means this x_0: the inverse of to_x0; needs sigma > 0."""
        if self.prediction_type == "sample":
            return x_0
        alpha, sigma = self.signal_and_noise(t, x_t)
        if self.prediction_type == "epsilon":
            return (x_t - alpha * x_0) / sigma
        if self.prediction_type == "edm":
            kept, gain = self._preconditioning(alpha, sigma)
            return (x_0 - kept * x_t) / gain
        return (alpha * x_t - x_0) / sigma

    def _preconditioning(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """c_skip / alpha and c_out of Karras et al. 2022, arXiv:2206.00364, table 1, in terms of x_t = alpha x_0 + sigma noise."""
        spread = self.sigma_data
        size = (sigma.square() + (alpha * spread).square()).sqrt()
        return alpha * spread.square() / size.square(), sigma * spread / size
