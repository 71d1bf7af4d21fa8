"""What several test files share: a tiny store, a tiny policy, and the real demonstrations where they are present."""

import os
from collections.abc import Callable
from pathlib import Path

# Before torch: small tensors are faster so, and test processes may run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

from diffpolicy.config import Config, build_policy, config_from_dict
from diffpolicy.policies import DiffusionPolicy
from diffpolicy.replay import ReplayBuffer
from diffpolicy.spec import DataSpec, FieldSpec

PROJECT = Path(__file__).parents[1]
TINY_LENGTHS = (12, 17, 9, 20, 14, 11)
"""Steps of the episodes in tiny_store."""
TINY_KEYS = {"observation.state": "state[0:2]", "observation.environment_state": "state[2:5]", "action": "action"}


@pytest.fixture
def project() -> Path:
    """The checkout's root."""
    return PROJECT


@pytest.fixture
def data_dir() -> Path:
    """The folder of real demonstrations; skips, naming it, where there is none."""
    folder = PROJECT / os.environ.get("DIFFPOLICY_DATA", "../shared/data")
    if not folder.is_dir():
        pytest.skip(f"the real demonstrations are not in {folder}; set DIFFPOLICY_DATA")
    return folder


@pytest.fixture
def pusht_demos(data_dir: Path) -> ReplayBuffer:
    """The 206 human Push-T episodes."""
    path = data_dir / "pusht_cchi_v7_replay.zarr"
    if not path.exists():
        pytest.skip(f"the real demonstrations {path.name} are not in {data_dir}")
    return ReplayBuffer.open(path)


@pytest.fixture
def tiny_store(tmp_path: Path) -> Path:
    """A store of six short walks: the action is the next position, the other three numbers are noise."""
    fields = {
        "state": FieldSpec(shape=(5,), dtype="float32", names=("x", "y", "a", "b", "c"), units="m"),
        "action": FieldSpec(shape=(2,), dtype="float32", names=("x", "y"), units="m"),
    }
    rng = np.random.default_rng(0)
    with ReplayBuffer.create(tmp_path / "tiny.zarr", fields=fields, fps=10) as buffer:
        for length in TINY_LENGTHS:
            walk = rng.normal(0, 0.1, (length + 1, 2)).cumsum(axis=0).astype(np.float32)
            noise = rng.normal(0, 1, (length, 3)).astype(np.float32)
            buffer.append_episode({"state": np.hstack([walk[:-1], noise]), "action": walk[1:]}, task="walk")
    return tmp_path / "tiny.zarr"


@pytest.fixture
def tiny_config(tiny_store: Path) -> Config:
    """A configuration that trains on tiny_store within seconds."""
    return tiny_config_for(tiny_store)


def tiny_config_for(store: str | Path = "", **sections) -> Config:
    """The configuration of tiny_config, with whole sections replaced."""
    train = {"steps": 8, "batch_size": 16, "warmup_steps": 2, "val_every": 4, "log_every": 1, "checkpoint_every": 4}
    plain = {
        "task": "tiny",
        "data": {"path": str(store), "keys": TINY_KEYS, "val_ratio": 0.2},
        "horizons": {"obs": 2, "pred": 8, "act": 4},
        "denoiser": {"name": "mlp", "width": 16, "depth": 1, "embed_dim": 8},
        "process": {"name": "flow"},
        "sampler": {"num_inference_steps": 3},
        "train": {**train, "val_windows": 8},
    }
    return config_from_dict(plain | sections)


TINY_SPEC = DataSpec(
    fields={
        "observation.state": FieldSpec(shape=(2,), dtype="float32"),
        "observation.environment_state": FieldSpec(shape=(3,), dtype="float32"),
        "action": FieldSpec(shape=(2,), dtype="float32"),
    },
    fps=10,
)


@pytest.fixture
def make_policy() -> Callable[..., DiffusionPolicy]:
    """make_policy(spec=..., process={...}, sampler={...}, ...): an untrained policy in eval mode, its statistics fitted."""

    def make(spec: DataSpec = TINY_SPEC, **sections) -> DiffusionPolicy:
        torch.manual_seed(0)
        policy = build_policy(tiny_config_for(**sections), spec).eval()
        for parameter in policy.denoiser.parameters():
            if not parameter.any():  # a head that starts at zero would answer zero to everything
                torch.nn.init.normal_(parameter, std=0.1)
        for i, key in enumerate((*spec.state_keys, "action")):
            rows = torch.rand(50, *spec.fields[key].shape, generator=torch.Generator().manual_seed(i))
            policy.normalizer.fit(key, 3 * rows + i)
        return policy

    return make


@pytest.fixture
def tiny_policy(make_policy: Callable[..., DiffusionPolicy]) -> DiffusionPolicy:
    """An untrained flow policy over TINY_SPEC, in eval mode."""
    return make_policy()
