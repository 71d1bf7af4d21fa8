"""Replaying recorded actions: what is compared with what, and how the two human Push-T sets come out."""

import json
import math
import os
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from diffpolicy.envs.base import RobotEnv
from diffpolicy.envs.pusht import PushtConfig, PushtEnv
from diffpolicy.open_loop import replay_open_loop
from diffpolicy.replay import ReplayBuffer

DATA = Path(__file__).parents[1] / os.environ.get("DIFFPOLICY_DATA", "../shared/data")
KEYS = {"state_key": "state", "action_key": "action"}


class Turntable(RobotEnv):
    """A puck that jumps by (dx, dy) on a table that turns by one radian a step; solved once x >= 3."""

    action_names, action_units = ("dx", "dy"), "cm"
    state_names = ("puck_x", "puck_y", "table_angle", "puck_vx")
    action_space = gym.spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        self.state = np.array(options["state"], dtype=np.float64)
        return {}, {}

    def step(self, action):
        self.state += [*action, 1.0, 5.0]
        self.state[2] %= math.tau
        solved = bool(self.state[0] >= 3)
        return {}, min(self.state[0] / 10, 1.0), solved, False, {"is_success": solved}

    def get_state(self):
        return self.state.copy()

    def action_to_pixels(self, actions):
        return actions


class Recording:
    """Episodes in memory."""

    def __init__(self, *episodes):
        self.episodes = episodes
        self.num_episodes = len(episodes)

    def episode(self, index, keys):
        return {key: self.episodes[index][key] for key in keys if key in self.episodes[index]}


def faithful(steps=5, shift=(0.0, 0.0, 0.0), at=2):
    """A recording of Turntable, x and y growing by 1 a step, with one state shifted in (x, y, angle)."""
    steps_so_far = np.arange(steps)[:, None]
    states = np.hstack([steps_so_far, steps_so_far, 5.0 + steps_so_far, 99.0 * steps_so_far])  # (steps, 4)
    states[at, :3] += shift
    return {"state": states, "action": np.ones((steps, 2))}


def real(name: str) -> ReplayBuffer:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"the real demonstrations {name} are not in {DATA}")
    return ReplayBuffer.open(path)


def test_state_after_an_action_is_compared_with_the_next_recorded_state():
    (episode,) = replay_open_loop(Recording(faithful()), Turntable(), **KEYS).episodes
    assert episode.drift == {"puck": 0.0, "table_angle": pytest.approx(0.0, abs=1e-12)}
    assert episode.steps == 5  # the last action is played too, though no state follows it
    assert episode.score == 0.5


def test_drift_is_a_distance_per_body_and_is_reported_with_its_step():
    (episode,) = replay_open_loop(Recording(faithful(shift=(3.0, 4.0, 0.0), at=3)), Turntable(), **KEYS).episodes
    assert episode.drift["puck"] == pytest.approx(5.0)
    assert episode.drift_step["puck"] == 3


@pytest.mark.parametrize("turns", [0, 1, -3])
def test_angles_are_compared_around_the_circle(turns):
    recording = Recording(faithful(shift=(0.0, 0.0, turns * math.tau + 0.25)))
    (episode,) = replay_open_loop(recording, Turntable(), **KEYS).episodes
    assert episode.drift["table_angle"] == pytest.approx(0.25)


def test_replay_goes_on_after_success():
    recording = Recording(faithful(steps=8, shift=(1.0, 0.0, 0.0), at=7))
    (episode,) = replay_open_loop(recording, Turntable(), **KEYS).episodes
    assert episode.success and episode.steps == 8
    assert episode.score == 0.8
    assert episode.drift["puck"] == pytest.approx(1.0)


def test_summary_counts_episodes_within_tolerance_and_names_the_worst():
    shifts = [0.0, 0.5, 2.0, 1.5]
    recording = Recording(*(faithful(shift=(shift, 0.0, 0.0)) for shift in shifts))
    result = replay_open_loop(recording, Turntable(), **KEYS)
    puck = result.summary(tolerance=1.0)["drift"]["puck"]
    assert (puck["episodes_within"], puck["max"], puck["worst_episode"], puck["worst_step"]) == (2, 2.0, 2, 2)
    assert puck["p50"] == 1.0 and puck["unit"] == "cm"
    assert result.summary(tolerance=1.75)["drift"]["puck"]["episodes_within"] == 3
    assert result.summary()["successes"] == 4
    assert [(e.episode, body) for e, body in result.worst_episodes(2)] == [(2, "puck"), (3, "puck")]


