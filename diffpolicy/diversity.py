"""How different are the chunks that a policy answers to one and the same observation? What guidance pays with.

start state --encode, once--> Condition --sample x 16--> chunks --normalizer--> [-1, 1] --chunk_diversity--> one number
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from diffpolicy.envs.players import LocalPlayers
from diffpolicy.executors import RecedingHorizon
from diffpolicy.metrics import chunk_diversity
from diffpolicy.rollout import episode_generator
from diffpolicy.spec import ACTION

NUM_CHUNKS = 16
"""Chunks of each observation."""
MAX_STARTS = 64
"""Start states that are looked at, the first of those that are played."""
ROWS = 4
"""Observations of one policy call, always: what is found for one does not depend on how many there are."""


@dataclass(frozen=True)
class StartDiversity:
    seeds: tuple[int, ...]
    """(O,) seeds of the start states."""
    values: np.ndarray
    """(O,) metrics.chunk_diversity of each, in normalised action units, over the executed steps."""
    num_chunks: int
    seconds: float
    """Wall time of all of it, resets included."""


def start_diversity(
    executor: RecedingHorizon,
    env_name: str,
    env_choices: dict,
    *,
    seeds: Sequence[int],
    sampling_seed: int = 0,
    num_chunks: int = NUM_CHUNKS,
) -> StartDiversity:
    """Samples chunks for the start observations of the first MAX_STARTS seeds.

    Each start has the noise of its episode (`rollout.episode_generator`), so that the first of its chunks begins from the
    noise that the episode begins from, and two ways of sampling are compared on the same noise.

    Raises:
        ValueError: no seeds, or fewer than two chunks.
    """
    if not len(seeds):
        raise ValueError("diversity needs at least one start state, got no seeds")
    began = time.perf_counter()
    seeds, policy = tuple(seeds[:MAX_STARTS]), executor.policy.eval()
    player = LocalPlayers(env_name, env_choices, policy.horizons.obs, 1)
    try:
        looks = [player.call("start", {0: (seed, False, False)})[0].obs for seed in seeds]
    finally:
        player.close()
    obs = {key: [look[key] for look in looks] for key in looks[0]}
    obs = {key: np.stack(value) if isinstance(value[0], np.ndarray) else value for key, value in obs.items()}
    values = []
    for first in range(0, len(seeds), ROWS):
        rows = np.minimum(np.arange(first, first + ROWS), len(seeds) - 1)  # the last row fills up
        with torch.no_grad():
            condition = policy.encode(executor.tensors(obs, rows))
        noise = [episode_generator(sampling_seed, seeds[row]) for row in rows]
        chunks = policy.sample(condition, num_samples=num_chunks, generators=noise)  # (ROWS, M, T_pred, D_act)
        executed = policy.normalizer.normalize(ACTION, chunks[:, :, policy.horizons.executed])
        values.append(chunk_diversity(executed.cpu().numpy())[: len(seeds) - first])
    return StartDiversity(seeds, np.concatenate(values), num_chunks, time.perf_counter() - began)
