"""The command line. Everything heavy is imported inside the commands, so that `diffpolicy --help` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from diffpolicy import __version__
from diffpolicy.cli_ablate import ablate
from diffpolicy.cli_data import app as data_app
from diffpolicy.cli_data import parse_episodes
from diffpolicy.cli_oracle import oracle
from diffpolicy.cli_schedules import schedules

app = typer.Typer(
    name="diffpolicy",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="""Robot action chunks by diffusion: zarr demonstrations in, trained policies and honest rollouts out.

    [bold]First steps[/bold]   diffpolicy quickstart

    [bold]Your data[/bold]     diffpolicy data info X.zarr · diffpolicy train conf/task/TASK.yaml --data X.zarr
    · diffpolicy rollout runs/TASK/NAME

    [bold]Ablations[/bold]     diffpolicy schedules · diffpolicy oracle · diffpolicy ablate conf/ablation/noise_schedule.yaml

    Add --debug to any command for a full traceback.""",
)
app.add_typer(data_app, name="data")
app.command()(ablate)
app.command()(schedules)
app.command()(oracle)

Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    debug: Debug = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONF.yaml ...] [key=value ...]",
            help="YAML files, stacked left to right, then single settings.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="The zarr store; overrides data.path of the YAML files.", show_default=False)
    ] = None,
    runs: Annotated[Path, typer.Option(help="Where run folders go: RUNS/<task>/<name>.")] = Path("runs"),
    name: Annotated[
        str | None, typer.Option(help="Name of the run folder; default: date and time.", show_default=False)
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Run folder to go on with, exactly where its last checkpoint stopped.", show_default=False),
    ] = None,
    stop_at: Annotated[
        int | None,
        typer.Option(
            help="Stop (with a checkpoint) at this step; the schedule still ends at train.steps.", show_default=False
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    num_devices: Annotated[int, typer.Option(help="More than one trains with DistributedDataParallel.", min=1)] = 1,
    precision: Annotated[str, typer.Option(help="auto (bf16 on a GPU, 32 on a CPU), 32, bf16 or fp16.")] = "auto",
    keep_checkpoints: Annotated[
        int, typer.Option(help="How many checkpoints to keep; older ones are removed.", min=1)
    ] = 3,
    wandb: Annotated[
        str | None,
        typer.Option(metavar="PROJECT", help="Also log to this Weights & Biases project.", show_default=False),
    ] = None,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Train a policy from demonstrations.

    [bold]Examples[/bold]

    diffpolicy train conf/task/tabletop.yaml --data data/tabletop.zarr

    diffpolicy train conf/task/pusht_state.yaml conf/denoiser/transformer.yaml seed=1 train.batch_size=128

    diffpolicy train --resume runs/tabletop/2026-11-22_13-40-05

    Ctrl-C stops after the step at hand and saves; --resume then gives the same result as never having stopped.
    """
    from diffpolicy.config import load_config
    from diffpolicy.spec import unknown_name

    for what, got, known in (
        ("--device", device, ("auto", "cpu", "cuda", "mps")),
        ("--precision", precision, ("auto", "32", "bf16", "fp16")),
    ):
        if got not in known:
            raise unknown_name(what, got, known)
    files = [a for a in arguments or [] if "=" not in a]
    overrides = [a for a in arguments or [] if "=" in a]
    if data is not None:
        overrides.append(f"data.path={data}")
    if resume is not None:
        if files or name is not None or [o for o in overrides if not o.startswith("data.path=")]:
            raise ValueError(
                "--resume takes the config of the run; give no YAML files, settings or --name with it (only --data, if it moved)"
            )
        from diffpolicy.train import load_resume_config

        config = load_resume_config(resume, data_path=str(data) if data else None)
    else:
        if not files:
            raise ValueError("no config: give at least one YAML file, such as conf/task/tabletop.yaml")
        config = load_config(files, overrides)
    from diffpolicy import train as trainer

    run = trainer.train(
        config,
        runs=runs,
        name=name,
        resume=resume,
        stop_at=stop_at,
        device=device,
        num_devices=num_devices,
        precision=precision,
        keep_checkpoints=keep_checkpoints,
        wandb_project=wandb,
        progress=progress,
    )
    if trainer.launched_rank() > 0:
        return
    where = f" --env {config.env.name}" if config.env else " --env ENVIRONMENT"
    print(f"\nnext: diffpolicy rollout {run}{where} --episodes 100")


