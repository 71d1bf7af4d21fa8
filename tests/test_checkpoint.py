"""Checkpoints: what is loaded acts as what was saved, damage has one line, and a failed write costs nothing."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from safetensors.torch import load_file, save_file

from diffpolicy.checkpoint import (
    find_checkpoint,
    import_reference_checkpoint,
    list_checkpoints,
    load_config_of,
    load_policy,
    read_description,
    save_policy,
)
from diffpolicy.config import Choice, build_policy, choose
from diffpolicy.denoisers import DENOISERS
from diffpolicy.denoisers.transformer import TransformerConfig
from diffpolicy.denoisers.unet import UnetConfig
from diffpolicy.encoders.resnet import ResnetConfig
from diffpolicy.foreign import load_reference_checkpoint, reference_policy_parts
from diffpolicy.processes import SamplerConfig, noise_generators
from diffpolicy.spec import Condition, ConditionSpec, DataSpec, FieldSpec, Horizons, frame_tokens
from tests import test_foreign as foreign
from tests.conftest import TINY_SPEC, tiny_config_for

STATE, WORLD = "observation.state", "observation.environment_state"
OBS = {
    STATE: torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(0)),
    WORLD: torch.rand(3, 2, 3, generator=torch.Generator().manual_seed(1)),
}


def chunk_of(policy) -> torch.Tensor:
    return policy.sample_actions(OBS, generators=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path: Path, tiny_policy) -> Path:
    """A checkpoint of tiny_policy."""
    return save_policy(tiny_policy, tiny_config_for(), tmp_path / "ckpt", step=12, metrics={"val/loss": 0.5})


# --- there and back ---


@pytest.mark.parametrize("process", ["flow", "diffusion"])
@pytest.mark.parametrize(
    "denoiser",
    [
        {"name": "mlp", "width": 16, "depth": 1, "embed_dim": 8},
        {"name": "unet", "down_dims": [16, 32], "diffusion_step_embed_dim": 8},
        {"name": "transformer", "width": 16, "depth": 1, "num_heads": 2},
    ],
    ids=lambda d: d["name"],
)
def test_loaded_policy_gives_chunks_equal_to_the_last_bit(tmp_path, make_policy, denoiser, process):
    sections = {"denoiser": denoiser, "process": {"name": process}}
    policy = make_policy(**sections)
    loaded = load_policy(save_policy(policy, tiny_config_for(**sections), tmp_path / "ckpt"))
    assert torch.equal(chunk_of(loaded), chunk_of(policy))
    assert not loaded.training
    assert (loaded.spec, loaded.horizons, loaded.sampler) == (policy.spec, policy.horizons, policy.sampler)


def test_description_says_what_the_checkpoint_is(saved, tiny_policy):
    described = read_description(saved)
    assert (described["step"], described["metrics"]) == (12, {"val/loss": 0.5})
    assert described["num_parameters"] == sum(p.numel() for p in tiny_policy.parameters())
    assert load_config_of(saved) == tiny_config_for()
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_statistics_travel_with_the_weights(saved, tiny_policy):
    loaded = load_policy(saved)
    for key, value in tiny_policy.normalizer.state_dict().items():
        assert torch.equal(loaded.normalizer.state_dict()[key], value)


def test_pretrained_weights_are_not_looked_for_again(tmp_path):
    fields = {
        "observation.images.top": FieldSpec(shape=(40, 48, 3), dtype="uint8"),
        "action": FieldSpec(shape=(2,), dtype="float32"),
    }
    config = tiny_config_for(encoder={"name": "resnet", "feature_dim": 8, "num_keypoints": 4})
    policy = build_policy(config, DataSpec(fields=fields))
    policy.normalizer.fit("action", torch.rand(9, 2))
    gone = dataclasses.replace(config.encoder.options, weights=str(tmp_path / "gone.pth"))
    save_policy(policy, dataclasses.replace(config, encoder=Choice("resnet", gone)), tmp_path / "ckpt")
    load_policy(tmp_path / "ckpt")


# --- finding ---


def test_run_folder_stands_for_its_latest_checkpoint(tmp_path, tiny_policy):
    for step in (900, 1000, 10):
        save_policy(tiny_policy, tiny_config_for(), tmp_path / "checkpoints" / f"step_{step}", step=step)
    (tmp_path / "checkpoints" / "step_9999.old").mkdir()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_10", "step_900", "step_1000"]
    assert find_checkpoint(tmp_path).name == "step_1000"
    assert find_checkpoint(tmp_path / "checkpoints" / "step_10").name == "step_10"
    load_policy(tmp_path)


def test_what_is_no_checkpoint_is_named(tmp_path, saved):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        find_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no checkpoint"):
        find_checkpoint(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"a checkpoint is a folder .* got the file .*model.safetensors"):
        find_checkpoint(saved / "model.safetensors")


# --- damage ---


def edit_description(saved: Path, **changes) -> None:
    described = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**described, **changes}))


def edit_config(saved: Path, **sections) -> None:
    edit_description(saved, config={**json.loads((saved / "config.json").read_text())["config"], **sections})


def cut(file: Path, keep: float) -> None:
    os.truncate(file, int(file.stat().st_size * keep))


def drop_statistics(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    weights["normalizer.action:scale"] = torch.full((2,), float("nan"))
    save_file(weights, saved / "model.safetensors")


def rename_weight(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    weights["other"] = weights.pop("denoiser.head.bias")
    save_file(weights, saved / "model.safetensors")


DAMAGE = {
    "weights empty": (lambda s: cut(s / "model.safetensors", 0), "model.safetensors is damaged or truncated"),
    "weights cut in the header": (lambda s: cut(s / "model.safetensors", 0.02), "is damaged or truncated"),
    "weights cut in half": (lambda s: cut(s / "model.safetensors", 0.5), "is damaged or truncated"),
    "weights cut at the end": (lambda s: cut(s / "model.safetensors", 0.999), "is damaged or truncated"),
    "weights missing": (lambda s: (s / "model.safetensors").unlink(), "incomplete: model.safetensors is missing"),
    "weights foreign": (lambda s: (s / "model.safetensors").write_bytes(b"PK\3\4" * 50), "is damaged or truncated"),
    "weights renamed": (rename_weight, r"missing \['denoiser.head.bias'\], unexpected \['other'\]"),
    "weights of another width": (
        lambda s: edit_config(s, denoiser={"name": "mlp", "width": 32, "depth": 1, "embed_dim": 8}),
        r"has shape \(.*\), the config says \(",
    ),
    "weights of another network": (
        lambda s: edit_config(s, denoiser={"name": "unet"}),
        "does not fit its config: missing .* another version of diffpolicy wrote it",
    ),
    "statistics missing": (drop_statistics, r"statistics are missing for \['action'\]"),
    "description missing": (lambda s: (s / "config.json").unlink(), "incomplete: config.json is missing"),
    "description cut": (lambda s: cut(s / "config.json", 0.5), "config.json is damaged"),
    "description binary": (lambda s: (s / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json is damaged"),
    "description of another library": (
        lambda s: (s / "config.json").write_text('{"model_type": "act"}'),
        "is not a diffpolicy checkpoint: it needs format_version, config and spec",
    ),
    "description a list": (lambda s: (s / "config.json").write_text("[]"), "is not a diffpolicy checkpoint"),
    "version of the future": (
        lambda s: edit_description(s, format_version=99),
        r"has format version 99, this diffpolicy \(.*\) reads 1",
    ),
    "config with an unknown key": (lambda s: edit_config(s, denoizer={}), "Did you mean 'denoiser'"),
    "config no mapping": (
        lambda s: edit_description(s, config=3),
        "config.json is damaged: config must be a mapping, got 3",
    ),
    "spec with an unknown key": (
        lambda s: edit_description(s, spec={"fields": {}, "x": 1}),
        "config.json is damaged: spec",
    ),
    "spec no mapping": (lambda s: edit_description(s, spec=[1]), "config.json is damaged: spec"),
    "fields no mapping": (lambda s: edit_description(s, spec={"fields": [1]}), "config.json is damaged: spec"),
    "spec without an action": (lambda s: edit_description(s, spec={"fields": {}}), "config.json is damaged: spec"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_refused_in_one_line(saved, damage):
    change, message = DAMAGE[damage]
    change(saved)
    with pytest.raises(ValueError, match=message) as caught:
        load_policy(saved)
    assert "\n" not in str(caught.value)


# --- writing ---


@pytest.mark.parametrize("where", ["weights", "description", "more"])
def test_failed_write_keeps_the_old_checkpoint_and_leaves_nothing_behind(saved, monkeypatch, make_policy, where):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    other, write_more = make_policy(), None
    if where == "weights":
        monkeypatch.setattr("diffpolicy.checkpoint.save_file", full)
    elif where == "description":
        monkeypatch.setattr(Path, "write_text", full)
    else:
        write_more = full
    with pytest.raises(OSError, match=r"ckpt could not be written: .*No space left.*; earlier checkpoints are intact"):
        save_policy(other, tiny_config_for(), saved, step=13, write_more=write_more)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == ["ckpt"]


def test_checkpoint_counts_only_once_everything_is_in_it(tmp_path, tiny_policy):
    target, seen = tmp_path / "ckpt", []

    def write_more(folder: Path) -> None:
        seen.append((folder != target, target.exists(), sorted(p.name for p in folder.iterdir())))
        (folder / "training_state.ckpt").write_bytes(b"state")

    save_policy(tiny_policy, tiny_config_for(), target, write_more=write_more)
    assert seen == [(True, False, ["config.json", "model.safetensors"])]
    assert (target / "training_state.ckpt").read_bytes() == b"state"


def test_writing_again_replaces_the_checkpoint_and_what_a_killed_writer_left(saved, tiny_policy):
    leftover = saved.parent / ".ckpt.partial"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    with torch.no_grad():
        tiny_policy.denoiser.head.bias += 1
    save_policy(tiny_policy, tiny_config_for(), saved, step=13)
    assert read_description(saved)["step"] == 13
    assert torch.equal(chunk_of(load_policy(saved)), chunk_of(tiny_policy))
    assert [p.name for p in saved.parent.iterdir()] == ["ckpt"]


# --- reference checkpoints ---


def reference_chunk(network, scaling, obs, *, horizon: int) -> torch.Tensor:
    """What the reference does with its checkpoint: 100 stock DDPM steps on noise predictions, clipped."""
    generator = torch.Generator().manual_seed(0)
    condition = obs * scaling["obs"].scale + scaling["obs"].offset  # (B, T_obs, D_state)
    condition = Condition(global_cond=condition.flatten(1), tokens=condition)
    scheduler = DDPMScheduler(**{k: v for k, v in foreign.SCHEDULER.items() if not k.startswith("_")})
    scheduler.set_timesteps(100)
    x_t = torch.randn(len(obs), horizon, len(scaling["action"].scale), generator=generator)
    fresh = noise_generators(generator)  # ours keeps the noise on the way apart from the initial noise
    with torch.no_grad():
        for k in scheduler.timesteps:
            noise = network(x_t, k.float().expand(len(obs)), condition)
            x_t = scheduler.step(noise, k, x_t, generator=fresh).prev_sample
    return (x_t - scaling["action"].offset) / scaling["action"].scale


def write_reference(path: Path, kind: str, *, obs_dim: int, action_dim: int) -> torch.nn.Module:
    """A low-dimensional policy in the reference's format, with statistics that matter; returns its denoiser."""
    small = {
        "unet": UnetConfig(down_dims=(16, 32), kernel_size=3, n_groups=4, diffusion_step_embed_dim=16),
        "transformer": TransformerConfig(width=16, depth=1, num_heads=4, dropout=0.3),
    }[kind]
    cond = ConditionSpec(global_dim=2 * obs_dim, groups=frame_tokens(2), token_dim=obs_dim)
    torch.manual_seed(0)
    network = DENOISERS[kind][1](small, action_dim=action_dim, pred_horizon=8, cond=cond).eval()
    state = foreign.policy_state(network, obs=obs_dim, action=action_dim)
    for i, (key, size) in enumerate((("obs", obs_dim), ("action", action_dim))):
        state[f"normalizer.params_dict.{key}.scale"] = torch.linspace(0.5, 2 + i, size)
        state[f"normalizer.params_dict.{key}.offset"] = torch.linspace(-1, 1 + i, size)
    cfg = foreign.unet_cfg(obs_dim=obs_dim) if kind == "unet" else foreign.transformer_cfg(obs_dim=obs_dim)
    foreign.save(path, cfg, state)
    return network


