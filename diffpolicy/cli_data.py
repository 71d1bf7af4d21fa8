"""`diffpolicy data`: look at, check and rewrite demonstrations. Everything heavy is imported where it is used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import numpy as np

    from diffpolicy.replay import ReplayBuffer
    from diffpolicy.spec import FieldSpec
    from diffpolicy.store_layout import Progress

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="Look at, check and rewrite demonstrations.")

Store = Annotated[Path, typer.Argument(metavar="PATH", help="A replay store: a zarr folder, or a zip of one.")]

FRAMES_SAMPLED = 32
"""`info` looks at this many frames of a camera, not at all of them."""
DIMS_SHOWN = 3


@app.command()
def info(path: Store) -> None:
    """What is in a store: episodes, keys with their shapes and ranges, instructions.

    Example: `diffpolicy data info data/pusht.zarr`
    """
    from rich.console import Console

    from diffpolicy.replay import ReplayBuffer

    buffer = ReplayBuffer.open(path)
    console = Console()
    console.print(_summary_table(buffer))
    with _progress("reading") as progress:
        keys = _key_table(buffer, progress)
    console.print(keys)
    if buffer.tasks:
        console.print(_task_table(buffer))


@app.command()
def validate(path: Store) -> None:
    """Reads every file of a store and says what is wrong with it: damaged files, NaN, lengths, black frames, ...

    Exits with 1 if there are errors, with 0 if there are only warnings.

    Example: `diffpolicy data validate data/pusht.zarr`
    """
    from rich.console import Console
    from rich.text import Text

    from diffpolicy.validation import validate as find_faults

    with _progress("checking") as progress:
        findings = find_faults(path, progress)
    console = Console()
    for finding in findings:
        style = "bold red" if finding.level == "error" else "yellow"
        place = f"{finding.file}: " if finding.file else ""
        console.print(Text.assemble((f"{finding.level:<8}", style), (place, "bold"), finding.message), soft_wrap=True)
    num_errors = sum(finding.level == "error" for finding in findings)
    num_warnings = len(findings) - num_errors
    counts = f"{_count(num_errors, 'error')}, {_count(num_warnings, 'warning')}"
    console.print(Text(f"{path}: {counts}", style="bold red" if num_errors else "bold green"), soft_wrap=True)
    if num_errors:
        raise typer.Exit(1)


@app.command()
def drop(
    path: Store,
    episodes: Annotated[str, typer.Option(help="Which to drop, counted from 0: `3,7-9`.")],
    out: Annotated[Path | None, typer.Option(help="Write the rest here and leave PATH as it is.")] = None,
) -> None:
    """Rewrites a store without some episodes, in place or to `--out`. The episodes after them move up.

    Example: `diffpolicy data drop demos.zarr --episodes 3,7-9`
    """
    from diffpolicy.replay import ReplayBuffer
    from diffpolicy.rewriting import drop_episodes

    chosen = parse_episodes(episodes)
    with _progress("rewriting") as progress:
        drop_episodes(path, chosen, out, progress)
    typer.echo(f"dropped {_count(len(chosen), 'episode')}: {_sizes(ReplayBuffer.open(out or path))}")


@app.command()
def convert(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="A store of the field: zarr v2 or v3, a folder or a zip.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="The store to write; must not exist yet.")],
    fps: Annotated[float | None, typer.Option(help="Steps per second, where SRC does not say.")] = None,
    task: Annotated[str, typer.Option(help="The instruction of all episodes that have none.")] = "",
    role: Annotated[
        list[str] | None, typer.Option(help="KEY=ROLE, once per key, as `img=observation.images.top`.")
    ] = None,
) -> None:
    """Writes a store anew in our format: zarr v3, sharded and checksummed, pictures as uint8.

    Example: `diffpolicy data convert pusht_cchi_v7_replay.zarr data/pusht.zarr --fps 10 --role
    img=observation.images.top --task "push the T onto the goal"`
    """
    from diffpolicy.replay import ReplayBuffer
    from diffpolicy.rewriting import convert as rewrite

    with _progress("converting") as progress:
        rewrite(src, dst, fps=fps, roles=parse_roles(role or ()), task=task, progress=progress)
    typer.echo(_sizes(ReplayBuffer.open(dst)))


@app.command()
def embed(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A replay store of ours: a zarr folder.")],
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="CONF.yaml ... [key=value ...]", help="The same as for `diffpolicy train`."),
    ],
    dtype: Annotated[str, typer.Option(help="float32, or float16: half the room.")] = "float32",
    batch: Annotated[int, typer.Option(help="Frames that the tower sees at a time.", min=1)] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Lets a frozen image tower look at every frame once, so that training need not run it.

    Writes what it says of them into the store; then train with `encoder.tuning=frozen data.embedded=true`.

    Example: `diffpolicy data embed data/pusht.zarr conf/task/pusht_image.yaml conf/encoder/clip_vit_b32.yaml
    encoder.tuning=frozen`
    """
    from diffpolicy.config import load_config
    from diffpolicy.embed import embed as embed_store

    files, settings = ([a for a in arguments if ("=" in a) == wanted] for wanted in (False, True))
    if not files:
        raise ValueError("no config: give the YAML files that training will get, such as conf/task/pusht_image.yaml")
    done = embed_store(path, load_config(files, settings), dtype=dtype, batch_size=batch, device=device)
    cameras = ", ".join(done.keys)
    typer.echo(f"{path} has features of {_count(done.num_frames, 'frame')} of {cameras}; train with data.embedded=true")


