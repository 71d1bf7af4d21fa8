"""Intervals: known values, honest edges, and coverage that is what it says."""

import numpy as np
import pytest

from diffpolicy.metrics import (
    bootstrap_interval,
    clustered_wilson_interval,
    crossed_difference_interval,
    episodes_needed,
    holm,
    mcnemar_exact,
    paired_difference_interval,
    percentiles,
    sign_flip_exact,
    sign_flip_sampled,
    smallest_difference_shown,
    student_quantile,
    unpaired_difference_interval,
    wilson_interval,
)


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


def pairs(both: int, only_a: int, only_b: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Two bool vectors with these numbers of pairs."""
    a = np.repeat([True, True, False, False], [both, only_a, only_b, neither])
    b = np.repeat([True, False, True, False], [both, only_a, only_b, neither])
    return a, b


def played(rng, *, networks: int, starts: int, ease: float, gain: float, hard: float, luck: float):
    """Simulated successes (S, E) of two settings on shared starts, and their true rates' difference for these networks.

    log odds = ease (+ gain for a) + start's ease (sd `hard`) + network's quality (sd `luck`).
    """
    chance = lambda z: 1 / (1 + np.exp(-z))
    start, quality = hard * rng.normal(size=starts), luck * rng.normal(size=(2, networks, 1))
    a = rng.random((networks, starts)) < chance(ease + gain + start + quality[0])
    b = rng.random((networks, starts)) < chance(ease + start + quality[1])
    others = hard * np.linspace(-3, 3, 601)
    weight = np.exp(-(np.linspace(-3, 3, 601) ** 2) / 2)
    truth = (chance(ease + gain + others + quality[0]) - chance(ease + others + quality[1])).mean(axis=0)
    return a, b, float((truth * weight).sum() / weight.sum())


def test_bootstrap_interval_has_the_numbers_of_one_resample_at_a_time():
    values = np.random.default_rng(5).random(137)
    rng = np.random.default_rng(0)
    means = np.array([values[rng.integers(0, 137, 137)].mean() for _ in range(9000)])  # two blocks and a rest
    low, high = bootstrap_interval(values, num_resamples=9000)
    assert (low, high) == tuple(np.quantile(means, [0.025, 0.975]))


def test_clustered_wilson_interval_is_wilsons_for_one_network():
    successes = np.arange(50) < 41
    assert clustered_wilson_interval(successes) == pytest.approx(wilson_interval(41, 50), abs=1e-12)


def test_networks_that_always_agree_are_worth_one():
    successes = np.tile(np.arange(200) < 150, (4, 1))
    low, high = clustered_wilson_interval(successes)
    one = wilson_interval(150, 200)
    assert high - low == pytest.approx(one[1] - one[0], rel=0.01)


def test_all_solved_by_three_networks_is_no_more_sure_than_its_start_states():
    assert clustered_wilson_interval(np.ones((3, 40), bool)) == wilson_interval(40, 40)


@pytest.mark.parametrize(
    ("counts", "p"),
    [  # 2 * P(Binomial(n10 + n01, 1/2) <= min) in closed form
        ((5, 0, 0, 5), 1.0),
        ((10, 5, 5, 3), 1.0),
        ((10, 6, 0, 3), 2 / 2**6),
        ((7, 1, 9, 2), 2 * 11 / 2**10),
    ],
)
def test_mcnemar_is_the_binomial_of_discordant_pairs(counts, p):
    a, b = pairs(*counts)
    assert mcnemar_exact(a, b) == pytest.approx(p) == mcnemar_exact(b, a)
    assert sign_flip_exact(a, b) == pytest.approx(p)


def test_mcnemar_of_thousands_of_pairs_is_a_number():
    assert mcnemar_exact(*pairs(0, 3000, 3000, 0)) == 1.0
    assert 0 <= mcnemar_exact(*pairs(0, 3000, 0, 0)) < 1e-300


def test_sign_flip_counts_all_flips_of_small_data():
    rng = np.random.default_rng(2)
    a, b = rng.random((3, 8)) < 0.8, rng.random((3, 8)) < 0.4
    d = a.sum(axis=0) - b.sum(axis=0).astype(int)
    flips = np.array(np.meshgrid(*[[-1, 1]] * 8)).reshape(8, -1)  # (8, 256)
    assert sign_flip_exact(a, b) == pytest.approx(np.mean(np.abs(d @ flips) >= abs(d.sum())))


def test_copies_of_a_network_do_not_make_a_difference_surer():
    a, b = pairs(30, 9, 2, 20)
    one, five = sign_flip_exact(a, b), sign_flip_exact(np.tile(a, (5, 1)), np.tile(b, (5, 1)))
    assert one == pytest.approx(five)
    assert mcnemar_exact(np.tile(a, (5, 1)), np.tile(b, (5, 1))) < one / 100  # pooled pairs pretend that they do
    assert paired_difference_interval(a, b) == paired_difference_interval(np.tile(a, (5, 1)), np.tile(b, (5, 1)))


def test_holm_has_the_textbook_values_in_the_order_asked():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.7, 0.9]) == [1.0, 1.0] and holm([]) == []
    with pytest.raises(ValueError, match=r"\[0, 1\], got 1.5"):
        holm([0.1, 1.5])


@pytest.mark.parametrize("networks", [1, 3])
def test_paired_interval_covers_these_networks_as_often_as_it_says(networks):
    rng, covered = np.random.default_rng(7), 0
    for _ in range(400):
        a, b, truth = played(rng, networks=networks, starts=60, ease=1.0, gain=0.4, hard=1.5, luck=0.4)
        low, high = paired_difference_interval(a, b, num_resamples=500)
        covered += low <= truth <= high
    assert 0.93 <= covered / 400 <= 0.99


@pytest.mark.parametrize("networks", [2, 3, 5])
def test_crossed_interval_covers_the_recipe_where_networks_vary(networks):
    rng, covered, narrow = np.random.default_rng(8), 0, 0
    for _ in range(400):
        a, b, _ = played(rng, networks=networks, starts=80, ease=1.0, gain=0.0, hard=1.5, luck=1.0)
        low, high = crossed_difference_interval(a, b)
        covered += low <= 0 <= high
        low, high = paired_difference_interval(a, b, num_resamples=300)
        narrow += low <= 0 <= high
    assert 0.88 <= covered / 400 <= 1.0
    assert narrow / 400 < 0.75  # "these networks" is another question


def test_settings_that_never_differed_keep_an_interval_with_width():
    solved = np.ones((1, 50), bool)
    low, high = paired_difference_interval(solved, solved)
    assert -0.1 < low < -0.01 and 0.01 < high < 0.1
    assert crossed_difference_interval(np.ones((2, 50)), np.ones((2, 50))) == (0.0, 0.0)


def test_difference_in_scores_is_the_paired_normal_interval_for_many_starts():
    rng = np.random.default_rng(4)
    b = rng.random(800) * 0.5
    a = b + rng.normal(0.1, 0.05, 800)
    half = 1.96 * (a - b).std() / np.sqrt(800)
    low, high = paired_difference_interval(a, b)
    assert (low, high) == pytest.approx(((a - b).mean() - half, (a - b).mean() + half), abs=0.1 * half)
    wide = unpaired_difference_interval(a, b)
    assert wide[1] - wide[0] > 3 * (high - low)  # pairing is what makes it narrow


def test_episodes_needed_is_connors_formula():
    a, b = pairs(40, 25, 15, 20)  # discordant .40, difference .10
    n = (1.959964 * np.sqrt(0.4) + 0.841621 * np.sqrt(0.4 - 0.01)) ** 2 / 0.01
    assert episodes_needed(a, b) == np.ceil(n) == 312
    assert episodes_needed(a, b, comparisons=5) > 312
    assert episodes_needed(np.tile(a, (3, 1)), np.tile(b, (3, 1))) == 3 * 312  # copies of a network add nothing
    assert episodes_needed(a, a) == np.inf


def test_episodes_needed_have_the_power_they_promise():
    rng, told = np.random.default_rng(11), 0
    for _ in range(400):
        only_a, only_b, rest = rng.multinomial(312, [0.25, 0.15, 0.6])
        told += mcnemar_exact(*pairs(rest, only_a, only_b, 0)) < 0.05
    assert told / 400 == pytest.approx(0.8, abs=0.06)


def test_smallest_difference_is_the_one_whose_episodes_are_at_hand():
    a, b = pairs(400, 250, 150, 200)
    smallest = smallest_difference_shown(a, b)
    n = (1.959964 * np.sqrt(0.4) + 0.841621 * np.sqrt(0.4 - smallest**2)) ** 2 / smallest**2
    assert n == pytest.approx(1000, rel=1e-4)
    assert smallest_difference_shown(a, a) is None


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.7062), (2, 4.30265), (5, 2.57058), (100, 1.98397)])
def test_student_quantile_has_the_tables_values(freedom, quantile):
    assert student_quantile(0.975, freedom) == pytest.approx(quantile, rel=1e-4) == -student_quantile(0.025, freedom)


def test_pairs_of_different_shape_are_refused():
    with pytest.raises(ValueError, match=r"got \(2, 5\) and \(3, 5\); keep the training seeds"):
        paired_difference_interval(np.zeros((2, 5)), np.zeros((3, 5)))
    with pytest.raises(ValueError, match=r"at least 2 training seeds and 2 start states, got \(S=1, E=5\)"):
        crossed_difference_interval(np.zeros((1, 5)), np.zeros((1, 5)))


def test_sampled_sign_flips_agree_with_all_of_them():
    rng = np.random.default_rng(0)
    a, b = rng.random((3, 40)) < 0.6, rng.random((3, 40)) < 0.45
    assert sign_flip_sampled(a, b) == pytest.approx(sign_flip_exact(a, b), abs=0.01)
    assert sign_flip_sampled(a, b) == sign_flip_sampled(a, b)
    assert sign_flip_sampled(a * 0.5, b * 0.5) == sign_flip_sampled(
        a, b
    )  # only the sizes relative to each other matter


def test_sampled_sign_flips_are_one_for_equals_and_never_zero():
    scores = np.random.default_rng(0).random((2, 30))
    assert sign_flip_sampled(scores, scores) == 1
    assert sign_flip_sampled(scores + 1, scores) == pytest.approx(1 / 10_001)
