"""Figures of an ablation, PNG and PDF: cells, curves, success against diversity, heat map, differences. No computation.

Colours are those of Okabe & Ito 2008 (distinct under colour blindness); markers and line styles differ as well, so that
every figure reads in grey. A setting with known problems carries a letter, explained under the figure.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffpolicy.ablation_axes import (
    changes_calls,
    curve_axes,
    grid_shape,
    guided_axes,
    guided_lines,
    guided_parts,
    lines_along,
    place_of,
    problem_letters,
    values_of,
    varying_axes,
)
from diffpolicy.ablation_cells import AblationResult, AxisValue, CellResult
from diffpolicy.ablation_table import CellSummary, p_value, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", ":", "-.")
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "pdf.fonttype": 42, "svg.hashsalt": "0"}
LINE_OF_TICK = 44
"""Characters on one line of a tick's label; there are two lines."""


def draw_figures(result: AblationResult, summaries: tuple[CellSummary, ...], folder: Path) -> list[tuple[Path, str]]:
    """Writes every figure that fits this sweep as PNG and PDF.

    Returns:
        (png file, caption) of each, in reading order.
    """
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    drawn: list[tuple[Path, str]] = []
    with matplotlib.rc_context(STYLE):
        drawn.append(_write(forest(result, summaries), folder / "cells", FOREST_CAPTION))
        for number, axis in enumerate(curve_axes(result)):
            name = "curves" if number == 0 else f"curves_{number + 1}"
            drawn.append(_write(curves(result, summaries, axis), folder / name, _curves_caption(result, axis)))
        for number, axis in enumerate(guided_axes(result)):
            name = "diversity" if number == 0 else f"diversity_{number + 1}"
            drawn.append(_write(trade_off(result, summaries, axis), folder / name, _trade_off_caption(result, axis)))
        if len(varying := varying_axes(result)) == 2 and max(grid_shape(result, varying)) > 1:
            drawn.append(_write(heat_map(result, summaries), folder / "heat_map", HEAT_CAPTION))
        if any(s.comparison and s.comparison.paired for s in summaries):
            drawn.append(_write(differences(result, summaries), folder / "differences", DIFFERENCES_CAPTION))
    return drawn


FOREST_CAPTION = (
    "Success and score of every setting. Large marks: all networks with their 95 % interval over start states (success: "
    "Wilson; score: bootstrap). Small circles: each training seed. Dashed line: the baseline."
)
HEAT_CAPTION = (
    "Success in percent, with its 95 % interval (Wilson), over the two axes of the sweep. Hatched: no result."
)
DIFFERENCES_CAPTION = (
    "Success in points and score minus those of the reference, on the same start states. Thick bar: 95 % interval for these networks "
    "(bootstrap over start states). Thin bar with caps: for networks trained anew. Filled mark: supported after correction "
    "for the number of comparisons (Holm); hollow mark: not told apart."
)


