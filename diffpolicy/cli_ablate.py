"""`diffpolicy ablate`: its arguments and what it prints. Everything heavy is imported inside."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def ablate(
    sweep: Annotated[
        Path, typer.Argument(metavar="SWEEP.yaml", help="The sweep file, such as those in conf/ablation.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[key=value ...]",
            help="Settings of every cell, or seeds=[0,1], episodes=500, first_env_seed=..., sampling_seed=...",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="The zarr store; overrides data.path of the YAML files.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Results folder; default: runs/ablations/<name>.", show_default=False)
    ] = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="A run of minutes to see that all works; goes to OUT_smoke.")
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(help="Processes, one thread each; results do not depend on it. Default: one per core.", min=1),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Use a Ray cluster instead, one job per CPU: `auto`, HOST:PORT, or `local` to start one here. "
            "All its nodes must see the results folder and the data under the same path.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the cells and what is done; run nothing.")] = False,
    extend: Annotated[
        bool, typer.Option("--extend", help="Go on in the folder of a sweep that was changed; finished cells are kept.")
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Write the report from what is finished; run nothing.")
    ] = False,
) -> None:
    """Train and roll out every cell of a sweep; one table, figures and an HTML report.

    [bold]Examples[/bold]

    diffpolicy ablate conf/ablation/noise_schedule.yaml --smoke

    diffpolicy ablate conf/ablation/noise_schedule.yaml --data data/pusht.zarr --jobs 8

    diffpolicy ablate conf/ablation/noise_schedule.yaml --dry-run train.steps=4000 seeds=[0,1,2]

    Every network is trained once, every cell plays the same start states from the same noise. After an interruption
    (Ctrl-C, a crash, kill -9) the same command goes on: finished cells are kept, trainings resume exactly. Ends with
    exit code 1 where a cell failed; the others are finished all the same.
    """
    from rich.console import Console

    from diffpolicy import ablate as engine
    from diffpolicy.sweep import load_sweep
    from diffpolicy.workers import LocalWorkers, RayWorkers

    if jobs is not None and ray is not None:
        raise ValueError("--jobs counts processes of this machine; give it or --ray, not both")
    loaded = load_sweep(sweep, settings or [], data=data, smoke=smoke)
    out = Path("runs") / "ablations" / loaded.name if out is None else out
    if smoke:  # never to be mistaken for the real ones
        out = out.absolute()
        out = out.with_name(f"{out.name}_smoke")
    console = Console()
    if dry_run:
        console.print(engine.dry_run(loaded, out), soft_wrap=True)
        return
    if report_only:
        print(f"report: {engine.report(loaded, out, extend=extend)}")
        return
    count = jobs or _usable_cores()
    result, failures = engine.ablate(
        loaded,
        out,
        make_workers=lambda run: RayWorkers(ray, run) if ray is not None else LocalWorkers(count, run),
        device=device,
        extend=extend,
        console=console,
    )
    if result is not None:
        print(f"report: {engine.report(loaded, out, failures)}")
    if failures:
        print(f"{len(failures)} failed:")
        for label, reason in failures.items():
            print(f"  {label}: {reason}")
        print(f"tracebacks are in {out / 'failures.log'}; run the same command again to try them anew")
        raise typer.Exit(1)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
