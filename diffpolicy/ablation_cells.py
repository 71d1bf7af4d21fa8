"""What a finished ablation is made of: the contract between the engine that runs cells and the report that reads them.

A cell is one setting, trained with S training seeds; each of its S networks plays the same E start states.

    S        training seeds: networks of one cell
    E        environment seeds: start states
    O        the first of them, whose observations were answered several times
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

AxisValue = str | float | int | bool | None


@dataclass(frozen=True, kw_only=True, eq=False)
class CellResult:
    """One setting of a sweep and how its networks did."""

    label: str
    """What a reader calls it: "cosine, 4 steps"; unique in a sweep."""
    axes: dict[str, AxisValue]
    """Axis -> value, as in the sweep, in the sweep's order."""
    train_seeds: tuple[int, ...]
    """(S,) training seeds that finished; fewer than asked for while a sweep is unfinished."""
    env_seeds: tuple[int, ...]
    """(E,) start states; cells that share them are compared in pairs."""
    scores: np.ndarray
    """(S, E) largest reward of each episode, in [0, 1]."""
    successes: np.ndarray
    """(S, E) bool."""
    nfe: int
    """Network calls per chunk, counted."""
    call_ms: float
    """Median wall time of one batched policy call, milliseconds."""
    labels: tuple[str, ...] = ()
    """Known problems of the setting ("terminal signal 60 %"), shown in every table and figure."""
    oracle: dict[str, float] | None = None
    """What the sampler alone costs, with the exact denoiser and no network: energy_distance, energy_floor,
    mode_weight_error, dispersion_ratio."""
    diversity: np.ndarray | None = None
    """(S, O) distance between two chunks for the same start observation (metrics.chunk_diversity), in normalised action
    units; None where it is not known of every network: cells of an earlier version, chunks that are not finite."""
    ignores: np.ndarray | None = None
    """(S, E) bool, whether a goal was fulfilled that the words did not name; None where the environment has no goals."""
    guidance: dict[str, float] = field(default_factory=dict)
    """Part of the observation -> its weight of classifier-free guidance; one that is not named has 1, as trained."""
    train: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Training seed -> minutes, steps, val_action_mse, run folder; whatever is known."""

    def __post_init__(self):
        for name in ("train_seeds", "env_seeds", "labels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "scores", np.asarray(self.scores, dtype=np.float64))
        object.__setattr__(self, "successes", np.asarray(self.successes, dtype=bool))
        if self.diversity is not None:
            object.__setattr__(self, "diversity", np.asarray(self.diversity, dtype=np.float64))
        if self.ignores is not None:
            object.__setattr__(self, "ignores", np.asarray(self.ignores, dtype=bool))
        expected = len(self.train_seeds), len(self.env_seeds)
        if 0 in expected:
            raise ValueError(f"cell {self.label!r} needs a training seed and an environment seed, got {expected}")
        for name in ("train_seeds", "env_seeds"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"cell {self.label!r}: {name} must differ from each other, got {getattr(self, name)}")
        for name in ("scores", "successes", "ignores"):
            if getattr(self, name) is not None and getattr(self, name).shape != expected:
                raise ValueError(
                    f"cell {self.label!r}: {name} must be (S={expected[0]}, E={expected[1]}), "
                    f"got {getattr(self, name).shape}"
                )
        if self.diversity is not None:
            rows = len(self.diversity) if self.diversity.ndim == 2 and self.diversity.size else 0
            if rows != expected[0] or not (self.diversity >= 0).all() or not np.isfinite(self.diversity).all():
                raise ValueError(
                    f"cell {self.label!r}: diversity must be (S={expected[0]}, O) finite numbers >= 0, got shape "
                    f"{self.diversity.shape}; leave it out where it is not known"
                )
        if not ((self.scores >= 0) & (self.scores <= 1)).all():  # NaN is neither
            bad = np.argwhere(~((self.scores >= 0) & (self.scores <= 1)))[0]
            raise ValueError(
                f"cell {self.label!r}: scores must be in [0, 1], got {self.scores[tuple(bad)]} for training seed "
                f"{self.train_seeds[bad[0]]} and environment seed {self.env_seeds[bad[1]]}"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class AblationResult:
    """A sweep as far as it got."""

    name: str
    question: str
    """What the sweep asks, in words; heads the report."""
    baseline: int = 0
    """Index in `cells` of the one that differences are taken to."""
    cells: tuple[CellResult, ...]
    """Finished cells, in the sweep's order; a cell counts as finished with one of its training seeds."""
    failed: dict[str, str] = field(default_factory=dict)
    """Label of a failed or missing cell (or of one of its training seeds) -> why, in one line."""
    described: dict[str, Any] = field(default_factory=dict)
    """How it was run, shown in the order given: command, commit, hardware, versions, data, date, minutes, env, ..."""
    duplicates: dict[str, str] = field(default_factory=dict)
    """Label of a cell that resolved to the same setting as an earlier one -> label of the one that was run."""
    references: dict[str, str] = field(default_factory=dict)
    """Label of a cell -> label of the cell that its difference is taken to; the baseline for all others."""

    def __post_init__(self):
        object.__setattr__(self, "cells", tuple(self.cells))
        if not self.cells:
            raise ValueError(f"ablation {self.name!r} has no finished cell to report")
        if not 0 <= self.baseline < len(self.cells):
            raise ValueError(
                f"ablation {self.name!r}: baseline must be in [0, {len(self.cells) - 1}], got {self.baseline}"
            )
        labels = [cell.label for cell in self.cells]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"ablation {self.name!r}: cells must have different labels, got {twice[0]!r} twice")
        if strange := set(self.references.values()) - set(labels):
            raise ValueError(f"ablation {self.name!r}: no cell is called {sorted(strange)[0]!r} that others refer to")

    def reference(self, cell: CellResult) -> CellResult | None:
        """The cell that this one's difference is taken to; None for the baseline itself."""
        wanted = self.references.get(cell.label, self.cells[self.baseline].label)
        return None if wanted == cell.label else next(other for other in self.cells if other.label == wanted)