@data_app.command()
def replay(
    path: Annotated[Path, typer.Argument(help="The zarr store.")],
    env: Annotated[str, typer.Option(help="Environment to replay in.")],
    state_key: Annotated[
        str | None,
        typer.Option(help="Key of the recorded simulator states; default: sim_state, else state.", show_default=False),
    ] = None,
    action_key: Annotated[str, typer.Option(help="Key of the recorded actions.")] = "action",
    episodes: Annotated[
        str | None, typer.Option(help="Which episodes, such as 3,7-9; default: all.", show_default=False)
    ] = None,
    env_option: Annotated[
        list[str] | None,
        typer.Option(
            "--env-option",
            metavar="KEY=VALUE",
            help="Option of the environment, may be repeated, e.g. goal=[356,356,0.785].",
            show_default=False,
        ),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Drift that still counts as following the recording, in units of the environment.")
    ] = 1.0,
    out: Annotated[
        Path | None, typer.Option(help="Also write every episode to this JSON file.", show_default=False)
    ] = None,
) -> None:
    """Play recorded actions open loop from each episode's first state: how far does the simulator drift from the recording?

    Finds most mistakes in data and environments: shifted actions, other units, another start state, other physics.

    [bold]Example[/bold]   diffpolicy data replay data/pusht_cchi_v7_replay.zarr --env pusht
    """
    from diffpolicy.evaluate import replay_recording

    replay_recording(
        path,
        env=env,
        state_key=state_key,
        action_key=action_key,
        episodes=parse_episodes(episodes) if episodes is not None else None,
        env_options=env_option or [],
        tolerance=tolerance,
        out=out,
    )


@app.command()
def rollout(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder, or a run folder (its latest checkpoint).")],
    env: Annotated[
        str | None, typer.Option(help="Environment; default: the one of the run's config.", show_default=False)
    ] = None,
    env_option: Annotated[
        list[str] | None,
        typer.Option(
            "--env-option",
            metavar="KEY=VALUE",
            help="Option of the environment, may be repeated, e.g. action_noise=1.0.",
            show_default=False,
        ),
    ] = None,
    episodes: Annotated[int, typer.Option(help="Episodes; 50 carry +-13 points, 500 carry +-4.", min=1)] = 100,
    seed: Annotated[
        int, typer.Option(help="Environment seed of the first episode; the others follow.", min=0)
    ] = 100_000,
    sampling_seed: Annotated[int, typer.Option(help="Seed of the policy's noise.", min=0)] = 0,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="ddim, ddpm, euler, heun, midpoint, dpmpp, dpmpp_2m, dpmpp_sde, dpmpp_2m_sde, unipc or diffusers; default: as trained.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Network calls per chunk; default: as trained.", show_default=False)
    ] = None,
    spacing: Annotated[
        str | None,
        typer.Option(help="Times visited: trailing, leading, linspace, karras or exponential.", show_default=False),
    ] = None,
    clip: Annotated[str | None, typer.Option(help="Clip x_0 to +- this, or `none`.", show_default=False)] = None,
    sampler_option: Annotated[
        list[str] | None,
        typer.Option(
            "--sampler-option",
            metavar="KEY=VALUE",
            help="Further setting of the sampler, may be repeated: eta=1.0, temperature=0.5, final_sigma=sigma_min, timesteps=[99,60,20].",
            show_default=False,
        ),
    ] = None,
    guidance: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PART=WEIGHT",
            help="How much the words (task=2) or the goal image (goal=1.5) count, classifier-free; 1: as trained, 0: not at all. "
            "Needs a policy trained with encoder.task_dropout or goal_dropout; may be repeated.",
            show_default=False,
        ),
    ] = None,
    act: Annotated[
        int | None, typer.Option(help="Actions executed per chunk, T_act; default: as trained.", show_default=False)
    ] = None,
    envs: Annotated[int, typer.Option(help="Environments side by side.", min=1)] = 16,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes that step them; 0: none; default: as many as cores for pixels, else 0.",
            show_default=False,
            min=0,
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            help="Rows of one policy call; fixed, so that results do not depend on --envs. Default 16, on a GPU 64.",
            show_default=False,
            min=1,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    videos: Annotated[int, typer.Option(help="Film so many episodes.", min=0)] = 4,
    pictures: Annotated[int, typer.Option(help="Episodes on the contact sheet.", min=0)] = 64,
    probe: Annotated[
        str | None,
        typer.Option(
            metavar="ROWS",
            help="Play the same seeds under other words: `language`, or some of asked, swapped, empty, paraphrase, held_out, "
            "state_only, image_only, with commas between.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Result folder; default: rollouts/ beside the checkpoint.", show_default=False),
    ] = None,
) -> None:
    """Sample trajectories in a simulator, with honest statistics.

    Writes results.json (every episode, success with its Wilson interval, score with its bootstrap interval, latency),
    videos/ and contact_sheet.png.

    [bold]--probe language[/bold] asks whether the policy does what the words say, or only what the scene suggests. Every row
    plays the same seeds with the same noise: [bold]asked[/bold] (the reference), [bold]swapped[/bold] (same scene, words of
    another goal), [bold]empty[/bold] (no words), [bold]paraphrase[/bold] (wordings never trained on), [bold]held_out[/bold]
    (goals never shown), [bold]state_only[/bold] and [bold]image_only[/bold] (half of the senses). The table says how often the
    named goal was reached ([bold]follows[/bold]), that of the scene against the words ([bold]ignores[/bold]), a third
    ([bold]other[/bold]), each with its interval, and tests every row against asked. Writes probes.json, probes.csv, probes.png,
    same_scene.png and videos/.

    [bold]Examples[/bold]

    diffpolicy rollout runs/pusht_keypoint/first --episodes 500 --seed 100000

    diffpolicy rollout runs/pusht_state/unet/checkpoints/step_010000 --sampler ddim --steps 10

    diffpolicy rollout RUN --sampler diffusers --sampler-option scheduler=DEISMultistepScheduler

    diffpolicy rollout RUN --episodes 200 --probe language

    diffpolicy rollout RUN --episodes 200 --probe swapped,paraphrase --steps 4
    """
    from diffpolicy import evaluate

    choices = {
        "env": env,
        "env_options": env_option or [],
        "episodes": episodes,
        "seed": seed,
        "sampling_seed": sampling_seed,
        "sampler": sampler,
        "steps": steps,
        "spacing": spacing,
        "clip": clip,
        "sampler_options": sampler_option or [],
        "guidance": guidance or [],
        "act": act,
        "num_envs": envs,
        "num_workers": workers,
        "batch_size": batch,
        "device": device,
        "videos": videos,
        "pictures": pictures,
        "out": out,
    }
    if probe is None:
        evaluate.evaluate(checkpoint, **choices)
    else:
        evaluate.probe(checkpoint, probe, **choices)


