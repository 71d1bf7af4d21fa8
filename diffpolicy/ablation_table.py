"""A finished ablation in numbers: every cell with its intervals, its comparison with another cell, and the tables of both.

A cell is compared with the baseline, or with the cell that the sweep's `compare` names, in pairs on the training seeds and the
start states that both have played; cells with other start states are never called paired. Success and score are tested, and p
is corrected for the number of all these tests (Holm).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffpolicy.ablation_cells import AblationResult, AxisValue, CellResult
from diffpolicy.metrics import (
    clustered_bootstrap_interval,
    clustered_wilson_interval,
    crossed_difference_interval,
    episodes_needed,
    holm,
    mcnemar_exact,
    paired_difference_interval,
    sign_flip_exact,
    sign_flip_sampled,
    smallest_difference_shown,
    unpaired_difference_interval,
)

Interval = tuple[float, float]
ALPHA = 0.05
"""A difference is called supported when its corrected p is below this and its interval leaves out zero."""
ORACLE_COLUMNS = ("energy_distance", "energy_floor", "mode_weight_error", "dispersion_ratio")
BETTER, WORSE, UNTOLD, UNPAIRED = "better", "worse", "not told apart", "not paired"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A cell minus its reference: the baseline, or the cell that the sweep names. Rates and scores are fractions, not points."""

    reference: str
    """Label of the other cell."""
    verdict: str
    """better, worse, not told apart, not paired."""
    paired: bool
    train_seeds: tuple[int, ...]
    """Training seeds that both sides have; all others are left out."""
    num_starts: int
    """Start states on which the two were compared (those of the cell where they are not paired)."""
    difference: float
    interval: Interval
    """95 %, these networks on other start states."""
    anew: Interval | None
    """95 %, networks trained anew; None with one training seed."""
    score_difference: float
    score_interval: Interval
    score_anew: Interval | None
    mcnemar_p: float | None
    """Pooled over networks and starts; None where not paired, as the next two."""
    start_p: float | None
    """Exact, a start state counts once; the same as McNemar's for one training seed."""
    holm_p: float | None
    """start_p corrected for the number of comparisons, of success and of score together."""
    needed: float | None
    """Paired episodes that would tell the two apart with power 0.8, were the true difference the one seen."""
    shown: float | None
    """The smallest difference in success that the episodes at hand would show with power 0.8."""

    score_verdict: str
    """The same of the score."""
    score_p: float | None
    """Sign flips of the start states' mean differences; None where not paired, as the next two."""
    score_holm_p: float | None
    """score_p corrected likewise."""
    score_needed: float | None
    """Paired episodes that would tell the scores apart with power 0.8, were the true difference the one seen."""

    @property
    def supported(self) -> bool:
        return self.verdict in (BETTER, WORSE)

    @property
    def score_supported(self) -> bool:
        return self.score_verdict in (BETTER, WORSE)


@dataclass(frozen=True, kw_only=True)
class CellSummary:
    """A cell and everything the report says of it."""

    cell: CellResult
    is_baseline: bool
    success: float
    success_interval: Interval
    """Wilson's, 95 %, these networks on other start states."""
    score: float
    score_interval: Interval
    """Bootstrap over start states, 95 %, these networks."""
    seed_success: tuple[float, ...]
    """(S,) success rate of each training seed."""
    seed_scores: tuple[float, ...]
    """(S,)"""
    spread: float | None
    """Standard deviation of seed_success between training seeds; None with one of them: unknown."""
    diversity: float | None
    """Mean distance between two chunks for the same start observation, normalised action units; None: not known."""
    diversity_interval: Interval | None
    """Bootstrap over start states, 95 %, these networks."""
    ignores: float | None
    """Share of episodes in which a goal was fulfilled that the words did not name; None: no goals."""
    ignores_interval: Interval | None
    """Wilson's, as of success."""
    comparison: Comparison | None
    """None for the baseline."""


def summarise(result: AblationResult) -> tuple[CellSummary, ...]:
    """All numbers of the report, once; tables and figures only show them.

    Success and score of every comparison are corrected together: one family, twice as many questions as comparisons.
    """
    others = {cell.label: (cell, other) for cell in result.cells if (other := result.reference(cell))}
    tested = {label: aligned for label, pair in others.items() if (aligned := _aligned(*pair))}
    start_p = [sign_flip_exact(a, b) for a, b in (aligned[:2] for aligned in tested.values())]
    score_p = [sign_flip_sampled(a, b) for a, b in (aligned[2:4] for aligned in tested.values())]
    corrected = holm([*start_p, *score_p])
    p_of = {label: (start_p[i], score_p[i], corrected[i], corrected[len(tested) + i]) for i, label in enumerate(tested)}
    compared = {
        label: _paired(other.label, *tested[label], p_of[label], 2 * len(tested))
        if label in tested
        else _unpaired(cell, other)
        for label, (cell, other) in others.items()
    }
    baseline = result.cells[result.baseline]
    return tuple(_summary(cell, cell is baseline, compared.get(cell.label)) for cell in result.cells)


