"""The normaliser: there and back, and nothing that explodes or passes through unscaled."""

import pytest
import torch

from diffpolicy.normalizer import MODES, Normalizer, NormalizerConfig


def fitted(values: torch.Tensor, mode: str = "limits", **choices) -> Normalizer:
    normalizer = Normalizer({"action": tuple(values.shape[1:])}, {"action": mode}, **choices)
    normalizer.fit("action", values)
    return normalizer


def walk(rows: int = 1000, dim: int = 3) -> torch.Tensor:
    """Numbers whose dimensions have different centres and widths."""
    noise = torch.randn(rows, dim, generator=torch.Generator().manual_seed(0))
    return noise * torch.tensor([0.01, 1.0, 300.0]) + torch.tensor([5.0, -2.0, 250.0])


@pytest.mark.parametrize("mode", MODES)
def test_unnormalize_undoes_normalize(mode):
    values = walk()
    normalizer = fitted(values, mode)
    back = normalizer.unnormalize("action", normalizer.normalize("action", values))
    torch.testing.assert_close(back, values, rtol=1e-6, atol=1e-4)  # values reach 1000


def test_limits_map_smallest_and_largest_to_minus_one_and_one():
    normalizer = fitted(torch.tensor([[0.0, 100.0], [1.0, 500.0], [4.0, 300.0]]))
    got = normalizer.normalize("action", torch.tensor([[0.0, 500.0], [4.0, 100.0], [2.0, 300.0]]))
    torch.testing.assert_close(got, torch.tensor([[-1.0, 1.0], [1.0, -1.0], [0.0, 0.0]]))


def test_gaussian_gives_mean_zero_and_spread_one():
    values = walk()
    got = fitted(values, "gaussian").normalize("action", values)
    torch.testing.assert_close(got.mean(dim=0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(got.std(dim=0, unbiased=False), torch.ones(3), atol=1e-4, rtol=0)


def test_quantile_maps_the_first_and_the_99th_percent_to_minus_one_and_one():
    values = torch.arange(101.0)[:, None]
    got = fitted(values, "quantile").normalize("action", torch.tensor([[1.0], [99.0], [50.0]]))
    torch.testing.assert_close(got, torch.tensor([[-1.0], [1.0], [0.0]]))


def test_an_outlier_squeezes_limits_but_not_quantiles():
    values = torch.cat([torch.linspace(-1, 1, 999)[:, None], torch.tensor([[1000.0]])])
    assert fitted(values, "limits").normalize("action", torch.tensor([[1.0]])) < -0.99
    assert fitted(values, "quantile").normalize("action", torch.tensor([[1.0]])) > 0.95


@pytest.mark.parametrize(("rest", "rare"), [(0.0, 1.0), (1.0, 0.0)])
def test_gripper_that_rests_on_one_value_keeps_its_limits_under_quantiles(rest, rare):
    values = torch.full((1000, 1), rest)
    values[500:505] = rare
    got = fitted(values, "quantile").normalize("action", torch.tensor([[0.0], [1.0]]))
    torch.testing.assert_close(got, torch.tensor([[-1.0], [1.0]]))


def test_identity_changes_nothing():
    values = walk()
    assert torch.equal(fitted(values, "identity").normalize("action", values), values)


@pytest.mark.parametrize("mode", ["limits", "gaussian", "quantile"])
@pytest.mark.parametrize("constant", [0.0, 0.7, -350.0])
def test_constant_dimension_is_centred_with_scale_one(mode, constant):
    normalizer = fitted(torch.full((100, 1), constant), mode)
    got = normalizer.normalize("action", torch.tensor([[constant], [constant + 0.5]]))
    torch.testing.assert_close(got, torch.tensor([[0.0], [0.5]]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("mode", "floored"), [("limits", 2 / 1e-4), ("quantile", 2 / 1e-4), ("gaussian", 1 / 1e-4)])
def test_tiny_range_is_floored_so_that_sensor_noise_is_not_blown_up(mode, floored):
    noise = torch.linspace(0, 1e-6, 100)[:, None]
    assert fitted(noise, mode).get_buffer("action:scale").item() == pytest.approx(floored)
    assert fitted(noise, mode, range_floor=1e-2).get_buffer("action:scale").item() == pytest.approx(floored / 100)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_number_that_is_not_finite_is_named_by_its_row(bad):
    values = walk(100)
    values[37, 1] = bad
    with pytest.raises(ValueError, match="action holds NaN or inf first at row 37"):
        fitted(values)


def test_values_of_another_shape_or_none_are_refused():
    normalizer = Normalizer({"action": (3,)}, {"action": "limits"})
    with pytest.raises(ValueError, match=r"statistics of action need \(N, 3\) values, got \(10, 2\)"):
        normalizer.fit("action", torch.zeros(10, 2))
    with pytest.raises(ValueError, match=r"got \(0, 3\)"):
        normalizer.fit("action", torch.zeros(0, 3))


def test_missing_statistics_are_an_error_that_names_the_key():
    normalizer = Normalizer(
        {"action": (2,), "observation.state": (2,)}, dict.fromkeys(("action", "observation.state"), "limits")
    )
    normalizer.fit("action", torch.rand(5, 2))
    with pytest.raises(ValueError, match=r"statistics are missing for \['observation.state'\]"):
        normalizer.require_fitted()
    normalizer.fit("observation.state", torch.rand(5, 2))
    normalizer.require_fitted()


def test_statistics_that_are_missing_poison_what_passes_through():
    normalizer = Normalizer({"action": (2,)}, {"action": "limits"})
    assert normalizer.normalize("action", torch.ones(1, 2)).isnan().all()


def test_key_that_was_never_fitted_is_refused():
    with pytest.raises(ValueError, match=r"no statistics for 'observation.state'; it knows \['action'\]"):
        fitted(walk()).normalize("observation.state", torch.zeros(1, 3))


def test_state_dict_carries_the_statistics():
    values, other = walk(), Normalizer({"action": (3,)}, {"action": "limits"})
    saved = fitted(values)
    other.load_state_dict(saved.state_dict())
    assert torch.equal(other.normalize("action", values), saved.normalize("action", values))
    torch.testing.assert_close(other.get_buffer("action:min"), values.amin(dim=0))
    torch.testing.assert_close(other.get_buffer("action:max"), values.amax(dim=0))


def test_statistics_from_elsewhere_imply_their_limits():
    normalizer = Normalizer({"action": (1,)}, {"action": "limits"})
    normalizer.set("action", scale=torch.tensor([0.5]), offset=torch.tensor([-3.0]))
    assert normalizer.get_buffer("action:min").item() == 4 and normalizer.get_buffer("action:max").item() == 8
    normalizer.require_fitted()


def test_steps_of_several_dimensions_keep_their_shape():
    values = torch.rand(50, 9, 2)
    normalizer = fitted(values)
    chunk = torch.rand(4, 16, 9, 2)
    assert normalizer.normalize("action", chunk).shape == chunk.shape
    assert normalizer.normalize("action", values).abs().max() <= 1 + 1e-6


@pytest.mark.parametrize("where", ["action", "observation"])
def test_unknown_mode_is_refused_with_the_nearest(where):
    with pytest.raises(ValueError, match=f"normalizer.{where} must be one of .* Did you mean 'limits'"):
        NormalizerConfig(**{where: "limit"})
