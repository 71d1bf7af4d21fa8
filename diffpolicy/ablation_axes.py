"""Which figures fit a sweep: the axes that vary, and the cells along one of them. No drawing.

A line is a group of cells that are equal but for one axis: what a curve joins.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from diffpolicy.ablation_cells import AblationResult, AxisValue, CellResult
from diffpolicy.ablation_table import CellSummary, axis_names


def varying_axes(result: AblationResult) -> list[str]:
    """Axes with more than one value among the finished cells."""
    return [axis for axis in axis_names(result) if len(values_of(result, axis)) > 1]


def curve_axes(result: AblationResult) -> list[str]:
    """Axes worth a curve: numbers, or names with a number in each ("4 calls") that differ in network calls.

    Names without one (ddim, heun) are no points of a line, though they may differ in calls.
    """
    worth = []
    for axis in varying_axes(result):
        values = values_of(result, axis)
        numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        numbered = all(re.search(r"\d", str(value)) for value in values) and changes_calls(result, axis)
        if (numeric or numbered) and any(len(line) > 1 for line in _grouped(result, axis).values()):
            worth.append(axis)
    return worth


def changes_calls(result: AblationResult, axis: str) -> bool:
    """Whether settings that are equal but for this axis always differ in network calls per chunk, and some do exist."""
    lines = [line for line in _grouped(result, axis).values() if len(line) > 1]
    return bool(lines) and all(len({cell.nfe for cell in line}) == len(line) for line in lines)


def guided_axes(result: AblationResult) -> list[str]:
    """Axes along which weights of guidance differ, also inside labelled settings, with diversity known of two points."""
    return [
        axis
        for axis in varying_axes(result)
        if guided_parts(result, axis)
        and any(sum(cell.diversity is not None for cell in line) > 1 for line in _grouped(result, axis).values())
    ]


def guided_parts(result: AblationResult, axis: str) -> tuple[str, ...]:
    """Parts whose weight differs between cells that are equal but for this axis."""
    lines = _grouped(result, axis).values()
    parts = dict.fromkeys(part for cell in result.cells for part in cell.guidance)
    return tuple(
        part for part in parts if any(len({cell.guidance.get(part, 1.0) for cell in line}) > 1 for line in lines)
    )


def guided_lines(result: AblationResult, summaries: tuple[CellSummary, ...], axis: str) -> dict[str, list[CellSummary]]:
    """What the other axes say -> the cells of known diversity in the order of their weights."""
    others, parts = [name for name in varying_axes(result) if name != axis], guided_parts(result, axis)
    of, lines = {id(s.cell): s for s in summaries}, {}
    for cells in _grouped(result, axis).values():
        label = ", ".join(said_of(name, cells[0].axes.get(name)) for name in others)
        known = [cell for cell in cells if cell.diversity is not None]
        known.sort(key=lambda cell: [cell.guidance.get(part, 1.0) for part in parts])
        lines[label] = [of[id(cell)] for cell in known]
    return {label: line for label, line in lines.items() if line}


def problem_letters(cells: Sequence[CellResult]) -> dict[str, str]:
    """Known problem -> the letter that stands for it in a figure: a .. z, then aa, ab, ..."""
    problems = list(dict.fromkeys(problem for cell in cells for problem in cell.labels))
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    letter: Callable[[int], str] = lambda i: alphabet[i] if i < 26 else alphabet[i // 26 - 1] + alphabet[i % 26]
    return {problem: letter(i) for i, problem in enumerate(problems)}


def _grouped(result: AblationResult, axis: str) -> dict[tuple, list[CellResult]]:
    """Cells that are equal but for one axis, by the values of the others."""
    others = [name for name in varying_axes(result) if name != axis]
    lines: dict[tuple, list[CellResult]] = {}
    for cell in result.cells:
        lines.setdefault(tuple(_key(cell.axes.get(name)) for name in others), []).append(cell)
    return lines


def lines_along(result: AblationResult, summaries: tuple[CellSummary, ...], axis: str) -> dict[str, list[CellSummary]]:
    """What the other axes say -> the cells of that line from left to right."""
    others = [name for name in varying_axes(result) if name != axis]
    of = {id(s.cell): s for s in summaries}
    against_calls = changes_calls(result, axis)
    lines = {}
    for cells in _grouped(result, axis).values():
        label = ", ".join(said_of(name, cells[0].axes.get(name)) for name in others)
        placed = [cell for cell in cells if against_calls or cell.axes.get(axis) is not None]
        lines[label] = [of[id(cell)] for cell in sorted(placed, key=lambda cell: place_of(cell, axis, against_calls))]
    return {label: line for label, line in lines.items() if line}


def said_of(axis: str, value: AxisValue) -> str:
    """A word speaks for itself; a number or a truth value needs the axis's name."""
    return value if isinstance(value, str) else f"{axis.rpartition('.')[2]} {value}"


def place_of(cell: CellResult, axis: str, against_calls: bool) -> float:
    return float(cell.nfe if against_calls else cell.axes[axis])


def _key(value: AxisValue) -> tuple[str, str]:
    """True and 1 are different values of an axis."""
    return type(value).__name__, str(value)


def values_of(result: AblationResult, axis: str) -> list[AxisValue]:
    """Values of an axis: numbers in order, words as in the sweep."""
    found = {_key(cell.axes.get(axis)): cell.axes.get(axis) for cell in result.cells}
    values = list(found.values())
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return sorted(values) if numeric else values


def grid_shape(result: AblationResult, axes: list[str]) -> tuple[int, int]:
    return len(values_of(result, axes[0])), len(values_of(result, axes[1]))
