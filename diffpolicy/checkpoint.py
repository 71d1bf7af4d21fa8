"""A checkpoint is a folder: model.safetensors (EMA weights and normaliser) and config.json; loading runs no foreign code.

runs/<task>/<name>/checkpoints/step_001000/
    model.safetensors     the policy to use
    config.json           config, data spec, step, metrics
    training_state.ckpt   for exact resume: live weights, optimiser, schedule, loop (may be deleted)
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffpolicy import __version__
from diffpolicy.config import Choice, Config, build_policy, choose, config_from_dict
from diffpolicy.foreign import LinearMap, load_reference_checkpoint, reference_policy_parts
from diffpolicy.policies import DiffusionPolicy
from diffpolicy.processes import SamplerConfig
from diffpolicy.processes.diffusion import DiffusionConfig
from diffpolicy.spec import ACTION, ENVIRONMENT_STATE, IMAGES, STATE, DataSpec, FieldSpec, Horizons, unknown_name

FORMAT_VERSION = 1
WEIGHTS, CONFIG, TRAINING_STATE = "model.safetensors", "config.json", "training_state.ckpt"


def save_policy(
    policy: DiffusionPolicy,
    config: Config,
    path: str | Path,
    *,
    step: int = 0,
    metrics: dict[str, float] | None = None,
    write_more: Callable[[Path], None] | None = None,
) -> Path:
    """Writes a checkpoint folder atomically: it is whole, or it is not there; an older one of that name is kept until then.

    Args:
        write_more: writes further files into the folder before it counts (the training state).
    Raises:
        OSError: disk full or no permission; names the folder, and nothing half-written is left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        save_file({k: v.detach().cpu().contiguous() for k, v in policy.state_dict().items()}, partial / WEIGHTS)
        plain = config.to_dict()
        if (architecture := getattr(policy.encoder, "architecture", None)) is not None:
            plain["encoder"]["architecture"] = (
                architecture  # so that loading needs neither network nor the first weights
            )
        described = {
            "format_version": FORMAT_VERSION,
            "diffpolicy_version": __version__,
            "step": step,
            "metrics": metrics or {},
            "config": plain,
            "spec": dataclasses.asdict(policy.spec),
            "num_parameters": sum(p.numel() for p in policy.parameters()),
        }
        (partial / CONFIG).write_text(json.dumps(described, indent=2))
        if write_more:
            write_more(partial)
        for file in partial.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        old = None
        if path.exists():
            old = path.with_name(f".{path.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        partial.rename(path)
        if old is not None:
            shutil.rmtree(old)
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # torch and safetensors wrap a full disk in their own types
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"checkpoint {path} could not be written: {error}; earlier checkpoints are intact") from error
    return path


