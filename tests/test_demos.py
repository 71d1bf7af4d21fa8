import numpy as np
import pytest

from diffpolicy.demos import (
    DEMONSTRATORS,
    EPISODE_SEED,
    MAX_FAILURES_IN_A_ROW,
    REWARD,
    SIM_STATE,
    collect,
    make_demonstrator,
)
from diffpolicy.envs import ENVIRONMENTS, make_env
from diffpolicy.envs.tabletop import TabletopConfig, TabletopEnv
from diffpolicy.envs.tabletop_expert import TabletopDemonstrator
from diffpolicy.replay import ReplayBuffer
from diffpolicy.spec import ACTION


class Forgetful(TabletopDemonstrator):
    """Stands still in every episode whose generator says so: fails about half of the time, the same half each time."""

    def reset(self, env, rng):
        super().reset(env, rng)
        self._idle = rng.random() < 0.5

    def act(self, env):
        return env.pusher_xy.astype(np.float32) if self._idle else super().act(env)


class Idle:
    def reset(self, env, rng):
        pass

    def act(self, env):
        return env.pusher_xy


class OtherStarts(TabletopEnv):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed + 1, options=options)


class Interrupted(Exception):
    pass


def stop_after(num_attempts):
    """A progress function that breaks the collection off."""
    calls = []

    def progress(*_):
        calls.append(1)
        if len(calls) == num_attempts:
            raise Interrupted

    return progress


def contents(path):
    buffer = ReplayBuffer.open(path)
    rows = {key: buffer.read(key) for key in buffer.keys}
    return rows, buffer.episode_ends.tolist(), [buffer.episode_task(i) for i in range(len(buffer))]


def assert_same_store(path, other):
    (rows, ends, tasks), (other_rows, other_ends, other_tasks) = contents(path), contents(other)
    assert ends == other_ends and tasks == other_tasks
    assert rows.keys() == other_rows.keys()
    for key in rows:
        assert np.array_equal(rows[key], other_rows[key]), key


@pytest.mark.parametrize("pixels", [False, True])
def test_recorded_episodes_replay_bit_for_bit_from_their_first_state(tmp_path, pixels):
    env = TabletopEnv(TabletopConfig(pixels=pixels))
    result = collect(env, TabletopDemonstrator(), out=tmp_path / "demos.zarr", episodes=3, seed=7)
    buffer = ReplayBuffer.open(result.path)
    assert (buffer.num_episodes, buffer.num_steps) == (result.num_episodes, result.num_steps) == (3, result.num_steps)
    assert buffer.fps == env.fps
    for i, episode in enumerate(buffer):
        obs, _ = env.reset(options={"state": episode[SIM_STATE][0]})
        assert env.task == buffer.episode_task(i)
        for k, action in enumerate(episode[ACTION]):
            assert np.array_equal(env.get_state(), episode[SIM_STATE][k])
            assert obs.keys() <= episode.keys()
            assert all(np.array_equal(obs[key], episode[key][k]) for key in obs)
            obs, reward, terminated, _, info = env.step(action)
            assert np.float32(reward) == episode[REWARD][k, 0]
            assert terminated == (k == len(episode[ACTION]) - 1)
        assert info["is_success"]


def test_seed_of_an_episode_starts_it_again(tmp_path):
    env = TabletopEnv()
    path = collect(env, Forgetful(), out=tmp_path / "demos.zarr", episodes=4, seed=20).path
    for episode in ReplayBuffer.open(path):
        env.reset(seed=int(episode[EPISODE_SEED][0, 0]))
        assert np.array_equal(env.get_state(), episode[SIM_STATE][0])


def test_store_says_what_its_numbers_are(tmp_path):
    env = TabletopEnv()
    buffer = ReplayBuffer.open(collect(env, TabletopDemonstrator(), out=tmp_path / "demos.zarr", episodes=1).path)
    assert buffer.fields[ACTION].names == ("target_x", "target_y") and buffer.fields[ACTION].units == "px"
    assert buffer.fields[SIM_STATE].names == env.state_names
    for key, names in env.observation_names.items():
        assert buffer.fields[key].names == names and buffer.fields[key].units == "px"
        assert buffer.roles[key] == key


def test_failed_attempts_are_left_out_and_named(tmp_path):
    result = collect(TabletopEnv(), Forgetful(), out=tmp_path / "demos.zarr", episodes=6, seed=3)
    rows, ends, _ = contents(result.path)
    seeds = rows[EPISODE_SEED][np.array(ends) - 1, 0].tolist()
    assert len(seeds) == 6 and len(result.discarded_seeds) > 0
    assert sorted([*seeds, *result.discarded_seeds]) == list(range(3, seeds[-1] + 1))
    assert np.all(rows[REWARD][np.array(ends) - 1] == 1.0)


