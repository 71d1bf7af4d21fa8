"""Environments side by side: what a policy sees after its actions, here and in worker processes."""

import numpy as np
import pytest

from diffpolicy.envs import make_env
from diffpolicy.envs.players import EpisodePlayer, LocalPlayers, ProcessPlayers

SMALL = {"max_steps": 12, "image_size": 32}


def actions_for(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(100, 400, (count, 2))


def test_first_look_repeats_the_first_frame():
    player = EpisodePlayer("tabletop", SMALL, obs_horizon=3)
    look = player.start(7, False, False)
    first, _ = make_env("tabletop", **SMALL).reset(seed=7)
    for key, value in first.items():
        assert look.obs[key].shape == (3, *value.shape)
        assert all(np.array_equal(frame, value) for frame in look.obs[key])
    assert look.obs["task"] == player.env.task != ""
    assert (look.steps, look.score, look.success, look.done, look.frames) == (0, 0.0, False, False, [])


def test_look_after_actions_is_the_last_frames_the_newest_last():
    player = EpisodePlayer("tabletop", SMALL, obs_horizon=3)
    player.start(7, False, False)
    played = player.play(actions_for(0, 5))
    env = make_env("tabletop", **SMALL)
    env.reset(seed=7)
    stepped = [env.step(action) for action in actions_for(0, 5)]
    for key in stepped[0][0]:
        np.testing.assert_array_equal(played.obs[key], np.stack([s[0][key] for s in stepped[-3:]]))
    assert played.steps == 5 and played.score == max(s[1] for s in stepped)


def test_history_does_not_reach_into_the_episode_before():
    player = EpisodePlayer("tabletop", SMALL, obs_horizon=3)
    player.start(7, False, False)
    player.play(actions_for(0, 5))
    again, fresh = player.start(8, False, False), EpisodePlayer("tabletop", SMALL, 3).start(8, False, False)
    assert all(np.array_equal(again.obs[k], fresh.obs[k]) for k in fresh.obs)
    assert (again.steps, again.score, again.done) == (0, 0.0, False)


class Scripted:
    """An environment whose rewards and end are given beforehand."""

    task = "count"

    def __init__(self, rewards, ends_at, success=()):
        self.rewards, self.ends_at, self.success, self.step_count, self.renders = rewards, ends_at, success, 0, 0

    def reset(self, seed):
        self.step_count = 0
        return {"observation.state": np.zeros(1, np.float32)}, {}

    def step(self, action):
        self.step_count += 1
        i = self.step_count
        obs = {"observation.state": np.full(1, i, np.float32)}
        done = i == self.ends_at
        return obs, self.rewards[i - 1], done, False, {"is_success": i in self.success}

    def render(self):
        self.renders += 1
        return np.full((2, 2, 3), self.step_count, np.uint8)


def scripted_player(**kwargs) -> EpisodePlayer:
    player = EpisodePlayer("tabletop", SMALL, obs_horizon=2)
    player.env = Scripted(**kwargs)
    return player


def test_score_is_the_largest_reward_and_success_is_kept():
    player = scripted_player(rewards=[0.1, 0.8, 0.3, 0.2], ends_at=4, success=(2,))
    player.start(0, False, False)
    played = player.play(np.zeros((4, 2)))
    assert (played.score, played.success, played.steps, played.done) == (0.8, True, 4, True)


def test_actions_after_the_end_are_not_played():
    player = scripted_player(rewards=[0.0, 0.0, 1.0], ends_at=3, success=(3,))
    player.start(0, False, False)
    played = player.play(np.zeros((8, 2)))
    assert played.steps == 3 and player.env.step_count == 3 and played.done
    assert played.obs["observation.state"].ravel().tolist() == [2, 3]


def test_a_film_has_every_frame_a_picture_the_last_and_otherwise_nothing_is_drawn():
    shown = {}
    for film, picture in ((True, False), (True, True), (False, True), (False, False)):
        player = scripted_player(rewards=[0.0] * 3, ends_at=3)
        player.start(0, film, picture)
        assert player.play(np.zeros((2, 2))).done is False
        played = player.play(np.zeros((2, 2)))
        shown[film, picture] = [int(frame.max()) for frame in played.frames]
        assert player.env.renders == len(played.frames)
    assert shown == {(True, False): [0, 1, 2, 3], (True, True): [0, 1, 2, 3], (False, True): [3], (False, False): []}


def play_all(players) -> list:
    looks = {0: players.call("start", {i: (20 + i, False, i == 0) for i in range(3)})}
    for turn in range(1, 4):
        looks[turn] = players.call("play", {i: (actions_for(10 * turn + i, 4),) for i in range(3)})
    players.close()
    return [looks[turn][i] for turn in range(4) for i in range(3)]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_worker_processes_play_exactly_as_this_process(num_workers):
    choices = {**SMALL, "pixels": True}
    here = play_all(LocalPlayers("tabletop", choices, 2, 3))
    there = play_all(ProcessPlayers("tabletop", choices, 2, 3, num_workers))
    assert here[-1].done
    for a, b in zip(here, there, strict=True):
        assert (a.steps, a.score, a.success, a.done, len(a.frames)) == (
            b.steps,
            b.score,
            b.success,
            b.done,
            len(b.frames),
        )
        assert a.obs.keys() == b.obs.keys() and a.obs["task"] == b.obs["task"]
        assert all(np.array_equal(a.obs[k], b.obs[k]) for k in a.obs if k != "task")


def test_a_failing_worker_hands_its_traceback_over():
    players = ProcessPlayers("tabletop", SMALL, 2, 1, 1)
    try:
        players.call("start", {0: (1, False, False)})
        with pytest.raises(RuntimeError, match=r"an environment worker failed:(.|\n)*Error"):
            players.call("play", {0: (np.zeros((3, 7)),)})
    finally:
        players.close()
    assert not any(process.is_alive() for process in players._processes)


def test_a_worker_that_died_is_said_and_closing_is_still_possible():
    players = ProcessPlayers("tabletop", SMALL, 2, 2, 2)
    try:
        players.call("start", {0: (1, False, False), 1: (2, False, False)})
        players._processes[1].kill()
        players._processes[1].join()
        with pytest.raises(RuntimeError, match="worker died; run again with --workers 0"):
            players.call("play", {0: (np.zeros((1, 2)),), 1: (np.zeros((1, 2)),)})
    finally:
        players.close()
    assert not any(process.is_alive() for process in players._processes)