@app.command()
def merge(
    sources: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Stores: zarr v2 or v3, folders or zips.")],
    out: Annotated[Path, typer.Option(help="The store to write; must not exist yet.")],
    instruction: Annotated[
        list[str] | None,
        typer.Option(
            help="What a source shows, once per source, in order; several wordings as `push it | shove it`, or as "
            "`@FILE` with one per line, are dealt out to its episodes. Default: the sources' own instructions."
        ),
    ] = None,
    wordings: Annotated[
        str,
        typer.Option(
            metavar="ENV",
            help="Each --instruction is the name of a goal of this environment, and stands for all wordings of it that "
            "demonstrations may use.",
        ),
    ] = "",
    seed: Annotated[int, typer.Option(help="Decides which episode gets which wording.", min=0)] = 0,
    keys: Annotated[
        str, typer.Option(help="What to keep, as `action,state`; default: all that the sources share.")
    ] = "",
    role: Annotated[
        list[str] | None, typer.Option(help="KEY=ROLE, once per key, as `img=observation.images.top`.")
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Steps per second, where the sources do not say.")] = None,
    paint_out: Annotated[
        str,
        typer.Option(
            help="Take out of the pictures what gives the task away: `pusht_goal`, the light green goal of Push-T."
        ),
    ] = "",
) -> None:
    """Writes several stores as one, the episodes of each with instructions of its own.

    Example: `diffpolicy data merge pusht_cchi_v7_replay.zarr pusht_keypoint_x356_y356.zarr --out data/pusht_two.zarr
    --fps 10 --wordings pusht_language --instruction "push the T to the centre" --instruction "push the T to the lower
    right"`
    """
    from diffpolicy.merging import merge as write_merged
    from diffpolicy.merging import read_wordings
    from diffpolicy.paint_out import painter
    from diffpolicy.replay import ReplayBuffer

    if wordings and not instruction:
        raise ValueError(f"--wordings {wordings} needs one --instruction for each source: the name of one of its goals")
    if wordings:
        told = [goal_wordings(wordings, text) for text in instruction or ()]
    else:
        told = [read_wordings(text) for text in instruction or ()]
    with _progress("merging") as progress:
        merged = write_merged(
            sources,
            out,
            wordings=told or None,
            keys=[key.strip() for key in keys.split(",")] if keys else None,
            roles=parse_roles(role or ()),
            fps=fps,
            seed=seed,
            repaint=painter(paint_out) if paint_out else None,
            progress=progress,
        )
    for key, why in merged.left_out.items():
        typer.echo(f"left out {key}: {why}")
    for note in merged.notes:
        typer.echo(f"note: {note}")
    counts = " + ".join(map(str, merged.num_episodes))
    typer.echo(f"merged {counts} episodes: {_sizes(ReplayBuffer.open(out))}")


def goal_wordings(env: str, goal: str) -> tuple[str, ...]:
    """The sentences by which demonstrations may ask for a goal of an environment.

    Raises:
        ValueError: unknown environment, one that is not told its goal in words, or a goal that it does not have.
    """
    from diffpolicy.envs import ENVIRONMENTS, make_env
    from diffpolicy.envs.base import LanguageEnv
    from diffpolicy.spec import unknown_name

    spoken_to = [name for name, (_, env_class) in ENVIRONMENTS.items() if issubclass(env_class, LanguageEnv)]
    if env not in spoken_to:
        raise unknown_name("--wordings", env, spoken_to)
    # Most know their sentences without being built, which needs the simulator.
    known = getattr(ENVIRONMENTS[env][1], "wordings", None) or make_env(env).wordings
    if goal not in known:
        raise unknown_name(f"with --wordings {env} an --instruction", goal, known)
    return known[goal].seen


def parse_roles(texts: Iterable[str]) -> dict[str, str]:
    """`img=observation.images.top` -> {"img": "observation.images.top"}."""
    roles = {}
    for text in texts:
        key, equals, name = text.partition("=")
        if not (key and equals and name):
            raise ValueError(f"--role must read KEY=ROLE, as in img=observation.images.top, got {text!r}")
        roles[key] = name
    return roles


def parse_episodes(text: str) -> list[int]:
    """`3,7-9` -> [3, 7, 8, 9], sorted, each once."""
    chosen: set[int] = set()
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"episodes must read like 3,7-9 (counted from 0), got {text!r}")
        low, high = int(first), int(last) if dash else int(first)
        if high < low:
            raise ValueError(f"a range of episodes must go up, got {part.strip()!r} in {text!r}")
        chosen.update(range(low, high + 1))
    return sorted(chosen)