def table_rows(result: AblationResult, summaries: tuple[CellSummary, ...]) -> list[dict[str, Any]]:
    """One flat row per cell, in the sweep's order: the columns of results.csv and results.parquet. Unknown is None."""
    rows = []
    for s in summaries:
        cell, c = s.cell, s.comparison
        numbers = {
            "labels": "; ".join(cell.labels),
            "baseline": s.is_baseline,
            "num_train_seeds": len(cell.train_seeds),
            "num_env_seeds": len(cell.env_seeds),
            "n": cell.successes.size,
            **{f"oracle_{name}": (cell.oracle or {}).get(name) for name in ORACLE_COLUMNS},
            **_with_interval("success", s.success, s.success_interval),
            **_with_interval("score", s.score, s.score_interval),
            **_with_interval("diversity", s.diversity, s.diversity_interval),
            **_with_interval("ignores", s.ignores, s.ignores_interval),
            "success_per_train_seed": _per_seed(cell, s.seed_success),
            "score_per_train_seed": _per_seed(cell, s.seed_scores),
            "success_spread": s.spread,
            "nfe": cell.nfe,
            "call_ms": cell.call_ms,
            "train_minutes": _mean_of_training(cell, "minutes"),
            "val_action_mse": _mean_of_training(cell, "val_action_mse"),
            **_with_interval("difference", c and c.difference, c and c.interval),
            "difference_anew_low": c.anew[0] if c and c.anew else None,
            "difference_anew_high": c.anew[1] if c and c.anew else None,
            **_with_interval("score_difference", c and c.score_difference, c and c.score_interval),
            "score_difference_anew_low": c.score_anew[0] if c and c.score_anew else None,
            "score_difference_anew_high": c.score_anew[1] if c and c.score_anew else None,
            "mcnemar_p": c and c.mcnemar_p,
            "start_p": c and c.start_p,
            "holm_p": c and c.holm_p,
            "reference": c.reference if c else None,
            "verdict": c.verdict if c else "baseline",
            "score_p": c and c.score_p,
            "score_holm_p": c and c.score_holm_p,
            "score_verdict": c.score_verdict if c else "baseline",
            "episodes_needed": c.needed if c and c.needed and math.isfinite(c.needed) else None,
            "smallest_difference_shown": c and c.shown,
        }
        rows.append({"label": cell.label, **axis_columns(result, cell, taken=numbers), **numbers})
    return rows


def episode_rows(result: AblationResult) -> list[dict[str, Any]]:
    """One row per cell x training seed x environment seed: the columns of episodes.parquet."""
    taken = ("train_seed", "env_seed", "score", "success", "ignores")
    return [
        {
            "label": cell.label,
            **axis_columns(result, cell, taken=taken),
            "train_seed": train_seed,
            "env_seed": env_seed,
            "score": float(cell.scores[i, j]),
            "success": bool(cell.successes[i, j]),
            "ignores": None if cell.ignores is None else bool(cell.ignores[i, j]),
        }
        for cell in result.cells
        for i, train_seed in enumerate(cell.train_seeds)
        for j, env_seed in enumerate(cell.env_seeds)
    ]


def axis_names(result: AblationResult) -> list[str]:
    """Every axis of any cell, in the sweep's order."""
    return list(dict.fromkeys(axis for cell in result.cells for axis in cell.axes))


def axis_columns(result: AblationResult, cell: CellResult, *, taken: Collection[str]) -> dict[str, AxisValue]:
    """Axis -> value as columns; an axis that mixes types (4 and "4, leading") becomes text so that a column has one type.

    An axis that is called like one of the columns already taken is written "axis <name>".
    """
    columns: dict[str, AxisValue] = {}
    for axis in axis_names(result):
        kinds = {type(c.axes[axis]) for c in result.cells if c.axes.get(axis) is not None}
        value = cell.axes.get(axis)
        if value is not None and kinds == {int, float}:
            value = float(value)
        elif value is not None and len(kinds) > 1:
            value = str(value)
        columns[axis if axis not in {"label", *taken} else f"axis {axis}"] = value
    return columns


