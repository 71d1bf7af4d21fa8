"""Figures from results; no computation beyond what is drawn. Every function returns uint8 (H, W, 3) pictures or writes a file."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from diffpolicy.processes.description import ScheduleDescription

GREEN, RED, GREY = (46, 160, 67), (207, 34, 46), (110, 110, 110)
OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
"""Colours that remain apart for colour-blind readers. Okabe & Ito 2008."""


def contact_sheet(
    pictures: Sequence[np.ndarray], labels: Sequence[str], passed: Sequence[bool], *, tile: int = 144, columns: int = 8
) -> np.ndarray:
    """Last frames side by side, framed green where the episode succeeded and red where not, with a caption each."""
    from PIL import Image, ImageDraw

    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    caption, margin = 16, 4
    width, height = tile + 2 * margin, tile + 2 * margin + caption
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, label, ok) in enumerate(zip(pictures, labels, passed, strict=True)):
        x, y = (i % columns) * width, (i // columns) * height
        draw.rectangle([x + 1, y + 1, x + width - 2, y + tile + 2 * margin - 2], fill=GREEN if ok else RED)
        sheet.paste(Image.fromarray(picture).resize((tile, tile), Image.Resampling.LANCZOS), (x + margin, y + margin))
        draw.text((x + margin, y + tile + 2 * margin), label, fill="black")
    return np.asarray(sheet)


def chunk_fan(picture: np.ndarray, chunks: np.ndarray, *, scale: int = 1) -> np.ndarray:
    """Sampled chunks over the scene they were sampled for; colour runs from the first predicted action to the last.

    Args:
        picture: (H, W, 3) uint8.
        chunks: (num_samples, T_pred, 2) columns and rows in the picture, pixels.
    """
    from matplotlib import colormaps
    from PIL import Image, ImageDraw

    fine = 3  # drawn larger and scaled down, for smooth lines
    size = (picture.shape[1] * scale, picture.shape[0] * scale)
    canvas = Image.fromarray(picture).resize((size[0] * fine, size[1] * fine))
    canvas = Image.blend(canvas, Image.new("RGB", canvas.size, "white"), 0.35)
    draw = ImageDraw.Draw(canvas)
    colours = (colormaps["viridis"](np.linspace(0, 0.95, chunks.shape[1] - 1))[:, :3] * 255).astype(int)
    for chunk in chunks * scale * fine:
        for (a, b), colour in zip(itertools.pairwise(chunk), colours, strict=True):
            draw.line([*a, *b], fill=tuple(colour.tolist()), width=fine * 2)
        x, y = chunk[-1]
        draw.ellipse([x - 2 * fine, y - 2 * fine, x + 2 * fine, y + 2 * fine], fill=tuple(colours[-1].tolist()))
    return np.asarray(canvas.resize(size, Image.Resampling.LANCZOS))


def side_by_side(pictures: Sequence[np.ndarray], gap: int = 8) -> np.ndarray:
    """Pictures of one height in a row on white."""
    height = pictures[0].shape[0]
    spacer = np.full((height, gap, 3), 255, np.uint8)
    parts = [part for picture in pictures for part in (picture, spacer)][:-1]
    return np.concatenate(parts, axis=1)


def score_against(
    path: Path,
    x: Sequence[float],
    series: dict[str, tuple[Sequence[float], Sequence[tuple[float, float]]]],
    *,
    xlabel: str,
    ylabel: str,
) -> None:
    """Lines with 95 % intervals, written as a figure file.

    Args:
        series: label -> (values, intervals), each as long as x.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for label, (values, intervals) in series.items():
        low, high = np.array(intervals).T
        axes.fill_between(x, low, high, alpha=0.2)
        axes.plot(x, values, marker="o", label=label)
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_png(path: Path, picture: np.ndarray) -> Path:
    import imageio.v3 as iio

    path.parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(path, picture)
    return path


def write_film(path: Path, frames: Sequence[np.ndarray], fps: float) -> Path:
    """An mp4 (H.264) that browsers play."""
    import imageio.v2 as iio

    path.parent.mkdir(parents=True, exist_ok=True)
    with iio.get_writer(
        path, fps=fps, codec="libx264", quality=7, macro_block_size=2, output_params=["-loglevel", "error"]
    ) as writer:
        for frame in frames:
            writer.append_data(frame)
    return path


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