@pytest.mark.parametrize("kind", ["unet", "transformer"])
def test_imported_pusht_policy_acts_as_the_reference_would(tmp_path, kind):
    network = write_reference(tmp_path / "latest.ckpt", kind, obs_dim=20, action_dim=2)
    scaling = reference_policy_parts(load_reference_checkpoint(tmp_path / "latest.ckpt")).normalizer
    policy = load_policy(import_reference_checkpoint(tmp_path / "latest.ckpt", tmp_path / "imported"))
    assert policy.horizons == Horizons(obs=2, pred=8, act=4, past=1)
    assert policy.spec.state_keys == (WORLD, STATE) and policy.spec.fps == 10
    assert load_config_of(tmp_path / "imported").env == choose("env", "pusht")
    obs = torch.rand(3, 2, 20)
    ours = policy.sample_actions(
        {WORLD: obs[..., :18], STATE: obs[..., 18:]}, generators=torch.Generator().manual_seed(0)
    )
    theirs = reference_chunk(network, scaling, obs, horizon=8)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_imported_policy_may_be_sampled_in_fewer_steps(tmp_path):
    write_reference(tmp_path / "latest.ckpt", "unet", obs_dim=20, action_dim=2)
    policy = load_policy(import_reference_checkpoint(tmp_path / "latest.ckpt", tmp_path / "imported"))
    policy.use_sampler(SamplerConfig(name="ddim", num_inference_steps=5))
    obs = {WORLD: torch.rand(1, 2, 18), STATE: torch.rand(1, 2, 2)}
    assert policy.sample_actions(obs).shape == (1, 8, 2)