def test_result_is_plain_data_and_a_table():
    from rich.console import Console

    result = replay_open_loop(Recording(faithful(), faithful(shift=(0.0, 2.0, 0.0))), Turntable(), **KEYS)
    data = json.loads(json.dumps(result.to_dict(tolerance=0.5)))
    assert data["summary"]["drift"]["puck"]["episodes_within"] == 1
    assert data["episodes"][1]["drift"]["puck"] == 2.0
    console = Console(width=100, record=True, file=open(os.devnull, "w"))
    console.print(result.table())
    text = console.export_text()
    assert "1/2" in text and "episode 1 (puck 2 cm at step 2)" in text


def test_chosen_episodes_are_replayed_with_progress():
    seen = []
    recording = Recording(*(faithful(steps=n) for n in (3, 4, 5)))
    result = replay_open_loop(
        recording, Turntable(), **KEYS, episodes=[2, 0], progress=lambda done, total: seen.append((done, total))
    )
    assert [(e.episode, e.steps) for e in result.episodes] == [(2, 5), (0, 3)]
    assert seen == [(1, 2), (2, 2)]


def test_dimensions_of_a_wider_store_can_be_selected():
    wide = faithful()
    wide["state"] = np.hstack([np.full((5, 3), -7.0), wide["state"]])
    result = replay_open_loop(Recording(wide), Turntable(), state_key="state[3:7]", action_key="action")
    assert result.episodes[0].drift["puck"] == 0.0


def broken(**arrays) -> Recording:
    return Recording({**faithful(), **arrays})


@pytest.mark.parametrize(
    ("recording", "choices", "message"),
    [
        (broken(state=np.zeros((5, 7))), {}, r"'state' has 7 dims, Turntable needs 4 \['puck_x'"),
        (broken(action=np.zeros((5, 3))), {}, r"'action' has 3 dims, Turntable takes 2 \['dx', 'dy'\]"),
        (broken(action=np.zeros((4, 2))), {}, "episode 0 must have as many states as actions, got 5 and 4"),
        (broken(action=np.full((5, 2), np.nan)), {}, r"episode 0: action\[0, 0\] is nan"),
        (broken(), {"state_key": "stat"}, "state_key must be one of .*got 'stat'"),
        (broken(), {"episodes": [1]}, r"episodes must be in \[0, 0\], got 1"),
        (broken(), {"episodes": []}, "nothing to replay"),
        (Recording(), {}, "nothing to replay"),
    ],
)
def test_what_does_not_fit_is_named(recording, choices, message):
    with pytest.raises(ValueError, match=message):
        replay_open_loop(recording, Turntable(), **{**KEYS, **choices})


def test_key_missing_from_a_store_is_named_with_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'state'"):
        replay_open_loop(real("pusht_cchi_v7_replay.zarr"), PushtEnv(), state_key="stat", action_key="action")


def test_human_pushes_replayed_open_loop_stay_with_the_recording():
    chosen = [0, 17, 18, 50, 90, 109, 186]  # 50, 109 and 186 leave by 1 px if reset does not find contacts first
    result = replay_open_loop(real("pusht_cchi_v7_replay.zarr"), PushtEnv(), **KEYS, episodes=chosen)
    for episode in result.episodes:
        assert episode.drift["agent"] < 1e-4
        assert episode.drift["block"] < 0.02
        assert episode.drift["block_angle"] < 1e-4
        assert 0.85 < episode.score <= 1


def test_humans_with_another_goal_all_reach_it():
    env = PushtEnv(PushtConfig(goal=(356.0, 356.0, math.pi / 4)))
    result = replay_open_loop(real("pusht_keypoint_x356_y356.zarr"), env, **KEYS, episodes=range(0, 151, 15))
    assert result.summary()["successes"] == 11
    assert max(e.drift["block"] for e in result.episodes) < 0.02


def test_wrong_control_is_seen_as_drift():
    recording = real("pusht_cchi_v7_replay.zarr").episode(0, ["state", "action"])
    late = {"state": recording["state"][:-1], "action": recording["action"][1:]}  # actions one step too early
    result = replay_open_loop(Recording(late), PushtEnv(), **KEYS)
    assert result.episodes[0].drift["agent"] > 5
