"""`diffpolicy schedules`: look at noise schedules before training with one. Everything heavy is imported where it is used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from diffpolicy.processes.description import ScheduleDescription


def schedules(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME ...]", help="Which schedules; default: all.", show_default=False),
    ] = None,
    timesteps: Annotated[
        int, typer.Option("--timesteps", "-T", help="Training steps, process.num_train_timesteps.", min=1)
    ] = 100,
    terminal_snr: Annotated[
        str,
        typer.Option(help="as_is, scaled, zero, several with commas, or all: what is done about signal that is left."),
    ] = "as_is",
    shift: Annotated[float, typer.Option(help="Noise over signal is multiplied by this.")] = 1.0,
    file: Annotated[
        Path | None,
        typer.Option(help="Also a schedule from a CSV file with the columns t,alpha_bar.", show_default=False),
    ] = None,
    prediction: Annotated[
        str, typer.Option(help="What the network predicts: epsilon, sample, v_prediction or edm.")
    ] = "epsilon",
    steps: Annotated[
        int, typer.Option(help="Network calls: which training steps does each spacing visit?", min=1)
    ] = 10,
    csv: Annotated[
        Path | None, typer.Option(help="Write t, alpha_bar and log-SNR of every step to this file.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Picture to write, .png or .pdf.")] = Path("schedules.png"),
) -> None:
    """Show noise schedules: how much signal each leaves, where its log-SNR spends the steps, what each spacing visits.

    [bold]Examples[/bold]

    diffpolicy schedules

    diffpolicy schedules linear cosine --terminal-snr all -T 100 --steps 10

    diffpolicy schedules cosine --file mine.csv

    A schedule that leaves more than 5 % of the signal at t=1 is marked: sampling starts from pure noise, so even a perfect
    network would be biased. Train with any of them: process.schedule=NAME process.terminal_snr=scaled.
    """
    from rich.console import Console

    from diffpolicy.processes import SCHEDULES
    from diffpolicy.processes.description import BANDS, describe_schedule
    from diffpolicy.processes.diffusion import DiffusionConfig
    from diffpolicy.processes.schedules import TERMINAL_SNRS, TUNED_FOR_1000
    from diffpolicy.schedule_plots import write_schedule_figure
    from diffpolicy.spec import unknown_name

    for name in names or []:
        if name not in SCHEDULES:
            raise unknown_name("schedule", name, SCHEDULES)
    chosen = list(TERMINAL_SNRS) if terminal_snr == "all" else terminal_snr.split(",")
    if out.suffix not in (".png", ".pdf"):
        raise ValueError(f"--out must end in .png or .pdf, got {out}")
    shown = list(names or ([] if file else SCHEDULES))
    configs = [
        DiffusionConfig(
            schedule=name,
            num_train_timesteps=timesteps,
            terminal_snr=snr,
            shift=shift,
            prediction_type=prediction,
            schedule_file=str(file) if name == "table" else None,
        )
        for name in [*shown, *(["table"] if file else [])]
        for snr in chosen
        if snr != "scaled" or name in TUNED_FOR_1000 or len(chosen) == 1
    ]
    described = [describe_schedule(config, steps) for config in configs]
    console = Console()
    console.print(_table(described, timesteps, [name for name, _, _ in BANDS]))
    console.print(_visited(described, steps))
    if csv is not None:
        _write_csv(csv, described)
    write_schedule_figure(out, described, steps)
    print(f"figure: {out}" + (f"   table: {csv}" if csv else ""))


def _table(described: list[ScheduleDescription], timesteps: int, bands: list[str]):
    from rich.table import Table

    table = Table(title=f"Noise schedules, T = {timesteps}", title_justify="left", caption_justify="left")
    table.add_column("schedule")
    for column in ("alpha_bar\nfirst step", "alpha_bar\nlast step", "terminal\nsignal"):
        table.add_column(column, justify="right")
    table.add_column("log-SNR\nfirst .. last", justify="right")
    for band, rule in zip(bands, ("> 2", "-2 .. 2", "< -2"), strict=True):
        table.add_column(f"{band}\n({rule})", justify="right")
    table.add_column("mind")
    for d in described:
        mind = "; ".join(d.findings)
        table.add_row(
            d.name,
            f"{d.alpha_bar[0]:.5f}",
            f"{d.alpha_bar[-1]:.2g}",
            f"{d.terminal_signal:.1%}",
            f"{d.log_snr[0]:.1f} .. {d.log_snr[-1]:.1f}",
            *(f"{share:.0%}" for share in d.band_shares),
            f"[bold red]{mind}[/]" if mind else "",
        )
    table.caption = (
        "terminal signal: share of the signal's amplitude left at t=1 (above 5 % even a perfect network is biased)\n"
        "the next three columns: share of the training steps by log-SNR (natural logarithm)"
    )
    return table


def _visited(described: list[ScheduleDescription], steps: int):
    """One table: spacings by row; those by sigma depend on the schedule, the others do not."""
    from rich.table import Table

    T = described[0].num_train_timesteps
    table = Table(title=f"Training steps visited with {steps} calls (pure noise is {T - 1})", title_justify="left")
    table.add_column("spacing")
    table.add_column("schedule")
    table.add_column("steps, from noise to data")
    table.add_column("mind")
    for spacing in described[0].visited:
        rows: dict[tuple[float, ...] | str, list[str]] = {}
        for d in described:
            rows.setdefault(d.visited[spacing], []).append(d.name)
        for i, (visited, names) in enumerate(rows.items()):
            text = visited if isinstance(visited, str) else " ".join(f"{k:g}" for k in visited)
            late = not isinstance(visited, str) and visited[0] < T - 1
            mind = f"[bold red]starts at t={(visited[0] + 1) / T:.2g}[/]" if late else ""
            who = "all" if len(names) == len(described) else ", ".join(names)
            table.add_row(spacing if i == 0 else "", who, text, mind)
    return table


def _write_csv(path: Path, described: list[ScheduleDescription]) -> None:
    import csv

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["schedule", "t", "alpha_bar", "log_snr"])
        for d in described:
            for k, (alpha_bar, log_snr) in enumerate(zip(d.alpha_bar, d.log_snr, strict=True)):
                writer.writerow([d.name, (k + 1) / d.num_train_timesteps, f"{alpha_bar:.10g}", f"{log_snr:.8g}"])
