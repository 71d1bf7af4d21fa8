"""Gaussian-mixture action chunks: whatever a diffusion policy could be asked about them has an exact answer.

The other half of the test bench, which grades samplers against these answers, is oracle.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffpolicy.processes import Denoise, Process
from diffpolicy.spec import Condition, unknown_name

Level = float | Tensor
"""alpha or sigma: one number, (B,) for one level per sample, or (B, T_pred) for one per action."""


class GaussianMixture:
    """p(x_0) = sum_k weights_k N(means_k, covariance_k) over chunks (T_pred, D_act); all answers are exact, in float64.

    The marginal at x_t = alpha x_0 + sigma noise is the mixture of N(alpha means_k, C_k), C_k = alpha covariance_k alpha
    + sigma^2, with alpha and sigma as diagonal matrices where every action has its own level. All that a network could be
    asked to predict follows from `pull_k` = C_k^-1 (x_t - alpha means_k) and the posterior weight of every component:

        score = -sum_k w_k pull_k    noise = sigma sum_k w_k pull_k    x_0 = sum_k w_k (means_k + covariance_k alpha pull_k)

    None divides by alpha or sigma, so all hold at pure noise (alpha = 0) and at clean data (sigma = 0).

    Args:
        weights: (K,), positive; scaled to sum to 1.
        means: (K, T_pred, D_act).
        spread: standard deviation: one for all, (K,) per component, or (T_pred, D_act) or (K, T_pred, D_act) per entry.
        covariance: instead of spread, (d, d) shared or (K, d, d), d = T_pred * D_act in the order of flattened chunks.
    Raises:
        ValueError: shapes that do not fit, weights or spreads that are not positive, covariances that are not positive
            definite, or both or neither of spread and covariance.
    """

    def __init__(
        self, weights: Tensor, means: Tensor, *, spread: float | Tensor | None = None, covariance: Tensor | None = None
    ):
        weights, means = _double(weights), _double(means)
        if means.ndim != 3 or weights.shape != means.shape[:1]:
            raise ValueError(
                f"weights must be (K,) and means (K, T_pred, D_act), got {tuple(weights.shape)} and {tuple(means.shape)}"
            )
        if not (weights > 0).all() or not weights.isfinite().all():
            raise ValueError(f"weights must be positive, got {weights.tolist()}; leave components of no weight out")
        if (spread is None) == (covariance is None):
            raise ValueError(
                "a mixture needs either spread (standard deviations) or covariance, not both and not neither"
            )
        self.shape: tuple[int, int] = tuple(means.shape[1:])
        """(T_pred, D_act)."""
        self.weights = weights / weights.sum()  # (K,)
        self.means = means
        self._elsewhere = {means.device: self}
        num, dim = len(weights), means[0].numel()
        if spread is not None:
            variances = self._expand_spread(_double(spread)).square()  # (K, d)
            self._variances, self._axes = variances, torch.eye(dim, dtype=torch.float64).expand(num, dim, dim)
        else:
            covariance = _double(covariance)
            if covariance.shape not in ((dim, dim), (num, dim, dim)):
                raise ValueError(
                    f"covariance must be (d, d) or (K, d, d) with d = T_pred * D_act = {dim}, got {tuple(covariance.shape)}"
                )
            self._variances, self._axes = torch.linalg.eigh(covariance.expand(num, dim, dim))
            if not (self._variances > 0).all():
                raise ValueError(
                    f"covariance must be positive definite, its smallest eigenvalue is {self._variances.min():.3g}; "
                    "add a little to the diagonal"
                )

    def _expand_spread(self, spread: Tensor) -> Tensor:
        """Standard deviations (K, d)."""
        num, shape = len(self.weights), self.shape
        if spread.shape not in ((), (num,), shape, (num, *shape)):
            raise ValueError(
                f"spread must be a number, (K={num},), {shape} or {(num, *shape)}, got shape {tuple(spread.shape)}"
            )
        if not (spread > 0).all() or not spread.isfinite().all():
            raise ValueError(f"spread must be positive, its smallest is {spread.min():.3g}")
        if spread.ndim == 1:
            spread = spread[:, None, None]
        return spread.expand(num, *shape).flatten(1)

    @functools.cached_property
    def covariance(self) -> Tensor:
        """(K, d, d)."""
        return (self._axes * self._variances[:, None]) @ self._axes.mT

    def to(self, device: torch.device) -> GaussianMixture:
        """The same mixture on another device; made once."""
        if device not in self._elsewhere:
            self._elsewhere[device] = GaussianMixture(
                self.weights.to(device), self.means.to(device), covariance=self.covariance.to(device)
            )
        return self._elsewhere[device]

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Chunks (num_samples, T_pred, D_act), float64."""
        component = torch.multinomial(self.weights, num_samples, replacement=True, generator=generator)  # (N,)
        noise = torch.randn(num_samples, self.means[0].numel(), dtype=torch.float64, generator=generator)
        scaled = noise * self._variances.sqrt()[component]
        offset = torch.empty_like(noise)
        for k in range(len(self.weights)):
            chosen = component == k
            offset[chosen] = scaled[chosen] @ self._axes[k].mT
        return self.means[component] + offset.view(-1, *self.shape)

    def sample_evenly(self, num_samples: int, seed: int = 0) -> Tensor:
        """Chunks (num_samples, T_pred, D_act) that fill the distribution more evenly than chance would; same marginals.

        Scrambled Sobol points (Owen 1998): the share of every component is right to within 1 / num_samples.
        """
        uniform = even_uniforms(num_samples, 1 + self.means[0].numel(), seed)
        component = torch.bucketize(uniform[:, 0].contiguous(), self.weights.cumsum(0)[:-1])  # (N,)
        scaled = torch.special.ndtri(uniform[:, 1:]) * self._variances.sqrt()[component]
        offset = torch.einsum("nd,ned->ne", scaled, self._axes[component])
        return self.means[component] + offset.view(-1, *self.shape)

    def even_noise(self, num_samples: int, seed: int = 0) -> Tensor:
        """Standard normal noise (num_samples, T_pred, D_act), most even along the directions in which the chunks differ most.

        A deterministic sampler started from it shows its own error in mode weights and little of chance.
        """
        means = self.means.flatten(1) - (self.weights[:, None] * self.means.flatten(1)).sum(0)
        total = torch.einsum("k,kde->de", self.weights, self.covariance + means[:, :, None] * means[:, None])
        axes = torch.linalg.eigh(total).eigenvectors.flip(
            1
        )  # (d, d), widest first, as the first Sobol coordinates are best
        return (torch.special.ndtri(even_uniforms(num_samples, len(axes), seed)) @ axes.T).view(-1, *self.shape)

    def _expand_level(self, level: Level, x_t: Tensor) -> Tensor:
        """A level as (B,), or as (B, d) where it was given per action."""
        level = torch.as_tensor(level, dtype=torch.float64, device=x_t.device)
        batch_size, (pred, action_dim) = len(x_t), self.shape
        if level.shape == (batch_size, pred):
            return level[:, :, None].expand(-1, -1, action_dim).flatten(1)
        if level.shape not in ((), (batch_size,)):
            raise ValueError(
                f"alpha and sigma must be a number, (B={batch_size},) or (B={batch_size}, T_pred={pred}), "
                f"got shape {tuple(level.shape)}"
            )
        return level.expand(batch_size)

    def _posterior(self, x_t: Tensor, alpha: Level, sigma: Level) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What every answer is made of.

        Returns:
            log joint density of x_t and component (B, K); pull_k (B, K, d); alpha and sigma, (B, 1) or (B, d).
        """
        if x_t.shape[1:] != self.shape:
            raise ValueError(f"x_t must be (B, T_pred={self.shape[0]}, D_act={self.shape[1]}), got {tuple(x_t.shape)}")
        x = x_t.double().flatten(1)  # (B, d)
        alpha, sigma = self._expand_level(alpha, x_t), self._expand_level(sigma, x_t)
        dim, per_action = x.shape[1], alpha.ndim == 2 or sigma.ndim == 2
        alpha, sigma = alpha.view(len(x), -1), sigma.view(len(x), -1)  # (B, 1) or (B, d)
        residual = x[:, None] - alpha[:, None] * self.means.flatten(1)  # (B, K, d)
        if per_action:  # noise no longer looks alike along every axis: factor each sample's own covariance
            alpha, sigma = alpha.expand(-1, dim), sigma.expand(-1, dim)
            marginal = alpha[:, None, :, None] * self.covariance * alpha[:, None, None, :]  # (B, K, d, d)
            factor = torch.linalg.cholesky(marginal + torch.diag_embed(sigma.square())[:, None])
            pull = torch.cholesky_solve(residual[..., None], factor)[..., 0]
            log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        else:
            variances = alpha.square()[:, None] * self._variances + sigma.square()[:, None]  # (B, K, d)
            along = torch.einsum("bkd,kde->bke", residual, self._axes)
            pull = torch.einsum("bke,kde->bkd", along / variances, self._axes)
            log_det = variances.log().sum(-1)
        log_joint = self.weights.log() - 0.5 * ((residual * pull).sum(-1) + log_det + dim * math.log(2 * math.pi))
        return log_joint, pull, alpha, sigma

    def log_prob(self, x_0: Tensor) -> Tensor:
        """log p(x_0), (B,), nats."""
        return self.log_prob_t(x_0, 1.0, 0.0)

    def log_prob_t(self, x_t: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """Log density of the noised chunks, (B,), nats."""
        return self.to(x_t.device)._posterior(x_t, alpha, sigma)[0].logsumexp(dim=1)

    def mode_weights(self, x_t: Tensor, alpha: Level = 1.0, sigma: Level = 0.0) -> Tensor:
        """Posterior probability of every component, (B, K); of clean chunks by default."""
        return self.to(x_t.device)._posterior(x_t, alpha, sigma)[0].softmax(dim=1)

    def denoise(self, x_t: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """E[x_0 | x_t], what the ideal denoiser answers, (B, T_pred, D_act) in the type of x_t."""
        here = self.to(x_t.device)
        log_joint, pull, alpha, _ = here._posterior(x_t, alpha, sigma)
        per_component = here.means.flatten(1) + torch.einsum("bkd,kde->bke", alpha[:, None] * pull, here.covariance)
        return torch.einsum("bk,bkd->bd", log_joint.softmax(dim=1), per_component).view_as(x_t).to(x_t.dtype)

    def score(self, x_t: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """Gradient of log_prob_t, (B, T_pred, D_act)."""
        log_joint, pull, _, _ = self.to(x_t.device)._posterior(x_t, alpha, sigma)
        return -torch.einsum("bk,bkd->bd", log_joint.softmax(dim=1), pull).view_as(x_t).to(x_t.dtype)

    def noise(self, x_t: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """E[noise | x_t], the ideal epsilon, (B, T_pred, D_act)."""
        log_joint, pull, _, sigma = self.to(x_t.device)._posterior(x_t, alpha, sigma)
        return (sigma * torch.einsum("bk,bkd->bd", log_joint.softmax(dim=1), pull)).view_as(x_t).to(x_t.dtype)

    def v(self, x_t: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """E[alpha noise - sigma x_0 | x_t], the ideal v. Salimans & Ho 2022, arXiv:2202.00512, appendix D."""
        a = self._expand_level(alpha, x_t).view(len(x_t), -1)
        s = self._expand_level(sigma, x_t).view(len(x_t), -1)
        noise, x_0 = self.noise(x_t, alpha, sigma).flatten(1), self.denoise(x_t, alpha, sigma).flatten(1)
        return (a * noise - s * x_0).view_as(x_t).to(x_t.dtype)

    def velocity(self, x_t: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """E[noise - x_0 | x_t], the ideal velocity of the straight path. Lipman et al. 2023, arXiv:2210.02747."""
        return self.noise(x_t, alpha, sigma) - self.denoise(x_t, alpha, sigma)

    def condition(self, observed: Tensor) -> GaussianMixture:
        """The exact distribution of the rest of a chunk, given some of its entries.

        Args:
            observed: (T_pred, D_act), NaN where nothing is known. Numbers that are an observation rather than an action
                may be carried as further columns of the chunk and be given here.
        Returns:
            a mixture over the unknown entries: (rows, columns) where they form a block, such as the last actions of a
            chunk, else (number of entries, 1), in the order of the flattened chunk.
        Raises:
            ValueError: another shape, or nothing left to predict.
        """
        observed = _double(observed)
        if observed.shape != self.shape:
            raise ValueError(f"observed must be {self.shape} with NaN where unknown, got {tuple(observed.shape)}")
        unknown = observed.isnan()
        if not unknown.any():
            raise ValueError("every entry of the chunk is observed: nothing is left; put NaN where it is unknown")
        if not unknown.all():
            rows, columns = unknown.any(dim=1), unknown.any(dim=0)
            block = (rows[:, None] & columns) == unknown
            shape = (int(rows.sum()), int(columns.sum())) if block.all() else (int(unknown.sum()), 1)
            rest, known = unknown.flatten(), ~unknown.flatten()
            means, cov = self.means.flatten(1), self.covariance
            residual = observed.flatten()[known] - means[:, known]  # (K, known)
            factor = torch.linalg.cholesky(cov[:, known][:, :, known])
            gain = torch.cholesky_solve(cov[:, known][:, :, rest], factor).mT  # (K, rest, known)
            pull = torch.cholesky_solve(residual[..., None], factor)[..., 0]
            log_likelihood = -0.5 * (residual * pull).sum(-1) - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            remaining = cov[:, rest][:, :, rest] - gain @ cov[:, known][:, :, rest]
            mean = means[:, rest] + (gain @ residual[..., None])[..., 0]
            return self._reweighted(log_likelihood, mean.view(-1, *shape), remaining)
        return self

    def tilt(
        self, *, reward: Tensor | None = None, precision: Tensor | None = None, target: Tensor | None = None
    ) -> GaussianMixture:
        """The exact p(x) exp(reward . x - 1/2 (x - target)^T precision (x - target)) / Z: still a mixture.

        What guidance by a linear or quadratic cost aims at, and what most guidance rules only approximate.

        Args:
            reward: (T_pred, D_act), the slope; None for none.
            precision: (T_pred, D_act) for a diagonal cost, or (d, d), positive semi-definite; None for none.
            target: (T_pred, D_act), where the quadratic cost is zero; None for the origin.
        Raises:
            ValueError: shapes that do not fit, or a target without precision.
        """
        dim = self.means[0].numel()
        if target is not None and precision is None:
            raise ValueError("target says where the quadratic cost is zero: give its precision too")
        for name, value in (("reward", reward), ("target", target)):
            if value is not None and tuple(value.shape) != self.shape:
                raise ValueError(f"{name} must be (T_pred, D_act) = {self.shape}, got {tuple(value.shape)}")
        slope = torch.zeros(dim, dtype=torch.float64) if reward is None else _double(reward).flatten()
        centre = torch.zeros(dim, dtype=torch.float64) if target is None else _double(target).flatten()
        stiffness = torch.zeros(dim, dim, dtype=torch.float64) if precision is None else _double(precision)
        if stiffness.shape == self.shape:
            stiffness = torch.diag(stiffness.flatten())
        if stiffness.shape != (dim, dim):
            raise ValueError(f"precision must be {self.shape} or {(dim, dim)}, got {tuple(stiffness.shape)}")
        means = self.means.flatten(1)  # (K, d)
        root = self._axes * self._variances.sqrt()[:, None]  # (K, d, d): root root^T = covariance
        # With x = mean + root z the exponent is quadratic in z, and z is standard normal: nothing is inverted that may be singular.
        factor = torch.linalg.cholesky(torch.eye(dim, dtype=torch.float64) + root.mT @ stiffness @ root)
        gap = centre - means
        force = slope + gap @ stiffness  # (K, d): gradient of the exponent at the mean
        whitened = torch.linalg.solve_triangular(factor, (root.mT @ force[..., None]), upper=False)  # (K, d, 1)
        new_root = torch.linalg.solve_triangular(factor, root.mT, upper=False)  # (K, d, d)
        log_mass = (
            (means * slope).sum(-1)
            - 0.5 * (gap @ stiffness * gap).sum(-1)
            + 0.5 * whitened.square().sum((-2, -1))
            - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        )
        mean = means + (new_root.mT @ whitened)[..., 0]
        return self._reweighted(log_mass, mean.view(-1, *self.shape), new_root.mT @ new_root)

    def _reweighted(self, log_mass: Tensor, means: Tensor, covariance: Tensor) -> GaussianMixture:
        """A mixture whose weights are multiplied by exp(log_mass); components whose weight vanishes in float64 are left out."""
        weights = (self.weights.log() + log_mass).softmax(dim=0)
        kept = weights > 0
        return GaussianMixture(weights[kept], means[kept], covariance=(covariance[kept] + covariance[kept].mT) / 2)

    def denoiser(self, process: Process, *, error: float = 0.0, seed: int = 0) -> Denoise:
        """The ideal denoise(x_t, t, condition) -> x_0 of a process, for `processes.sample`; the condition is not looked at.

        Args:
            error: root mean square of a smooth, fixed error in what the network of this process would predict (noise, x_0,
                v, velocity), so that objectives can be told apart: at alpha = .0005 an epsilon error of .01 is one of 20 in x_0.
            seed: which error.
        """
        wrong = smooth_error(self.shape, seed) if error else None

        def denoise(x_t: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
            x_0 = self.denoise(x_t, *process.levels(t))
            prediction = process.from_x0(x_0, x_t, t)  # what a perfect network of this process would answer
            said = prediction + error * wrong(x_t, t) if wrong else prediction
            # at sigma = 0 no noise can be predicted, and nothing is to be: x_t is x_0
            return torch.where(prediction.isfinite(), process.to_x0(said, x_t, t), x_0)

        return denoise


def _double(values: float | Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def even_uniforms(num_points: int, dim: int, seed: int) -> Tensor:
    """Scrambled Sobol points (num_points, dim) inside (0, 1), float64. Best where num_points is a power of two."""
    points = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed).draw(num_points, dtype=torch.float64)
    return points.clamp(2**-31, 1 - 2**-31)


def smooth_error(shape: tuple[int, int], seed: int, num_features: int = 128) -> Callable[[Tensor, Tensor], Tensor]:
    """A smooth random function (x_t, t) -> (B, T_pred, D_act) of root mean square 1: random Fourier features.

    Rahimi & Recht 2007. One period spans a few units of the chunk's root mean square and about the whole of t.
    """
    generator = torch.Generator().manual_seed(seed)
    dim = math.prod(shape)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    over_x, over_t = draw(dim, num_features) * math.sqrt(2 / dim), draw(num_features) * math.pi
    phase = torch.rand(num_features, generator=generator, dtype=torch.float64) * 2 * math.pi
    weights = draw(num_features, dim)
    weights = weights * (2 / weights.square().sum(dim=0)).sqrt()  # (F, d): every entry's mean square is 1

    def wrong(x_t: Tensor, t: Tensor) -> Tensor:
        x = x_t.double().flatten(1)
        when = t.double().reshape(len(x), -1).mean(dim=1, keepdim=True)  # (B, 1)
        angle = x @ over_x.to(x.device) + when * over_t.to(x.device) + phase.to(x.device)
        return (angle.cos() @ weights.to(x.device)).view_as(x_t).to(x_t.dtype)

    return wrong


def two_modes() -> GaussianMixture:
    """Two ways of very different weight, .7 and .3, each narrow: chunks around -.6 or +.6, spread .05. (4, 2)."""
    return GaussianMixture([0.7, 0.3], torch.tensor([-0.6, 0.6])[:, None, None].expand(2, 4, 2), spread=0.05)


def one_gaussian() -> GaussianMixture:
    """One way, centred off the origin, spread .2. (4, 2)."""
    return GaussianMixture([1.0], torch.tensor([0.3, -0.2]).expand(1, 4, 2), spread=0.2)


def ring() -> GaussianMixture:
    """Six ways on a circle of radius .7, the first three twice as likely as the others, spread .05. (4, 2)."""
    angle = torch.arange(6) * math.pi / 3
    points = 0.7 * torch.stack([angle.cos(), angle.sin()], dim=-1)  # (6, 2)
    return GaussianMixture([2.0, 2.0, 2.0, 1.0, 1.0, 1.0], points[:, None].expand(6, 4, 2), spread=0.05)


def detour() -> GaussianMixture:
    """Past an obstacle at the origin, on the left (.6) or on the right (.4), smooth in time. (16, 2): across, along.

    across   .6  o o                  along runs from -.8 to .8; deviations are Gaussian processes over time with
             .  o   o                 standard deviation .06 and a correlation length of a quarter of the chunk,
             0 o  X  o                plus .01 of independent noise
            -.6  (the same, mirrored)
    """
    time = torch.linspace(0, 1, 16, dtype=torch.float64)
    along = 1.6 * time - 0.8
    across = 0.6 * (math.pi * time).sin()
    means = torch.stack([torch.stack([side * across, along], dim=-1) for side in (1, -1)])  # (2, 16, 2)
    smooth = 0.06**2 * torch.exp(-0.5 * ((time[:, None] - time) / 0.25).square()) + 0.01**2 * torch.eye(16)
    return GaussianMixture([0.6, 0.4], means, covariance=torch.kron(smooth, torch.eye(2, dtype=torch.float64)))


PROBLEMS: dict[str, Callable[[], GaussianMixture]] = {
    "two_modes": functools.cache(two_modes),
    "one_gaussian": functools.cache(one_gaussian),
    "ring": functools.cache(ring),
    "detour": functools.cache(detour),
}
"""name -> a mixture inside [-1, 1], the range of normalised actions. The one place to add one."""


def problem_named(problem: str | GaussianMixture) -> GaussianMixture:
    """A problem by its name in PROBLEMS, or a mixture as it is."""
    if isinstance(problem, GaussianMixture):
        return problem
    if problem not in PROBLEMS:
        raise unknown_name("problem", problem, PROBLEMS)
    return PROBLEMS[problem]()