@contextmanager
def _progress(what: str) -> Iterator[Progress]:
    """A bar that disappears when done, as progress(key, done, total); silent where the output is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task(what, total=None)
        yield lambda key, done, total: bars.update(bar, description=f"{what} {key}", completed=done, total=total)


def _summary_table(buffer: ReplayBuffer):
    import numpy as np
    from rich.markup import escape
    from rich.table import Table

    from diffpolicy.store_folder import list_files
    from diffpolicy.store_layout import FORMAT_VERSION

    lengths = buffer.episode_lengths
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    ours = f", diffpolicy format {FORMAT_VERSION}" if buffer.is_ours else ""
    table.add_row("path", escape(str(buffer.path)))
    table.add_row("format", f"zarr v{buffer.zarr_format}{ours}")
    table.add_row("fps", f"{buffer.fps:g}" if buffer.fps else "unknown")
    table.add_row("episodes", f"{buffer.num_episodes:,}")
    table.add_row("steps", f"{buffer.num_steps:,}")
    if buffer.fps:
        table.add_row("duration", _duration(buffer.num_steps / buffer.fps))
    if len(lengths):
        table.add_row(
            "lengths", f"{lengths.min()} / {np.median(lengths):g} / {lengths.max()} steps (min / median / max)"
        )
    table.add_row("on disk", _megabytes(sum(list_files(buffer.path).values())))
    return table


def _key_table(buffer: ReplayBuffer, progress: Progress):
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="keys", title_justify="left", title_style="bold", header_style="bold")
    table.add_column("key", no_wrap=True)
    table.add_column("one step", no_wrap=True)
    table.add_column("min .. max", overflow="fold")
    roles = buffer.roles
    for key, spec in buffer.fields.items():
        shape = "x".join(map(str, spec.shape)) or "1"
        ranges = _ranges(buffer, key, spec) if buffer.num_episodes else []
        progress(key, 1, 1)
        names = spec.names if len(spec.names) == len(ranges) else ()
        unit = f" [{spec.units}]" if spec.units else ""
        lines = [f"{extent}  {name}" for extent, name in zip(ranges, names or [""] * len(ranges), strict=True)]
        role = roles.get(key, key)
        name = key if role == key else f"{key} = {role}"
        table.add_row(*map(escape, (name, f"{shape} {spec.dtype}{unit}", _shortened(lines, "\n"))))
    return table


def _task_table(buffer: ReplayBuffer):
    from collections import Counter

    from rich.markup import escape
    from rich.table import Table

    counts = Counter(buffer.episode_task(i) for i in range(buffer.num_episodes))
    table = Table(title="instructions", title_justify="left", title_style="bold", header_style="bold")
    table.add_column("episodes", justify="right")
    table.add_column("instruction", overflow="fold")
    for task, count in counts.most_common():
        table.add_row(f"{count:,}", escape(task or "(none)"))
    return table


def _ranges(buffer: ReplayBuffer, key: str, spec: FieldSpec) -> list[str]:
    """Smallest and largest value of each number of a key; of some frames, all pixels together, for pictures."""
    import numpy as np

    from diffpolicy.store_layout import is_image

    if is_image(spec):
        rows = np.unique(np.linspace(0, buffer.num_steps - 1, FRAMES_SAMPLED).astype(int))
        frames = np.stack([buffer.read(key, row, row + 1) for row in rows])
        sampled = f" ({len(rows)} frames)" if len(rows) < buffer.num_steps else ""
        return [f"{_number(frames.min())} .. {_number(frames.max())}{sampled}"]
    if np.dtype(spec.dtype).kind not in "biuf":
        return []
    low = high = None
    for start, stop in buffer.blocks(key):
        flat = buffer.read(key, start, stop).reshape(stop - start, -1)  # (n, D)
        with np.errstate(invalid="ignore"):
            low = flat.min(axis=0) if low is None else np.minimum(low, flat.min(axis=0))
            high = flat.max(axis=0) if high is None else np.maximum(high, flat.max(axis=0))
    return [f"{_number(a)} .. {_number(b)}" for a, b in zip(low, high, strict=True)]


def _shortened(parts: list[str], joint: str) -> str:
    """All of a short list; the first few and how many more of a long one."""
    if len(parts) <= 2 * DIMS_SHOWN:
        return joint.join(parts)
    return joint.join([*parts[:DIMS_SHOWN], f"... and {len(parts) - DIMS_SHOWN} more"])


def _number(value: np.generic) -> str:
    return f"{value:.4g}" if value.dtype.kind == "f" else str(value)


def _sizes(buffer: ReplayBuffer) -> str:
    return f"{buffer.path} has {_count(buffer.num_episodes, 'episode')}, {_count(buffer.num_steps, 'step')}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}" if number else f"no {what}s"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _megabytes(size: int) -> str:
    return f"{size / 1e3:,.1f} kB" if size < 1e6 else f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.2f} GB"
