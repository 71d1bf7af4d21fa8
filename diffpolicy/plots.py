"""Figures from results; no computation beyond what is drawn. Every function returns uint8 (H, W, 3) pictures or writes a file."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

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
