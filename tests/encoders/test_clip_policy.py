"""A policy that sees and reads: trained from pictures and words, saved, resumed, and run without its first weights."""

import io
import socket
import warnings

import open_clip
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from diffpolicy import train as trainer
from diffpolicy.checkpoint import load_config_of, load_policy
from diffpolicy.config import build_policy, config_from_dict, find_yaml, load_config
from diffpolicy.demos import collect, make_demonstrator
from diffpolicy.encoders.clip_weights import known_models
from diffpolicy.envs import make_env
from diffpolicy.replay import ReplayBuffer
from diffpolicy.spec import DataSpec, FieldSpec
from diffpolicy.training import PolicyModule, parameter_groups
from diffpolicy.windows import load_windows
from tests.test_resume import assert_same_end

TOP, STATE = "observation.images.top", "observation.state"
KEYS = {TOP: TOP, STATE: STATE, "action": "action"}
DENOISERS = {
    "mlp": {"width": 32, "depth": 1, "embed_dim": 8},
    "unet": {"down_dims": [16, 32], "diffusion_step_embed_dim": 16},
    "transformer": {"width": 32, "depth": 1, "num_heads": 2},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Four demonstrations on the table, with pictures, under at least two instructions."""
    path = tmp_path_factory.mktemp("table") / "tabletop.zarr"
    env = make_env("tabletop", pixels=True, image_size=48)
    collect(env, make_demonstrator("tabletop"), out=path, episodes=4, seed=1)
    assert len(ReplayBuffer.open(path).tasks) > 1
    return path


@pytest.fixture(scope="module")
def source():
    """A random CLIP that stands for one trained elsewhere."""
    known_models()
    torch.manual_seed(5)
    return open_clip.create_model("diffpolicy-tiny").eval()


def config_for(store="", *, denoiser="mlp", train=None, **encoder):
    steps = {"steps": 6, "batch_size": 8, "warmup_steps": 1, "val_every": 3, "log_every": 1, "checkpoint_every": 2}
    return config_from_dict(
        {
            "task": "table",
            "data": {"path": str(store), "keys": KEYS, "val_ratio": 0.25},
            "horizons": {"obs": 2, "pred": 8, "act": 4},
            "encoder": {"name": "clip", "token_dim": 32, **encoder},
            "denoiser": {"name": denoiser, **DENOISERS[denoiser]},
            "process": {"name": "flow"},
            "sampler": {"num_inference_steps": 3},
            "train": {**steps, "val_windows": 8, **(train or {})},
        }
    )


def windows_of(store, config):
    (dataset,), spec = load_windows(ReplayBuffer.open(store), KEYS, config.horizons, [[0, 1, 2, 3]])
    return dataset, spec


def fitted_policy(store, config):
    dataset, spec = windows_of(store, config)
    torch.manual_seed(0)
    policy = build_policy(config, spec)
    for key in (STATE, "action"):
        policy.normalizer.fit(key, dataset.arrays[key])
    return policy, dataset


def first_chunk(policy, obs):
    return policy.sample_actions(obs, generators=[torch.Generator().manual_seed(i) for i in range(len(obs["task"]))])


def run(config, runs, **kwargs):
    return trainer.train(config, runs=runs, name="run", device="cpu", console=Console(file=io.StringIO()), **kwargs)


def test_every_window_carries_the_instruction_of_its_episode(store):
    dataset, spec = windows_of(store, config_for())
    batch = dataset.batch(torch.arange(len(dataset)))
    buffer = ReplayBuffer.open(store)
    assert batch.obs["task"] == [buffer.episode_task(int(episode)) for episode in dataset.indices.episode]
    assert set(batch.obs["task"]) == set(spec.tasks)


@pytest.mark.parametrize("image", ["pooled", "patch_tokens"])
@pytest.mark.parametrize("denoiser", DENOISERS)
def test_training_from_pictures_and_words_lowers_the_loss(store, denoiser, image):
    policy, dataset = fitted_policy(store, config_for(denoiser=denoiser, image=image))
    batch = dataset.batch(torch.linspace(0, len(dataset) - 1, 8).long())
    optimiser = torch.optim.Adam(policy.parameters(), lr=2e-3)
    losses = []
    for _ in range(20):
        torch.manual_seed(0)
        loss = policy.train().compute_loss(batch, torch.Generator().manual_seed(0))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    unread = {"proj", "ln_post.weight"} if denoiser == "transformer" and image == "patch_tokens" else set()
    for tower in (policy.encoder.image_tower, policy.encoder.text_tower):
        still = {name for name, p in tower.named_parameters() if p.grad is None or not p.grad.any()}
        assert still <= unread  # who looks at patches does not look at the pooled vector


@pytest.mark.parametrize("denoiser", DENOISERS)
def test_chunk_depends_on_the_picture_and_on_the_words(store, denoiser):
    policy, dataset = fitted_policy(store, config_for(denoiser=denoiser, image="patch_tokens"))
    torch.manual_seed(0)
    for parameter in policy.denoiser.parameters():
        if not parameter.any():  # a head that starts at zero answers zero to everything
            torch.nn.init.normal_(parameter, std=0.1)
    policy.eval()
    obs = dataset.batch(torch.tensor([0, 5])).obs
    before = first_chunk(policy, obs)
    assert torch.equal(first_chunk(policy, obs), before)
    said = first_chunk(policy, obs | {"task": [obs["task"][0], "do something else"]})
    assert torch.equal(said[0], before[0]) and not torch.equal(said[1], before[1])
    picture = obs[TOP].clone()
    picture[1] = 255 - picture[1]
    seen = first_chunk(policy, obs | {TOP: picture})
    moved = (seen - before).abs().amax(dim=(1, 2))
    assert moved[1] > 10 * moved[0] and moved[1] > 0


def test_first_action_of_a_causal_transformer_hears_the_words_and_sees_the_patches_of_its_time(store):
    policy, _ = fitted_policy(store, config_for(denoiser="transformer", image="patch_tokens"))
    assert policy.encoder.cond.num_tokens == 2 + 2 * 64 + 1
    mask = policy.denoiser.memory_mask  # (T_pred, time + 2 frames + patches + words)
    assert mask.shape == (8, 1 + 2 + 2 * 64 + 1)
    seen = [
        *[0.0] * 2,
        float("-inf"),
        *[0.0] * 64,
        *[float("-inf")] * 64,
        0.0,
    ]  # what belongs to the second frame is later
    assert mask[0].tolist() == seen and (mask[1:] == 0).all()


def test_encoder_runs_once_for_a_chunk(store):
    policy, dataset = fitted_policy(store, config_for())
    calls = []
    policy.encoder.register_forward_hook(lambda *_: calls.append(1))
    policy.eval().sample_actions(dataset.batch(torch.arange(3)).obs, num_samples=4)
    assert calls == [1]


def test_trained_run_is_resumed_to_the_bit_and_loads_without_network_and_first_weights(
    store, source, tmp_path, monkeypatch
):
    weights = tmp_path / "clip.safetensors"
    save_file({k: v.contiguous() for k, v in source.state_dict().items()}, weights)
    config = config_for(store, pretrained=str(weights), tuning="last_n", text_tuning="frozen", image="patch_tokens")
    whole = run(config, tmp_path / "whole")
    halves = run(config, tmp_path / "halves", stop_at=3)
    weights.unlink()
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was asked"))
    policy = load_policy(whole)
    assert not torch.equal(policy.encoder.image_tower.proj, source.visual.proj)  # it learnt
    assert torch.equal(policy.encoder.image_tower.conv1.weight, source.visual.conv1.weight)  # it did not
    for name, value in source.transformer.state_dict().items():
        assert torch.equal(policy.encoder.text_tower.transformer.state_dict()[name], value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # in particular: nothing about random weights
        again = load_policy(whole)
    dataset, _ = windows_of(store, config)
    obs = dataset.batch(torch.arange(2)).obs
    assert torch.equal(first_chunk(policy, obs), first_chunk(again, obs))
    assert load_config_of(whole).encoder.options.pretrained == str(weights)  # what it came from is not forgotten
    trainer.train(trainer.load_resume_config(halves), resume=halves, device="cpu", console=Console(file=io.StringIO()))
    assert_same_end(whole, halves)


def test_average_of_a_frozen_tower_is_the_tower(store):
    with pytest.warns(UserWarning, match="keeps random weights"):
        policy, _ = fitted_policy(store, config_for(tuning="frozen"))
    module = PolicyModule(policy, config=config_for().train, seed=0).train()
    assert not module.policy.encoder.image_tower.training and module.policy.training
    groups = parameter_groups(module.policy, 0.1, lr=1e-3)
    towers = {id(p) for name, p in policy.encoder.named_parameters() if "tower" in name}
    assert towers.isdisjoint({id(p) for group in groups for p in group["params"]})
    module._update_ema()
    for a, b in zip(module.ema.encoder.image_tower.parameters(), policy.encoder.image_tower.parameters(), strict=True):
        assert torch.equal(a, b)


def test_tuned_towers_have_a_learning_rate_of_their_own_that_follows_the_schedule(store):
    policy, _ = fitted_policy(store, config_for(denoiser="transformer", lr_scale=0.1))
    config = config_for(train={"lr": 0.01, "warmup_steps": 4}).train
    module = PolicyModule(policy, config=config, seed=0)
    made = module.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    assert [group["initial_lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.01, 0.001])
    assert optimizer.param_groups[2]["weight_decay"] == config.weight_decay
    towers = {id(p) for name, p in policy.encoder.named_parameters() if "tower." in name}
    assert {id(p) for p in optimizer.param_groups[2]["params"]} == towers
    every = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(every) == sorted(id(p) for p in policy.parameters())
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.0025, 0.0025, 0.00025])


def test_store_without_instructions_is_refused_by_name(store):
    policy, dataset = fitted_policy(store, config_for())
    dataset.episode_tasks = None
    batch = dataset.batch(torch.arange(2))
    with pytest.raises(
        ValueError, match=r"observation must have 'task', the instruction that encoder\.text=pooled reads"
    ):
        policy.compute_loss(batch)


@pytest.mark.parametrize(
    ("file", "num_parameters"), [("clip_tiny", 170_816 + 3_268_352), ("clip_vit_b32", 87_849_216 + 63_428_096)]
)
def test_shipped_encoder_stacks_on_a_task_and_builds(file, num_parameters):
    config = load_config(["conf/task/tabletop.yaml", f"conf/encoder/{file}.yaml"])
    fields = {key: FieldSpec(shape=(2,), dtype="float32") for key in KEYS} | {
        TOP: FieldSpec(shape=(96, 96, 3), dtype="uint8")
    }
    with torch.device("meta"):
        encoder = build_policy(config, DataSpec(fields=fields)).encoder
    assert sum(p.numel() for n, p in encoder.named_parameters() if "tower." in n) == num_parameters
    assert find_yaml(f"conf/encoder/{file}.yaml").is_file()


def test_store_without_instructions_is_named_before_any_training(store, tmp_path):
    silent = tmp_path / "silent.zarr"
    source = ReplayBuffer.open(store)
    with ReplayBuffer.create(silent, fields=source.fields, fps=10) as buffer:
        for i in range(4):
            rows = {key: source.read(key)[source.episode_slice(i)] for key in source.keys}
            buffer.append_episode(rows, task="" if i in (1, 3) else "push it")
    with pytest.raises(ValueError, match=r"2 of 4 episodes of .*silent.zarr have no instruction \(the first is 1\)"):
        run(config_for(silent), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    run(config_for(silent, task_dropout=0.1, train={"steps": 2}), tmp_path / "learnt")
