"""Guidance graded with exact denoisers: two classes, told or not told apart by words, whose chunks are Gaussian mixtures."""

import dataclasses

import pytest
import torch

from diffpolicy.guidance import GuidanceConfig, classifier_free
from diffpolicy.mixture import GaussianMixture
from diffpolicy.processes import PROCESSES, SamplerConfig, sample
from diffpolicy.spec import Condition

NUM = 2048
MODES = torch.tensor([-0.6, 0.6])[:, None, None].expand(2, 4, 2)
SPREAD = 0.05
UNTOLD = GaussianMixture([0.5, 0.5], MODES, spread=SPREAD)
"""What demonstrators do when nobody knows the words: both ways, equally often."""
MOSTLY_LEFT = GaussianMixture([0.9, 0.1], MODES, spread=SPREAD)
"""What they do when told `left`: one in ten errs."""
LEFT = GaussianMixture([1.0], MODES[:1], spread=SPREAD)
EULER = SamplerConfig(name="euler", num_inference_steps=50, clip_sample=None)
IMAGEN_QUANTILE = 0.995
"""Dynamic thresholding, Saharia et al. 2022, arXiv:2205.11487, section 2.3: x_0 is clipped to this quantile and scaled by it."""


def flow():
    config_class, process_class = PROCESSES["flow"]
    return process_class(config_class())


def guided(told: GaussianMixture, weight: float, untold: GaussianMixture = UNTOLD, num: int = NUM):
    """The guided denoise of a flow whose network is exact in both cases, with its condition."""
    with_words, without_words = told.denoiser(flow()), untold.denoiser(flow())

    def denoise(x_t, t, condition):
        has_words = condition.global_cond[:, :1, None] > 0
        return torch.where(has_words, with_words(x_t, t), without_words(x_t, t))

    tokens = torch.zeros(num, 0, 1)
    without = {"task": Condition(torch.zeros(num, 1), tokens)}
    return classifier_free(denoise, Condition(torch.ones(num, 1), tokens, without=without), GuidanceConfig(task=weight))


def draw(told, weight, *, sampler=EULER, change=lambda x_0: x_0, **kwargs):
    """Guided chunks (NUM, 4, 2) from evenly spread noise, and the largest number that an estimate of x_0 held."""
    denoise, condition = guided(told, weight, **kwargs)
    largest = 0.0

    def seen(x_t, t, c):
        nonlocal largest
        x_0 = denoise(x_t, t, c)
        largest = max(largest, x_0.abs().max().item())
        return change(x_0)

    return sample(flow(), seen, UNTOLD.even_noise(NUM, 0), condition, sampler).double(), largest


def share_left(chunks) -> float:
    return UNTOLD.mode_weights(chunks)[:, 0].mean().item()


def spread(chunks) -> float:
    """Standard deviation inside the left mode, mean over the entries."""
    return chunks[UNTOLD.mode_weights(chunks)[:, 0] > 0.5].std(dim=0).mean().item()


@pytest.mark.parametrize("told", [LEFT, MOSTLY_LEFT], ids=["left", "mostly left"])
def test_weight_one_samples_the_class_itself_and_weight_zero_everything(told):
    for weight, alone in ((1.0, told), (0.0, UNTOLD)):
        chunks = sample(flow(), alone.denoiser(flow()), UNTOLD.even_noise(NUM, 0), None, EULER).double()
        torch.testing.assert_close(draw(told, weight)[0], chunks, atol=1e-6, rtol=0)


def test_guided_denoiser_of_two_classes_is_the_closed_form():
    """x_0(none) = sum_c p(c | x_t) x_0(c), so x_0(w) = x_0(left) + (w - 1) p(right | x_t) (x_0(left) - x_0(right))."""
    right = GaussianMixture([1.0], MODES[1:], spread=SPREAD)
    x_t = torch.randn(5, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in (0.2, 0.7, 0.95):
        alpha, sigma = 1 - t, t
        here, there = LEFT.denoise(x_t, alpha, sigma), right.denoise(x_t, alpha, sigma)
        not_here = UNTOLD.mode_weights(x_t, alpha, sigma)[:, 1, None, None]
        for weight in (1.0, 2.0, 4.0):
            denoise, condition = guided(LEFT, weight, num=5)
            closed = here + (weight - 1) * not_here * (here - there)
            torch.testing.assert_close(denoise(x_t, torch.full((5,), t), condition), closed, atol=1e-6, rtol=1e-6)


def test_larger_weights_leave_the_rarer_mode_out():
    """Where modes are far apart p(x | c)^w p(x)^(1 - w) gives left .9^w against .1^w; the sampled weights go beyond that."""
    left = {weight: share_left(draw(MOSTLY_LEFT, weight)[0]) for weight in (1.0, 2.0, 4.0)}
    assert left[1.0] == pytest.approx(0.9, abs=0.01)
    assert 0.9**2 / (0.9**2 + 0.1**2) < left[2.0] < 0.995 < left[4.0]


def test_larger_weights_narrow_a_mode_and_push_it_away_from_the_other():
    drawn = {weight: draw(LEFT, weight)[0] for weight in (1.0, 2.0, 4.0)}
    ratio = {weight: spread(chunks) / spread(drawn[1.0]) for weight, chunks in drawn.items()}
    assert 1.0 > ratio[2.0] > ratio[4.0] > 0.9
    mean = {weight: chunks.mean().item() for weight, chunks in drawn.items()}
    assert mean[1.0] == pytest.approx(-0.6, abs=0.001) and -0.65 < mean[4.0] < mean[2.0] < -0.605


def test_clipping_sees_what_guidance_exaggerates_and_takes_most_of_the_push_back():
    """At weight 7 an estimate of x_0 reaches 5.5 where the data end at .8; clipped, the mode moves by .012, not by .033."""
    free, largest = draw(LEFT, 7.0)
    clipped, _ = draw(LEFT, 7.0, sampler=dataclasses.replace(EULER, clip_sample=1.0))
    assert largest > 4
    assert -0.64 < free.mean() < -0.62 and -0.615 < clipped.mean() < -0.605
    assert free.abs().max() < 1  # even so no chunk leaves the range


@pytest.mark.parametrize("gap", [0.6, 0.2], ids=["far apart", "overlapping"])
@pytest.mark.parametrize("weight", [2.0, 4.0, 7.0])
def test_dynamic_clipping_would_give_what_the_fixed_limit_gives(gap, weight):
    """So there is none. Saturation, its reason for images, does not occur: guidance ends once x_t tells the class."""
    width = SPREAD if gap == 0.6 else gap
    untold = GaussianMixture([0.5, 0.5], MODES * gap / 0.6, spread=width)
    told = GaussianMixture([1.0], MODES[:1] * gap / 0.6, spread=width)

    def dynamic(x_0):
        limit = x_0.abs().flatten(1).quantile(IMAGEN_QUANTILE, dim=1).clamp_min(1.0)[:, None, None]
        return x_0.clamp(-limit, limit) / limit

    fixed, _ = draw(told, weight, untold=untold, sampler=dataclasses.replace(EULER, clip_sample=1.0))
    scaled, _ = draw(told, weight, untold=untold, change=dynamic)
    assert scaled.mean().item() == pytest.approx(fixed.mean().item(), abs=0.005)
    assert scaled.std(dim=0).mean().item() == pytest.approx(fixed.std(dim=0).mean().item(), rel=0.02)
    assert (fixed.abs() >= 0.999).double().mean() < 0.001