@app.command()
def collect(
    env: Annotated[
        str, typer.Argument(help="Environment with a scripted demonstrator: tabletop, tabletop_language or metaworld.")
    ],
    out: Annotated[Path, typer.Option(help="The zarr store to write; an unfinished one is continued.")],
    episodes: Annotated[int, typer.Option(help="Demonstrations.", min=1)] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the first episode.", min=0)] = 0,
    pixels: Annotated[bool, typer.Option(help="Record camera images too.")] = True,
    env_option: Annotated[
        list[str] | None,
        typer.Option(
            "--env-option", metavar="KEY=VALUE", help="Option of the environment, may be repeated.", show_default=False
        ),
    ] = None,
    demonstrator_option: Annotated[
        list[str] | None,
        typer.Option(
            "--demonstrator-option",
            metavar="KEY=VALUE",
            help="Option of the demonstrator, may be repeated, e.g. noise=0.1.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Record scripted demonstrations into a zarr store.

    [bold]Examples[/bold]

    diffpolicy collect tabletop --episodes 200 --out data/tabletop.zarr

    diffpolicy collect metaworld --no-pixels --env-option "tasks=\[mt5]" --episodes 250 --out data/metaworld.zarr

    Every finished episode is on disk at once; call again after an interruption to go on.
    """
    from diffpolicy.quickstart import collect_demonstrations, parse_options

    options = parse_options(env_option or [])
    result = collect_demonstrations(
        env,
        out=out,
        episodes=episodes,
        seed=seed,
        options={"pixels": pixels, **options},
        demonstrator_options=parse_options(demonstrator_option or [], "--demonstrator-option"),
    )
    discarded = f", {len(result.discarded_seeds)} failed attempts left out" if result.discarded_seeds else ""
    print(
        f"{result.path}: {result.num_episodes} episodes, {result.num_steps} steps ({result.num_added} episodes new{discarded})"
    )
    print(f"next: diffpolicy data info {result.path}\n      diffpolicy train conf/task/{env}.yaml --data {result.path}")


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for the demonstrations, the run and its pictures.")] = Path(
        "runs/quickstart"
    ),
    demonstrations: Annotated[int, typer.Option(min=1)] = 300,
    episodes: Annotated[int, typer.Option(help="Unseen episodes to test on.", min=1)] = 100,
    train_steps: Annotated[
        int | None,
        typer.Option(help="Optimiser steps; default: those of conf/task/tabletop.yaml.", show_default=False),
    ] = None,
) -> None:
    """Demonstrations, training and rollout of a small policy in five minutes: no GPU, no download.

    Collects scripted demonstrations of a tabletop task, trains a small network on them, tests it on unseen starts and
    shows where to look and what to type next.
    """
    from diffpolicy.quickstart import quickstart as run

    run(out=out, demonstrations=demonstrations, episodes=episodes, train_steps=train_steps)


@app.command(name="import-checkpoint")
def import_checkpoint(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A .ckpt file of the original Diffusion Policy code (low-dimensional U-Net or Transformer)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The checkpoint folder to write.")],
) -> None:
    """Turn a checkpoint of the original Diffusion Policy into one of ours, without running any code that it holds.

    [bold]Example[/bold]   diffpolicy import-checkpoint epoch=0550.ckpt --out runs/imported && diffpolicy rollout runs/imported --env pusht
    """
    from diffpolicy.checkpoint import import_reference_checkpoint

    folder = import_reference_checkpoint(checkpoint, out)
    print(f"wrote {folder}\nnext: diffpolicy rollout {folder} --env pusht")


def main() -> None:
    """Entry point: errors that a user can mend are one line and exit code 2; --debug, anywhere, shows the traceback."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    try:
        import warnings

        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        app(args=arguments, prog_name="diffpolicy")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        expected = isinstance(error, (ValueError, OSError, ImportError, FloatingPointError))
        text = " ".join(str(error).split()) or type(error).__name__
        print(
            f"error: {text}"
            if expected
            else f"internal error: {type(error).__name__}: {text}; see it whole with --debug",
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
