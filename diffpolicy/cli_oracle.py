"""`diffpolicy oracle`: grades noise schedules and samplers with an exact denoiser. Everything heavy is imported inside."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffpolicy.spec import unknown_name

if TYPE_CHECKING:
    from rich.table import Table

    from diffpolicy.oracle import Grade
    from diffpolicy.processes import Process, SamplerConfig

DEFAULTS = {
    "process": ("diffusion", "flow"),
    "schedule": ("cosine", "linear"),
    "prediction_type": ("",),
    "terminal_snr": ("as_is",),
    "num_train_timesteps": (100,),
    "shift": ("",),
}
"""Choices of processes that are combined where the command names none; "" leaves the process's own default."""
DEFAULT_SAMPLERS = {"diffusion": ("ddim", "dpmpp_2m"), "flow": ("euler",)}
OPTIONS = {
    "schedule": "--schedule",
    "prediction_type": "--prediction",
    "terminal_snr": "--terminal-snr",
    "num_train_timesteps": "--timesteps-train",
    "shift": "--shift",
}
"""Fields of a process's config -> the options that set them."""
NAMED_IN_TABLE = {
    "process": "process",
    "schedule": "schedule",
    "prediction_type": "predicts",
    "terminal_snr": "terminal SNR",
    "num_train_timesteps": "T",
    "shift": "shift",
    "sampler.name": "sampler",
    "sampler.spacing": "spacing",
    "sampler.eta": "eta",
    "sampler.temperature": "temperature",
}
"""Choices that tell settings apart, as columns and in legends; the number of steps is a column of its own, NFE."""


def oracle(
    process: Annotated[
        str | None,
        typer.Option(
            help="diffusion, flow, or a baseline; several with commas. Default: diffusion,flow.", show_default=False
        ),
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help="Noise schedules. Default: cosine,linear.", show_default=False)
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(help="Samplers. Default: ddim,dpmpp_2m for diffusion, euler for flow.", show_default=False),
    ] = None,
    spacing: Annotated[
        str, typer.Option(help="Which times are visited: trailing, leading, linspace, ...")
    ] = "trailing",
    steps: Annotated[str, typer.Option(help="Network calls per chunk.")] = "4,8,16,50",
    prediction: Annotated[
        str | None,
        typer.Option(help="epsilon, sample, v_prediction, ...; default: the process's own.", show_default=False),
    ] = None,
    terminal_snr: Annotated[
        str | None, typer.Option(help="as_is, scaled or zero. Default: as_is.", show_default=False)
    ] = None,
    timesteps_train: Annotated[
        str | None, typer.Option(help="Training steps T of a diffusion. Default: 100.", show_default=False)
    ] = None,
    shift: Annotated[
        str | None, typer.Option(help="Noise over signal is multiplied by these.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="CSV file with the columns t,alpha_bar: the schedule `table`.", show_default=False),
    ] = None,
    clip: Annotated[str, typer.Option(help="Clip x_0 to +- this, or `none`.")] = "1.0",
    sampler_option: Annotated[
        list[str] | None,
        typer.Option(
            "--sampler-option",
            metavar="KEY=VALUE",
            help="Further setting of every sampler, may be repeated: eta=1.0, final_sigma=sigma_min.",
            show_default=False,
        ),
    ] = None,
    problem: Annotated[
        str, typer.Option(help="What is sampled: two_modes, one_gaussian, ring or detour.")
    ] = "two_modes",
    samples: Annotated[int, typer.Option(help="Chunks per setting.", min=2)] = 2048,
    error: Annotated[
        float, typer.Option(help="Root mean square of an error in what the network predicts; 0: exact.", min=0)
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="Write this figure.", show_default=False)] = None,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write every grade to this file.", show_default=False)
    ] = None,
) -> None:
    """Grade noise schedules and samplers on chunks whose ideal denoiser is known exactly: no data, no training, no GPU.

    Every combination is sampled and compared with the truth: energy distance (beside it what a perfect sampler scores by
    chance), error of the mode weights, spread inside a mode (1 is right). What is wrong here no network can mend.

    [bold]Examples[/bold]

    diffpolicy oracle --schedule cosine,linear --terminal-snr as_is,scaled --out oracle.png

    diffpolicy oracle --process diffusion --prediction epsilon,v_prediction --error 0.01 --clip none

    diffpolicy oracle --sampler ddim,ddpm,dpmpp_2m --spacing trailing,leading --steps 2,4,8,16 --csv oracle.csv
    """
    from rich.console import Console

    from diffpolicy.mixture import PROBLEMS
    from diffpolicy.oracle import grade_table
    from diffpolicy.processes import PROCESSES, SAMPLERS, SCHEDULES, SPACINGS, diffusion, flow
    from diffpolicy.processes.schedules import TERMINAL_SNRS
    from diffpolicy.progress import progress_bar

    if problem not in PROBLEMS:
        raise unknown_name("--problem", problem, PROBLEMS)
    if out is not None and out.suffix not in (".png", ".pdf"):
        raise ValueError(f"--out must end in .png or .pdf, got {out}")
    if csv_file is not None and csv_file.is_dir():
        raise ValueError(f"--csv must name a file, got the folder {csv_file}")
    predictions = dict.fromkeys((*diffusion.PREDICTION_TYPES, *flow.PREDICTION_TYPES))
    asked = {
        "schedule": _names("--schedule", schedule, [*SCHEDULES, *(["table"] if file else [])])
        or (("table",) if file else ()),
        "prediction_type": _names("--prediction", prediction, predictions),
        "terminal_snr": _names("--terminal-snr", terminal_snr, TERMINAL_SNRS),
        "num_train_timesteps": _counts("--timesteps-train", timesteps_train),
        "shift": _numbers("--shift", shift),
    }
    settings, skipped = combine(
        _names("--process", process, PROCESSES) or DEFAULTS["process"],
        asked,
        samplers=_names("--sampler", sampler, ["auto", *SAMPLERS]),
        spacings=_names("--spacing", spacing, SPACINGS) or ("trailing",),
        steps=_counts("--steps", steps, needed=True),
        clip_sample=_limit(clip),
        schedule_file=file,
        sampler_options=sampler_option or [],
    )
    console = Console()
    if not settings:
        raise ValueError(f"no setting can be sampled: {'; '.join(skipped)}")
    with progress_bar("oracle", console) as bar:
        task = bar.add_task("oracle", total=len(settings), shown="")

        def show(done: int, latest: Grade) -> None:
            bar.update(task, completed=done, shown=f"energy distance {latest.energy_distance:.4f}")

        grades = grade_table(settings, problem=problem, num_samples=samples, seed=seed, error=error, progress=show)
    console.print(_table(grades))
    for reason in skipped:
        console.print(f"skipped: {reason}", markup=False, highlight=False, soft_wrap=True)
    if csv_file is not None:
        write_csv(grades, csv_file)
        print(f"wrote {csv_file}")
    if out is not None:
        draw(grades, out)
        print(f"wrote {out}")


