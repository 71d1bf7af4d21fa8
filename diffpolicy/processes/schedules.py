"""Noise schedules: name -> alpha_bar(t), the fraction of signal power left at diffusion time t. The one place to add one.

Every schedule is written over continuous t in [0, 1] (1 = noise) and becomes a table of T steps, so that every schedule
meets every sampler, ours and those of diffusers (`trained_betas`). Integer step k of T is t = (k + 1) / T.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from diffpolicy.spec import unknown_name

MAX_BETA = 0.999
"""Cap on one step's noise (Nichol & Dhariwal 2021): keeps alpha_bar above zero where the closed form reaches it."""
TUNED_FOR_1000 = ("linear", "scaled_linear", "sigmoid")
"""Schedules made of betas that were tuned for T = 1000; all others are functions of t alone, the same at every T."""
TERMINAL_SNRS = ("as_is", "scaled", "zero")


def cosine_alpha_bar(t: Tensor, num_train_timesteps: int = 100, s: float = 0.008) -> Tensor:
    """Cosine schedule (`squaredcos_cap_v2` in diffusers, where MAX_BETA is the cap).

    Nichol & Dhariwal 2021, arXiv:2102.09672, Eq. 17. Does not depend on num_train_timesteps.

    Args:
        t: diffusion time in [0, 1], shape (...).
        s: offset that keeps the first steps from being noise-free.
    Returns:
        alpha_bar in [0, 1], shape (...); 1 at t=0, decreasing.
    """
    start = math.cos(s / (1 + s) * math.pi / 2) ** 2
    return torch.cos((t + s) / (1 + s) * math.pi / 2).square() / start