def test_imported_policy_of_another_task_takes_our_names_of_its_observations(tmp_path):
    write_reference(tmp_path / "latest.ckpt", "unet", obs_dim=5, action_dim=3)
    plain = load_policy(import_reference_checkpoint(tmp_path / "latest.ckpt", tmp_path / "plain"))
    assert {k: f.shape for k, f in plain.spec.fields.items()} == {STATE: (5,), "action": (3,)}
    assert load_config_of(tmp_path / "plain").env is None
    roles = {"obs": "observation.arm:3,observation.gripper:2"}
    split = load_policy(import_reference_checkpoint(tmp_path / "latest.ckpt", tmp_path / "split", roles=roles))
    obs = torch.rand(2, 2, 5)
    parts = {"observation.arm": obs[..., :3], "observation.gripper": obs[..., 3:]}
    chunks = [
        policy.sample_actions(seen, generators=torch.Generator().manual_seed(0))
        for policy, seen in ((plain, {STATE: obs}), (split, parts))
    ]
    assert torch.equal(*chunks)
    with pytest.raises(ValueError, match="the roles of 'obs' cover 4 of its 5 numbers"):
        import_reference_checkpoint(tmp_path / "latest.ckpt", tmp_path / "x", roles={"obs": "observation.arm:4"})


