"""One rollout of a checkpoint from start to finish: load, run, write, show. `diffpolicy rollout` and quickstart call it."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from diffpolicy import __version__
from diffpolicy.checkpoint import find_checkpoint, load_policy, read_description, resolve_device
from diffpolicy.config import Choice, changed_sampler, choose, config_from_dict, env_for
from diffpolicy.envs import ENVIRONMENTS, make_env
from diffpolicy.executors import EXECUTORS
from diffpolicy.open_loop import OpenLoopResult, replay_open_loop
from diffpolicy.policies import DiffusionPolicy
from diffpolicy.progress import progress_bar
from diffpolicy.replay import ReplayBuffer
from diffpolicy.rollout import Episode, RolloutResult, check_fit, measure_latency, rollout, write_rollout


def evaluate(
    checkpoint: str | Path,
    *,
    env: str | None = None,
    env_options: Sequence[str] = (),
    episodes: int = 100,
    seed: int = 100_000,
    sampling_seed: int = 0,
    sampler: str | None = None,
    steps: int | None = None,
    spacing: str | None = None,
    clip: str | float | None = None,
    sampler_options: Sequence[str] = (),
    act: int | None = None,
    num_envs: int = 16,
    num_workers: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    videos: int = 4,
    pictures: int = 64,
    out: str | Path | None = None,
    console: Console | None = None,
) -> tuple[RolloutResult, Path]:
    """Rolls a checkpoint out over `episodes` seeds from `seed` on; returns the result and the folder it was written to.

    What is None stays as the checkpoint was trained. `clip` is a number, or "none" for no clipping; sampler_options are
    further settings of the sampler, each as `temperature=0.5`.

    Raises:
        ValueError, FileNotFoundError: a checkpoint, environment or option that does not fit, before anything runs.
    """
    console = console or Console()
    run = _prepare(
        checkpoint, env, env_options, sampler, steps, spacing, clip, sampler_options, act, batch_size, device
    )
    policy, choice, executor = run.policy, run.env, run.executor
    out = _new_folder(Path(out) if out is not None else _default_out(run.folder, policy, choice, seed, episodes))

    scores: list[Episode] = []
    with progress_bar("rollout", console) as bar:
        task = bar.add_task("rollout", total=episodes, shown="")

        def on_episode(episode: Episode) -> None:
            scores.append(episode)
            solved = sum(e.success for e in scores) / len(scores)
            mean = sum(e.score for e in scores) / len(scores)
            bar.update(task, advance=1, shown=f"success {solved:.0%}  score {mean:.3f}")

        result = rollout(
            executor,
            choice.name,
            dataclasses.asdict(choice.options),
            seeds=range(seed, seed + episodes),
            num_envs=num_envs,
            num_workers=num_workers,
            sampling_seed=sampling_seed,
            num_films=videos,
            num_pictures=pictures,
            on_episode=on_episode,
        )
    alone = measure_latency(executor, choice.name, dataclasses.asdict(choice.options))
    fps = ENVIRONMENTS[choice.name][1].fps
    console.print(summary_table(result, policy, choice, alone))  # before writing: a full disk must not swallow it
    write_rollout(
        result,
        out,
        {
            "checkpoint": str(folder),
            "step": described.get("step"),
            "env": choice.to_dict(),
            "seed": seed,
            "sampling_seed": sampling_seed,
            "sampler": dataclasses.asdict(policy.sampler),
            "labels": [finding.label for finding in policy.findings()],
            "horizons": dataclasses.asdict(policy.horizons),
            "single_observation_latency_ms": alone,
            "device": torch.cuda.get_device_name()
            if device.startswith("cuda")
            else platform.processor() or platform.machine(),
            "torch_threads": torch.get_num_threads(),
            "diffpolicy": __version__,
            "command": sys.argv,
            "finished": datetime.datetime.now().isoformat(timespec="seconds"),
        },
        fps=fps,
    )
    console.print(
        f"results in {out}: results.json"
        + (", videos/" if videos else "")
        + (", contact_sheet.png" if pictures else ""),
        soft_wrap=True,
    )
    return result, out


def replay_recording(
    path: str | Path,
    *,
    env: str,
    state_key: str | None = None,
    action_key: str = "action",
    episodes: Sequence[int] | None = None,
    env_options: Sequence[str] = (),
    tolerance: float = 1.0,
    out: str | Path | None = None,
    console: Console | None = None,
) -> OpenLoopResult:
    """Replays a store's recorded actions open loop and shows the drift; see open_loop.py."""
    console = console or Console()
    buffer = ReplayBuffer.open(path)
    if state_key is None:
        state_key = next((key for key in ("sim_state", "state") if key in buffer.keys), None)
        if state_key is None:
            raise ValueError(
                f"{path} has neither sim_state nor state; name the recorded states with --state-key, one of {buffer.keys}"
            )
    choice = choose("env", env, env_options)
    simulator = make_env(choice.name, **dataclasses.asdict(choice.options))
    with progress_bar("replay", console) as bar:
        task = bar.add_task("replay", total=buffer.num_episodes if episodes is None else len(episodes), shown="")
        result = replay_open_loop(
            buffer,
            simulator,
            state_key=state_key,
            action_key=action_key,
            episodes=episodes,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    simulator.close()
    console.print(result.table(tolerance=tolerance))
    if out is not None:
        out = Path(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result.to_dict(tolerance=tolerance), indent=2))
        console.print(f"every episode in {out}")
    return result


