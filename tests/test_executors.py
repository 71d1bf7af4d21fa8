"""Executors: which part of a chunk is played, when the policy is asked again, and what padding must not change."""

import numpy as np
import pytest
import torch

from diffpolicy.executors import EXECUTORS, RecedingHorizon
from diffpolicy.rollout import episode_generator
from diffpolicy.spec import DataSpec, FieldSpec, Horizons

CAMERA = "observation.images.top"
HORIZONS = {"obs": 3, "pred": 8, "act": 3}
TRANSFORMER = {"name": "transformer", "width": 16, "depth": 1, "num_heads": 2}
UNET = {"name": "unet", "down_dims": [8, 16], "kernel_size": 3, "n_groups": 4, "diffusion_step_embed_dim": 8}


def observations(batch: int, steps: int = 3, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "observation.state": rng.normal(size=(batch, steps, 2)).astype(np.float32),
        "observation.environment_state": rng.normal(size=(batch, steps, 3)).astype(np.float32),
        "task": [f"task {i}" for i in range(batch)],
    }


def generators(batch: int, first: int = 0) -> list[torch.Generator]:
    return [episode_generator(0, first + i) for i in range(batch)]


def rows(obs: dict, chosen: list[int]) -> dict:
    return {k: v[chosen] if isinstance(v, np.ndarray) else [v[i] for i in chosen] for k, v in obs.items()}


class Counting:
    """Wraps a policy: counts its calls and remembers the sizes of their batches."""

    def __init__(self, policy):
        self._policy, self.batches, self.tasks = policy, [], []

    def __getattr__(self, name):
        return getattr(self._policy, name)

    def sample_actions(self, obs, **kwargs):
        self.batches.append(len(obs["observation.state"]))
        self.tasks.append(obs.get("task"))
        return self._policy.sample_actions(obs, **kwargs)


@pytest.mark.parametrize("past", [0, 1, 2])
def test_played_is_the_chunk_from_now_on(make_policy, past):
    policy = make_policy(horizons={**HORIZONS, "past": past})
    obs = observations(1)
    tensors = {k: torch.from_numpy(v) for k, v in obs.items() if k != "task"}
    chunk = policy.sample_actions(tensors, generators=generators(1))
    actions = RecedingHorizon(policy).plan(obs, generators(1))
    assert actions.shape == (1, 3, 2) and actions.dtype == np.float64
    np.testing.assert_array_equal(actions, chunk[:, past : past + 3].double().numpy())


def test_filling_rows_change_nothing(make_policy):
    """Five observations in calls of four rows are five times one observation in a call of four rows."""
    policy, obs = make_policy(horizons=HORIZONS), observations(5)
    together = RecedingHorizon(policy, batch_size=4).plan(obs, generators(5))
    for i in range(5):
        alone = RecedingHorizon(policy, batch_size=4).plan(rows(obs, [i]), generators(1, first=i))
        np.testing.assert_array_equal(together[i], alone[0])


def test_filling_rows_draw_from_no_one_else_s_generator(make_policy):
    policy, obs = make_policy(horizons=HORIZONS), observations(3)
    few, many = generators(3), generators(3)
    RecedingHorizon(policy, batch_size=16).plan(obs, few)
    RecedingHorizon(policy, batch_size=3).plan(obs, many)
    for a, b in zip(few, many, strict=True):
        assert torch.equal(a.get_state(), b.get_state())
    fresh = generators(3)
    assert not torch.equal(few[0].get_state(), fresh[0].get_state())


def test_every_call_has_the_fixed_number_of_rows(make_policy):
    policy = Counting(make_policy(horizons=HORIZONS))
    RecedingHorizon(policy, batch_size=4).plan(observations(9), generators(9))
    assert policy.batches == [4, 4, 4]
    assert policy.tasks[-1] == ["task 8"] * 4, "the last row fills up, its words too"
    policy.batches.clear()
    RecedingHorizon(policy).plan(observations(9), generators(9))
    assert policy.batches == [9]


def test_an_environment_s_actions_follow_its_own_observation_and_noise(make_policy):
    policy, obs = make_policy(horizons=HORIZONS), observations(4)
    executor = RecedingHorizon(policy, batch_size=4)
    base = executor.plan(obs, generators(4))
    changed = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in obs.items()}
    changed["observation.state"][2] += 1.0
    moved = executor.plan(changed, generators(4))
    for i in range(4):
        assert np.array_equal(base[i], moved[i]) == (i != 2)


