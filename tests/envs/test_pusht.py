"""Push-T agrees with gym-pusht bit for bit, with the published start states, and with the human recordings."""

import dataclasses
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from diffpolicy.envs.pusht import TEE_AREA, TOP_CAMERA, PushtConfig, PushtEnv, block_keypoints, tee_coverage
from diffpolicy.replay import ReplayBuffer
from diffpolicy.spec import ENVIRONMENT_STATE, STATE, MissingExtraError

PROJECT = Path(__file__).parents[2]
DATA = PROJECT / os.environ.get("DIFFPOLICY_DATA", "../shared/data")


@pytest.fixture(scope="module")
def demos() -> ReplayBuffer:
    path = DATA / "pusht_cchi_v7_replay.zarr"
    if not path.exists():
        pytest.skip(f"the real demonstrations {path.name} are not in {DATA}")
    return ReplayBuffer.open(path)


def stock_env(obs_type: str):
    from gym_pusht.envs.pusht import PushTEnv

    return PushTEnv(obs_type=obs_type, visualization_width=512, visualization_height=512)


def pushing_actions(block_xy, rng) -> np.ndarray:
    """Ten targets, most of them inside the block, so that it is pushed; some outside the world."""
    return np.clip(np.asarray(block_xy) + rng.normal(0, 70, (10, 2)), -40, 560)


# --- agreement with gym-pusht ---


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_states_and_rewards_equal_those_of_gym_pusht_to_the_last_bit(dtype):
    ours, stock = PushtEnv(PushtConfig(start_states="gym_pusht")), stock_env("state")
    rng, moved = np.random.default_rng(0), 0
    for seed in range(6):
        ours.reset(seed=seed)
        np.testing.assert_array_equal(ours.get_state(), stock.reset(seed=seed)[0])
        for _ in range(8):
            before = ours.get_state()
            for action in pushing_actions(before[2:4], rng).astype(dtype):
                obs, reward, terminated, _, info = ours.step(action)
                theirs, their_reward, their_end, _, their_info = stock.step(action)
                np.testing.assert_array_equal(ours.get_state(), theirs)
                np.testing.assert_array_equal(obs[STATE], theirs[:2].astype(np.float32))
                assert reward == pytest.approx(their_reward, abs=1e-9)
                assert info["coverage"] == pytest.approx(their_info["coverage"], abs=1e-9)
                assert (terminated, info["is_success"]) == (their_end, their_info["is_success"])
            moved += not np.array_equal(before[2:], ours.get_state()[2:])
    assert moved > 20  # the block was pushed: contacts agree too


def test_pictures_equal_those_of_gym_pusht_including_contact_marks():
    ours, stock = PushtEnv(PushtConfig(start_states="gym_pusht", pixels=True)), stock_env("pixels")
    rng = np.random.default_rng(1)
    for seed in range(4):
        obs, _ = ours.reset(seed=seed)
        np.testing.assert_array_equal(obs[TOP_CAMERA], stock.reset(seed=seed)[0])
        for _ in range(4):
            for action in pushing_actions(ours.get_state()[2:4], rng):
                np.testing.assert_array_equal(ours.step(action)[0][TOP_CAMERA], stock.step(action)[0])
        np.testing.assert_array_equal(ours.render(), stock.render())


def test_coverage_equals_shapely_on_random_poses():
    import shapely
    from shapely import affinity

    tee = shapely.union(shapely.box(-60, 0, 60, 30), shapely.box(-15, 30, 15, 120))
    assert tee.area == TEE_AREA

    def placed(pose):
        return affinity.translate(affinity.rotate(tee, pose[2], origin=(0, 0), use_radians=True), pose[0], pose[1])

    rng, touching = np.random.default_rng(2), 0
    for _ in range(500):
        goal = (*rng.uniform(100, 400, 2), rng.uniform(-7, 7))
        spread = rng.choice([0.5, 5.0, 60.0])
        block = (*(goal[:2] + rng.normal(0, spread, 2)), goal[2] + rng.normal(0, spread / 20))
        expected = placed(block).intersection(placed(goal)).area / tee.area
        touching += expected > 0
        assert tee_coverage(block, goal) == pytest.approx(expected, abs=1e-9)
    assert touching > 300


