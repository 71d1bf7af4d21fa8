"""A checkpoint from start to finish: load, run, write, show. `diffpolicy rollout`, with or without --probe, and quickstart."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from diffpolicy.config import Choice, choose
from diffpolicy.envs import ENVIRONMENTS, make_env
from diffpolicy.open_loop import OpenLoopResult, replay_open_loop
from diffpolicy.policies import DiffusionPolicy
from diffpolicy.prepare import default_out, new_folder, prepare
from diffpolicy.probe_report import MAX_SCENES, write_figures, write_films, write_numbers
from diffpolicy.probe_table import explanation, goal_table, probe_table
from diffpolicy.probes import Probes, Row, check_can_be_probed, parse_probes, play_probes
from diffpolicy.progress import progress_bar
from diffpolicy.replay import ReplayBuffer
from diffpolicy.rollout import Episode, RolloutResult, measure_latency, rollout, write_rollout


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
    guidance: Sequence[str] = (),
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
    further settings of the sampler, each as `temperature=0.5`, guidance weights of words and goal, each as `task=2`.

    Raises:
        ValueError, FileNotFoundError: a checkpoint, environment or option that does not fit, before anything runs.
    """
    console = console or Console()
    run = prepare(
        checkpoint,
        env=env,
        env_options=env_options,
        sampler=sampler,
        steps=steps,
        spacing=spacing,
        clip=clip,
        sampler_options=sampler_options,
        guidance=guidance,
        act=act,
        batch_size=batch_size,
        device=device,
    )
    policy, choice, executor = run.policy, run.env, run.executor
    out = new_folder(Path(out) if out is not None else default_out(run.folder, policy, choice, seed, episodes))

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
        run.described(seed, sampling_seed) | {"single_observation_latency_ms": alone},
        fps=fps,
    )
    console.print(
        f"results in {out}: results.json"
        + (", videos/" if videos else "")
        + (", contact_sheet.png" if pictures else ""),
        soft_wrap=True,
    )
    return result, out


def probe(
    checkpoint: str | Path,
    probes: str = "language",
    *,
    episodes: int = 100,
    seed: int = 100_000,
    sampling_seed: int = 0,
    num_envs: int = 16,
    num_workers: int | None = None,
    videos: int = 4,
    pictures: int = 64,
    out: str | Path | None = None,
    console: Console | None = None,
    **choices,
) -> tuple[Probes, Path]:
    """Plays the same seeds under other words and without parts of the observation; see probes.py.

    Args:
        probes: `language` for all, or a comma list of probes.PROBES.
        videos, pictures: of each row the first so many seeds.
        choices: env, env_options, sampler, ..., device, as evaluate() takes them.
    Returns:
        What was played, and the folder it was written to.
    Raises:
        ValueError: an unknown probe, an environment without words, a policy that reads none; and as evaluate().
    """
    console = console or Console()
    names = parse_probes(probes)
    run = prepare(checkpoint, **choices)
    policy, choice = run.policy, run.env
    check_can_be_probed(policy, choice.name)
    default = default_out(run.folder, policy, choice, seed, episodes)
    out = new_folder(Path(out) if out is not None else default.with_name(f"probe_{default.name}"))
    described = run.described(seed, sampling_seed)
    fps = ENVIRONMENTS[choice.name][1].fps

    def on_row(row: Row, played: Probes) -> None:
        write_films(row, out, fps)
        write_numbers(played, out, described)

    with progress_bar("{task.description}", console) as bar:

        def on_start(name: str) -> Callable[[Episode], None]:
            task = bar.add_task(f"{name:10}", total=episodes, shown="")
            seen: list[bool] = []

            def on_episode(episode: Episode) -> None:
                seen.append(episode.success)
                bar.update(task, advance=1, shown=f"follows {sum(seen) / len(seen):.0%}")

            return on_episode

        played = play_probes(
            run.executor,
            choice.name,
            dataclasses.asdict(choice.options),
            names,
            seeds=range(seed, seed + episodes),
            num_envs=num_envs,
            num_workers=num_workers,
            sampling_seed=sampling_seed,
            num_films=videos,
            num_pictures=min(pictures, MAX_SCENES),
            on_row=on_row,
            on_start=on_start,
        )
    write_numbers(played, out, described)  # once more: now it is known what was left out
    title = f"{choice.name}: {episodes} seeds under other words, {policy.sampler.name}, {policy.sampler.num_inference_steps} steps"
    console.print(probe_table(played, title))
    for line in explanation(played):
        console.print(line, highlight=False, markup=False)
    if (goals := goal_table(played)) is not None:
        console.print(goals)
    figures = [path.name for path in write_figures(played, out, title)]
    names = ["probes.json", "probes.csv", *figures, *(["videos/"] if videos else [])]
    console.print(f"results in {out}: {', '.join(names)}", soft_wrap=True)
    return played, out


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
    if goals := s.get("goals"):
        table.add_row("follows, of those that reached any goal", *_shown(goals["followed_share"]))
        table.add_row("ignores: reached a goal not named", *_shown(goals["ignores"]))
        if goals["other_score"] is not None:
            table.add_row("best score at a goal not named", f"{goals['other_score']:.3f}", "")
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


def _shown(rate: dict) -> tuple[str, str]:
    if not rate["trials"]:
        return "none did", ""
    low, high = rate["interval_95"]
    return f"{rate['rate']:.1%}", f"{low:.1%} .. {high:.1%}  (Wilson)"