@pytest.mark.parametrize("denoiser", [None, TRANSFORMER, UNET], ids=["mlp", "transformer", "unet"])
def test_select_action_plans_every_third_step_and_equals_plan(make_policy, denoiser):
    policy = make_policy(horizons=HORIZONS, **({"denoiser": denoiser} if denoiser else {}))
    counting = Counting(policy)
    executor, generator = RecedingHorizon(counting), torch.Generator().manual_seed(5)
    frames = [rows(observations(10, steps=1), [i]) for i in range(10)]
    frames = [{k: v[0, 0] if isinstance(v, np.ndarray) else v[0] for k, v in f.items()} for f in frames]
    chosen, planned_at = [], []
    for step, frame in enumerate(frames):
        chosen.append(executor.select_action(frame, generator))
        if len(counting.batches) > len(planned_at):
            planned_at.append(step)
    assert planned_at == [0, 3, 6, 9]

    planner, generator = RecedingHorizon(policy), torch.Generator().manual_seed(5)
    for start in planned_at:
        seen = [frames[max(0, i)] for i in range(start - 2, start + 1)]  # before the first, the first is repeated
        obs = {k: np.stack([f[k] for f in seen])[None] for k in planner.observation_keys}
        planned = planner.plan({**obs, "task": [frames[start]["task"]]}, [generator])[0]
        np.testing.assert_array_equal(np.stack(chosen[start : start + 3]), planned[: len(chosen[start : start + 3])])


def test_while_the_history_is_short_its_oldest_frame_is_repeated(make_policy):
    """As before the first step of a training window; here every action is planned anew."""
    policy = make_policy(horizons={**HORIZONS, "act": 1})
    frames = [{k: v[0, 0] for k, v in observations(1, seed=i).items() if k != "task"} for i in range(2)]
    executor = RecedingHorizon(policy)
    executor.select_action(frames[0], torch.Generator().manual_seed(0))
    chosen = executor.select_action(frames[1], torch.Generator().manual_seed(1))
    obs = {k: np.stack([frames[0][k], frames[0][k], frames[1][k]])[None] for k in frames[0]}
    np.testing.assert_array_equal(chosen, executor.plan(obs, [torch.Generator().manual_seed(1)])[0, 0])


def test_reset_forgets_promises_and_history(make_policy):
    policy = make_policy(horizons=HORIZONS)
    frames = [{k: v[0, 0] for k, v in observations(1, seed=i).items() if k != "task"} for i in range(4)]
    executor = RecedingHorizon(policy)
    for frame in frames[:2]:
        executor.select_action(frame, torch.Generator().manual_seed(0))
    executor.reset()
    again = executor.select_action(frames[3], torch.Generator().manual_seed(1))
    fresh = RecedingHorizon(policy).select_action(frames[3], torch.Generator().manual_seed(1))
    np.testing.assert_array_equal(again, fresh)


def test_without_generators_two_plans_differ(make_policy):
    executor = RecedingHorizon(make_policy(horizons=HORIZONS))
    assert not np.array_equal(executor.plan(observations(1)), executor.plan(observations(1)))


@pytest.mark.parametrize("name", EXECUTORS)
def test_every_executor_plans_finite_actions_of_the_right_shape(name, make_policy):
    executor = EXECUTORS[name](make_policy(horizons=HORIZONS), batch_size=4)
    actions = executor.plan(observations(2), generators(2))
    assert actions.shape == (2, 3, 2) and np.isfinite(actions).all()


def test_an_observation_that_is_missing_or_of_another_shape_is_named(make_policy):
    executor = RecedingHorizon(make_policy(horizons=HORIZONS))
    with pytest.raises(ValueError, match="environment_state"):
        executor.plan({"observation.state": observations(1)["observation.state"]}, generators(1))
    with pytest.raises(ValueError, match=r"observation.state must be \(B, T_obs=3, 2\), got \(1, 2, 2\)"):
        executor.plan(observations(1, steps=2), generators(1))


class Blind:
    """Stands for a policy of two frames that may miss its camera: notes which roles it was shown."""

    device, droppable = torch.device("cpu"), frozenset({CAMERA})
    horizons = Horizons(obs=2, pred=2, act=1)

    def __init__(self):
        fields = {
            CAMERA: FieldSpec(shape=(4, 4, 3), dtype="uint8"),
            "observation.state": FieldSpec(shape=(2,), dtype="float32"),
        }
        self.spec, self.shown = DataSpec(fields=fields), []

    def sample_actions(self, obs, *, generators=None):
        self.shown.append(sorted(obs))
        return torch.zeros(1, 2, 2)


def test_a_camera_that_one_frame_lacks_is_missing_until_all_frames_have_it():
    policy = Blind()
    executor = RecedingHorizon(policy)
    blind = {"observation.state": np.zeros(2, np.float32)}
    seeing = blind | {CAMERA: np.zeros((4, 4, 3), np.uint8)}
    for frame in (seeing, blind, seeing, seeing):
        executor.select_action(frame)
    state = ["observation.state"]
    assert policy.shown == [[CAMERA, *state], state, state, [CAMERA, *state]]