def linear_alpha_bar(
    t: Tensor, num_train_timesteps: int = 100, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Tensor:
    """Linear betas, Ho et al. 2020, arXiv:2006.11239, section 4.

    The product of n = t T factors 1 - beta_start - i step is a ratio of gamma functions; between two steps its logarithm
    is a straight line (the gamma functions themselves would rise above 1 before the first step). The betas were tuned
    for T = 1000: at T = 100 alpha_bar(1) = .36, 60 % of the signal is left.

    Args and returns as cosine_alpha_bar.
    """
    step = (beta_end - beta_start) / max(num_train_timesteps - 1, 1)
    return _falling_product(1 - beta_start, step, t * num_train_timesteps).exp()


def scaled_linear_alpha_bar(
    t: Tensor, num_train_timesteps: int = 100, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Tensor:
    """Betas linear in their square root, Rombach et al. 2022, arXiv:2112.10752 (latent diffusion).

    1 - b_i^2 = (1 - b_i)(1 + b_i) with b_i linear: two ratios of gamma functions. The terminal signal at T = 100 is .70.

    Args and returns as cosine_alpha_bar.
    """
    low, high = math.sqrt(beta_start), math.sqrt(beta_end)
    step, n = (high - low) / max(num_train_timesteps - 1, 1), t * num_train_timesteps
    return (_falling_product(1 - low, step, n) + _rising_product(1 + low, step, n)).exp()


def sigmoid_alpha_bar(
    t: Tensor, num_train_timesteps: int = 100, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Tensor:
    """Betas that rise along a sigmoid from -6 to 6, Xu et al. 2022 (GeoDiff), arXiv:2203.02923, appendix; as in diffusers.

    The product of its betas has no shorter form: its logarithm is summed over the T steps and is a straight line between two.
    Tuned for T = 1000, as linear.

    Args and returns as cosine_alpha_bar.
    """
    ramp = torch.linspace(-6, 6, num_train_timesteps, dtype=torch.float64, device=t.device)
    factors = torch.log1p(-(ramp.sigmoid() * (beta_end - beta_start) + beta_start))
    log_alpha_bar = torch.cat([factors.new_zeros(1), factors.cumsum(dim=0)])  # (T + 1,)
    n = (t.double() * num_train_timesteps).clamp(0, num_train_timesteps)
    low = n.floor().clamp_max(num_train_timesteps - 1).long()
    return torch.lerp(log_alpha_bar[low], log_alpha_bar[low + 1], n - low).exp()


def chen_sigmoid_alpha_bar(
    t: Tensor, num_train_timesteps: int = 100, start: float = -3.0, end: float = 3.0, tau: float = 1.0
) -> Tensor:
    """A sigmoid in alpha_bar itself, Jabri et al. 2022, arXiv:2212.11972 and Chen 2023, arXiv:2301.10972, algorithm 1.

    Not the `sigmoid` of diffusers, whose betas follow a sigmoid. Does not depend on num_train_timesteps.

    Args and returns as cosine_alpha_bar.
    """
    t = t.double()
    high, low = (1 / (1 + math.exp(-edge / tau)) for edge in (end, start))
    return ((high - torch.sigmoid((t * (end - start) + start) / tau)) / (high - low)).clamp(0, 1)


def laplace_alpha_bar(t: Tensor, num_train_timesteps: int = 100, mu: float = 0.0, b: float = 0.5) -> Tensor:
    """Laplace schedule as diffusers has it: alpha_bar = sqrt(snr / (1 + snr)), which leaves 18 % of the signal at t = 1.

    After Hang & Gu 2024, arXiv:2407.03297, where the quotient stands without the root: that is `laplace_snr`.

    Args and returns as cosine_alpha_bar.
    """

    def fraction(u: Tensor) -> Tensor:
        log_snr = mu - b * torch.copysign(torch.ones_like(u), 0.5 - u) * torch.log(1 - 2 * (0.5 - u).abs() + 1e-6)
        return torch.sigmoid(log_snr).sqrt()

    t = t.double()
    return fraction(t) / fraction(torch.zeros_like(t))


def laplace_snr_alpha_bar(t: Tensor, num_train_timesteps: int = 100, mu: float = 0.0, b: float = 0.5) -> Tensor:
    """Log-SNR with a Laplace distribution over t, Hang & Gu 2024, arXiv:2407.03297, table 1: most steps near log-SNR mu.

    Args and returns as cosine_alpha_bar.
    """
    t = t.double()
    return torch.sigmoid(mu - b * torch.sign(0.5 - t) * torch.log((1 - 2 * (0.5 - t).abs()).clamp_min(0)))


def exponential_alpha_bar(t: Tensor, num_train_timesteps: int = 100, rate: float = 12.0) -> Tensor:
    """alpha_bar = exp(-12 t): every step takes the same share of what is left (`exp` of diffusers' betas_for_alpha_bar).

    Args and returns as cosine_alpha_bar.
    """
    return torch.exp(-rate * t.double())


def geometric_alpha_bar(
    t: Tensor, num_train_timesteps: int = 100, sigma_min: float = 0.01, sigma_max: float = 50.0
) -> Tensor:
    """Noise-to-signal ratio geometric over the steps, Song et al. 2021, arXiv:2011.13456, section 3.4 (the VE SDE).

    sigma = sigma_min at the first of the T steps, sigma_max at the last; written variance preserving, 1 / (1 + sigma^2).

    Args and returns as cosine_alpha_bar.
    """
    ramp = lambda share: sigma_min * (sigma_max / sigma_min) ** share
    return sigma_to_alpha_bar(_from_first_step(t, num_train_timesteps, ramp))


def karras_alpha_bar(
    t: Tensor, num_train_timesteps: int = 100, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Tensor:
    """The sigmas of EDM, Karras et al. 2022, arXiv:2206.00364, Eq. 5, written variance preserving, 1 / (1 + sigma^2).

    Args and returns as cosine_alpha_bar.
    """
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return sigma_to_alpha_bar(
        _from_first_step(t, num_train_timesteps, lambda share: (low + share * (high - low)) ** rho)
    )


def flow_alpha_bar(t: Tensor, num_train_timesteps: int = 100) -> Tensor:
    """The noise levels of the straight path (rectified flow), Liu et al. 2023, arXiv:2209.03003: sigma / signal = t / (1 - t).

    Args and returns as cosine_alpha_bar.
    """
    return flow_time_to_alpha_bar(t.double())


def _falling_product(first: float, step: float, n: Tensor) -> Tensor:
    """log of first (first - step) (first - 2 step) ... with n factors; linear between whole n; float64 inside."""
    n = n.double()
    whole = n.floor()
    top = torch.as_tensor(first / step, dtype=torch.float64, device=n.device)
    product = whole * math.log(step) + torch.lgamma(top + 1) - torch.lgamma(top + 1 - whole)
    return product + (n - whole) * (first - whole * step).log()


def _rising_product(first: float, step: float, n: Tensor) -> Tensor:
    """log of first (first + step) (first + 2 step) ... with n factors; linear between whole n; float64 inside."""
    n = n.double()
    whole = n.floor()
    bottom = torch.as_tensor(first / step, dtype=torch.float64, device=n.device)
    product = whole * math.log(step) + torch.lgamma(bottom + whole) - torch.lgamma(bottom)
    return product + (n - whole) * (first + whole * step).log()


def _from_first_step(t: Tensor, num_train_timesteps: int, ramp: Callable[[Tensor], Tensor]) -> Tensor:
    """A ramp of sigma over share 0 (first step, t = 1/T) .. 1 (last step); from t = 0 to the first step it rises from 0."""
    n = t.double() * num_train_timesteps
    share = ((n - 1) / max(num_train_timesteps - 1, 1)).clamp_min(0)
    return torch.where(n < 1, n * ramp(torch.zeros_like(share)), ramp(share))


# --- conversions, each with its inverse; all keep shape and type ---


def alpha_bar_to_sigma(alpha_bar: Tensor) -> Tensor:
    """Noise over signal, sqrt((1 - alpha_bar) / alpha_bar): the sigma of EDM and k-diffusion; inf at alpha_bar = 0."""
    _require_within(alpha_bar, 0, 1, "alpha_bar")
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def sigma_to_alpha_bar(sigma: Tensor) -> Tensor:
    """1 / (1 + sigma^2)."""
    _require_within(sigma, 0, math.inf, "sigma")
    return 1 / (1 + sigma.square())


def alpha_bar_to_log_snr(alpha_bar: Tensor) -> Tensor:
    """log(alpha_bar / (1 - alpha_bar)), natural; from inf (data) to -inf (noise)."""
    _require_within(alpha_bar, 0, 1, "alpha_bar")
    return torch.logit(alpha_bar)


def log_snr_to_alpha_bar(log_snr: Tensor) -> Tensor:
    """The logistic function."""
    _require_within(log_snr, -math.inf, math.inf, "log_snr")
    return torch.sigmoid(log_snr)


def alpha_bar_to_flow_time(alpha_bar: Tensor) -> Tensor:
    """The time of the straight path with the same ratio of noise to signal: sigma / (signal + sigma)."""
    _require_within(alpha_bar, 0, 1, "alpha_bar")
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    return noise / (signal + noise)


def flow_time_to_alpha_bar(t: Tensor) -> Tensor:
    """(1 - t)^2 / ((1 - t)^2 + t^2)."""
    _require_within(t, 0, 1, "flow time")
    return (1 - t).square() / ((1 - t).square() + t.square())


def shift_alpha_bar(alpha_bar: Tensor, shift: float) -> Tensor:
    """The schedule with its noise-to-signal ratio multiplied by shift: log-SNR falls by 2 log(shift).

    Hoogeboom et al. 2023, arXiv:2301.11093, section 3.1; on the straight path it is the time shift
    t -> shift t / (1 + (shift - 1) t) of Esser et al. 2024, arXiv:2403.03206, Eq. 23.
    """
    if not 0 < shift < math.inf:
        raise ValueError(f"process.shift must be positive, got {shift}")
    return alpha_bar if shift == 1 else alpha_bar / (alpha_bar + shift**2 * (1 - alpha_bar))


def zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """sqrt(alpha_bar) (T,) moved and scaled so that the last step is pure noise and the first stays.

    Lin et al. 2024, arXiv:2305.08891, algorithm 1.
    """
    signal = alpha_bar.sqrt()
    if len(signal) == 1:
        return torch.zeros_like(alpha_bar)
    return ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])).square()


def _require_within(values: Tensor, low: float, high: float, name: str) -> None:
    if values.device.type != "meta" and not ((values >= low) & (values <= high)).all():
        raise ValueError(
            f"{name} must lie in [{low:g}, {high:g}], got {values.min().item():g} .. {values.max().item():g}"
        )


# --- tables ---


def alpha_bar_table(
    name: str,
    num_train_timesteps: int,
    *,
    terminal_snr: str = "as_is",
    shift: float = 1.0,
    table: tuple[tuple[float, float], ...] = (),
) -> Tensor:
    """alpha_bar after each of the T steps, (T,) float64 on the CPU; a step takes at most MAX_BETA away.

    Args:
        terminal_snr: as_is; scaled: the betas of TUNED_FOR_1000 times 1000 / T (others are the same at every T);
            zero: `zero_terminal_snr`, exactly 0 at the last step.
        shift: `shift_alpha_bar`.
        table: (t, alpha_bar) pairs for name = table.
    Raises:
        ValueError: unknown schedule (with the nearest name), no steps, a table that is no schedule.
    """
    if name not in (*SCHEDULES, "table"):
        raise unknown_name("process.schedule", name, [*SCHEDULES, "table"])
    if num_train_timesteps < 1:
        raise ValueError(f"process.num_train_timesteps must be at least 1, got {num_train_timesteps}")
    if terminal_snr not in TERMINAL_SNRS:
        raise unknown_name("process.terminal_snr", terminal_snr, TERMINAL_SNRS)
    T = num_train_timesteps
    # on the CPU even where a policy is built without memory (torch.device("meta")): these are known numbers, no weights
    t = torch.arange(T + 1, dtype=torch.float64, device="cpu") / T
    if name == "table":
        alpha_bar = _interpolated(table, t)
    else:
        alpha_bar = SCHEDULES[name](t, T)
    betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(0, MAX_BETA)
    if terminal_snr == "scaled" and name in TUNED_FOR_1000:
        betas = (betas * 1000 / T).clamp(0, MAX_BETA)
    alpha_bar = shift_alpha_bar((1 - betas).cumprod(dim=0), shift)
    return zero_terminal_snr(alpha_bar) if terminal_snr == "zero" else alpha_bar


def schedule_betas(name: str, num_train_timesteps: int, **choices) -> Tensor:
    """Discrete betas of a schedule, (T,) float64: beta_k = 1 - alpha_bar_k / alpha_bar_{k-1}; choices as alpha_bar_table."""
    alpha_bar = alpha_bar_table(name, num_train_timesteps, **choices)
    return 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])


