"""What Lightning is given: learning rate, averages, order of windows, optimiser groups, the losses it sees."""

import copy

import numpy as np
import pytest
import torch

from diffpolicy.config import build_policy
from diffpolicy.replay import ReplayBuffer
from diffpolicy.spec import Horizons
from diffpolicy.training import (
    BatchStream,
    FixedBatches,
    PolicyModule,
    TrainConfig,
    cosine_warmup,
    ema_decay,
    parameter_groups,
    step_seed,
)
from diffpolicy.windows import load_windows
from tests.conftest import tiny_config_for

TRANSFORMER = {"name": "transformer", "width": 16, "depth": 2, "num_heads": 2}


@pytest.fixture
def dataset(tiny_store):
    config = tiny_config_for(tiny_store)
    (windows,), _ = load_windows(
        ReplayBuffer.open(tiny_store), config.data.keys, Horizons(obs=2, pred=8, act=4), [range(6)]
    )
    return windows


def module_for(store, seed=0, **sections) -> tuple[PolicyModule, object]:
    """A PolicyModule on all six episodes of the tiny store, with its windows."""
    config = tiny_config_for(store, **sections)
    (windows,), spec = load_windows(ReplayBuffer.open(store), config.data.keys, config.horizons, [range(6)])
    torch.manual_seed(seed)
    policy = build_policy(config, spec)
    for key in policy.normalizer.shapes:
        policy.normalizer.fit(key, windows.arrays[key])
    return PolicyModule(policy, config=config.train, seed=seed), windows


# the reference's numbers, six digits
@pytest.mark.parametrize(
    ("update", "decay"),
    [
        (0, 0.0),
        (1, 0.0),
        (2, 0.405396),
        (3, 0.561309),
        (10, 0.822172),
        (100, 0.968377),
        (1000, 0.994377),
        (10_000, 0.999),
    ],
)
def test_ema_decay_warms_up_as_in_diffusion_policy(update, decay):
    assert ema_decay(update, power=0.75, maximum=0.9999) == pytest.approx(decay, abs=5e-7)


def test_ema_decay_stops_at_its_maximum():
    assert ema_decay(10**9, power=0.75, maximum=0.9999) == 0.9999
    assert ema_decay(3, power=0.75, maximum=0.5) == 0.5


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 0.0), (1, 0.1), (5, 0.5), (10, 1.0), (35, 0.8535534), (60, 0.5), (110, 0.0), (200, 0.0)]
)
def test_learning_rate_rises_for_ten_steps_then_falls_as_half_a_cosine(step, factor):
    assert cosine_warmup(step, warmup_steps=10, total_steps=110) == pytest.approx(factor, abs=1e-7)


def test_learning_rate_without_warmup_starts_at_its_peak():
    assert cosine_warmup(0, warmup_steps=0, total_steps=10) == 1.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "train.steps must be at least 1, got 0"),
        ({"checkpoint_every": 0}, "train.checkpoint_every must be at least 1"),
        ({"steps": 5, "warmup_steps": 6}, r"train.warmup_steps must be in \[0, train.steps = 5\], got 6"),
        ({"lr": 0.0}, "train.lr must be positive"),
        ({"grad_clip": 0.0}, "train.grad_clip must be positive, or null for no clipping, got 0.0"),
        ({"weight_decay": -1.0}, "train.weight_decay must not be negative, got -1.0"),
        ({"betas": (0.9, 1.0)}, r"train.betas must lie in \[0, 1\), got \(0.9, 1.0\)"),
        ({"ema_power": -1.0}, "train.ema_power must be positive, got -1.0"),
        ({"ema_max": 1.0}, r"train.ema_max must be in \[0, 1\), got 1.0"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**wrong)


def test_step_seeds_differ_between_seeds_steps_and_ranks():
    seeds = {step_seed(s, n, r) for s in range(3) for n in range(50) for r in range(3)}
    assert len(seeds) == 450


