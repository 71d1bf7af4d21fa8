"""The embedded default, end to end: demonstrations, training, rollout, pictures. No GPU, no download."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf
from rich.console import Console

from diffpolicy.config import choose, load_config
from diffpolicy.demos import CollectResult, collect, make_demonstrator
from diffpolicy.envs import make_env
from diffpolicy.progress import progress_bar


def parse_options(options: list[str], flag: str = "--env-option") -> dict:
    """`key=value` texts -> a dict with YAML types."""
    for option in options:
        if "=" not in option:
            raise ValueError(f"{flag} must read key=value, got {option!r}")
    return OmegaConf.to_container(OmegaConf.from_dotlist(options))


def collect_demonstrations(
    env_name: str,
    *,
    out: Path,
    episodes: int,
    seed: int = 0,
    options: dict | None = None,
    demonstrator_options: dict | None = None,
    console: Console | None = None,
) -> CollectResult:
    """Scripted demonstrations of an environment into a store, with a progress bar."""
    choice = choose("env", env_name, options or {})
    demonstrator = make_demonstrator(env_name, **(demonstrator_options or {}))
    env = make_env(env_name, **dataclasses.asdict(choice.options))
    with progress_bar("collect", console) as bar:
        task = bar.add_task("collect", total=episodes, shown="")

        def progress(done: int, wanted: int, failed: int) -> None:
            bar.update(task, completed=done, total=wanted, shown=f"{failed} attempts failed" if failed else "")

        try:
            return collect(env, demonstrator, out=out, episodes=episodes, seed=seed, progress=progress)
        finally:
            env.close()


def quickstart(*, out: Path, demonstrations: int, episodes: int, train_steps: int | None = None) -> Path:
    """Collects (or goes on with what is there), trains anew, rolls out; returns the run folder."""
    from diffpolicy import train as trainer
    from diffpolicy.evaluate import evaluate

    began = time.perf_counter()
    console = Console()
    out = Path(out)
    store = out / "tabletop.zarr"
    console.rule("1 of 3: demonstrations")
    collected = collect_demonstrations(
        "tabletop", out=store, episodes=demonstrations, options={"pixels": False}, console=console
    )
    console.print(f"{store}: {collected.num_episodes} episodes, {collected.num_steps} steps")
    console.rule("2 of 3: training")
    overrides = [f"data.path={store}"]
    if train_steps is not None:
        overrides += [f"train.steps={train_steps}", f"train.warmup_steps={min(100, train_steps)}"]
    config = load_config(["conf/task/tabletop.yaml"], overrides)
    run = trainer.train(config, runs=out, device="cpu", console=console)
    console.rule("3 of 3: rollout on unseen starts")
    _, results = evaluate(run, episodes=episodes, device="cpu", console=console)
    fan = draw_chunks(run, results / "sampled_chunks.png")
    minutes = (time.perf_counter() - began) / 60
    console.print(f"\n{minutes:.1f} minutes in all. Look at:")
    for label, path in (
        ("video", next(iter(sorted((results / "videos").glob("*.mp4"))), results / "videos")),
        ("every episode", results / "contact_sheet.png"),
        ("sampled chunks, both ways round the post", fan),
        ("numbers", results / "results.json"),
    ):
        console.print(f"  {label:42} {path}", soft_wrap=True)
    console.print("\nNext:")
    for command in (
        f"diffpolicy data info {store}",
        f"diffpolicy rollout {run} --episodes 500 --steps 2",
        f"diffpolicy train conf/task/tabletop.yaml conf/denoiser/unet_small.yaml --data {store}",
        f"diffpolicy train conf/task/tabletop.yaml conf/process/ddim.yaml --data {store}",
    ):
        console.print(f"  {command}", soft_wrap=True)
    return run


def draw_chunks(run: Path, out: Path, *, num_samples: int = 48, num_scenes: int = 3, first_seed: int = 100_000) -> Path:
    """Draws many sampled chunks over each of a few start scenes: where the colours part, the policy knows two ways."""
    import torch

    from diffpolicy import plots
    from diffpolicy.checkpoint import load_config_of, load_policy

    policy = load_policy(run)
    choice = load_config_of(run).env
    env = make_env(choice.name, **dataclasses.asdict(choice.options))
    pictures = []
    for seed in range(first_seed, first_seed + num_scenes):
        obs, _ = env.reset(seed=seed)
        stacked = {
            key: torch.from_numpy(np.stack([obs[key]] * policy.horizons.obs))[None]
            for key in policy.spec.fields
            if key.startswith("observation.")
        }
        chunks = policy.sample_actions(
            stacked, num_samples=num_samples, generators=torch.Generator().manual_seed(seed)
        )[0]
        future = chunks[:, policy.horizons.past :].numpy()  # (num_samples, T_pred - past, D_act)
        pictures.append(plots.chunk_fan(env.render(), env.action_to_pixels(future)))
    env.close()
    return plots.write_png(out, plots.side_by_side(pictures))