def combine(
    processes: Iterable[str],
    asked: dict[str, tuple],
    *,
    samplers: Sequence[str],
    spacings: Sequence[str],
    steps: Sequence[int],
    clip_sample: float | None,
    schedule_file: Path | None = None,
    sampler_options: Sequence[str] = (),
) -> tuple[list[tuple[Process, SamplerConfig]], list[str]]:
    """Every combination that can be sampled, and a line for every reason why others cannot, or equal an earlier one.

    Args:
        asked: field of a process's config -> values; empty for the defaults. A process without the field is taken once.
        samplers: names; empty for those of DEFAULT_SAMPLERS.
        schedule_file: of the schedule `table`.
        sampler_options: further settings of every sampler, as `eta=1.0`.
    """
    from diffpolicy.config import changed_sampler
    from diffpolicy.processes import PROCESSES, SamplerConfig, make_plan, resolve_sampler

    further = changed_sampler(SamplerConfig(), sampler_options)  # says what is wrong with them, once
    settings, seen = [], {}
    skipped: dict[str, list[str]] = {}  # reason -> settings, so that a reason is said once
    for name in processes:
        config_class, process_class = PROCESSES[name]
        fields = {f.name for f in dataclasses.fields(config_class)}
        for key in asked:
            if asked[key] and key not in fields:
                skipped.setdefault(f"{name} has no such choice", []).append(OPTIONS[key])
        choices = {key: asked[key] or DEFAULTS[key] for key in asked if key in fields}
        for values in itertools.product(*choices.values()):
            chosen = {key: value for key, value in zip(choices, values, strict=True) if value != ""}
            spoken = " ".join(map(str, (name, *chosen.values())))
            if chosen.get("schedule") == "table":
                chosen["schedule_file"] = str(schedule_file)
            try:
                with warnings.catch_warnings(record=True):  # the labels of a grade say the same
                    process = process_class(config_class(**chosen))
            except ValueError as refusal:
                skipped.setdefault(str(refusal), []).append(spoken)
                continue
            if (name, process.config) in seen:
                skipped.setdefault(f"the same as {seen[name, process.config]}", []).append(spoken)
                continue
            seen[name, process.config] = spoken
            names = samplers or DEFAULT_SAMPLERS.get(name, ("auto",))
            for sampler_name, spacing, num_steps in itertools.product(names, spacings, steps):
                config = dataclasses.replace(
                    further, name=sampler_name, spacing=spacing, num_inference_steps=num_steps, clip_sample=clip_sample
                )
                words = f"{spoken} {sampler_name} {spacing} {num_steps}"
                try:
                    resolved = resolve_sampler(process, config)
                    what = (name, process.config, resolved.name, make_plan(process, config))
                except ValueError as refusal:
                    skipped.setdefault(str(refusal), []).append(words)
                    continue
                if what in seen:
                    skipped.setdefault(f"the same as {seen[what]}", []).append(words)
                    continue
                seen[what] = words
                settings.append((process, resolved))
    lines = [
        f"{which[0]}{f' and {len(which) - 1} more' if len(which) > 1 else ''}: {reason}"
        for reason, which in skipped.items()
    ]
    return settings, lines