def summary_table(result: RolloutResult, policy: DiffusionPolicy, env: Choice, alone: dict[str, float]) -> Table:
    """The rollout as a person reads it."""
    s = result.summary()
    sampler = policy.sampler
    cut = s["episodes"] < s["episodes_planned"]
    count = (
        f"{s['episodes']} of {s['episodes_planned']} episodes (interrupted: biased)"
        if cut
        else f"{s['episodes']} episodes"
    )
    table = Table(
        title=f"{env.name}: {count}, {sampler.name} with {sampler.num_inference_steps} steps",
        title_justify="left",
        caption="mind: " + "; ".join(finding.label for finding in policy.findings()) if policy.findings() else None,
        caption_justify="left",
    )
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    low, high = s["success_interval_95"]
    table.add_row("success", f"{s['success_rate']:.1%}", f"{low:.1%} .. {high:.1%}  (Wilson)")
    low, high = s["mean_score_interval_95"]
    table.add_row("mean score", f"{s['mean_score']:.3f}", f"{low:.3f} .. {high:.3f}  (bootstrap)")
    table.add_row("mean steps", f"{s['mean_steps']:.1f}", "")
    table.add_row(
        "one chunk, one robot", f"{alone['p50']:.1f} ms", f"p95 {alone['p95']:.1f}, p99 {alone['p99']:.1f} ms"
    )
    if s["call_latency_ms"]:
        call = s["call_latency_ms"]
        table.add_row(
            f"one call, batch {s['call_batch_size']}",
            f"{call['p50']:.1f} ms",
            f"p95 {call['p95']:.1f}, p99 {call['p99']:.1f} ms",
        )
    table.add_row("speed", f"{s['env_steps_per_second']:,.0f} steps/s", f"{s['seconds']:.0f} s in all")
    return table


def _choose_env(trained: Choice | None, name: str | None, options: Sequence[str]) -> Choice:
    if name is None:
        if trained is None:
            raise ValueError(f"the checkpoint names no environment; choose one with --env from {sorted(ENVIRONMENTS)}")
        name = trained.name
    given = choose("env", name, options)  # checks the options by themselves
    if trained is None or trained.name != name:
        return given
    chosen = {option.split("=", 1)[0] for option in options}
    return Choice(name, dataclasses.replace(trained.options, **{k: getattr(given.options, k) for k in chosen}))


def _parse_clip(clip: str | float | None) -> str | float | None:
    """None: leave as trained; null: no clipping."""
    if clip is None or isinstance(clip, float):
        return clip
    if str(clip).lower() in ("none", "null", "off"):
        return "null"
    try:
        return float(clip)
    except ValueError:
        raise ValueError(f"--clip must be a positive number or `none`, got {clip!r}") from None


def _default_out(folder: Path, policy: DiffusionPolicy, env: Choice, seed: int, episodes: int) -> Path:
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    sampler = policy.sampler
    return (
        run
        / "rollouts"
        / f"{env.name}_{folder.name}_{sampler.name}-{sampler.num_inference_steps}_seed{seed}x{episodes}"
    )


def _new_folder(path: Path) -> Path:
    """The path, or path-2, path-3, ... where results stand already: earlier results are never overwritten."""
    chosen, number = path, 2
    while chosen.exists() and any(chosen.iterdir()):
        chosen, number = path.with_name(f"{path.name}-{number}"), number + 1
    chosen.mkdir(parents=True, exist_ok=True)
    return chosen