def test_coverage_of_special_poses():
    assert tee_coverage((256, 256, 0.8), (256, 256, 0.8)) == pytest.approx(1.0, abs=1e-12)
    assert tee_coverage((256, 256, 0.8 + math.tau), (256, 256, 0.8)) == pytest.approx(1.0, abs=1e-12)
    assert tee_coverage((0, 0, 0), (0, 120, 0)) == 0.0  # they only touch
    # Moved 30 px down, the bar covers the first 30 x 30 px of the stem's place, and the stem the other 30 x 60.
    assert tee_coverage((0, 30, 0), (0, 0, 0)) == pytest.approx((30 * 30 + 30 * 60) / 6300, abs=1e-12)


# --- start states ---


@pytest.mark.parametrize(
    ("seed", "agent", "drawn_block", "angle"),
    [
        # RandomState(seed): randint(50, 450) twice, randint(100, 400) twice, randn * 2 pi - pi
        (0, (222, 97), (217, 292), 3.0079994677),
        (42, (152, 398), (370, 206), -0.1642372254),
        (100000, (235, 124), (335, 128), -0.9049274284),
    ],
)
def test_published_start_state_sets_the_position_first_and_then_turns_about_the_centre_of_gravity(
    seed, agent, drawn_block, angle
):
    env = PushtEnv()
    env.reset(seed=seed)
    # The centre of gravity stays at drawn_block + (0, 45); the origin of the block turns about it.
    block_x = drawn_block[0] + 45 * math.sin(angle)
    block_y = drawn_block[1] + 45 - 45 * math.cos(angle)
    np.testing.assert_allclose(env.get_state(), [*agent, block_x, block_y, angle % math.tau], rtol=0, atol=1e-6)


def test_every_human_episode_starts_from_the_published_start_state_of_its_index(demos):
    env = PushtEnv()
    for episode in range(0, demos.num_episodes, 5):
        env.reset(seed=episode)
        np.testing.assert_allclose(env.get_state(), demos.episode(episode, ["state"])["state"][0], rtol=0, atol=1e-4)


