"""Densities of the training time: name -> quantile(u, a, b), which turns uniform u in (0, 1] into times. The one place to add one.

Written `beta(1.5, 1)` in a config; a name alone takes its default parameters. One uniform number makes one time, so that
runs that differ in their density alone still draw the same windows and the same noise.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffpolicy.spec import unknown_name

EDGE = 1e-6
"""Uniform numbers are kept this far from 0 and 1 where a quantile is infinite there."""


def uniform(u: Tensor) -> Tensor:
    """Every time alike."""
    return u


def beta(u: Tensor, a: float = 1.5, b: float = 1.0) -> Tensor:
    """t ~ Beta(a, b); (1.5, 1) leans towards noise, as pi0: Black et al. 2024, arXiv:2410.24164, appendix B."""
    if b == 1:
        return u ** (1 / a)
    times, cdf = _beta_table(a, b)
    times, cdf = times.to(u.device), cdf.to(u.device)
    high = torch.searchsorted(cdf, u.double()).clamp(1, len(cdf) - 1)
    share = (u - cdf[high - 1]) / (cdf[high] - cdf[high - 1]).clamp_min(1e-300)
    return torch.lerp(times[high - 1], times[high], share.clamp(0, 1)).to(u.dtype)


def logit_normal(u: Tensor, mean: float = 0.0, sd: float = 1.0) -> Tensor:
    """logit(t) ~ Normal(mean, sd): most times in the middle. Esser et al. 2024, arXiv:2403.03206, Eq. 19."""
    return torch.sigmoid(mean + sd * torch.special.ndtri(u.double().clamp(EDGE, 1 - EDGE))).to(u.dtype)


def u_shaped(u: Tensor, a: float = 4.0) -> Tensor:
    """p(t) ~ exp(a t) + exp(a (1 - t)): most times at both ends. Lee et al. 2024, arXiv:2405.20320, section 3.2."""
    return 0.5 + torch.asinh((2 * u - 1) * math.sinh(a / 2)) / a


def log_normal(u: Tensor, mean: float = -1.2, sd: float = 1.2) -> Tensor:
    """log(sigma / signal) ~ Normal(mean, sd). Karras et al. 2022, arXiv:2206.00364, table 1."""
    return mean + sd * torch.special.ndtri(u.double().clamp(EDGE, 1 - EDGE))


def log_logistic(u: Tensor, scale: float = 0.5, shape: float = 2.0) -> Tensor:
    """sigma / signal ~ log-logistic of this scale (its median) and shape, as the BESO and MDT policies train.

    Reuss et al. 2023, arXiv:2304.02532; there scale = sigma_data = .5 and shape = 1 / .5.
    """
    return math.log(scale) + torch.logit(u.double().clamp(EDGE, 1 - EDGE)) / shape


@functools.lru_cache(maxsize=32)
def _beta_table(a: float, b: float) -> tuple[Tensor, Tensor]:
    """Times and cumulative distribution of Beta(a, b), (4097,) each, on a grid that is even in logit(t)."""
    z = torch.linspace(-30, 30, 4097, dtype=torch.float64)
    log_pdf = a * torch.nn.functional.logsigmoid(z) + b * torch.nn.functional.logsigmoid(-z)  # of z: t^a (1 - t)^b
    pdf = (log_pdf - log_pdf.max()).exp()
    cdf = torch.cat([pdf.new_zeros(1), ((pdf[1:] + pdf[:-1]) / 2).cumsum(dim=0)])
    return torch.sigmoid(z), cdf / cdf[-1]


DENSITIES: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform,
    "beta": beta,
    "logit_normal": logit_normal,
    "u_shaped": u_shaped,
    "log_normal": log_normal,
    "log_logistic": log_logistic,
}
"""The last two give log(sigma / signal), which the process turns into its own time; the others give t."""
OF_LOG_SIGMA = ("log_normal", "log_logistic")


@dataclass(frozen=True)
class Named:
    """A choice with its parameters, as `beta(1.5, 1)`."""

    name: str
    parameters: tuple[float, ...]

    @classmethod
    def parse(cls, what: str, text: str, known: dict[str, Callable[..., Tensor]], fixed: int = 1) -> Named:
        """Reads `name` or `name(1, 2)`.

        Args:
            fixed: leading arguments of the functions that are no parameters.
        Raises:
            ValueError: unknown name (with the nearest), or parameters that it does not take.
        """
        match = re.fullmatch(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*", str(text))
        if not match or match[1] not in known:
            raise unknown_name(what, match[1] if match else text, known)
        try:
            parameters = tuple(float(p) for p in match[2].split(",")) if match[2] and match[2].strip() else ()
        except ValueError:
            raise ValueError(f"{what}: parameters must be numbers as in {match[1]}(1, 2), got {text!r}") from None
        names = known[match[1]].__code__.co_varnames[fixed : known[match[1]].__code__.co_argcount]
        if len(parameters) > len(names) or any(not math.isfinite(p) for p in parameters):
            raise ValueError(f"{what}={match[1]} takes at most ({', '.join(names)}), got {text!r}")
        for name, value in zip(names, parameters, strict=False):
            if name != "mean" and value <= 0:
                raise ValueError(f"{what}={match[1]}: {name} must be positive, got {value:g}")
        return cls(match[1], parameters)


__all__ = ["DENSITIES", "OF_LOG_SIGMA", "Named"]
