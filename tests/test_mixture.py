"""Exact answers about Gaussian mixtures: every form agrees with every other, with autograd and with sampling."""

import math

import pytest
import torch
from torch import Tensor

from diffpolicy.mixture import PROBLEMS, GaussianMixture, problem_named, smooth_error
from diffpolicy.processes import PROCESSES

LEVELS = {
    "noise": (0.0, 1.0),
    "nearly noise": (1e-4, 1.0),
    "middle": (0.6, 0.8),
    "nearly data": (1.0, 1e-4),
    "data": (1.0, 0.0),
    "straight path": (0.3, 0.7),
    "per sample": (torch.tensor([0.9, 0.5, 0.1, 0.99, 0.3]), torch.tensor([0.4, 0.5, 0.9, 0.1, 0.95])),
    "per action": (torch.tensor([[1.0, 0.8, 0.0]]).expand(5, 3), torch.tensor([[0.0, 0.6, 1.0]]).expand(5, 3)),
}


def random_mixture(kind: str = "full", seed: int = 0) -> GaussianMixture:
    """Three components over chunks (3, 2)."""
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(3, 3, 2, generator=g, dtype=torch.float64)
    weights = torch.tensor([0.5, 0.3, 0.2])
    if kind == "full":
        root = 0.4 * torch.randn(3, 6, 6, generator=g, dtype=torch.float64)
        return GaussianMixture(weights, means, covariance=root @ root.mT + 0.05 * torch.eye(6))
    spreads = {
        "one": 0.3,
        "per component": torch.tensor([0.2, 0.3, 0.5]),
        "diagonal": 0.2 + torch.rand(3, 3, 2, generator=g, dtype=torch.float64),
    }
    return GaussianMixture(weights, means, spread=spreads[kind])


