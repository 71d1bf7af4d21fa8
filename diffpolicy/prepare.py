"""A checkpoint made ready to play: loaded, with the sampler, environment and executor that were chosen, and checked.

Whatever does not fit is refused here, before a folder or a progress bar is made.
"""

from __future__ import annotations

import dataclasses
import datetime
import platform
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from diffpolicy import __version__
from diffpolicy.checkpoint import find_checkpoint, load_policy, read_description, resolve_device
from diffpolicy.config import Choice, changed_guidance, changed_sampler, choose, config_from_dict, env_for
from diffpolicy.envs import ENVIRONMENTS
from diffpolicy.executors import EXECUTORS, RecedingHorizon
from diffpolicy.policies import DiffusionPolicy
from diffpolicy.rollout import check_fit


@dataclass(frozen=True)
class Prepared:
    """A checkpoint that is ready to play."""

    folder: Path
    step: int | None
    policy: DiffusionPolicy
    env: Choice
    executor: RecedingHorizon
    device: str

    def described(self, seed: int, sampling_seed: int) -> dict:
        """How results came about, stored with them."""
        return {
            "checkpoint": str(self.folder),
            "step": self.step,
            "env": self.env.to_dict(),
            "seed": seed,
            "sampling_seed": sampling_seed,
            "sampler": dataclasses.asdict(self.policy.sampler),
            "guidance": dataclasses.asdict(self.policy.guidance),
            "labels": [finding.label for finding in self.policy.findings()],
            "horizons": dataclasses.asdict(self.policy.horizons),
            "device": torch.cuda.get_device_name()
            if self.device.startswith("cuda")
            else platform.processor() or platform.machine(),
            "torch_threads": torch.get_num_threads(),
            "diffpolicy": __version__,
            "command": sys.argv,
            "finished": datetime.datetime.now().isoformat(timespec="seconds"),
        }


def prepare(
    checkpoint: str | Path,
    *,
    env: str | None = None,
    env_options: Sequence[str] = (),
    sampler: str | None = None,
    steps: int | None = None,
    spacing: str | None = None,
    clip: str | float | None = None,
    sampler_options: Sequence[str] = (),
    guidance: Sequence[str] = (),
    act: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
) -> Prepared:
    """Loads a checkpoint and applies what was chosen; everything that does not fit is refused here."""
    folder = find_checkpoint(checkpoint)
    device = resolve_device(device)
    policy = load_policy(folder, device)
    described = read_description(folder)
    config = config_from_dict(described["config"])
    choice = _choose_env(config.env, env, env_options)
    choice = env_for(choice, policy.spec)  # without its camera it could not act
    options = [
        f"{key}={value}"
        for key, value in (
            ("name", sampler),
            ("num_inference_steps", steps),
            ("spacing", spacing),
            ("clip_sample", _parse_clip(clip)),
        )
        if value is not None
    ]
    policy.use_sampler(changed_sampler(policy.sampler, [*options, *sampler_options]))
    if steps is not None and policy.sampler.num_inference_steps != steps:
        calls = policy.sampler.num_inference_steps
        warnings.warn(f"--steps {steps} is ignored: {policy.sampler.name} always makes {calls}", stacklevel=3)
    policy.use_guidance(changed_guidance(policy.guidance, guidance))
    if act is not None:
        policy.horizons = dataclasses.replace(policy.horizons, act=act)
    batch_size = batch_size or (64 if device.startswith("cuda") else 16)
    executor = EXECUTORS["receding_horizon"](policy, batch_size=batch_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rollout() says them; here: before a folder or a bar is made
        check_fit(policy.spec, choice.name, dataclasses.asdict(choice.options), policy.droppable)
    return Prepared(folder, described.get("step"), policy, choice, executor, device)


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


def default_out(folder: Path, policy: DiffusionPolicy, env: Choice, seed: int, episodes: int) -> Path:
    """Where results go when nobody says: rollouts/ beside the checkpoints, by what was played."""
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    sampler = policy.sampler
    return (
        run
        / "rollouts"
        / f"{env.name}_{folder.name}_{sampler.name}-{sampler.num_inference_steps}_seed{seed}x{episodes}"
    )


def new_folder(path: Path) -> Path:
    """The path, or path-2, path-3, ... where results stand already: earlier results are never overwritten."""
    chosen, number = path, 2
    while chosen.exists() and any(chosen.iterdir()):
        chosen, number = path.with_name(f"{path.name}-{number}"), number + 1
    chosen.mkdir(parents=True, exist_ok=True)
    return chosen
