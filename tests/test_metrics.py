"""Intervals: known values, honest edges, and coverage that is what it says."""

import numpy as np
import pytest

from diffpolicy.metrics import bootstrap_interval, percentiles, wilson_interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # by the closed form, as in Brown, Cai & DasGupta 2001
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (1, 2, 0.0945, 0.9055),
        (50, 100, 0.4038, 0.5962),
        (456, 500, 0.8839, 0.9338),
    ],
)
def test_wilson_interval_has_the_known_values(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-4)


def test_wilson_interval_covers_the_truth_as_often_as_it_says():
    rng, rate = np.random.default_rng(0), 0.9
    intervals = [wilson_interval(int(k), 50) for k in rng.binomial(50, rate, 4000)]
    assert np.mean([low <= rate <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.025)


def test_more_confidence_is_a_wider_interval():
    narrow, wide = wilson_interval(7, 10, 0.8), wilson_interval(7, 10, 0.99)
    assert wide[0] < narrow[0] < 0.7 < narrow[1] < wide[1]


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 5), (6, 5)])
def test_rate_that_cannot_be_is_refused(successes, trials):
    with pytest.raises(ValueError, match=f"got {successes} of {trials}"):
        wilson_interval(successes, trials)


def test_bootstrap_interval_is_that_of_the_normal_approximation_for_many_values():
    values = np.random.default_rng(0).normal(3, 2, 2000)
    low, high = bootstrap_interval(values, num_resamples=4000)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_bootstrap_interval_repeats_and_is_a_point_for_equal_values():
    values = np.random.default_rng(1).random(30)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(np.full(7, 0.25), num_resamples=50) == (0.25, 0.25)


@pytest.mark.parametrize("values", [[], [0.5, float("nan")], [[1.0, 2.0]]])
def test_bootstrap_of_no_finite_vector_is_refused(values):
    with pytest.raises(ValueError, match="needs a vector of finite values"):
        bootstrap_interval(np.array(values))


def test_percentiles_are_named_and_ordered():
    assert percentiles(np.arange(101)) == {"p50": 50, "p95": 95, "p99": 99}
