"""Flow matching on the straight path: literals, and every prediction says the same about x_0."""

import pytest
import torch

from diffpolicy.processes.flow import PREDICTION_TYPES, Flow, FlowConfig


def test_path_is_straight_from_data_to_noise():
    x_0, noise = torch.full((3, 1, 1), 2.0), torch.full((3, 1, 1), -4.0)
    got = Flow(FlowConfig()).add_noise(x_0, noise, torch.tensor([0.0, 0.25, 1.0]))
    assert got.flatten().tolist() == [2.0, 0.5, -4.0]


def test_velocity_is_the_derivative_of_the_path_by_time():
    x_0, noise = torch.full((1, 1, 1), 2.0), torch.full((1, 1, 1), -4.0)
    process, t = Flow(FlowConfig()), torch.tensor([0.5])
    difference = process.add_noise(x_0, noise, t + 0.25) - process.add_noise(x_0, noise, t - 0.25)
    torch.testing.assert_close(process.target(x_0, noise, t), difference / 0.5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("t", [torch.tensor([1e-3, 0.5, 1.0]), torch.tensor([[0.1, 0.9], [0.5, 1.0], [1e-3, 0.2]])])
def test_to_x0_inverts_the_target(prediction_type, t):
    process = Flow(FlowConfig(prediction_type=prediction_type))
    x_0, noise = torch.randn(2, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    got = process.to_x0(process.target(x_0, noise, t), process.add_noise(x_0, noise, t), t)
    torch.testing.assert_close(got, x_0, atol=1e-6, rtol=0)


def test_training_times_spread_evenly():
    t = Flow(FlowConfig()).sample_time(100_000, torch.device("cpu"), torch.Generator().manual_seed(0))
    quantiles = torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(t.quantile(quantiles), quantiles, atol=0.01, rtol=0)


def test_training_times_include_pure_noise_and_leave_out_the_data(monkeypatch):
    # torch.rand draws from [0, 1)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([0.0, 1 - 2**-24]))
    t = Flow(FlowConfig()).sample_time(2, torch.device("cpu"))
    assert t[0] == 1 and 0 < t[1] < 1e-7


def test_network_sees_time_on_the_scale_of_the_config():
    t = torch.tensor([0.0, 0.5, 1.0])
    assert Flow(FlowConfig()).network_time(t).tolist() == [0, 500, 1000]
    assert Flow(FlowConfig(time_scale=4.0)).network_time(t).tolist() == [0, 2, 4]


def test_unknown_prediction_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"process.prediction_type must be one of .* Did you mean 'velocity'"):
        FlowConfig(prediction_type="velocit")


@pytest.mark.parametrize("t_shape", [(3,), (3, 2)])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_from_x0_inverts_to_x0_and_the_target_is_from_x0_of_the_truth(prediction_type, t_shape):
    process = Flow(FlowConfig(prediction_type=prediction_type))
    x_0, noise, prediction = torch.randn(3, 3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = 0.05 + 0.95 * torch.rand(t_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x_t = process.add_noise(x_0, noise, t)
    torch.testing.assert_close(process.from_x0(x_0, x_t, t), process.target(x_0, noise, t))
    torch.testing.assert_close(process.from_x0(process.to_x0(prediction, x_t, t), x_t, t), prediction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_are_those_of_the_path_in_the_type_and_shape_of_time(dtype):
    t = torch.tensor([[0.0, 0.25], [0.5, 1.0]], dtype=dtype)
    alpha, sigma = Flow(FlowConfig()).levels(t)
    assert alpha.tolist() == [[1.0, 0.75], [0.5, 0.0]] and sigma.tolist() == t.tolist()
    assert alpha.dtype == sigma.dtype == dtype


@pytest.mark.parametrize("choice", ["shift", "time_scale"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_factor_that_is_not_positive_is_refused(choice, value):
    with pytest.raises(ValueError, match=rf"process.{choice} must be positive, got"):
        FlowConfig(**{choice: value})
