"""The figure of noise schedules side by side."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffpolicy.plots import OKABE_ITO
from diffpolicy.processes.description import ScheduleDescription

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def write_schedule_figure(file: str | Path, described: Sequence[ScheduleDescription], num_inference_steps: int) -> None:
    """Noise schedules side by side: signal and log-SNR over diffusion time, log-SNR by share of steps, steps visited by spacing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained", dpi=110)
    (signal, snr), (share, visited) = figure.subplots(2, 2)
    styles = list(itertools.product(("-", "--", ":"), OKABE_ITO))
    for d, (style, colour) in zip(described, itertools.cycle(styles)):
        T = d.num_train_timesteps
        t = (np.arange(T) + 1) / T
        alpha_bar, log_snr = np.array(d.alpha_bar), np.array(d.log_snr)
        mark = f"{d.name}  ({'; '.join(d.findings)})" if d.findings else d.name
        signal.plot(t, np.sqrt(alpha_bar), style, color=colour, label=mark)
        snr.plot(t, np.clip(log_snr, -20, 20), style, color=colour)
        ordered = np.sort(np.clip(log_snr, -20, 20))
        share.plot(ordered, (np.arange(T) + 1) / T, style, color=colour)
    signal.axhline(0.05, color="0.5", lw=0.8, ls="--")
    signal.annotate("5 %: more than this left at t = 1 biases every sampler", (0.02, 0.065), fontsize=8, color="0.35")
    signal.set(title="Signal left", xlabel="diffusion time t (1 = noise)", ylabel="sqrt(alpha_bar)", ylim=(0, 1.02))
    snr.set(title="Log-SNR (natural), cut at 20", xlabel="diffusion time t (1 = noise)", ylabel="log-SNR")
    snr.axhspan(-2, 2, color="0.9", zorder=0)
    share.set(title="Where the training steps are", xlabel="log-SNR", ylabel="share of steps below")
    share.axvspan(-2, 2, color="0.9", zorder=0)
    share.annotate("noise", (0.02, 0.93), xycoords="axes fraction", fontsize=8, color="0.35")
    share.annotate("data", (0.98, 0.05), xycoords="axes fraction", fontsize=8, color="0.35", ha="right")
    _draw_visited(visited, described, num_inference_steps)
    figure.legend(*signal.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def _draw_visited(axes: Axes, described: Sequence[ScheduleDescription], num_inference_steps: int) -> None:
    """A row per spacing, and per schedule where that matters: the first three schedules that differ."""
    T, rows = described[0].num_train_timesteps, []
    for spacing in described[0].visited:
        different: dict[tuple[float, ...], str] = {}
        for d in described:
            if not isinstance(d.visited[spacing], str):
                different.setdefault(d.visited[spacing], d.name)
        for steps, name in list(different.items())[:3]:
            rows.append((spacing if len(different) == 1 else f"{spacing}: {name}", steps))
    for y, (_, steps) in enumerate(rows):
        starts = steps[0] == T - 1
        axes.plot(steps, [y] * len(steps), "o" if starts else "X", color=OKABE_ITO[0] if starts else OKABE_ITO[5], ms=6)
    axes.axvline(T - 1, color="0.5", lw=0.8, ls="--")
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set(
        title=f"Steps visited with {num_inference_steps} calls (crosses: never pure noise)",
        xlabel=f"training step (pure noise: {T - 1})",
    )
