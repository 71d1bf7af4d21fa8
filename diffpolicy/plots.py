"""Figures from results; no computation beyond what is drawn. Every function returns uint8 (H, W, 3) pictures or writes a file."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

GREEN, RED, GREY = (46, 160, 67), (207, 34, 46), (110, 110, 110)
OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
"""Colours that remain apart for colour-blind readers. Okabe & Ito 2008."""
FAN_COLOURS = ((213, 94, 0), (0, 90, 160), (0, 0, 0))
"""Of the headings of chunk_fans: vermilion, blue, black."""
DARKEST = 0.2
"""What is left of a patch's brightness where nothing looks at it."""
WORD_COLOUR = (240, 140, 20)
"""Behind the heaviest word."""


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

    colours = (colormaps["viridis"](np.linspace(0, 0.95, chunks.shape[1] - 1))[:, :3] * 255).astype(int)
    return _draw_chunks(picture, [(chunks, [tuple(c) for c in colours.tolist()])], scale=scale, fade=0.35)


def chunk_fans(picture: np.ndarray, fans: Mapping[str, np.ndarray]) -> np.ndarray:
    """Chunks sampled for one scene under several headings (other words, say), each in a colour of its own.

    Args:
        picture: (H, W, 3) uint8.
        fans: heading -> (num_samples, T_pred, 2) columns and rows in the picture, pixels; at most len(FAN_COLOURS).
    Returns:
        The scene, faded, with a line for each heading below it, in the colour of its chunks.
    """
    if not 1 <= len(fans) <= len(FAN_COLOURS):
        raise ValueError(f"fans must have 1 to {len(FAN_COLOURS)} headings, a colour each, got {list(fans)}")
    coloured = [
        (chunks, [colour] * (chunks.shape[1] - 1)) for chunks, colour in zip(fans.values(), FAN_COLOURS, strict=False)
    ]
    drawn = _draw_chunks(picture, coloured, scale=1, fade=0.55)
    captions = [_caption(text, colour, drawn.shape[1]) for text, colour in zip(fans, FAN_COLOURS, strict=False)]
    return np.concatenate([drawn, *captions])


def _draw_chunks(picture: np.ndarray, fans: list[tuple[np.ndarray, list]], *, scale: int, fade: float) -> np.ndarray:
    """Chunks (num_samples, T_pred, 2), with a colour for each of their lines, over a picture that is faded to white."""
    from PIL import Image, ImageDraw

    fine = 3  # drawn larger and scaled down, for smooth lines
    size = (picture.shape[1] * scale, picture.shape[0] * scale)
    canvas = Image.fromarray(picture).resize((size[0] * fine, size[1] * fine))
    canvas = Image.blend(canvas, Image.new("RGB", canvas.size, "white"), fade)
    draw = ImageDraw.Draw(canvas)
    for chunks, colours in fans:
        for chunk in chunks * scale * fine:
            for (a, b), colour in zip(itertools.pairwise(chunk), colours, strict=True):
                draw.line([*a, *b], fill=colour, width=fine * 2)
            x, y = chunk[-1]
            draw.ellipse([x - 2 * fine, y - 2 * fine, x + 2 * fine, y + 2 * fine], fill=colours[-1])
    return np.asarray(canvas.resize(size, Image.Resampling.LANCZOS))


def attention_overlay(picture: np.ndarray, weights: np.ndarray, *, largest: float | None = None) -> np.ndarray:
    """A picture lit up where it is looked at: a patch keeps its colours at the largest weight and is dark at 0.

    Args:
        picture: (H, W, 3) uint8.
        weights: (rows, columns) of the patches, at least 0.
        largest: the weight at which a patch is fully lit, for pictures to be compared; None: the largest one here.
    """
    if weights.ndim != 2 or not (np.isfinite(weights).all() and weights.min() >= 0):
        raise ValueError(f"weights must be (rows, columns), finite and at least 0, got {weights}")
    height, width = picture.shape[:2]
    rows = np.arange(height) * weights.shape[0] // height
    columns = np.arange(width) * weights.shape[1] // width
    light = np.clip(weights / max(largest or weights.max(), 1e-12), 0, 1)[rows][:, columns]  # (H, W)
    return (picture * (DARKEST + (1 - DARKEST) * light)[..., None]).round().astype(np.uint8)


def weighted_words(sentences: Sequence[Sequence[str]], weights: Sequence[Sequence[float]]) -> np.ndarray:
    """A line for each sentence: its words on orange, the darker the heavier, with the weight in percent under each.

    Args:
        weights: one for each word, in [0, 1]; the largest of all sentences is the darkest.
    """
    from PIL import Image, ImageDraw

    large, small = _font(17), _font(11)
    pad, line = 7, 44
    widths = [[round(large.getlength(word)) + 2 * pad for word in words] for words in sentences]
    canvas = Image.new("RGB", (max(sum(row) for row in widths) + 2 * pad, line * len(sentences) + pad), "white")
    draw = ImageDraw.Draw(canvas)
    largest = max(max(row) for row in weights)
    for i, (words, shares, row) in enumerate(zip(sentences, weights, widths, strict=True)):
        x, y = pad, i * line + pad
        for word, share, width in zip(words, shares, row, strict=True):
            amount = share / largest if largest > 0 else 0.0
            colour = tuple(round(255 + amount * (full - 255)) for full in WORD_COLOUR)
            draw.rectangle([x + 1, y, x + width - 2, y + 22], fill=colour)
            draw.text((x + pad, y + 2), word, fill="black", font=large)
            draw.text((x + width / 2, y + 24), f"{100 * share:.0f}", fill=GREY, font=small, anchor="ma")
            x += width
    return np.asarray(canvas)


def _font(size: int):
    """The sans-serif that comes with matplotlib, so that pictures look the same everywhere."""
    from matplotlib.font_manager import findfont
    from PIL import ImageFont

    return ImageFont.truetype(findfont("DejaVu Sans"), size)


def _caption(text: str, colour: tuple[int, int, int], width: int) -> np.ndarray:
    """One line of text on white, uint8 (20, width, 3)."""
    from PIL import Image, ImageDraw

    line = Image.new("RGB", (width, 20), "white")
    ImageDraw.Draw(line).text((4, 3), text, fill=colour, font=_font(13))
    return np.asarray(line)


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
