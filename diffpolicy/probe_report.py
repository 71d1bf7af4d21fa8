"""What a probing leaves behind: probes.json, probes.csv, a figure of the rates, and one scene under different words.

probes.json         rows, comparisons, goals, every episode
probes.csv          one row per probe
probes.png          follows / ignores / other with their intervals
same_scene.png      rows: seeds; columns: asked, swapped; the last frame with the words that the policy got beneath
videos/<probe>_seed_<seed>.mp4
"""

from __future__ import annotations

import csv
import io
import json
import textwrap
from pathlib import Path

import numpy as np

from diffpolicy import plots
from diffpolicy.probe_table import csv_rows, summarise, to_dict
from diffpolicy.probes import Probes, Row
from diffpolicy.rollout import Episode

MAX_SCENES = 8
"""Seeds on the sheet of scenes."""
BARS = (("follows", "#0072B2"), ("ignores", "#D55E00"), ("other", "#999999"))
ORANGE = (230, 120, 0)
TILE, MARGIN, LINE = 200, 5, 14
"""Side of a frame on the sheet, its border and the height of a line of words, pixels."""


def write_numbers(probes: Probes, out: Path, described: dict) -> None:
    """probes.json and probes.csv, each whole or as it was; called after every row, so that none is lost."""
    out.mkdir(parents=True, exist_ok=True)
    rows = csv_rows(probes)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    written = {"probes.json": json.dumps({**described, **to_dict(probes)}, indent=2), "probes.csv": text.getvalue()}
    for name, content in written.items():
        partial = out / f".{name}.partial"
        partial.write_text(content, encoding="utf-8")
        partial.replace(out / name)


def write_films(row: Row, out: Path, fps: float) -> None:
    """The films of a row; they are then dropped from memory."""
    for seed, frames in row.result.films.items():
        plots.write_film(out / "videos" / f"{row.name}_seed_{seed}.mp4", frames, fps)
    row.result.films.clear()


def write_figures(probes: Probes, out: Path, title: str) -> list[Path]:
    """probes.png, and same_scene.png where both asked and swapped were pictured; returns what was written."""
    draw_bars(probes, out / "probes.png", title)
    written = [out / "probes.png"]
    sheet = scene_sheet(probes)
    if sheet is not None:
        written.append(plots.write_png(out / "same_scene.png", sheet))
    return written


def draw_bars(probes: Probes, path: Path, title: str) -> None:
    """Rates of every row side by side, with their Wilson intervals; what cannot be said has no bar."""
    from matplotlib.figure import Figure

    summaries = summarise(probes)
    figure = Figure(figsize=(1.6 + 1.35 * len(summaries), 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(BARS)
    for i, (key, colour) in enumerate(BARS):
        known = [(x, s[key]) for x, s in enumerate(summaries) if s[key] is not None]
        rates = np.array([value["rate"] for _, value in known])
        ends = np.array([value["interval_95"] for _, value in known]).reshape(-1, 2)
        places = np.array([x for x, _ in known]) + (i - 1) * width
        errors = np.stack([rates - ends[:, 0], ends[:, 1] - rates]).clip(min=0) * 100
        style = {"width": 0.92 * width, "color": colour, "yerr": errors, "capsize": 2, "error_kw": {"lw": 1}}
        axes.bar(places, 100 * rates, label=key, **style)
    axes.set_xticks(range(len(summaries)), [f"{s['probe']}\nn = {s['n']}" for s in summaries], fontsize=8)
    axes.set(ylim=(0, 102), ylabel="% of episodes, 95 % interval")
    axes.set_title("\n".join(textwrap.wrap(title, 25 + 17 * len(summaries))), fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(BARS), fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def scene_sheet(probes: Probes) -> np.ndarray | None:
    """Same scene, other words: last frames of asked and swapped side by side, None where they were not pictured.

    Framed green where the named goal was reached, orange where another was, red where none was.
    """
    if "asked" not in probes or "swapped" not in probes:
        return None
    rows = [probes["asked"], probes["swapped"]]
    by_seed = [{e.seed: e for e in row.episodes} for row in rows]
    seeds = [s for s in by_seed[0] if s in by_seed[1] and all(s in row.result.pictures for row in rows)][:MAX_SCENES]
    if not seeds:
        return None
    strips = []
    for seed in seeds:
        cells = [
            _cell(row.result.pictures[seed], row.name, known[seed]) for row, known in zip(rows, by_seed, strict=True)
        ]
        height = max(len(cell) for cell in cells)
        cells = [np.pad(c, ((0, height - len(c)), (0, 0), (0, 0)), constant_values=255) for c in cells]
        strips.append(plots.side_by_side(cells))
    return np.concatenate(strips)


def _cell(picture: np.ndarray, name: str, episode: Episode) -> np.ndarray:
    """A frame with its words beneath, (height, TILE + 2 * MARGIN, 3) uint8."""
    from PIL import Image, ImageDraw

    words = [f"{name}, seed {episode.seed}, score {episode.score:.2f}", *textwrap.wrap(f'"{episode.task}"', TILE // 6)]
    if episode.other_goals_reached:
        words += textwrap.wrap(f"reached: {', '.join(episode.goals_reached)}", TILE // 6)
    side = TILE + 2 * MARGIN
    cell = Image.new("RGB", (side, side + LINE * len(words) + 2 * MARGIN), "white")
    draw = ImageDraw.Draw(cell)
    followed = episode.goal in episode.goals_reached
    colour = plots.GREEN if followed else ORANGE if episode.other_goals_reached else plots.RED
    draw.rectangle([0, 0, side - 1, side - 1], fill=colour)
    cell.paste(Image.fromarray(picture).resize((TILE, TILE), Image.Resampling.LANCZOS), (MARGIN, MARGIN))
    for i, line in enumerate(words):
        draw.text((MARGIN, side + 2 + LINE * i), line, fill="black")
    return np.asarray(cell)