def test_kept_failures_are_recorded_with_a_reward_below_one(tmp_path):
    config = TabletopConfig(max_steps=90)
    result = collect(TabletopEnv(config), Forgetful(), out=tmp_path / "d.zarr", episodes=6, seed=3, keep_failures=True)
    rows, ends, _ = contents(result.path)
    assert rows[EPISODE_SEED][np.array(ends) - 1, 0].tolist() == [3, 4, 5, 6, 7, 8]
    assert result.discarded_seeds == ()
    assert 0 < np.sum(rows[REWARD][np.array(ends) - 1] < 1.0) < 6


@pytest.mark.parametrize("attempts", [1, 5, 8])
def test_interrupted_collection_goes_on_to_the_same_rows(tmp_path, attempts):
    whole = collect(TabletopEnv(), Forgetful(), out=tmp_path / "whole.zarr", episodes=6, seed=3)
    with pytest.raises(Interrupted):
        collect(
            TabletopEnv(), Forgetful(), out=tmp_path / "parts.zarr", episodes=6, seed=3, progress=stop_after(attempts)
        )
    parts = collect(TabletopEnv(), Forgetful(), out=tmp_path / "parts.zarr", episodes=6, seed=3)
    assert_same_store(whole.path, parts.path)
    assert parts.discarded_seeds == whole.discarded_seeds


def test_collecting_what_is_there_already_adds_nothing(tmp_path):
    first = collect(TabletopEnv(), TabletopDemonstrator(), out=tmp_path / "demos.zarr", episodes=3)
    again = collect(TabletopEnv(), TabletopDemonstrator(), out=tmp_path / "demos.zarr", episodes=2)
    assert (first.num_added, again.num_added, again.num_episodes) == (3, 0, 3)


def test_store_of_another_collection_is_refused(tmp_path):
    path = collect(TabletopEnv(), TabletopDemonstrator(), out=tmp_path / "demos.zarr", episodes=2, seed=100).path
    before = contents(path)
    with pytest.raises(ValueError, match="begins with seed 100"):
        collect(TabletopEnv(), TabletopDemonstrator(), out=path, episodes=3, seed=101)
    with pytest.raises(ValueError, match="begins with seed 100"):
        collect(TabletopEnv(), TabletopDemonstrator(), out=path, episodes=3, seed=0)
    with pytest.raises(ValueError, match=r"observation\.images\.top is recorded in this collection, not in"):
        collect(TabletopEnv(TabletopConfig(pixels=True)), TabletopDemonstrator(), out=path, episodes=3, seed=100)
    with pytest.raises(ValueError, match=r"must be as in"):
        collect(TabletopEnv(TabletopConfig(num_blocks=3)), TabletopDemonstrator(), out=path, episodes=3, seed=100)
    with pytest.raises(ValueError, match="another environment"):
        collect(OtherStarts(), TabletopDemonstrator(), out=path, episodes=3, seed=100)
    assert contents(path)[1] == before[1]


def test_a_demonstrator_that_never_succeeds_is_given_up(tmp_path):
    env = TabletopEnv(TabletopConfig(max_steps=3))
    with pytest.raises(ValueError, match=rf"Idle failed {MAX_FAILURES_IN_A_ROW} times in a row \(seeds 0 to 49\)"):
        collect(env, Idle(), out=tmp_path / "demos.zarr", episodes=1)


def test_progress_counts_kept_and_failed_attempts(tmp_path):
    seen = []
    collect(TabletopEnv(), Forgetful(), out=tmp_path / "d.zarr", episodes=4, seed=3, progress=lambda *n: seen.append(n))
    assert seen[-1][:2] == (4, 4)
    assert [kept + failed for kept, _, failed in seen] == list(range(1, len(seen) + 1))


@pytest.mark.parametrize("name", DEMONSTRATORS)
def test_every_demonstrator_solves_its_environment(tmp_path, name):
    assert name in ENVIRONMENTS
    result = collect(make_env(name), make_demonstrator(name), out=tmp_path / "demos.zarr", episodes=10)
    assert len(result.discarded_seeds) <= 1


def test_environment_without_demonstrator_is_named():
    with pytest.raises(ValueError, match="scripted demonstrator must be one of"):
        make_demonstrator("pusht")


def test_demonstrator_takes_its_options_by_name():
    assert make_demonstrator("tabletop", noise=1.5).config.noise == 1.5
    with pytest.raises(ValueError, match="Did you mean 'noise'"):
        make_demonstrator("tabletop", noize=1.5)
