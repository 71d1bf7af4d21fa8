"""Diversity: known distances, and a measurement that depends on seeds alone."""

import math

import numpy as np
import pytest
import torch

from diffpolicy.diversity import ROWS, start_diversity
from diffpolicy.envs import make_env
from diffpolicy.executors import RecedingHorizon
from diffpolicy.metrics import chunk_diversity
from diffpolicy.processes import SamplerConfig
from diffpolicy.rollout import episode_generator
from diffpolicy.spec import DataSpec, FieldSpec

SEEDS = range(100_000, 100_006)


def test_diversity_of_two_narrow_modes_is_their_distance_times_the_odds_of_meeting_both():
    left, right = np.zeros((4, 8, 2)), np.full((12, 8, 2), 0.5)  # of 16 chunks a quarter goes left
    chunks = np.concatenate([left, right])
    assert chunk_diversity(chunks) == pytest.approx(2 * 4 * 12 / (16 * 15) * 0.5)
    both = chunk_diversity(np.stack([chunks, 0 * chunks]))  # (2,): an observation alone
    assert both.shape == (2,) and both[0] == chunk_diversity(chunks) and both[1] == 0


def test_diversity_of_gaussian_chunks_is_the_closed_form_whatever_their_number():
    """E|X - X'| of N(0, s^2) in n dimensions is 2 s Gamma((n + 1) / 2) / Gamma(n / 2)."""
    spread, (steps, dim) = 0.3, (4, 2)
    size = steps * dim
    expected = 2 * spread * math.exp(math.lgamma((size + 1) / 2) - math.lgamma(size / 2)) / math.sqrt(size)
    rng = np.random.default_rng(0)
    for num_chunks in (2, 16):
        values = chunk_diversity(spread * rng.standard_normal((4000, num_chunks, steps, dim)))
        assert values.mean() == pytest.approx(expected, rel=0.02)


def test_diversity_is_per_step_and_dimension():
    rng = np.random.default_rng(0)
    short = rng.standard_normal((16, 4, 2))
    assert chunk_diversity(np.tile(short, (1, 3, 1))) == pytest.approx(chunk_diversity(short))
    assert chunk_diversity(np.tile(short, (1, 1, 5))) == pytest.approx(chunk_diversity(short))


def test_one_chunk_has_no_diversity_and_a_chunk_that_is_not_finite_none_either():
    with pytest.raises(ValueError, match=r"diversity needs chunks \(\.\.\., M >= 2, T, D\), got shape \(5, 1, 8, 2\)"):
        chunk_diversity(np.zeros((5, 1, 8, 2)))
    chunks = np.zeros((2, 3, 4, 1))
    chunks[1, 0, 0, 0] = np.nan
    assert np.isfinite(chunk_diversity(chunks)).tolist() == [True, False]


@pytest.fixture
def make_tabletop_policy(make_policy):
    """An untrained policy for the tabletop."""
    obs, _ = make_env("tabletop").reset(seed=0)
    fields = {k: FieldSpec(shape=v.shape, dtype=str(v.dtype)) for k, v in obs.items()}
    spec = DataSpec(fields={**fields, "action": FieldSpec(shape=(2,), dtype="float32")})
    return lambda **sections: make_policy(spec=spec, **sections)


def measured(policy, seeds=SEEDS, **kwargs):
    return start_diversity(RecedingHorizon(policy, batch_size=16), "tabletop", {}, seeds=seeds, **kwargs)


def test_measurement_follows_from_its_seeds_alone(make_tabletop_policy):
    policy = make_tabletop_policy()
    result = measured(policy)
    assert result.seeds == tuple(SEEDS) and (result.values > 0).all() and len(set(result.values)) == len(SEEDS)
    assert np.array_equal(measured(policy).values, result.values)
    for some in (SEEDS[:1], SEEDS[: ROWS + 1], SEEDS[3:]):  # whatever stands beside it
        assert np.array_equal(measured(policy, some).values, result.values[[SEEDS.index(seed) for seed in some]])
    assert not np.array_equal(measured(policy, sampling_seed=1).values, result.values)


def test_policy_that_always_answers_alike_has_none(make_tabletop_policy):
    policy = make_tabletop_policy(process={"name": "regression"}, sampler={})
    assert measured(policy).values.tolist() == [0.0] * len(SEEDS)
    assert measured(policy, SEEDS[:1]).values.tolist() == [0.0]


def test_noise_that_is_left_out_is_diversity_that_is_left_out(make_tabletop_policy):
    policy = make_tabletop_policy()
    full = measured(policy).values
    policy.use_sampler(SamplerConfig(num_inference_steps=3, temperature=0.5))
    assert (measured(policy).values < full).all()


def test_only_executed_steps_count_in_normalised_units(make_tabletop_policy):
    """The number is that of the chunks which the policy itself gives, on the noise of the episode."""
    policy = make_tabletop_policy()
    seen = []
    policy.encoder.register_forward_hook(lambda module, inputs, condition: seen.append(condition))
    result = measured(policy, SEEDS[:ROWS], num_chunks=3)
    (condition,) = seen  # looked once at all of them
    noise = [episode_generator(0, seed) for seed in SEEDS[:ROWS]]
    chunks = policy.sample(condition, num_samples=3, generators=noise)[:, :, policy.horizons.executed]
    scale = policy.normalizer.stat("action", "scale")
    values = chunk_diversity((chunks * scale).numpy())
    assert result.values == pytest.approx(values, rel=1e-4) and chunks.shape[2] == policy.horizons.act
    first = policy.sample(condition, generators=[episode_generator(0, seed) for seed in SEEDS[:ROWS]])
    torch.testing.assert_close(first[:, policy.horizons.executed], chunks[:, 0], atol=1e-5, rtol=1e-5)


def test_no_start_state_is_refused(make_tabletop_policy):
    with pytest.raises(ValueError, match="diversity needs at least one start state"):
        measured(make_tabletop_policy(), [])