def points(seed: int = 1, num: int = 5) -> Tensor:
    return torch.randn(num, 3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def entrywise(level: float | Tensor) -> Tensor:
    """A level shaped to multiply points() (5, 3, 2)."""
    level = torch.as_tensor(level, dtype=torch.float64)
    return level.view(level.shape + (1,) * (3 - level.ndim)) if level.ndim else level


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["full", "one", "per component", "diagonal"])
def test_score_is_the_gradient_of_the_log_density(kind, level):
    mixture, x = random_mixture(kind), points().requires_grad_()
    (gradient,) = torch.autograd.grad(mixture.log_prob_t(x, *LEVELS[level]).sum(), x)
    score = mixture.score(x.detach(), *LEVELS[level])
    assert torch.allclose(score, gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_every_form_means_the_same(kind, level):
    mixture, x, (a, s) = random_mixture(kind), points(), LEVELS[level]
    x_0, noise, score = mixture.denoise(x, a, s), mixture.noise(x, a, s), mixture.score(x, a, s)
    alpha, sigma = entrywise(a), entrywise(s)
    close = lambda left, right: torch.allclose(left, right, rtol=1e-9, atol=1e-9)
    assert close(alpha * x_0 + sigma * noise, x)
    assert close(alpha * x_0, x + sigma.square() * score), "Tweedie's formula"
    assert close(noise, -sigma * score)
    assert close(mixture.v(x, a, s), alpha * noise - sigma * x_0)
    assert close(mixture.velocity(x, a, s), noise - x_0)


def test_log_density_is_the_sum_over_components():
    from torch.distributions import MultivariateNormal

    mixture, x = random_mixture(), points()
    parts = MultivariateNormal(0.6 * mixture.means.flatten(1), 0.36 * mixture.covariance + 0.64 * torch.eye(6))
    expected = (parts.log_prob(x.flatten(1)[:, None]).exp() * mixture.weights).sum(1).log()
    assert torch.allclose(mixture.log_prob_t(x, 0.6, 0.8), expected)
    assert torch.allclose(mixture.log_prob(x), mixture.log_prob_t(x, 1, 0))


def test_pure_noise_is_answered_with_the_mean_and_clean_data_with_itself():
    mixture, x = random_mixture(), points()
    mean = (mixture.weights[:, None, None] * mixture.means).sum(0)
    assert torch.allclose(mixture.denoise(x, 0.0, 1.0), mean.expand_as(x))
    assert torch.allclose(mixture.denoise(x, 1.0, 0.0), x)
    assert torch.allclose(mixture.mode_weights(x, 0.0, 1.0), mixture.weights.expand(5, 3))


def test_far_and_narrow_chunks_stay_finite():
    mixture = GaussianMixture([0.9, 0.1], torch.tensor([-1.0, 1.0])[:, None, None].expand(2, 4, 2), spread=1e-4)
    x = torch.full((1, 4, 2), 30.0, dtype=torch.float64)
    for a, s in ((1.0, 0.0), (1.0, 1e-8), (1e-8, 1.0), (0.0, 1.0)):
        for answer in (mixture.denoise(x, a, s), mixture.score(x, a, s), mixture.log_prob_t(x, a, s)):
            assert answer.isfinite().all()


def test_posterior_mean_agrees_with_weighing_samples():
    mixture = random_mixture()
    x_0 = mixture.sample(400_000, torch.Generator().manual_seed(0))
    x_t = points(num=3)
    for a, s in (
        (0.6, 0.8),
        (torch.tensor([[0.2, 0.5, 0.7]]).expand(3, 3), torch.tensor([[0.9, 0.8, 0.6]]).expand(3, 3)),
    ):
        exact = mixture.denoise(x_t, a, s)
        for i, x in enumerate(x_t):
            alpha, sigma = (torch.as_tensor(v)[..., None] if torch.is_tensor(v) else v for v in (a, s))
            alpha, sigma = (v[i] if torch.is_tensor(v) else v for v in (alpha, sigma))
            weight = (-0.5 * ((x - alpha * x_0) / sigma).square().sum((1, 2))).softmax(0)
            error = (weight * weight).sum().sqrt()  # of a weighted mean of numbers of size 1
            assert torch.allclose((weight[:, None, None] * x_0).sum(0), exact[i], atol=float(4 * error))
            assert error < 0.03, "too few samples near x_t for the comparison to mean anything"


def test_samples_have_the_moments_of_the_mixture():
    mixture = random_mixture()
    x = mixture.sample(200_000, torch.Generator().manual_seed(0)).flatten(1)
    m = mixture.means.flatten(1)
    mean = mixture.weights @ m
    cov = torch.einsum("k,kde->de", mixture.weights, mixture.covariance + m[:, :, None] * m[:, None]) - mean.outer(mean)
    assert torch.allclose(x.mean(0), mean, atol=0.02) and torch.allclose(x.T.cov(), cov, atol=0.03)


def test_levels_per_action_that_are_all_equal_are_levels_per_sample():
    mixture, x = random_mixture(), points()
    a, s = LEVELS["per sample"]
    per_action = mixture.denoise(x, a[:, None].expand(5, 3), s[:, None].expand(5, 3))
    assert torch.allclose(per_action, mixture.denoise(x, a, s))


def test_known_actions_pull_the_unknown_ones_as_conditioning_does():
    mixture, x = random_mixture(), points()
    known = torch.tensor([[1.0, 1.0, 0.0]]).expand(5, 3)
    answer = mixture.denoise(x, known, 1 - known)  # two clean actions, one of pure noise
    for x_i, answer_i in zip(x, answer, strict=True):
        observed = x_i.clone()
        observed[2] = torch.nan
        rest = mixture.condition(observed)
        assert rest.shape == (1, 2)
        assert torch.allclose(answer_i[2], (rest.weights[:, None, None] * rest.means).sum(0)[0])


def test_conditional_density_is_joint_over_marginal():
    mixture, x = random_mixture(), points(num=4)
    x[:, 0] = x[0, 0]  # the first action is the same in all: their densities differ as those of the rest do
    observed = torch.full((3, 2), torch.nan, dtype=torch.float64)
    observed[0] = x[0, 0]
    rest = mixture.condition(observed)
    assert rest.shape == (2, 2)
    difference = mixture.log_prob(x) - rest.log_prob(x[:, 1:])
    assert torch.allclose(difference, difference[0].expand(4))


def test_conditional_agrees_with_rejection_sampling():
    x = random_mixture("diagonal").sample(600_000, torch.Generator().manual_seed(0))
    mixture = random_mixture("diagonal")
    observed = torch.full((3, 2), torch.nan, dtype=torch.float64)
    observed[0, 0], observed[1, 1] = 0.2, -0.1
    rest = mixture.condition(observed)
    assert rest.shape == (4, 1), "what is left is no block"
    near = x[(x[:, 0, 0] - 0.2).abs().maximum((x[:, 1, 1] + 0.1).abs()) < 0.06].flatten(1)[:, [1, 2, 4, 5]]
    assert len(near) > 500
    mean = (rest.weights[:, None] * rest.means[..., 0]).sum(0)
    assert torch.allclose(near.mean(0), mean, atol=float(5 * near.std() / len(near) ** 0.5))


def test_a_column_may_carry_an_observation():
    seen = torch.tensor([[[-1.0, -0.5]], [[1.0, 0.5]]])  # (goal, action): the goal tells which action
    mixture = GaussianMixture([0.5, 0.5], seen, spread=torch.tensor([[0.1, 0.05]]))
    asked = mixture.condition(torch.tensor([[1.0, torch.nan]]))
    assert asked.shape == (1, 1) and float(asked.weights[0]) < 1e-80
    assert torch.allclose(asked.means[1], torch.tensor([[0.5]], dtype=torch.float64))


@pytest.mark.parametrize("cost", ["reward", "precision", "full precision", "both"])
def test_tilted_density_is_proportional_to_the_tilted_one(cost):
    mixture, x, g = random_mixture(), points(), torch.Generator().manual_seed(5)
    reward = torch.randn(3, 2, generator=g, dtype=torch.float64) if cost in ("reward", "both") else None
    precision = target = None
    matrix = torch.zeros(6, 6, dtype=torch.float64)
    if cost in ("precision", "both"):
        precision = torch.tensor([[0.0, 3.0], [1.0, 0.0], [0.0, 0.5]])  # semi-definite: some entries are free
        matrix = torch.diag(precision.flatten().double())
    if cost == "full precision":
        row = torch.randn(6, generator=g, dtype=torch.float64)
        precision = matrix = 4 * row.outer(row)  # rank one
    if precision is not None:
        target = torch.randn(3, 2, generator=g, dtype=torch.float64)
    tilted = mixture.tilt(reward=reward, precision=precision, target=target)
    away = (x - (target if target is not None else 0)).flatten(1)
    exponent = -0.5 * torch.einsum("bd,de,be->b", away, matrix, away)
    if reward is not None:
        exponent = exponent + (x * reward).sum((1, 2))
    log_z = mixture.log_prob(x) + exponent - tilted.log_prob(x)
    assert torch.allclose(log_z, log_z[0].expand_as(log_z))
    samples = mixture.sample(300_000, torch.Generator().manual_seed(6))
    away = (samples - (target if target is not None else 0)).flatten(1)
    exponent = -0.5 * ((away @ matrix) * away).sum(1)
    if reward is not None:
        exponent = exponent + (samples * reward).sum((1, 2))
    assert float(exponent.logsumexp(0) - math.log(len(samples))) == pytest.approx(float(log_z[0]), abs=0.15)


def test_tilt_of_nothing_changes_nothing_and_a_hard_target_is_met():
    mixture, x = random_mixture(), points()
    assert torch.allclose(mixture.tilt().log_prob(x), mixture.log_prob(x))
    target = torch.tensor([[0.3, -0.2], [0.0, 0.0], [0.0, 0.0]])
    hard = mixture.tilt(precision=torch.tensor([[1e8, 1e8], [0, 0], [0, 0]]), target=target)
    observed = torch.where(torch.arange(3)[:, None] == 0, target, torch.nan)
    exact = mixture.condition(observed)
    assert torch.allclose(hard.weights, exact.weights, atol=1e-4)
    assert torch.allclose(hard.means[:, 1:], exact.means, atol=1e-4)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_problems_lie_inside_the_range_of_normalised_actions(problem):
    mixture = problem_named(problem)
    x = mixture.sample(2000, torch.Generator().manual_seed(0))
    assert x.shape == (2000, *mixture.shape) and x.dtype == torch.float64
    assert (x.abs() > 1).double().mean() < 1e-3
    assert mixture.mode_weights(x).max(dim=1).values.quantile(0.05) > 0.99, "the modes are told apart"


def test_detour_is_smooth_in_time_and_goes_round_the_obstacle():
    x = problem_named("detour").sample(500, torch.Generator().manual_seed(0))
    deviation = x - torch.where(x[:, 8:9, :1] > 0, 1, -1) * problem_named("detour").means[:1] * torch.tensor([1.0, 0.0])
    step = deviation[:, 1:, 0] - deviation[:, :-1, 0]
    assert step.std() < 0.5 * deviation[..., 0].std(), "neighbouring actions move together"
    assert x[:, 7:9].norm(dim=-1).min() > 0.3


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_denoiser_through_any_prediction_is_the_posterior_mean(prediction_type):
    config, process_class = PROCESSES["diffusion"]
    process, mixture = process_class(config(prediction_type=prediction_type)), random_mixture()
    x, t = points(), torch.tensor([0.01, 0.3, 0.5, 0.9, 1.0], dtype=torch.float64)
    assert torch.allclose(
        mixture.denoiser(process)(x, t, None), mixture.denoise(x, *process.levels(t)), rtol=1e-6, atol=1e-6
    )


def test_denoiser_answers_clean_actions_with_themselves():
    config, process_class = PROCESSES["diffusion"]
    process, x = process_class(config(prediction_type="epsilon")), points()
    t = torch.tensor([[0.0, 0.0, 0.7]], dtype=torch.float64).expand(5, 3)
    answer = random_mixture().denoiser(process)(x, t, None)
    assert torch.allclose(answer[:, :2], x[:, :2]) and answer.isfinite().all()


def test_error_has_the_asked_size_in_what_the_network_predicts():
    config, process_class = PROCESSES["diffusion"]
    mixture, (batch_size, size) = problem_named("two_modes"), (4000, 0.01)
    for prediction_type in ("epsilon", "sample", "v_prediction"):
        process = process_class(config(prediction_type=prediction_type))
        t = torch.rand(batch_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        t = (t * 98).ceil() / 100
        x_0 = mixture.sample(batch_size, torch.Generator().manual_seed(1))
        x_t = process.add_noise(x_0, torch.randn(x_0.shape, generator=torch.Generator().manual_seed(2)).double(), t)
        exact, wrong = (mixture.denoiser(process, error=e)(x_t, t, None) for e in (0.0, size))
        shift = process.from_x0(wrong, x_t, t) - process.from_x0(exact, x_t, t)
        assert float(shift.square().mean().sqrt()) == pytest.approx(size, rel=0.1)


def test_a_small_epsilon_error_is_a_huge_error_in_x0_at_the_last_cosine_step():
    config, process_class = PROCESSES["diffusion"]
    process, mixture = process_class(config(prediction_type="epsilon")), problem_named("two_modes")
    x_T, t = torch.randn(500, 4, 2, generator=torch.Generator().manual_seed(0)).double(), torch.ones(500).double()
    shift = mixture.denoiser(process, error=0.01)(x_T, t, None) - mixture.denoiser(process)(x_T, t, None)
    assert 10 < float(shift.square().mean().sqrt()) < 40


def test_error_is_smooth_and_fixed():
    x, t = points(num=200)[:, :, :].float(), torch.linspace(0.01, 1, 200)
    wrong = smooth_error((3, 2), seed=0)
    assert torch.equal(wrong(x, t), smooth_error((3, 2), seed=0)(x, t))
    assert not torch.allclose(wrong(x, t), smooth_error((3, 2), seed=1)(x, t), atol=0.1)
    assert (wrong(x + 1e-3, t + 1e-3) - wrong(x, t)).abs().max() < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(weights=[1.0, 1.0], means=torch.zeros(1, 3, 2), spread=1.0), "weights must be"),
        (dict(weights=[1.0, 0.0], means=torch.zeros(2, 3, 2), spread=1.0), "weights must be positive"),
        (dict(weights=[1.0], means=torch.zeros(1, 3, 2)), "either spread"),
        (dict(weights=[1.0], means=torch.zeros(1, 3, 2), spread=-1.0), "spread must be positive"),
        (dict(weights=[1.0], means=torch.zeros(1, 3, 2), spread=torch.ones(5)), "spread must be a number"),
        (dict(weights=[1.0], means=torch.zeros(1, 3, 2), covariance=torch.eye(3)), "covariance must be"),
        (dict(weights=[1.0], means=torch.zeros(1, 3, 2), covariance=torch.zeros(6, 6)), "positive definite"),
    ],
)
def test_a_mixture_says_what_is_wrong_with_it(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(**arguments)


def test_wrong_shapes_are_named():
    mixture = random_mixture()
    with pytest.raises(ValueError, match=r"x_t must be \(B, T_pred=3, D_act=2\)"):
        mixture.denoise(torch.zeros(4, 2, 3), 1.0, 0.0)
    with pytest.raises(ValueError, match="alpha and sigma must be"):
        mixture.denoise(points(), torch.ones(4), 0.0)
    with pytest.raises(ValueError, match="nothing is left"):
        mixture.condition(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="give its precision"):
        mixture.tilt(target=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="Did you mean 'two_modes'"):
        problem_named("two_mode")