def main_table(result: AblationResult, summaries: tuple[CellSummary, ...]) -> tuple[list[str], list[list[str]]]:
    """(headers, rows of text): the sampler alone first, the trained policies second."""
    has_oracle = any(cell.oracle for cell in result.cells)
    has_labels = any(cell.labels for cell in result.cells)
    has_diversity = any(cell.diversity is not None for cell in result.cells)
    has_goals = any(cell.ignores is not None for cell in result.cells)
    headers = ["setting"]
    if has_oracle:
        headers += ["sampler alone: energy distance (floor)", "mode weight error", "dispersion ratio"]
    headers += ["success [95 %]", "score [95 %]"]
    headers += ["ignores [95 %]"] * has_goals + ["diversity [95 %]"] * has_diversity
    headers += ["success per training seed", "episodes", "NFE", "ms per call"]
    rows = []
    for s in summaries:
        cell, oracle = s.cell, s.cell.oracle or {}
        row = [cell.label + (" (baseline)" if s.is_baseline else "")]
        if has_oracle:
            floor = f" ({oracle['energy_floor']:.4f})" if "energy_floor" in oracle else ""
            row += [_number(oracle.get("energy_distance"), 4) + floor]
            row += [_number(oracle.get("mode_weight_error"), 3), _number(oracle.get("dispersion_ratio"), 2)]
        row += [
            _rate(s.success, s.success_interval),
            _with_digits(s.score, s.score_interval),
            *([_rate(s.ignores, s.ignores_interval)] if has_goals else []),
            *([_with_digits(s.diversity, s.diversity_interval)] if has_diversity else []),
            " / ".join(percent(rate) for rate in s.seed_success),
            f"{len(cell.train_seeds)} x {len(cell.env_seeds)}",
            str(cell.nfe),
            f"{cell.call_ms:.1f}",
        ]
        rows.append(row + (["; ".join(cell.labels)] if has_labels else []))
    return headers + (["warnings"] if has_labels else []), rows


def difference_table(result: AblationResult, summaries: tuple[CellSummary, ...]) -> tuple[list[str], list[list[str]]]:
    """(headers, rows of text): every cell minus its reference, success in points."""
    has_labels = any(cell.labels for cell in result.cells)
    headers = [
        "setting",
        "minus",
        "success, points [95 %, these networks]",
        "[95 %, trained anew]",
        "McNemar p",
        "p by start state",
        "Holm p",
        "success",
        "episodes needed",
        "score [95 %, these networks]",
        "Holm p of score",
        "score",
    ]
    rows = []
    for s in summaries:
        if (c := s.comparison) is None:
            continue
        needed = "" if c.needed is None else f"{c.needed:,.0f}" if math.isfinite(c.needed) else "no number"
        rows.append(
            [
                s.cell.label,
                c.reference,
                f"{points(c.difference)} [{points(c.interval[0])}, {points(c.interval[1])}]",
                f"[{points(c.anew[0])}, {points(c.anew[1])}]" if c.anew else "unknown",
                *(p_value(p) for p in (c.mcnemar_p, c.start_p, c.holm_p)),
                c.verdict,
                needed,
                f"{c.score_difference:+.3f} [{c.score_interval[0]:+.3f}, {c.score_interval[1]:+.3f}]",
                p_value(c.score_holm_p),
                c.score_verdict,
                *(["; ".join(s.cell.labels)] if has_labels else []),
            ]
        )
    return headers + (["warnings"] if has_labels else []), rows


def percent(rate: float) -> str:
    return f"{100 * rate:.1f}"


def points(difference: float) -> str:
    """A difference of rates in percentage points, with its sign; zero has none."""
    return f"{100 * difference:+.1f}" if abs(difference) >= 0.0005 else "0.0"


def p_value(p: float | None) -> str:
    return "-" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def _aligned(
    cell: CellResult, baseline: CellResult
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple] | None:
    """Successes and scores of both, (S', E) each, on the training seeds that both have; None where nothing is shared."""
    seeds = tuple(seed for seed in cell.train_seeds if seed in baseline.train_seeds)
    if not seeds or set(cell.env_seeds) != set(baseline.env_seeds):
        return None
    ours = np.ix_([cell.train_seeds.index(s) for s in seeds], np.arange(len(cell.env_seeds)))
    place = {seed: i for i, seed in enumerate(baseline.env_seeds)}
    theirs = np.ix_([baseline.train_seeds.index(s) for s in seeds], [place[seed] for seed in cell.env_seeds])
    return cell.successes[ours], baseline.successes[theirs], cell.scores[ours], baseline.scores[theirs], seeds