def test_an_epoch_shows_every_window_at_most_once_and_the_next_in_another_order(dataset):
    stream = BatchStream(dataset, batch_size=16, seed=3)
    epochs = [
        torch.cat([stream.windows(e * stream.batches_per_epoch + i) for i in range(stream.batches_per_epoch)])
        for e in range(2)
    ]
    for epoch in epochs:
        assert len(epoch) == 16 * (len(dataset) // 16) == len(set(epoch.tolist()))
    assert epochs[0].tolist() != epochs[1].tolist()


def test_a_stream_started_late_goes_on_where_another_was(dataset):
    whole = iter(BatchStream(dataset, batch_size=16, seed=3))
    seen = [next(whole) for _ in range(12)]  # three epochs
    late = iter(BatchStream(dataset, batch_size=16, seed=3, start_step=7))
    for before in seen[7:]:
        after = next(late)
        assert torch.equal(before.window, after.window) and torch.equal(before.actions, after.actions)


def test_windows_of_a_step_do_not_depend_on_which_step_was_asked_before(dataset):
    stream = BatchStream(dataset, batch_size=16, seed=3)
    forward = [stream.windows(i).tolist() for i in range(9)]
    assert [stream.windows(i).tolist() for i in reversed(range(9))] == forward[::-1]


def test_ranks_see_disjoint_windows_that_together_are_the_permutation(dataset):
    ranks = [BatchStream(dataset, batch_size=8, seed=3, rank=r, world_size=2) for r in range(2)]
    alone = BatchStream(dataset, batch_size=16, seed=3)
    for step in range(2 * ranks[0].batches_per_epoch):
        first, second = (stream.windows(step).tolist() for stream in ranks)
        assert not set(first) & set(second)
        assert first + second == alone.windows(step).tolist()


def test_a_batch_larger_than_the_dataset_is_the_whole_dataset(dataset):
    stream = BatchStream(dataset, batch_size=10_000, seed=0)
    assert stream.batches_per_epoch == 1
    assert sorted(stream.windows(5).tolist()) == list(range(len(dataset)))


def test_validation_windows_are_spread_evenly_and_stay_the_same(dataset):
    batches = FixedBatches(dataset, num_windows=5, batch_size=2)
    shown = [torch.cat([b.window for b in batches]).tolist() for _ in range(2)]
    assert len(batches) == 3 and shown[0] == shown[1]
    assert shown[0] == np.linspace(0, len(dataset) - 1, 5).round().tolist()


def test_more_validation_windows_than_there_are_show_each_once(dataset):
    batches = FixedBatches(dataset, num_windows=10_000, batch_size=7)
    assert torch.cat([b.window for b in batches]).tolist() == list(range(len(dataset)))


def test_weight_decay_spares_what_the_denoiser_exempts(tiny_store):
    module, _ = module_for(tiny_store, denoiser=TRANSFORMER)
    decayed, spared = parameter_groups(module.policy, 0.1, lr=1e-3)
    exempt = module.policy.denoiser.no_weight_decay()
    assert exempt and (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    named = dict(module.policy.denoiser.named_parameters())
    assert {id(p) for p in spared["params"]} == {id(named[name]) for name in exempt}
    every = {id(p) for p in module.policy.parameters()}
    assert {id(p) for p in decayed["params"]} == every - {id(p) for p in spared["params"]}


def test_frozen_parameters_are_not_handed_to_the_optimiser(tiny_store):
    module, _ = module_for(tiny_store)
    frozen = next(module.policy.denoiser.parameters()).requires_grad_(False)
    groups = parameter_groups(module.policy, 0.1, lr=1e-3)
    assert all(p is not frozen for group in groups for p in group["params"])


def test_optimiser_is_fused_adamw_with_the_settings(tiny_store):
    module, _ = module_for(tiny_store, train={"lr": 0.01, "betas": [0.8, 0.9], "warmup_steps": 4, "weight_decay": 0.2})
    made = module.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]
    assert type(optimizer) is torch.optim.AdamW and schedule["interval"] == "step"
    for group in optimizer.param_groups:
        assert group["fused"] and group["betas"] == (0.8, 0.9)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.2, 0.0}
    optimizer.step()
    schedule["scheduler"].step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 / 4)


