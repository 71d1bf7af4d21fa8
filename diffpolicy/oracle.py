"""The exact test bench: every sampler setting graded against chunks whose ideal denoiser is known in closed form.

Whatever a setting gets wrong here is its own fault: no network stands between it and the result. Every schedule,
spacing, step count, objective and clipping is graded in a fraction of a second on a CPU, with nothing trained:

    mixture.denoiser(process) --sample--> chunks (N, T_pred, D_act) --compared with mixture.sample(N)--> Grade

The chunks and their exact answers are in mixture.py.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from diffpolicy.mixture import PROBLEMS, GaussianMixture, problem_named
from diffpolicy.processes import PROCESSES, Process, SamplerConfig, labels, resolve_sampler, sample
from diffpolicy.spec import Condition

NUM_FLOOR_SETS = 100
"""Sets of independent true chunks that are compared with the truth, to know what a perfect sampler scores by chance."""
MAX_FLOOR_SAMPLES = 512
"""Chunks in each of them; with more, the floor is scaled: a distance to the truth that is chance alone falls as 1 / N."""


@dataclass(frozen=True, kw_only=True)
class Grade:
    """How far a setting's chunks are from the truth, and what it costs."""

    setting: dict[str, object]
    """What was graded: process, schedule, sampler, spacing, steps, ... by name."""
    problem: str
    num_samples: int
    mode_weights: tuple[float, ...]
    """Share of the chunks in every mode, by posterior probability."""
    mode_weight_error: float
    """Largest absolute difference between sampled and true mode weights."""
    energy_distance: float
    """Distance between sampled and true chunks, in the unit of the chunks; inf where samples are not finite."""
    energy_floor: float
    """Mean energy distance of as many independent true chunks: what a perfect sampler scores."""
    energy_band: tuple[float, float]
    """95 % of the energy distances of independent true chunks lie in here."""
    dispersion_ratio: float
    """Spread of the typical chunk inside its mode, sampled over true: 1 is right, 0 is one chunk per mode."""
    nfe: int
    """Network calls per chunk, counted."""
    labels: tuple[str, ...]
    """What is known to be unsound about the setting, in words; empty if nothing."""
    seconds: float = field(compare=False)
    """Time to draw the chunks."""

    @property
    def above_floor(self) -> bool:
        """Whether a perfect sampler would score so badly by chance less than once in 40 times."""
        return not self.energy_distance <= self.energy_band[1]

    def row(self) -> dict[str, object]:
        """The grade as one flat row, for a table or a CSV file."""
        return {
            **self.setting,
            "problem": self.problem,
            "num_samples": self.num_samples,
            "nfe": self.nfe,
            "energy_distance": self.energy_distance,
            "energy_floor": self.energy_floor,
            "energy_low": self.energy_band[0],
            "energy_high": self.energy_band[1],
            "above_floor": self.above_floor,
            "mode_weight_error": self.mode_weight_error,
            "dispersion_ratio": self.dispersion_ratio,
            "seconds": self.seconds,
            "labels": "; ".join(self.labels),
        }