def _paired(
    reference: str,
    a: np.ndarray,
    b: np.ndarray,
    a_scores: np.ndarray,
    b_scores: np.ndarray,
    seeds: tuple,
    p_values: tuple[float, float, float, float],
    comparisons: int,
) -> Comparison:
    start_p, score_p, holm_p, score_holm_p = p_values
    interval = paired_difference_interval(a, b)
    score_interval = paired_difference_interval(a_scores, b_scores)
    difference = float(a.mean() - b.mean())
    score_difference = float(a_scores.mean() - b_scores.mean())
    several = min(a.shape) > 1
    return Comparison(
        reference=reference,
        verdict=_verdict(difference, interval, holm_p),
        paired=True,
        train_seeds=seeds,
        num_starts=a.shape[1],
        difference=difference,
        interval=interval,
        anew=_hull(crossed_difference_interval(a, b), interval) if several else None,
        score_difference=score_difference,
        score_interval=score_interval,
        score_anew=_hull(crossed_difference_interval(a_scores, b_scores), score_interval) if several else None,
        mcnemar_p=mcnemar_exact(a, b),
        start_p=start_p,
        holm_p=holm_p,
        needed=episodes_needed(a, b, alpha=ALPHA, comparisons=comparisons),
        shown=smallest_difference_shown(a, b, alpha=ALPHA, comparisons=comparisons),
        score_verdict=_verdict(score_difference, score_interval, score_holm_p),
        score_p=score_p,
        score_holm_p=score_holm_p,
        score_needed=episodes_needed(a_scores, b_scores, alpha=ALPHA, comparisons=comparisons),
    )


def _verdict(difference: float, interval: Interval, holm_p: float) -> str:
    if holm_p < ALPHA and not interval[0] <= 0 <= interval[1]:
        return BETTER if difference > 0 else WORSE
    return UNTOLD


def _hull(anew: Interval, interval: Interval) -> Interval:
    """Networks trained anew are never known better than these: where the two methods differ by a hair, the wider end."""
    return min(anew[0], interval[0]), max(anew[1], interval[1])


def _unpaired(cell: CellResult, baseline: CellResult) -> Comparison:
    return Comparison(
        reference=baseline.label,
        verdict=UNPAIRED,
        paired=False,
        train_seeds=cell.train_seeds,
        num_starts=len(cell.env_seeds),
        difference=float(cell.successes.mean() - baseline.successes.mean()),
        interval=unpaired_difference_interval(cell.successes, baseline.successes),
        anew=None,
        score_difference=float(cell.scores.mean() - baseline.scores.mean()),
        score_interval=unpaired_difference_interval(cell.scores, baseline.scores),
        score_anew=None,
        mcnemar_p=None,
        start_p=None,
        holm_p=None,
        needed=None,
        shown=None,
        score_verdict=UNPAIRED,
        score_p=None,
        score_holm_p=None,
        score_needed=None,
    )


def _summary(cell: CellResult, is_baseline: bool, comparison: Comparison | None) -> CellSummary:
    by_seed = cell.successes.mean(axis=1)
    return CellSummary(
        cell=cell,
        is_baseline=is_baseline,
        success=float(cell.successes.mean()),
        success_interval=clustered_wilson_interval(cell.successes),
        score=float(cell.scores.mean()),
        score_interval=clustered_bootstrap_interval(cell.scores),
        seed_success=tuple(by_seed.tolist()),
        seed_scores=tuple(cell.scores.mean(axis=1).tolist()),
        spread=float(by_seed.std(ddof=1)) if len(by_seed) > 1 else None,
        diversity=None if cell.diversity is None else float(cell.diversity.mean()),
        diversity_interval=None if cell.diversity is None else clustered_bootstrap_interval(cell.diversity),
        ignores=None if cell.ignores is None else float(cell.ignores.mean()),
        ignores_interval=None if cell.ignores is None else clustered_wilson_interval(cell.ignores),
        comparison=comparison,
    )


def _with_interval(name: str, value: float | None, interval: Interval | None) -> dict[str, float | None]:
    low, high = interval or (None, None)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _per_seed(cell: CellResult, values: tuple[float, ...]) -> str:
    return "; ".join(f"{seed}: {value:.4f}" for seed, value in zip(cell.train_seeds, values, strict=True))


def _mean_of_training(cell: CellResult, name: str) -> float | None:
    known = [float(run[name]) for run in cell.train.values() if isinstance(run, dict) and run.get(name) is not None]
    return float(np.mean(known)) if known else None


def _rate(value: float | None, interval: Interval | None) -> str:
    return "-" if value is None else f"{percent(value)} % [{percent(interval[0])}, {percent(interval[1])}]"


def _with_digits(value: float | None, interval: Interval | None) -> str:
    return "-" if value is None else f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