def test_reset_to_a_state_restores_it_exactly():
    env, state = PushtEnv(), np.array([100.5, 400.25, 300.0, 200.0, 4.0])
    obs, info = env.reset(options={"state": state})
    np.testing.assert_allclose(env.get_state(), state, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(obs[STATE], [100.5, 400.25])
    assert info == {"is_success": False, "coverage": tee_coverage((300.0, 200.0, 4.0), (256, 256, math.pi / 4))}


def test_unwrapped_recorded_angle_is_the_same_start_as_the_wrapped_one():
    env = PushtEnv()
    env.reset(options={"state": [100, 100, 300, 200, 1.5 - 3 * math.tau]})
    np.testing.assert_allclose(env.get_state(), [100, 100, 300, 200, 1.5], rtol=0, atol=1e-12)


@pytest.mark.parametrize("state", [[1, 2, 3], [1, 2, 3, 4, math.nan]])
def test_bad_start_state_is_named(state):
    with pytest.raises(ValueError, match="must be five finite numbers"):
        PushtEnv().reset(options={"state": state})


def test_unknown_reset_option_is_named():
    with pytest.raises(ValueError, match="Did you mean 'state'"):
        PushtEnv().reset(options={"states": [1, 2, 3, 4, 5]})


@pytest.mark.parametrize("noise", [0.0, 5.0])
def test_seed_and_actions_decide_the_trajectory(noise):
    def trajectory(seed):
        env = PushtEnv(PushtConfig(action_noise=noise))
        env.reset(seed=3)
        env.step((10.0, 10.0))  # another episode before must not matter
        env.reset(seed=seed)
        rng, states = np.random.default_rng(0), []
        for action in pushing_actions(env.get_state()[2:4], rng):
            env.step(action)
            states.append(env.get_state())
        return np.array(states)

    np.testing.assert_array_equal(trajectory(7), trajectory(7))
    assert not np.array_equal(trajectory(7), trajectory(8))


def test_action_noise_has_the_asked_standard_deviation_in_pixels():
    env = PushtEnv(PushtConfig(action_noise=8.0))
    env.reset(seed=0)
    targets = []
    for _ in range(300):
        env.step((256.0, 256.0))
        targets.append(env._target)
    np.testing.assert_allclose(np.mean(targets, axis=0), 256.0, atol=2.0)
    np.testing.assert_allclose(np.std(targets, axis=0), 8.0, atol=1.2)


def test_reset_without_seed_goes_on_from_the_last_seed():
    env = PushtEnv()
    starts = []
    for seed in (5, None, None, 5, None):
        env.reset(seed=seed)
        starts.append(env.get_state())
    assert not np.array_equal(starts[0], starts[1]) and not np.array_equal(starts[1], starts[2])
    np.testing.assert_array_equal(starts[1], starts[4])


# --- observations and pictures ---


def test_keypoints_equal_the_recorded_ones_within_their_scatter(demos):
    states, recorded = demos.read("state").astype(float), demos.read("keypoint").astype(float)  # (N, 5), (N, 9, 2)
    error = np.array([block_keypoints(*state[2:]) for state in states]) - recorded  # (N, 9, 2) pixels
    assert error.std(axis=0).max() < 0.03
    assert np.median(np.abs(error)) < 1e-4


def test_keypoints_of_the_second_human_set_are_exact():
    path = DATA / "pusht_keypoint_x356_y356.zarr"
    if not path.exists():
        pytest.skip(f"the real demonstrations {path.name} are not in {DATA}")
    demos = ReplayBuffer.open(path)
    states, recorded = demos.read("state").astype(float), demos.read("keypoint").astype(float)
    error = [block_keypoints(*states[row, 2:]) - recorded[row] for row in range(0, len(states), 7)]
    assert np.abs(error).max() < 1e-3


def test_environment_state_is_flat_keypoints_or_the_pose_with_its_angle_wrapped():
    state = [100.0, 100.0, 300.0, 200.0, -1.0]
    obs, _ = PushtEnv().reset(options={"state": state})
    keypoints = obs[ENVIRONMENT_STATE].reshape(9, 2)
    np.testing.assert_allclose(keypoints, block_keypoints(300.0, 200.0, -1.0), rtol=1e-6)
    np.testing.assert_allclose(block_keypoints(0, 0, math.pi / 2)[0], [-90.04097, 9.26979], rtol=1e-9)  # quarter turn
    obs, _ = PushtEnv(PushtConfig(environment_state="pose")).reset(options={"state": state})
    np.testing.assert_allclose(obs[ENVIRONMENT_STATE], [300.0, 200.0, math.tau - 1.0], rtol=1e-6)


@pytest.mark.parametrize("config", [PushtConfig(), PushtConfig(environment_state="pose", pixels=True, image_size=48)])
def test_observations_and_actions_lie_in_their_spaces(config):
    env = PushtEnv(config)
    obs, _ = env.reset(seed=0)
    assert env.observation_space.contains(obs)
    assert env.observation_space.contains(env.step(env.action_space.sample())[0])
    for key, names in env.observation_names.items():
        assert obs[key].shape == (len(names),)
        assert env.observation_units[key].split(", ")[0] == "pixels"
    if config.pixels:
        assert obs[TOP_CAMERA].shape == (48, 48, 3) and obs[TOP_CAMERA].dtype == np.uint8


def test_picture_of_a_recorded_state_is_the_recorded_picture(demos):
    env = PushtEnv(PushtConfig(pixels=True))
    for row in (0, 500, 9000, 20000):
        obs, _ = env.reset(options={"state": demos.read("state", row, row + 1)[0]})
        recorded = demos.read("img", row, row + 1)[0]  # (96, 96, 3) float, 0..255
        seen = obs[TOP_CAMERA].astype(float)
        # An older pygame drew the recordings: single pixels on edges differ. Swapped colours give 1.1, swapped axes 5.
        assert np.abs(seen - recorded).mean() < 0.2


def test_later_pictures_do_not_change_earlier_ones():
    env = PushtEnv(PushtConfig(pixels=True))
    first, _ = env.reset(seed=0)
    kept = first[TOP_CAMERA].copy()
    env.step((400.0, 400.0))
    np.testing.assert_array_equal(first[TOP_CAMERA], kept)


def test_render_marks_the_target_where_action_to_pixels_says():
    env = PushtEnv(PushtConfig(render_size=256))
    env.reset(seed=0)
    without = env.render()
    env.step((480.0, 64.0))
    with_mark = env.render()
    column, row = env.action_to_pixels(np.array([480.0, 64.0]))
    assert without.shape == with_mark.shape == (256, 256, 3)
    assert tuple(without[int(row), int(column)]) == (255, 255, 255)
    assert tuple(with_mark[int(row), int(column)]) == (255, 0, 0)
    assert env.action_to_pixels(np.zeros((4, 16, 2))).shape == (4, 16, 2)
    env.reset(seed=0)
    np.testing.assert_array_equal(env.render(), without)


# --- goals and ends ---


def test_another_goal_moves_the_reward_and_the_drawn_goal():
    goal = (356.0, 356.0, math.pi / 4)
    state = [60.0, 60.0, *goal]
    solved, info = PushtEnv(PushtConfig(goal=goal, pixels=True)).reset(options={"state": state})
    elsewhere, other_info = PushtEnv(PushtConfig(pixels=True)).reset(options={"state": state})
    assert info["coverage"] == pytest.approx(1.0) and info["is_success"]
    assert other_info["coverage"] < 0.2 and not other_info["is_success"]
    light_green = (144, 238, 144)
    assert (elsewhere[TOP_CAMERA] == light_green).all(-1).sum() > 100
    assert (solved[TOP_CAMERA] == light_green).all(-1).sum() == 0  # the block lies on it


def test_success_terminates_with_full_reward_and_the_world_goes_on():
    env = PushtEnv()
    env.reset(options={"state": [60.0, 60.0, 257.0, 256.0, math.pi / 4]})
    for _ in range(2):
        _, reward, terminated, truncated, info = env.step((60.0, 60.0))
        assert (reward, terminated, truncated, info["is_success"]) == (1.0, True, False, True)
    assert 0.95 < info["coverage"] < 1


def test_episode_is_truncated_at_its_300th_step():
    env = PushtEnv()
    env.reset(seed=0)
    ends = [env.step((222.0, 97.0))[3] for _ in range(300)]
    assert ends.index(True) == 299


# --- errors ---


@pytest.mark.parametrize("action", [(math.nan, 1.0), (1.0, math.inf)])
def test_action_that_is_not_finite_is_refused(action):
    env = PushtEnv()
    env.reset(seed=0)
    with pytest.raises(ValueError, match="two finite numbers"):
        env.step(action)


def test_action_of_wrong_shape_is_refused():
    env = PushtEnv()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"action must be \(2,\).*got shape \(3,\)"):
        env.step(np.zeros(3))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"environment_state": "keypoint"}, "Did you mean 'keypoints'"),
        ({"start_states": "publish"}, "Did you mean 'published'"),
        ({"goal": (1.0, 2.0)}, "env.goal must be three finite numbers"),
        ({"image_size": 0}, "env.image_size must be at least 1"),
        ({"action_noise": -1.0}, "env.action_noise must be"),
    ],
)
def test_bad_choice_is_named(choice, message):
    with pytest.raises(ValueError, match=message):
        PushtConfig(**choice)