def test_imported_image_policy_sees_what_the_saved_one_saw(tmp_path):
    encoder, state = foreign.image_checkpoint()
    foreign.save(tmp_path / "latest.ckpt", foreign.image_cfg(), state)
    policy = load_policy(import_reference_checkpoint(tmp_path / "latest.ckpt", tmp_path / "imported"))
    assert isinstance(load_config_of(tmp_path / "imported").encoder.options, ResnetConfig)
    agent = "observation.agent_pos" if "observation.agent_pos" in policy.spec.fields else STATE
    images, position = torch.randint(0, 256, (2, 2, 48, 56, 3), dtype=torch.uint8), torch.rand(2, 2, 2)
    got = policy.encode({"observation.images.image": images, agent: position})
    seen = {"observation.images.image": images, STATE: policy.normalizer.normalize(agent, position)}
    assert torch.equal(got.global_cond, encoder(seen).global_cond)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule must be one of"),
        ({"beta_schedule": "linear", "beta_end": 0.05}, "beta_start and beta_end must be 1e-4 and .02 for linear"),
    ],
)
def test_noise_schedule_that_we_would_get_wrong_is_refused(tmp_path, scheduler, message):
    network = write_reference(tmp_path / "latest.ckpt", "unet", obs_dim=20, action_dim=2)
    cfg = foreign.unet_cfg(obs_dim=20, noise_scheduler={**foreign.SCHEDULER, **scheduler})
    foreign.save(tmp_path / "latest.ckpt", cfg, foreign.policy_state(network, obs=20, action=2))
    with pytest.raises(ValueError, match=message):
        import_reference_checkpoint(tmp_path / "latest.ckpt", tmp_path / "imported")
    assert not (tmp_path / "imported").exists()


def test_checkpoint_that_would_run_code_is_refused(tmp_path):
    foreign.save(
        tmp_path / "evil.ckpt", {}, {"x": torch.zeros(1)}, cfg=foreign.Hostile(os.system, f"touch {tmp_path / 'ran'}")
    )
    with pytest.raises(ValueError, match="which is not plain data; refused, and not run"):
        import_reference_checkpoint(tmp_path / "evil.ckpt", tmp_path / "imported")
    assert not (tmp_path / "ran").exists()


def test_spec_of_the_checkpoint_is_that_of_the_policy(saved):
    assert load_policy(saved).spec == TINY_SPEC
