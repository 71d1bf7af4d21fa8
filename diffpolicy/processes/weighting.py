"""Weights of the loss: name -> weight of the squared error of x_0 at a noise level. The one place to add one.

A weight is defined once, for the error of x_0. What the network predicts errs differently (an error e of the noise is an
error e sigma / alpha of x_0), so a process divides by `error_gain` of its prediction: the same x_0 estimate then has the same
loss, whatever the network predicts. `none` leaves the plain squared error of the prediction.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

SMALL = 1e-12
"""Squared signal and squared noise are taken to be at least this, so that pure data and pure noise have finite weights."""


def min_snr(snr: Tensor, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma). Hang et al. 2023, arXiv:2303.09556, Eq. 7 (there for x_0, here for every prediction)."""
    return snr.clamp_max(gamma)


def soft_min_snr(snr: Tensor, gamma: float = 5.0) -> Tensor:
    """SNR gamma / (SNR + gamma): min-SNR without its corner. Crowson et al. 2024, arXiv:2401.11605, section 3.4."""
    return snr * gamma / (snr + gamma)


def cosmap(snr: Tensor) -> Tensor:
    """2 / (pi (1 - 2 t + 2 t^2)) on the velocity error of the straight path. Esser et al. 2024, arXiv:2403.03206, section 3.1.

    t = 1 / (1 + sqrt(SNR)) is the time of the straight path with this noise level; a velocity error is an x_0 error / t.
    """
    t = 1 / (1 + snr.sqrt())
    return 2 / (3.141592653589793 * (1 - 2 * t + 2 * t.square())) / t.square()


def _none(snr: Tensor) -> Tensor:
    raise AssertionError("`none` is no weight of x_0: the prediction's own error counts as it is")


LOSS_WEIGHTS: dict[str, Callable[..., Tensor]] = {
    "none": _none,
    "min_snr": min_snr,
    "soft": soft_min_snr,
    "cosmap": cosmap,
}


def error_gain(prediction_type: str, alpha: Tensor, sigma: Tensor, sigma_data: Tensor | None = None) -> Tensor:
    """How much larger the squared error of the prediction is than the squared error of x_0 that it means.

    Args:
        alpha, sigma: x_t = alpha x_0 + sigma noise, any shape.
        sigma_data: spread of the data, for edm.
    """
    a2, s2 = alpha.square().clamp_min(SMALL), sigma.square().clamp_min(SMALL)
    if prediction_type == "sample":
        return a2 / a2
    if prediction_type == "epsilon":  # noise = (x_t - alpha x_0) / sigma
        return a2 / s2
    if prediction_type == "v_prediction":  # v = alpha noise - sigma x_0 = (alpha x_t - (alpha^2 + sigma^2) x_0) / sigma
        return (a2 + s2).square() / s2
    if prediction_type == "velocity":  # noise - x_0 = (x_t - (alpha + sigma) x_0) / sigma
        return (alpha + sigma).square() / s2
    if prediction_type == "edm":  # 1 / c_out^2
        return (s2 + a2 * sigma_data.square()) / (s2 * sigma_data.square())
    raise AssertionError(prediction_type)


def loss_weight(weight: Callable[[Tensor], Tensor], gain: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Weight of the squared error of the prediction: weight of x_0 over gain."""
    snr = alpha.square().clamp_min(SMALL) / sigma.square().clamp_min(SMALL)
    return weight(snr) / gain