def _names(option: str, text: str | None, known: Iterable[str] | None) -> tuple[str, ...]:
    """Names between commas, checked where all that can be meant is known."""
    names = tuple(name.strip() for name in (text or "").split(",") if name.strip())
    for name in names:
        if known is not None and name not in known:
            raise unknown_name(option, name, known)
    return tuple(dict.fromkeys(names))


def _counts(option: str, text: str | None, needed: bool = False) -> tuple[int, ...]:
    """Positive whole numbers between commas."""
    names = _names(option, text, None)
    if not all(name.isdecimal() and int(name) > 0 for name in names) or (needed and not names):
        raise ValueError(
            f"{option} must be whole numbers from 1 with commas between them, such as 4,8,16, got {text!r}"
        )
    return tuple(dict.fromkeys(int(name) for name in names))


def _numbers(option: str, text: str | None) -> tuple[float, ...]:
    """Positive numbers between commas."""
    try:
        numbers = tuple(dict.fromkeys(float(name) for name in _names(option, text, None)))
    except ValueError:
        numbers = (0.0,)
    if not all(0 < number < float("inf") for number in numbers):
        raise ValueError(f"{option} must be positive numbers with commas between them, such as 1,3, got {text!r}")
    return numbers


def _limit(text: str) -> float | None:
    """A positive number, or None for `none`."""
    if text == "none":
        return None
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not limit > 0:
        raise ValueError(f"--clip must be a positive number or none, got {text!r}")
    return limit


def told_apart(grades: Sequence[Grade]) -> list[str]:
    """Those of NAMED_IN_TABLE in which settings that have such a choice differ; at least the sampler."""
    differs = [key for key in NAMED_IN_TABLE if len({str(g.setting[key]) for g in grades if key in g.setting}) > 1]
    return differs or ["sampler.name"]


def _table(grades: Sequence[Grade]) -> Table:
    from rich.table import Table
    from rich.text import Text

    first = grades[0]
    low, high = first.energy_band
    table = Table(
        title=f"{first.problem}, {first.num_samples} chunks per setting, exact denoiser"
        + (f" with an error of {first.setting['error']:g}" if "error" in first.setting else ""),
        caption=f"a perfect sampler scores an energy distance of {first.energy_floor:.4f} by chance, 95 % of them "
        f"{low:.4f} to {high:.4f}; * is above",
    )
    columns = told_apart(grades)
    for key in columns:
        table.add_column(NAMED_IN_TABLE[key], no_wrap=True)
    for header in ("NFE", "energy distance", "weights off by", "spread"):
        table.add_column(header, justify="right", min_width=7 if " " in header else 3)
    table.add_column("labels", style="yellow", min_width=10)
    for i, g in enumerate(grades):
        line = [str(g.setting.get(key, "")) for key in columns]
        table.add_row(
            *line,
            str(g.nfe),
            f"{g.energy_distance:.4f}{'*' if g.above_floor else ' '}",
            f"{g.mode_weight_error:.3f}",
            f"{g.dispersion_ratio:.2f}",
            Text("; ".join(g.labels)),
            end_section=i + 1 < len(grades) and line != [str(grades[i + 1].setting.get(key, "")) for key in columns],
        )
    return table


def write_csv(grades: Sequence[Grade], path: Path) -> None:
    """One row per grade; a choice that a process does not have is left empty."""
    rows = [g.row() for g in grades]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def draw(grades: Sequence[Grade], path: Path) -> None:
    """Energy distance with its floor, and dispersion, against network calls; dashed where a setting carries a label."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns, lines = told_apart(grades), {}
    for g in grades:
        label = " ".join(str(g.setting[key]) for key in columns if key in g.setting)
        lines.setdefault(label, []).append(g)
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(7, 6.5), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    low, high = grades[0].energy_band
    above.axhspan(low, high, color="0.88", zorder=0, label="a perfect sampler (95 %)")
    above.axhline(grades[0].energy_floor, color="0.6", linewidth=1, zorder=0)
    below.axhline(1, color="0.6", linewidth=1, zorder=0)
    colours, markers = plt.get_cmap("tab10" if len(lines) <= 10 else "tab20").colors, "osD^vP*X<>"
    for i, (label, line) in enumerate(lines.items()):
        line = sorted(line, key=lambda g: g.nfe)
        calls = [g.nfe for g in line]
        style = dict(
            color=colours[i % len(colours)],
            marker=markers[(i + i // 10) % 10],
            markersize=5,
            linestyle="--" if any(g.labels for g in line) else "-",
        )
        above.plot(calls, [g.energy_distance for g in line], label=label, **style)
        below.plot(calls, [g.dispersion_ratio for g in line], **style)
    above.set(xscale="log", yscale="log", ylabel="energy distance to the truth", title=grades[0].problem)
    below.set(xlabel="network calls per chunk (NFE)", ylabel="spread inside a mode,\nsampled / true", ylim=(0, None))
    ticks = sorted({g.nfe for g in grades})
    below.set_xticks(ticks, [str(n) for n in ticks])
    below.minorticks_off()
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *above.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8,
        title="dashed: labelled as unsound" if any(g.labels for g in grades) else None, title_fontsize=8,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