def test_missing_simulator_names_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "gym_pusht.envs.pusht", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'diffpolicy\[pusht\]'"):
        PushtEnv()


def test_module_imports_without_the_extra_and_without_a_word():
    blocked = "import sys; sys.modules.update(dict.fromkeys(['gym_pusht', 'pygame', 'cv2', 'shapely']))"
    code = f"{blocked}\nfrom diffpolicy.envs.pusht import PushtConfig\nPushtConfig()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_environment_is_silent_and_needs_no_display():
    code = (
        "from diffpolicy.envs.pusht import *\n"
        "env = PushtEnv(PushtConfig(pixels=True)); env.reset(seed=0); env.step((1, 1)); env.render(); env.close()"
    )
    unset = ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER", "PYGAME_HIDE_SUPPORT_PROMPT")
    bare = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, env=bare)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_config_is_frozen_and_travels_between_processes():
    config = PushtConfig(goal=[1, 2, 3])
    assert config.goal == (1.0, 2.0, 3.0)
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.pixels = True


def test_gymnasium_vector_env_runs_it():
    envs = gym.vector.SyncVectorEnv([PushtEnv, PushtEnv])
    obs, _ = envs.reset(seed=[0, 1])
    assert obs[ENVIRONMENT_STATE].shape == (2, 18)
    assert envs.step(np.full((2, 2), 100.0, np.float32))[1].shape == (2,)
    envs.close()