def test_optimiser_holds_the_learning_policy_and_nothing_of_the_average(tiny_store):
    module, _ = module_for(tiny_store)
    groups = module.configure_optimizers()["optimizer"].param_groups
    held = {id(p) for group in groups for p in group["params"]}
    assert held == {id(p) for p in module.policy.parameters()}


def test_average_stays_in_eval_mode_and_learns_nothing(tiny_store):
    module, _ = module_for(tiny_store, denoiser=TRANSFORMER)
    module.train()
    assert module.policy.training and not any(m.training for m in module.ema.modules())
    assert not any(p.requires_grad for p in module.ema.parameters())


def test_missing_statistics_are_refused_before_training(tiny_store):
    config = tiny_config_for(tiny_store)
    _, spec = load_windows(ReplayBuffer.open(tiny_store), config.data.keys, config.horizons, [range(6)])
    with pytest.raises(ValueError, match=r"statistics are missing for \['observation.state'"):
        PolicyModule(build_policy(config, spec), config=config.train, seed=0)


def logged_validation(module: PolicyModule, batch) -> dict[str, float]:
    logged = {}
    module.log_dict = lambda values, **_: logged.update({k: float(v) for k, v in values.items()})
    module.validation_step(batch, 0)
    return logged


def test_validation_gives_the_same_numbers_for_the_same_weights(tiny_store):
    """... whatever the global generator does, and although the denoiser has dropout."""
    module, windows = module_for(tiny_store, denoiser={**TRANSFORMER, "dropout": 0.5})
    module.train()
    batch = windows.batch(torch.arange(20))
    first = logged_validation(module, batch)
    torch.manual_seed(99)
    assert logged_validation(module, batch) == first
    assert set(first) == {"val/loss", "val/action_mse"} and all(v > 0 for v in first.values())


def test_validation_looks_at_the_average_not_at_the_learning_weights(tiny_store):
    module, windows = module_for(tiny_store)
    batch = windows.batch(torch.arange(20))
    first = logged_validation(module, batch)
    with torch.no_grad():
        for p in module.policy.parameters():
            p.add_(1.0)
    assert logged_validation(module, batch) == first
    with torch.no_grad():
        for p in module.ema.parameters():
            p.add_(1.0)
    assert logged_validation(module, batch) != first


def test_action_error_leaves_padded_steps_out(tiny_store):
    module, windows = module_for(tiny_store)
    batch = windows.batch(torch.arange(20))
    assert not batch.mask.all()
    first = logged_validation(module, batch)
    spoilt = copy.deepcopy(batch)
    spoilt.actions[~spoilt.mask] = 1e3
    again = logged_validation(module, spoilt)
    assert again["val/action_mse"] == first["val/action_mse"]
    spoilt.actions[spoilt.mask] += 1.0
    assert logged_validation(module, spoilt)["val/action_mse"] != first["val/action_mse"]


class _Counter(torch.nn.Module):
    """A network part with a buffer that changes while it learns."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([4.0]))
        self.register_buffer("seen", torch.tensor(0))


def test_average_copies_buffers_and_mixes_parameters(monkeypatch):
    module = PolicyModule.__new__(PolicyModule)
    torch.nn.Module.__init__(module)
    module.policy, module.config = _Counter(), TrainConfig(ema_power=0.75)
    module.ema = copy.deepcopy(module.policy)
    monkeypatch.setattr(PolicyModule, "global_step", 2)
    module.policy.weight.data.fill_(8.0)
    module.policy.seen.fill_(7)
    module._update_ema()
    assert module.ema.seen == 7
    assert module.ema.weight.item() == pytest.approx(0.405396 * 4 + (1 - 0.405396) * 8, abs=1e-5)