def list_checkpoints(run: str | Path) -> list[Path]:
    """Checkpoints of a run folder, oldest first."""
    found = [p for p in (Path(run) / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint folder, or the latest one of a run folder.

    Raises:
        FileNotFoundError: neither is there, saying what was looked for.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    if path.is_file():
        raise ValueError(f"a checkpoint is a folder with {WEIGHTS} and {CONFIG}, got the file {path}")
    if (path / CONFIG).exists() or (path / WEIGHTS).exists():
        return path
    checkpoints = list_checkpoints(path)
    if not checkpoints:
        raise FileNotFoundError(f"{path} holds no checkpoint: neither {CONFIG} and {WEIGHTS}, nor checkpoints/step_*")
    return checkpoints[-1]


def read_description(path: str | Path) -> dict:
    """config.json of a checkpoint, checked.

    Raises:
        ValueError: missing, not JSON, or of a format this version does not know.
    """
    file = find_checkpoint(path) / CONFIG
    try:
        described = json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(f"checkpoint {file.parent} is incomplete: {CONFIG} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(described, dict) or not {"format_version", "config", "spec"} <= described.keys():
        raise ValueError(f"{file} is not a diffpolicy checkpoint: it needs format_version, config and spec")
    if described["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format version {described['format_version']}, this diffpolicy ({__version__}) reads {FORMAT_VERSION}"
        )
    for part in ("config", "spec"):
        if not isinstance(described[part], dict):
            raise ValueError(f"{file} is damaged: {part} must be a mapping, got {described[part]!r}")
    return described


def load_config_of(path: str | Path) -> Config:
    """The Config that a checkpoint was trained with."""
    return config_from_dict(read_description(path)["config"])


def load_policy(path: str | Path, device: str | torch.device = "cpu") -> DiffusionPolicy:
    """The policy to use, in eval mode, from a checkpoint folder or the latest of a run folder.

    Raises:
        FileNotFoundError, ValueError: missing, truncated or foreign files; weights that do not match, by name.
    """
    folder = find_checkpoint(path)
    described = read_description(folder)
    try:
        spec = DataSpec(**described["spec"])
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG} is damaged: spec: {error}") from error
    if ACTION not in spec.fields:
        raise ValueError(f"{folder / CONFIG} is damaged: spec must have {ACTION!r}, got only {sorted(spec.fields)}")
    config = config_from_dict(described["config"])
    if getattr(config.encoder.options, "weights", None) is not None:  # they are in the checkpoint: read no other file
        options = dataclasses.replace(config.encoder.options, weights=None)
        config = dataclasses.replace(config, encoder=Choice(config.encoder.name, options))
    policy = build_policy(config, spec)
    try:
        weights = load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise ValueError(f"checkpoint {folder} is incomplete: {WEIGHTS} is missing") from None
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged or truncated: {error}") from error
    wanted = policy.state_dict()
    missing, surplus = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    if missing or surplus:
        raise ValueError(
            f"{folder / WEIGHTS} does not fit its config: missing {missing[:3]}, unexpected {surplus[:3]}; if nobody edited it, "
            "another version of diffpolicy wrote it: load it with that one, or train anew"
        )
    for name, value in weights.items():
        if value.shape != wanted[name].shape:
            raise ValueError(
                f"{folder / WEIGHTS}: {name} has shape {tuple(value.shape)}, the config says {tuple(wanted[name].shape)}"
            )
    policy.load_state_dict(weights)
    policy.normalizer.require_fitted()
    return policy.to(device).eval()


def resolve_device(device: str) -> str:
    """cpu, cuda or mps; auto is cuda where there is a GPU, else cpu.

    Raises:
        ValueError: unknown, or not on this machine.
    """
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return "cuda" if present["cuda"] else "cpu"
    kind, _, index = device.partition(":")
    if kind not in present or (index and not index.isdecimal()):
        raise unknown_name("--device", device, ("auto", *present))
    if not present[kind] or (kind == "cuda" and index and int(index) >= torch.cuda.device_count()):
        raise ValueError(
            f"--device {device} is not on this machine (or torch was installed without it); use --device auto"
        )
    return device


REFERENCE_SCHEDULES = {"squaredcos_cap_v2": "cosine", "linear": "linear", "scaled_linear": "scaled_linear"}
"""diffusers' beta_schedule -> our schedule of the same betas."""


def import_reference_checkpoint(file: str | Path, out: str | Path, *, roles: dict[str, str] | None = None) -> Path:
    """A .ckpt of the original Diffusion Policy -> a checkpoint folder of ours; nothing in it is executed.

    Args:
        roles: the checkpoint's observation names -> our roles; several roles share one vector as `role:numbers,...`.
            Known without it are those of Push-T: `obs` (9 keypoints, then the pusher), `image` and `agent_pos`.
    Raises:
        ValueError: not such a checkpoint, one that would run code, or a variant that has no counterpart here.
    """
    parts = reference_policy_parts(load_reference_checkpoint(file))
    looks_like_pusht = parts.action_dim == 2 and (
        parts.state_shapes == {"obs": (20,)}
        or set(parts.state_shapes) | set(parts.image_shapes) == {"image", "agent_pos"}
    )
    if roles is None and looks_like_pusht:
        roles = {"obs": f"{ENVIRONMENT_STATE}:18,{STATE}:2", "image": f"{IMAGES}top", "agent_pos": STATE}
    roles = roles or {}
    fields: dict[str, FieldSpec] = {}
    statistics = {ACTION: parts.normalizer["action"]}
    for name, shape in parts.image_shapes.items():
        fields[roles.get(name, IMAGES + name)] = FieldSpec(shape=shape, dtype="uint8")
    for name, shape in parts.state_shapes.items():
        scale, offset, start = parts.normalizer[name].scale, parts.normalizer[name].offset, 0
        for role in roles.get(name, STATE if len(parts.state_shapes) == 1 else f"observation.{name}").split(","):
            role, _, size = role.partition(":")
            stop = start + int(size) if size else shape[0]
            fields[role] = FieldSpec(shape=(stop - start,), dtype="float32")
            statistics[role] = LinearMap(scale[start:stop], offset[start:stop])
            start = stop
        if start != shape[0]:
            raise ValueError(f"the roles of {name!r} cover {start} of its {shape[0]} numbers")
    fields[ACTION] = FieldSpec(shape=(parts.action_dim,), dtype="float32")
    scheduler = parts.noise_scheduler
    if parts.beta_schedule not in REFERENCE_SCHEDULES:
        raise unknown_name(f"{file}: beta_schedule", parts.beta_schedule, REFERENCE_SCHEDULES)
    if parts.beta_schedule != "squaredcos_cap_v2" and (scheduler.get("beta_start"), scheduler.get("beta_end")) != (
        1e-4,
        0.02,
    ):
        raise ValueError(
            f"{file}: beta_start and beta_end must be 1e-4 and .02 for {parts.beta_schedule}, got {scheduler}"
        )
    config = Config(
        task="imported",
        horizons=Horizons(obs=parts.obs_horizon, pred=parts.pred_horizon, act=parts.act_horizon, past=parts.past),
        encoder=Choice(parts.encoder, parts.encoder_config),
        denoiser=Choice(parts.kind, parts.denoiser_config),
        process=Choice(
            "diffusion",
            DiffusionConfig(
                schedule=REFERENCE_SCHEDULES[parts.beta_schedule],
                num_train_timesteps=parts.num_train_timesteps,
                prediction_type=parts.prediction_type,
            ),
        ),
        sampler=SamplerConfig(
            name="ddpm",
            num_inference_steps=parts.num_inference_steps,
            clip_sample=1.0 if scheduler.get("clip_sample", True) else None,
        ),
        env=choose("env", "pusht", {"pixels": bool(parts.image_shapes)}) if looks_like_pusht else None,
    )
    policy = build_policy(config, DataSpec(fields=fields, fps=10.0 if looks_like_pusht else None))
    policy.denoiser.load_state_dict(parts.denoiser_state)
    if parts.encoder_state:
        policy.encoder.load_state_dict(parts.encoder_state)
    for role, known in statistics.items():
        policy.normalizer.set(role, known.scale, known.offset)
    policy.normalizer.require_fitted()
    return save_policy(policy, config, out, metrics={})