def grade(
    process: Process,
    sampler: SamplerConfig,
    *,
    problem: str | GaussianMixture = "two_modes",
    num_samples: int = 2048,
    seed: int = 0,
    error: float = 0.0,
) -> Grade:
    """Samples the problem with its ideal denoiser and says how far the chunks are from the truth.

    The same seed gives the same noise to every setting, so that settings are compared on equal draws. Initial noise and
    true chunks are spread evenly (quasi-random), so that chance adds little: at 2048 samples .002 to mode weights, not .01.
    What noise a sampler draws on the way is independent.

    Args:
        problem: a name in PROBLEMS, or a mixture.
        num_samples: chunks drawn; energy distances of a perfect sampler shrink with 1 / num_samples.
        error: root mean square of a smooth error in the network's prediction; see GaussianMixture.denoiser.
    Raises:
        ValueError: the sampler cannot solve the process; unknown problem; fewer than two samples; a negative error.
    """
    if num_samples < 2:
        raise ValueError(f"num_samples must be at least 2, got {num_samples}")
    if not error >= 0:
        raise ValueError(f"error must be zero or more, got {error}")
    mixture = problem_named(problem)
    x_T, truth = (
        mixture.even_noise(num_samples, seed),
        mixture.sample_evenly(num_samples, seed + 1),
    )  # (N, T_pred, D_act)
    process = copy.deepcopy(process)
    process.fit(truth.flatten(0, 1))  # as training does
    exact, num_calls = mixture.denoiser(process, error=error, seed=seed), 0

    def counted(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        return exact(x_t, t, condition)

    nothing = Condition(torch.zeros(num_samples, 0), torch.zeros(num_samples, 0, 0))
    start = time.perf_counter()
    with torch.no_grad():
        chunks = sample(
            process, counted, x_T, nothing, sampler, torch.Generator().manual_seed(seed)
        )  # (N, T_pred, D_act)
    seconds = time.perf_counter() - start
    floor, band = energy_floor(mixture, num_samples, seed)
    # a thousandth of the numbers may lie further out: a Gaussian has no end
    spoken = labels(process, sampler, action_limit=float(np.quantile(truth.abs().numpy(), 0.999)))
    if chunks.isfinite().all():
        weights = mixture.mode_weights(chunks).mean(dim=0)  # (K,)
        distance = energy_distance(chunks.flatten(1).numpy(), truth.flatten(1).numpy())
        dispersion = dispersion_ratio(mixture, chunks, truth)
    else:
        weights = torch.full_like(mixture.weights, torch.nan)
        distance, dispersion = float("inf"), float("nan")
        spoken += (f"{int((~chunks.isfinite()).flatten(1).any(dim=1).sum())} of {num_samples} chunks are not finite",)
    return Grade(
        setting=describe(process, sampler) | ({"error": error} if error else {}),
        problem=problem if isinstance(problem, str) else "mixture",
        num_samples=num_samples,
        mode_weights=tuple(weights.tolist()),
        mode_weight_error=float((weights - mixture.weights).abs().max()),
        energy_distance=distance,
        energy_floor=floor,
        energy_band=band,
        dispersion_ratio=dispersion,
        nfe=num_calls,
        labels=spoken,
        seconds=seconds,
    )


def grade_table(
    settings: Sequence[tuple[Process, SamplerConfig]],
    *,
    problem: str | GaussianMixture = "two_modes",
    num_samples: int = 2048,
    seed: int = 0,
    error: float = 0.0,
    progress: Callable[[int, Grade], None] = lambda done, latest: None,
) -> list[Grade]:
    """Grades many settings on the same draws, in order; `[g.row() for g in grade_table(...)]` is a flat table.

    Args:
        progress: called after every setting with the number done and the latest grade.
    """
    grades = []
    for process, sampler in settings:
        grades.append(grade(process, sampler, problem=problem, num_samples=num_samples, seed=seed, error=error))
        progress(len(grades), grades[-1])
    return grades


def describe(process: Process, sampler: SamplerConfig) -> dict[str, object]:
    """A setting in flat names: the process's and the sampler's choices, with `auto` resolved."""
    name = next((name for name, (_, cls) in PROCESSES.items() if type(process) is cls), type(process).__name__)
    choices = dataclasses.asdict(resolve_sampler(process, sampler))
    return {"process": name, **dataclasses.asdict(process.config)} | {f"sampler.{k}": v for k, v in choices.items()}


def mean_distance(x: np.ndarray, y: np.ndarray, block: int = 1000) -> float:
    """Mean Euclidean distance between the rows of x (n, d) and y (m, d), in blocks of rows.

    Distances are taken by subtraction and summed by numpy, so that the number of threads changes nothing.
    """
    y_rows, total = torch.from_numpy(y), 0.0
    for start in range(0, len(x), block):
        rows = torch.from_numpy(x[start : start + block])
        total += float(torch.cdist(rows, y_rows, compute_mode="donot_use_mm_for_euclid_dist").numpy().sum())
    return total / (len(x) * len(y))


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'|, over all pairs: zero or more, and zero only for equal sets.

    Székely & Rizzo 2013, doi:10.1016/j.jspi.2013.03.018, Eq. 5 (the V-statistic, biased upwards by about 1/n: hence
    `energy_floor`). Sensitive to mode weights, to places and to spreads.

    Args:
        x, y: (n, d) and (m, d), float64.
    Raises:
        ValueError: not two sets of vectors of one length.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not len(x) or not len(y):
        raise ValueError(f"an energy distance needs sets (n, d) and (m, d), got shapes {x.shape} and {y.shape}")
    return max(0.0, 2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y))


@functools.lru_cache(maxsize=32)
def energy_floor(mixture: GaussianMixture, num_samples: int, seed: int = 0) -> tuple[float, tuple[float, float]]:
    """Mean and 95 % band of the energy distance from independent true chunks to `grade`'s: what a perfect sampler scores.

    Samplers that only draw their evenly spread initial noise may score lower.
    """
    size = min(num_samples, MAX_FLOOR_SAMPLES)
    generator = torch.Generator().manual_seed(seed + 2)
    truth = mixture.sample_evenly(size, seed + 1).flatten(1).numpy()
    inside_truth, distances = mean_distance(truth, truth), []
    for _ in range(NUM_FLOOR_SETS):
        chunks = mixture.sample(size, generator).flatten(1).numpy()
        distances.append(2 * mean_distance(chunks, truth) - mean_distance(chunks, chunks) - inside_truth)
    low, high = np.quantile(distances, [0.025, 0.975]) * size / num_samples
    return float(np.mean(distances)) * size / num_samples, (float(low), float(high))


def dispersion_ratio(mixture: GaussianMixture, chunks: Tensor, truth: Tensor) -> float:
    """How far the typical chunk lies from the middle of its own mode, sampled over true; 1 is right.

    Medians throughout: a few chunks between the modes, which the energy distance sees, do not hide that all others have
    collapsed onto their mode, which success does not see.

    Args:
        chunks, truth: (N, T_pred, D_act); every chunk belongs to its most probable mode.
    """

    def typical(x: Tensor) -> float:
        mode, deviations = mixture.mode_weights(x).argmax(dim=1), []  # (N,)
        for k in range(len(mixture.weights)):
            own = x[mode == k].double().flatten(1)
            if len(own):
                deviations.append((own - own.median(dim=0).values).norm(dim=1) / mixture.covariance[k].trace().sqrt())
        return float(torch.cat(deviations).median())

    return typical(chunks) / typical(truth)


__all__ = [
    "PROBLEMS",
    "GaussianMixture",
    "Grade",
    "dispersion_ratio",
    "energy_distance",
    "energy_floor",
    "grade",
    "grade_table",
]
