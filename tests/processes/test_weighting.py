"""Weights of the loss: one weight of x_0 for every prediction type, with the literals of the papers."""

import math

import pytest
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3

from diffpolicy.processes.flow import Flow, FlowConfig
from diffpolicy.processes.weighting import LOSS_WEIGHTS, cosmap, error_gain, min_snr, soft_min_snr
from tests.processes.exact import diffusion

T = torch.tensor([0.01, 0.1, 0.33, 0.5, 0.77, 0.99], dtype=torch.float64)
PREDICTIONS = [("diffusion", p) for p in ("epsilon", "sample", "v_prediction", "edm")]
PREDICTIONS += [("flow", p) for p in ("velocity", "sample")]


def build(path: str, prediction_type: str, **choices):
    if path == "flow":
        return Flow(FlowConfig(prediction_type=prediction_type, **choices))
    if prediction_type == "edm":
        choices["sigma_data"] = 0.7
    return diffusion(prediction_type=prediction_type, **choices)


def snr_of(process, t: torch.Tensor) -> torch.Tensor:
    alpha, sigma = process.levels(t)
    return (alpha / sigma).square()


@pytest.mark.parametrize(
    ("prediction_type", "weight"),
    [
        ("epsilon", lambda snr: snr.clamp_max(5) / snr),
        ("v_prediction", lambda snr: snr.clamp_max(5) / (snr + 1)),
        ("sample", lambda snr: snr.clamp_max(5)),
    ],
)
def test_min_snr_is_that_of_the_paper(prediction_type, weight):
    process = build("diffusion", prediction_type, loss_weight="min_snr(5)")
    torch.testing.assert_close(process.loss_weight(T), weight(snr_of(process, T)), rtol=1e-9, atol=0)


def test_min_snr_at_a_known_signal_is_this_literal():
    """exponential at t = 0.05: alpha_bar = exp(-0.6), SNR = 1 / (exp(0.6) - 1) = 1.21636."""
    t = torch.tensor([0.05], dtype=torch.float64)
    weight = lambda p: build("diffusion", p, schedule="exponential", loss_weight="min_snr(1)").loss_weight(t).item()
    assert weight("sample") == 1
    assert weight("epsilon") == pytest.approx(0.82212, abs=1e-5)  # 1 / SNR
    assert weight("v_prediction") == pytest.approx(0.45119, abs=1e-5)  # 1 / (SNR + 1) = 1 - alpha_bar


@pytest.mark.parametrize("weight", ["min_snr(5)", "soft(5)", "cosmap"])
def test_same_estimate_of_x0_has_the_same_weighted_loss_whatever_is_predicted(weight):
    generator = torch.Generator().manual_seed(0)
    x_0, noise, error = torch.randn(3, 6, 4, 2, dtype=torch.float64, generator=generator)

    def losses(path: str, prediction_type: str) -> torch.Tensor:
        process = build(path, prediction_type, loss_weight=weight)
        x_t = process.add_noise(x_0, noise, T)
        prediction = process.from_x0(x_0 + 0.1 * error, x_t, T)
        squared = (prediction - process.target(x_0, noise, T)).square().mean(dim=(1, 2))
        return process.loss_weight(T) * squared

    for path in ("diffusion", "flow"):
        of_path = [losses(path, p) for where, p in PREDICTIONS if where == path]
        for other in of_path[1:]:
            torch.testing.assert_close(other, of_path[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("path", "prediction_type"), PREDICTIONS)
def test_error_of_the_prediction_is_error_gain_times_that_of_x0(path, prediction_type):
    process = build(path, prediction_type)
    x_0, noise = torch.randn(2, 6, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t, target = process.add_noise(x_0, noise, T), process.target(x_0, noise, T)
    off = (process.to_x0(target + 0.01, x_t, T) - x_0)[:, 0, 0]
    alpha, sigma = process.levels(T)
    gain = error_gain(prediction_type, alpha, sigma, getattr(process, "sigma_data", None))
    torch.testing.assert_close(off.square() * gain, torch.full_like(off, 1e-4), rtol=1e-6, atol=0)


def test_large_gamma_on_x0_is_the_plain_loss_of_the_noise():
    weight = build("diffusion", "sample", loss_weight="min_snr(1e9)").loss_weight(T)
    torch.testing.assert_close(weight, snr_of(build("diffusion", "sample"), T))  # |noise error|^2 = SNR |x_0 error|^2
    plain = build("diffusion", "epsilon", loss_weight="min_snr(1e9)").loss_weight(T)
    torch.testing.assert_close(plain, torch.ones_like(plain))


def test_soft_min_snr_is_min_snr_at_both_ends_and_half_of_it_at_the_corner():
    snr = torch.tensor([1e-6, 5.0, 1e8], dtype=torch.float64)
    torch.testing.assert_close(soft_min_snr(snr) / min_snr(snr), torch.tensor([1, 0.5, 1.0], dtype=torch.float64))


def test_cosmap_on_the_velocity_is_the_density_of_the_paper_and_of_diffusers():
    weight = Flow(FlowConfig(loss_weight="cosmap")).loss_weight(T)
    torch.testing.assert_close(weight, 2 / (math.pi * (1 - 2 * T + 2 * T**2)))
    torch.testing.assert_close(weight, compute_loss_weighting_for_sd3("cosmap", sigmas=T))
    assert weight.max().item() == pytest.approx(4 / math.pi, abs=2e-3)


def test_cosmap_weighs_a_diffusion_at_the_flow_time_of_its_noise():
    snr = torch.tensor([1.0, 9.0], dtype=torch.float64)  # t = 1/2, 1/4
    expected = torch.tensor([4 / math.pi * 4, 2 / (math.pi * 0.625) * 16], dtype=torch.float64)
    torch.testing.assert_close(cosmap(snr), expected)


@pytest.mark.parametrize(("path", "prediction_type"), PREDICTIONS)
def test_no_weight_leaves_the_plain_error(path, prediction_type):
    assert build(path, prediction_type).loss_weight(T) is None


@pytest.mark.parametrize("weight", [w for w in LOSS_WEIGHTS if w != "none"])
@pytest.mark.parametrize(("path", "prediction_type"), PREDICTIONS)
def test_weight_is_finite_from_the_data_to_pure_noise(path, prediction_type, weight):
    choices = {"terminal_snr": "zero"} if path == "diffusion" else {}
    process = build(path, prediction_type, loss_weight=weight, **choices)
    for t in (torch.tensor([1e-3, 0.5, 1.0]), torch.tensor([[1e-3, 0.5], [0.9, 1.0]])):
        got = process.loss_weight(t)
        assert got.shape == t.shape and got.isfinite().all() and (got >= 0).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("min_sn", r"process.loss_weight must be one of .* Did you mean 'min_snr'\?"),
        ("min_snr(0)", r"process.loss_weight=min_snr: gamma must be positive, got 0"),
        ("min_snr(5, 1)", r"process.loss_weight=min_snr takes at most \(gamma\), got"),
        ("none(1)", r"process.loss_weight=none takes at most \(\), got"),
    ],
)
def test_slip_in_a_weight_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        FlowConfig(loss_weight=text)