def terminal_signal(betas: Tensor) -> float:
    """sqrt(alpha_bar) after the last step: how much of x_0 the sampler's pure-noise start pretends not to know."""
    return float((1 - betas).log().sum().mul(0.5).exp())


def read_schedule(path: str | Path) -> tuple[tuple[float, float], ...]:
    """(t, alpha_bar) pairs of a CSV file with the header `t,alpha_bar`; t rises from 0 to 1, alpha_bar falls from 1.

    Raises:
        FileNotFoundError; ValueError: naming file and line.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"process.schedule_file={path} does not exist; it is a CSV file with the columns t,alpha_bar"
        )
    with open(path, newline="") as handle:
        reader = csv.DictReader(handle)
        if [n.strip() for n in reader.fieldnames or []] != ["t", "alpha_bar"]:
            raise ValueError(
                f"{path}: the first line must read `t,alpha_bar`, got {','.join(reader.fieldnames or [])!r}"
            )
        pairs = []
        for row in reader:
            try:
                pairs.append((float(row["t"]), float(row["alpha_bar"])))
            except (TypeError, ValueError):
                raise ValueError(
                    f"{path}, line {reader.line_num}: expected two numbers, got {list(row.values())}"
                ) from None
    try:
        check_schedule_table(tuple(pairs))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return tuple(pairs)


def check_schedule_table(table: tuple[tuple[float, float], ...]) -> None:
    """Raises ValueError, naming the row, where (t, alpha_bar) pairs are no schedule."""
    if len(table) < 2:
        raise ValueError(f"a schedule table needs at least the rows t=0 and t=1, got {len(table)} rows")
    if table[0][0] != 0 or table[-1][0] != 1:
        raise ValueError(f"t must run from 0 to 1, got {table[0][0]:g} .. {table[-1][0]:g}")
    if abs(table[0][1] - 1) > 1e-9:
        raise ValueError(f"alpha_bar must be 1 at t=0 (no noise), got {table[0][1]:g}")
    for row, ((t, high), (t_next, low)) in enumerate(itertools.pairwise(table), start=2):
        if not t < t_next:
            raise ValueError(f"t must rise, row {row} goes from {t:g} to {t_next:g}")
        if not 0 <= low < high:
            raise ValueError(f"alpha_bar must fall and stay in [0, 1], row {row} goes from {high:g} to {low:g}")


def _interpolated(table: tuple[tuple[float, float], ...], t: Tensor) -> Tensor:
    """A table's alpha_bar at times t, straight between its rows."""
    check_schedule_table(table)
    times, values = torch.tensor(table, dtype=torch.float64, device="cpu").T.contiguous()
    high = torch.searchsorted(times, t).clamp(1, len(times) - 1)
    share = (t - times[high - 1]) / (times[high] - times[high - 1])
    return torch.lerp(values[high - 1], values[high], share)


SCHEDULES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "cosine": cosine_alpha_bar,
    "linear": linear_alpha_bar,
    "scaled_linear": scaled_linear_alpha_bar,
    "sigmoid": sigmoid_alpha_bar,
    "chen_sigmoid": chen_sigmoid_alpha_bar,
    "laplace": laplace_alpha_bar,
    "laplace_snr": laplace_snr_alpha_bar,
    "exponential": exponential_alpha_bar,
    "geometric": geometric_alpha_bar,
    "karras": karras_alpha_bar,
    "flow": flow_alpha_bar,
}
"""name -> alpha_bar(t, T); `table`, read from process.schedule_file, is the one without a function."""