def forest(result: AblationResult, summaries: tuple[CellSummary, ...]) -> Figure:
    """Figure 1: every cell's rate and score with intervals, training seeds as small circles, the baseline as a line."""
    from matplotlib.figure import Figure

    rows = np.arange(len(summaries))[::-1]
    letters = problem_letters([s.cell for s in summaries])
    ticks = [_tick(s.cell, letters, s.is_baseline) for s in summaries]
    figure = Figure(figsize=(9.5, 1.5 + _height(ticks)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True, squeeze=False)
    baseline = summaries[result.baseline]
    for panel, what in zip(panels[0], ("success", "score"), strict=True):
        scale = 100 if what == "success" else 1
        panel.axvline(scale * getattr(baseline, what), color="0.5", ls="--", lw=0.9, zorder=0)
        for y, s in zip(rows, summaries, strict=True):
            value, (low, high) = getattr(s, what), getattr(s, f"{what}_interval")
            seeds = s.seed_success if what == "success" else s.seed_scores
            colour = COLOURS[1] if s.is_baseline else COLOURS[0]
            if len(seeds) > 1:
                panel.plot(
                    scale * np.array(seeds), np.full(len(seeds), y), "o", mfc="white", mec="0.45", ms=3.5, zorder=1
                )
            panel.plot([scale * low, scale * high], [y, y], color=colour, lw=2, zorder=2)
            panel.plot(scale * value, y, "D" if s.is_baseline else "o", color=colour, ms=6, zorder=3)
        panel.set(xlabel="success, % of episodes" if what == "success" else "score, largest reward of an episode")
        panel.grid(axis="x", alpha=0.3)
        panel.set_ylim(-0.7, len(summaries) - 0.3)
    panels[0, 0].set_yticks(rows, ticks)
    figure.suptitle("Success and score of every setting, 95 % intervals", fontsize=10)
    return _explain(figure, letters)


def curves(result: AblationResult, summaries: tuple[CellSummary, ...], axis: str) -> Figure:
    """Figure 2: success and score along a numeric axis, one line per setting of the others; the sampler alone beside it.

    Against network calls per chunk where the axis changes them: two samplers compare at equal cost, not at equal "steps".
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    lines = lines_along(result, summaries, axis)
    against_calls = changes_calls(result, axis)
    has_oracle = any(s.cell.oracle and "energy_distance" in s.cell.oracle for s in summaries)
    titles = ["success, % of episodes", "score"] + (["sampler alone: energy distance"] if has_oracle else [])
    many = len(lines) > 1
    figure = Figure(figsize=(0.4 + 3.5 * len(titles), 3.4), layout="constrained")
    panels = figure.subplots(1, len(titles), squeeze=False)
    xs = np.array([place_of(s.cell, axis, against_calls) for line in lines.values() for s in line])
    logarithmic = xs.min() > 0 and xs.max() / xs.min() >= 6
    letters = problem_letters([s.cell for s in summaries])
    for i, (label, line) in enumerate(lines.items()):
        style = {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "ls": LINES[(i // len(COLOURS)) % len(LINES)],
            "ms": 5,
            "lw": 1.4,
        }
        x = _beside(np.array([place_of(s.cell, axis, against_calls) for s in line]), i, len(lines), xs, logarithmic)
        # a line's letters are those of any of its cells
        marked = "".join(sorted({letters[problem] for s in line for problem in s.cell.labels}))
        label = textwrap.shorten(label, 60, placeholder=" ...") + (f" [{marked}]" if marked else "")
        for panel, what, scale in ((panels[0, 0], "success", 100), (panels[0, 1], "score", 1)):
            values = scale * np.array([getattr(s, what) for s in line])
            ends = scale * np.array([getattr(s, f"{what}_interval") for s in line]).T
            panel.vlines(x, *ends, color=style["color"], lw=1, alpha=0.8)
            panel.plot(x, values, label=label, **style)
        if has_oracle:
            graded = [(at, s.cell.oracle) for at, s in zip(x, line, strict=True) if s.cell.oracle]
            graded = [(at, oracle) for at, oracle in graded if "energy_distance" in oracle]
            panels[0, 2].plot([at for at, _ in graded], [oracle["energy_distance"] for _, oracle in graded], **style)
    if has_oracle:
        floors = [s.cell.oracle["energy_floor"] for s in summaries if s.cell.oracle and "energy_floor" in s.cell.oracle]
        if floors:
            panels[0, 2].axhspan(min(floors) * 0.98, max(floors) * 1.02, color="0.6", zorder=0)
            panels[0, 2].annotate(
                "floor: a perfect sampler", (0.02, max(floors)), (0, 3), xycoords=("axes fraction", "data"),
                textcoords="offset points", fontsize=7, color="0.35",
            )  # fmt: skip
        if min((s.cell.oracle or {}).get("energy_distance", 1.0) for s in summaries) > 0:
            panels[0, 2].set_yscale("log")
            panels[0, 2].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panels[0, 2].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            panels[0, 2].yaxis.set_minor_formatter(NullFormatter())
    for panel, title in zip(panels[0], titles, strict=True):
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("network calls per chunk (NFE)" if against_calls else axis)
        panel.grid(alpha=0.3)
        if logarithmic:
            panel.set_xscale("log")
        if len(ticks := np.unique(xs)) <= 8:
            panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            panel.set_xticks([], minor=True)
    against = "network calls" if against_calls else axis
    figure.suptitle(f"Success and score against {against}, 95 % intervals", fontsize=10)
    return _explain(figure, letters, legend_of=panels[0, 0] if many else None, columns=len(titles))


def trade_off(result: AblationResult, summaries: tuple[CellSummary, ...], axis: str) -> Figure:
    """Success and score against diversity, one point per weight of guidance, joined in the order of the weights."""
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    lines = guided_lines(result, summaries, axis)
    parts = guided_parts(result, axis)
    letters = problem_letters([s.cell for line in lines.values() for s in line])
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, squeeze=False)[0]
    for i, (label, line) in enumerate(lines.items()):
        style = {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "ls": LINES[(i // len(COLOURS)) % len(LINES)],
            "ms": 5,
            "lw": 1.2,
        }
        marked = "".join(sorted({letters[problem] for s in line for problem in s.cell.labels}))
        label = textwrap.shorten(label, 60, placeholder=" ...") + (f" [{marked}]" if marked else "")
        x, wide = [s.diversity for s in line], np.array([s.diversity_interval for s in line]).T
        for panel, what, scale in ((panels[0], "success", 100), (panels[1], "score", 1)):
            y = scale * np.array([getattr(s, what) for s in line])
            high = scale * np.array([getattr(s, f"{what}_interval") for s in line]).T
            panel.vlines(x, *high, color=style["color"], lw=0.9, alpha=0.6)
            panel.hlines(y, *wide, color=style["color"], lw=0.9, alpha=0.6)
            panel.plot(x, y, label=label, **style)
            for s, at_x, at_y in zip(line, x, y, strict=True):
                said = ", ".join(f"{s.cell.guidance.get(part, 1.0):g}" for part in parts)
                panel.annotate(
                    said, (at_x, at_y), (4, 4), textcoords="offset points", fontsize=7.5, color=style["color"],
                    path_effects=[withStroke(linewidth=2, foreground="white")],
                )  # fmt: skip
    for panel, what in zip(panels, ("success, % of episodes", "score, largest reward of an episode"), strict=True):
        panel.set(xlabel="diversity: distance of two chunks, normalised units", ylabel=what)
        panel.grid(alpha=0.3)
    figure.suptitle(
        f"Success against diversity, by weight of guidance ({', '.join(parts)}), 95 % intervals", fontsize=10
    )
    return _explain(figure, letters, legend_of=panels[0] if len(lines) > 1 else None, columns=2)


def heat_map(result: AblationResult, summaries: tuple[CellSummary, ...]) -> Figure:
    """Figure 3, for two varying axes: success of each combination, the number written in it."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    down, across = varying_axes(result)
    rows, columns = values_of(result, down), values_of(result, across)
    letters = problem_letters([s.cell for s in summaries])
    grid = np.full((len(rows), len(columns)), np.nan)
    figure = Figure(figsize=(2.6 + 1.05 * len(columns), 1.7 + 0.55 * len(rows)), layout="constrained")
    panel = figure.subplots()
    panel.set_facecolor("0.92")
    texts = {}
    for s in summaries:
        at = rows.index(s.cell.axes.get(down)), columns.index(s.cell.axes.get(across))
        grid[at] = 100 * s.success
        marked = "".join(letters[problem] for problem in s.cell.labels)
        low, high = s.success_interval
        texts[at] = f"{percent(s.success)}{f' [{marked}]' if marked else ''}\n{percent(low)} .. {percent(high)}"
    low, high = np.nanmin(grid), np.nanmax(grid)
    image = panel.imshow(grid, cmap="cividis", aspect="auto", vmin=low - 1e-6, vmax=high + 1e-6)
    for i in range(len(rows)):
        for j in range(len(columns)):
            if (i, j) in texts:
                dark = high == low or (grid[i, j] - low) / (high - low) < 0.55
                panel.text(
                    j, i, texts[i, j], ha="center", va="center", fontsize=7.5, color="white" if dark else "black"
                )
            else:
                panel.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, hatch="////", fill=False, ec="0.6", lw=0))
    panel.set_xticks(range(len(columns)), [_wrapped(value, 14) for value in columns], fontsize=8)
    panel.set_yticks(range(len(rows)), [_wrapped(value, 24) for value in rows], fontsize=8)
    panel.set(xlabel=across, ylabel=down)
    panel.spines[:].set_visible(False)
    if high > low:
        figure.colorbar(image, ax=panel, label="success, %", shrink=0.9)
    panel.set_title("Success of each combination, with 95 % interval", fontsize=10)
    return _explain(figure, letters)


def differences(result: AblationResult, summaries: tuple[CellSummary, ...]) -> Figure:
    """Figure 4: every paired difference, of success and of score, with both intervals and the corrected verdicts."""
    from matplotlib.figure import Figure

    compared = [s for s in summaries if s.comparison and s.comparison.paired]
    letters = problem_letters([s.cell for s in compared])
    ticks = [_tick(s.cell, letters, False) for s in compared]
    others = {s.comparison.reference for s in compared}
    if len(others) > 1:
        ticks = [
            f"{tick}\nminus {_wrapped(s.comparison.reference, 60)}" for tick, s in zip(ticks, compared, strict=True)
        ]
    figure = Figure(figsize=(13, 1.6 + _height(ticks)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    rows = np.arange(len(compared))[::-1]
    for y, s in zip(rows, compared, strict=True):
        c = s.comparison
        _difference(panels[0], y, 100, c.difference, c.interval, c.anew, c.verdict, c.holm_p)
        _difference(
            panels[1], y, 1, c.score_difference, c.score_interval, c.score_anew, c.score_verdict, c.score_holm_p
        )
    panels[0].set_yticks(rows, ticks)
    for panel, label in zip(panels, ("difference in success, percentage points", "difference in score"), strict=True):
        panel.axvline(0, color="0.3", lw=1, zorder=0)
        panel.set_ylim(-0.7, len(compared) - 0.3)
        panel.set_xlabel(label)
        panel.grid(axis="x", alpha=0.3)
    to = textwrap.shorten(others.pop(), 60, placeholder=" ...") if len(others) == 1 else "the setting named with it"
    figure.suptitle(f"Every setting minus {to}, 95 % intervals", fontsize=10)
    return _explain(figure, letters)


def _difference(panel: Axes, y: float, scale: float, value, interval, anew, verdict: str, p: float) -> None:
    """One row: the primary interval thick, the one for networks trained anew thin, the verdict beside it."""
    colour = {"better": COLOURS[0], "worse": COLOURS[1]}.get(verdict, "0.35")
    if anew:
        panel.plot([scale * end for end in anew], [y, y], "|-", color=colour, lw=0.8, ms=6)
    panel.plot([scale * end for end in interval], [y, y], color=colour, lw=3.2, alpha=0.75, solid_capstyle="butt")
    marker = {"better": "^", "worse": "v"}.get(verdict, "o")
    filled = colour if marker != "o" else "white"
    panel.plot(scale * value, y, marker, color=colour, mfc=filled, ms=7, zorder=3)
    said = f"{verdict}, p {'' if p < 1e-4 else '= '}{p_value(p)}"
    panel.text(1.01, y, said, transform=panel.get_yaxis_transform(), va="center", fontsize=8)


def _beside(x: np.ndarray, line: int, num_lines: int, xs: np.ndarray, logarithmic: bool) -> np.ndarray:
    """Lines a little beside each other, so that their intervals can be told apart."""
    places = np.unique(np.log(xs) if logarithmic else xs)
    gap = (
        np.diff(places).min() if len(places) > 1 else 0.0
    )  # together never more than a fifth of the way to the next place
    shift = (line - (num_lines - 1) / 2) / num_lines * min(0.2 * gap, 0.06 * float(np.ptp(places)))
    return x * np.exp(shift) if logarithmic else x + shift


def _tick(cell: CellResult, letters: dict[str, str], is_baseline: bool) -> str:
    marked = "".join(letters[problem] for problem in cell.labels)
    name = cell.label + (f" [{marked}]" if marked else "") + (" (baseline)" if is_baseline else "")
    if len(name) > 2 * LINE_OF_TICK - 4:  # both ends: labels of a sweep often differ in the last axis only
        name = f"{name[: LINE_OF_TICK - 4]} ... {name[-LINE_OF_TICK + 4 :]}"
    return textwrap.fill(name, LINE_OF_TICK, max_lines=2, placeholder=" ...")


def _height(ticks: list[str]) -> float:
    """Inches that these rows need so that no label touches the next."""
    return len(ticks) * (0.36 if any("\n" in tick for tick in ticks) else 0.28)


def _wrapped(value: AxisValue, width: int) -> str:
    return textwrap.fill(str(value), width, max_lines=3, placeholder=" ...")


def _explain(figure: Figure, letters: dict[str, str], legend_of: Axes | None = None, columns: int = 3) -> Figure:
    """Makes room under the figure for what the letters stand for and, above that, for the legend of a panel."""
    handles, names = legend_of.get_legend_handles_labels() if legend_of else ([], [])
    width = int(figure.get_figwidth() * 15)
    notes = [line for problem, at in letters.items() for line in textwrap.wrap(f"[{at}] {problem}", width)]
    for_notes = 0.15 * len(notes) + 0.06 * bool(notes)  # inches
    for_legend = 0.2 * -(-len(names) // columns) + 0.06 * bool(names)
    height = figure.get_figheight() + for_notes + for_legend
    figure.set_figheight(height)
    figure.get_layout_engine().set(
        rect=(0, (for_notes + for_legend) / height, 1, 1 - (for_notes + for_legend) / height)
    )
    if names:
        legend = figure.legend(
            handles, names, loc="lower center", bbox_to_anchor=(0.5, for_notes / height), ncols=columns, fontsize=8,
            frameon=False, borderpad=0, borderaxespad=0.1,
        )  # fmt: skip
        legend.set_in_layout(False)
    if notes:
        text = figure.text(0.01, for_notes / height, "\n".join(notes), va="top", fontsize=7.5, color="0.25")
        text.set_in_layout(False)
    return figure


def _curves_caption(result: AblationResult, axis: str) -> str:
    against = "network calls per chunk, so that settings compare at equal cost" if changes_calls(result, axis) else axis
    oracle = any(cell.oracle and "energy_distance" in cell.oracle for cell in result.cells)
    beside = (
        " Right: energy distance to the truth with the exact denoiser, what the sampler alone costs; its floor is what "
        "a perfect sampler scores by chance." if oracle else ""
    )  # fmt: skip
    return f"Success and score against {against}, with 95 % intervals over start states.{beside}"


def _trade_off_caption(result: AblationResult, axis: str) -> str:
    parts = guided_parts(result, axis)
    missing = sum(cell.diversity is None for cell in result.cells)
    lacking = f" {missing} settings are missing: their diversity is not known." if missing else ""
    return (
        "What guidance buys and what it pays: success and score against diversity, the mean distance between two chunks that "
        "a policy answers to the same start observation, over the executed steps, per step and dimension, in normalised action "
        f"units. One point per weight of guidance ({', '.join(parts)}), its number beside it, joined in the order of the weights; "
        f"bars: 95 % intervals over start states. 1 is the policy as trained.{lacking}"
    )


def _write(figure: Figure, stem: Path, caption: str) -> tuple[Path, str]:
    png = stem.with_suffix(".png")
    figure.savefig(png, dpi=160, metadata={"Software": None})
    figure.savefig(stem.with_suffix(".pdf"), metadata={"CreationDate": None, "Creator": None, "Producer": None})
    return png, caption
