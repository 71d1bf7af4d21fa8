import hashlib
import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest

if importlib.util.find_spec("metaworld") is None:  # not imported here: whoever does so first decides how MuJoCo draws
    pytest.skip("metaworld is not installed; pip install 'diffpolicy[metaworld]'", allow_module_level=True)

from diffpolicy.demos import SIM_STATE, collect
from diffpolicy.envs.metaworld import CORNER_CAMERA, GOAL, TASK_SETS, TASKS, MetaworldConfig, MetaworldEnv
from diffpolicy.envs.metaworld_expert import MetaworldDemonstrator, MetaworldDemonstratorConfig
from diffpolicy.envs.metaworld_scene import MissingGraphicsError, Scene, load_metaworld
from diffpolicy.envs.metaworld_sentences import SENTENCES
from diffpolicy.replay import ReplayBuffer
from diffpolicy.spec import ACTION, ENVIRONMENT_STATE, STATE

OPEN_DRAWER, CLOSE_DRAWER = "open the drawer", "close the drawer"
TOUCHING = ("drawer-open", "pick-place", "hammer", "bin-picking", "door-lock")
"""Tasks with a hinge, a slide, a free body and one that is carried, and those whose reset or reward is peculiar."""


OPEN = []
"""Environments of the test that runs; their scenes are used again by the next one."""


def env_for(*tasks, **choices):
    OPEN.append(MetaworldEnv(MetaworldConfig(tasks=tasks, **choices)))
    return OPEN[-1]


@pytest.fixture(autouse=True)
def scenes_go_back():
    yield
    while OPEN:
        OPEN.pop().close()


def play(env, seed, demonstrator=None, steps=300):
    """One demonstration: the states before each action and after the last, its actions, rewards and last info."""
    demonstrator = demonstrator or MetaworldDemonstrator()
    env.reset(seed=seed)
    demonstrator.reset(env, np.random.default_rng(seed))
    states, actions, rewards = [env.get_state()], [], []
    for _ in range(steps):
        actions.append(demonstrator.act(env))
        _, reward, terminated, truncated, info = env.step(actions[-1])
        states.append(env.get_state())
        rewards.append(reward)
        if terminated or truncated:
            break
    return states, actions, rewards, info


@pytest.fixture
def graphics():
    """Skips, saying what is missing, where MuJoCo cannot draw."""
    env = env_for("reach", render_size=16)
    env.reset(seed=0)
    try:
        env.render()
    except MissingGraphicsError as error:
        pytest.skip(str(error))


# --- episodes ---


def test_same_seed_gives_the_same_episode_in_another_process_and_after_other_episodes():
    code = """
import hashlib
from diffpolicy.envs.metaworld import MetaworldConfig, MetaworldEnv
env = MetaworldEnv(MetaworldConfig(tasks=("mt5",)))
env.reset(seed=7)
env.step([1, 0, 0, 1])
print(env.task, hashlib.sha256(env.get_state().tobytes()).hexdigest(), sep=" | ")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    env = env_for("mt5")
    for seed in (2, 12, 7):  # 2 and 12 use the same scenes
        env.reset(seed=seed)
        env.step([1, 0, 0, 1])
    assert done.stdout.strip() == f"{env.task} | {hashlib.sha256(env.get_state().tobytes()).hexdigest()}"


def test_another_seed_places_things_elsewhere():
    env = env_for("drawer-open")
    places = [env.reset(seed=seed)[0][ENVIRONMENT_STATE][0] for seed in range(4)]
    assert len(set(places)) == 4


@pytest.mark.parametrize("task", TOUCHING)
def test_restored_state_goes_on_bit_for_bit(task):
    states, actions, rewards, _ = play(env_for(task), seed=1, steps=60)
    other = env_for(task)
    for start in (0, 40):
        other.reset(options={"state": states[start]})
        assert np.array_equal(other.get_state(), states[start])
        for k in range(start, min(start + 15, len(actions))):
            _, reward, *_ = other.step(actions[k])
            assert np.array_equal(other.get_state(), states[k + 1])
            assert reward == rewards[k]


@pytest.mark.parametrize("task", ["door-open", "push", "window-open"])
def test_episode_is_meta_worlds_own(task):
    scene = Scene(task)
    numbers = scene.draw(seed=3)
    world = load_metaworld().worlds[f"{task}-v3"]()
    world._set_task_called = True
    world._partially_observable = False
    del world.sawyer_observation_space  # Meta-World caches it for a hidden goal
    world._last_rand_vec = numbers[: world._random_reset_space.low.size]
    world.reset()
    scene.begin(numbers)
    rng = np.random.default_rng(0)
    for _ in range(25):
        action = rng.uniform(-1, 1, 4).astype(np.float32)
        seen, reward, _, _, info = world.step(action)
        assert scene.step(action) == (reward, bool(info["success"]))
        assert np.array_equal(scene.observation[:18], seen[:18])


def test_first_observation_is_up_to_date():
    env = env_for("window-close")
    obs, info = env.reset(seed=0)
    assert not info["is_success"], "the window stands open"
    later, *_ = env.step(np.zeros(4))
    assert np.allclose(obs[ENVIRONMENT_STATE], later[ENVIRONMENT_STATE], atol=0.01)


def test_step_lasts_an_eightieth_of_a_second():
    env = env_for("reach")
    env.reset(seed=0)
    time = env.state_names.index("time")
    before = env.get_state()[time]
    env.step(np.zeros(4))
    assert env.get_state()[time] - before == pytest.approx(1 / env.fps)


def test_action_of_one_moves_the_hand_one_centimetre():
    env = env_for("reach")
    env.reset(seed=0)
    target = env.state_names.index("hand_target_0")
    for action, moved in (([1, 0, 0, 0], 0.01), ([5, 0, 0, 0], 0.01), ([-0.5, 0, 0, 0], -0.005)):
        before = env.get_state()[target]
        env.step(action)
        assert env.get_state()[target] - before == pytest.approx(moved)


def test_episode_is_truncated_at_max_steps():
    env = env_for("reach", max_steps=3)
    env.reset(seed=0)
    assert [env.step(np.zeros(4))[2:4] for _ in range(3)] == [(False, False), (False, False), (False, True)]


def test_observations_say_what_meta_world_says():
    env = env_for("push")
    obs, _ = env.reset(seed=0)
    assert env.observation_space.contains(obs)
    seen = env.scene.observation
    assert np.allclose(np.concatenate([obs[STATE], obs[ENVIRONMENT_STATE]]), seen[:18])
    assert np.allclose(obs[GOAL], seen[36:]) and obs[GOAL][1] > 0.7, "the goal is shown"


def test_scenes_are_shared_one_environment_after_the_other():
    first, second = env_for("reach"), env_for("reach")
    first.reset(seed=0)
    second.reset(seed=0)
    scene = first.scene
    assert scene is not second.scene
    first.close()
    with pytest.raises(ValueError, match=r"call reset\(\) before step"):
        first.step(np.zeros(4))
    third = env_for("reach")
    third.reset(seed=1)
    assert third.scene is scene


# --- words ---


def test_every_task_has_four_wordings_and_two_unseen_ones_of_the_same_words():
    worlds = load_metaworld().worlds
    assert {f"{task}-v3" for task in SENTENCES} == set(worlds) and len(TASKS) == 50
    for task, words in SENTENCES.items():
        assert len(words.seen) >= 4 and len(words.unseen) >= 2, task
        known = {word for sentence in words.seen for word in sentence.split()}
        assert {word for sentence in words.unseen for word in sentence.split()} <= known, task


def test_no_sentence_asks_for_two_tasks():
    sentences = [sentence for words in SENTENCES.values() for sentence in (*words.seen, *words.unseen)]
    assert len(set(sentences)) == len(sentences)


@pytest.mark.parametrize(
    ("task", "joint", "sign"),
    [
        ("faucet-open", [0, 0, 1], 1),  # counterclockwise seen from above, where z points
        ("faucet-close", [0, 0, 1], -1),
        ("dial-turn", [0, 0, 1], -1),
        ("door-lock", [0, 1, 0], 1),  # clockwise for the robot, which looks along y
        ("door-unlock", [0, 1, 0], -1),
    ],
)
def test_clockwise_is_said_of_what_turns_clockwise(task, joint, sign):
    env = env_for(task)
    states, *_, info = play(env, seed=1)
    assert info["is_success"]
    assert env.scene._world.model.joint(9).axis.tolist() == joint
    turned = states[-1][env.state_names.index("qpos_9")] - states[0][env.state_names.index("qpos_9")]
    assert np.sign(turned) == sign and abs(turned) > 0.5
    said = " ".join(SENTENCES[task].seen)
    clockwise = (sign > 0) == (joint == [0, 1, 0])
    assert (" clockwise" in said) == clockwise and ("counterclockwise" in said) != clockwise


@pytest.mark.parametrize(
    ("task", "axis", "sign", "word"),
    [
        ("window-open", "x", 1, "right"),
        ("window-close", "x", -1, "left"),
        ("plate-slide-side", "x", -1, "left"),
        ("plate-slide-back-side", "x", 1, "right"),
        ("plate-slide", "y", 1, "forward"),
        ("plate-slide-back", "y", -1, "back"),
        ("lever-pull", "z", 1, "up"),
        ("handle-press", "z", -1, "down"),
    ],
)
def test_direction_is_said_as_the_robot_sees_it(task, axis, sign, word):
    env = env_for(task)
    states, *_, info = play(env, seed=1)
    place = env.state_names.index(f"object_{axis}")
    assert info["is_success"] and np.sign(states[-1][place] - states[0][place]) == sign
    assert any(word in sentence.split() for sentence in SENTENCES[task].seen)


def test_every_run_of_seeds_asks_every_task_once_and_in_many_wordings():
    env = env_for("mt5")
    asked = []
    for seed in range(20):
        env.reset(seed=seed)
        assert env.task in env.wordings[env.goal].seen and env.scene_goals == (env.goal,)
        asked.append((env.goal, env.task))
    for start in range(0, 20, 5):
        assert {goal for goal, _ in asked[start : start + 5]} == set(env.wordings)
    assert len({goal for goal, _ in asked[::5]}) > 1, "not in the same order every time"
    assert len({task for _, task in asked}) > 8


def test_wordings_change_the_words_alone():
    heard = {}
    for wordings in ("seen", "unseen", "first"):
        env = env_for("mt5", wordings=wordings)
        env.reset(seed=4)
        heard[wordings] = (env.goal, env.task, env.get_state())
    goals, tasks, states = zip(*heard.values(), strict=True)
    wording = env.state_names.index("wording")
    assert len(set(goals)) == 1 and all(
        np.array_equal(np.delete(s, wording), np.delete(states[0], wording)) for s in states
    )
    words = env.wordings[goals[0]]
    assert tasks[0] in words.seen and tasks[1] in words.unseen and tasks[2] == goals[0]


def test_state_brings_back_the_words():
    env, other = env_for("mt5", wordings="unseen", swap=True), env_for("mt5")
    env.reset(seed=9)
    other.reset(options={"state": env.get_state()})
    assert (other.task, other.goal, other.scene_goals) == (env.task, env.goal, env.scene_goals)


def test_goal_is_asked_by_its_name():
    env = env_for("mt5", goal=OPEN_DRAWER)
    for seed in range(4):
        env.reset(seed=seed)
        assert env.goal == OPEN_DRAWER and env.scene.task == "drawer-open"


def test_swap_says_other_words_in_the_same_scene_and_only_the_scene_can_be_solved():
    plain, swapped = env_for("mt5", goal=OPEN_DRAWER), env_for("mt5", goal=OPEN_DRAWER, swap=True)
    _, actions, _, _ = play(plain, seed=2)
    swapped.reset(seed=2)
    physics = slice(plain.state_names.index("random_0"), None)
    plain.reset(seed=2)
    assert np.array_equal(plain.get_state()[physics], swapped.get_state()[physics])
    assert swapped.goal != OPEN_DRAWER and swapped.task in swapped.wordings[swapped.goal].seen
    for action in actions:
        _, reward, terminated, _, info = swapped.step(action)
        assert reward == 0 and not terminated and not info["is_success"]
    assert info["goals_reached"] == (OPEN_DRAWER,)
    assert info["goal_rewards"] == {OPEN_DRAWER: 1.0, swapped.goal: 0.0}


# --- demonstrations ---


@pytest.mark.parametrize("task", TASK_SETS["mt5"])
def test_scripted_policy_solves_its_task_and_reward_is_one_only_then(task):
    for noise in (0.0, 0.3):
        demonstrator = MetaworldDemonstrator(MetaworldDemonstratorConfig(noise=noise))
        _, actions, rewards, info = play(env_for(task), 5, demonstrator)
        assert info["is_success"] and info["goals_reached"] == (SENTENCES[task].seen[0],)
        assert rewards[-1] == 1 and 0 <= min(rewards) and max(rewards[:-1]) <= 0.99
        assert np.abs(actions).max() <= 1


def test_shake_follows_from_the_generator():
    demonstrator, env = MetaworldDemonstrator(MetaworldDemonstratorConfig(noise=0.2)), env_for("reach")
    first, second = (np.array(play(env, 3, demonstrator, steps=10)[1]) for _ in range(2))
    steady = np.array(play(env, 3, steps=10)[1])
    assert np.array_equal(first, second)
    assert 0.02 < np.abs(first[:, :3] - steady[:, :3]).mean() < 1


def test_demonstrator_does_not_show_one_task_under_the_words_of_another():
    env = env_for("mt5", swap=True)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="collect without swap"):
        MetaworldDemonstrator().reset(env, np.random.default_rng(0))


def test_recorded_demonstrations_replay_bit_for_bit(tmp_path):
    env = env_for("drawer-close", "reach")
    buffer = ReplayBuffer.open(collect(env, MetaworldDemonstrator(), out=tmp_path / "demos.zarr", episodes=2).path)
    for i, episode in enumerate(buffer):
        obs, _ = env.reset(options={"state": episode[SIM_STATE][0]})
        assert env.task == buffer.episode_task(i)
        for k, action in enumerate(episode[ACTION]):
            assert np.array_equal(env.get_state(), episode[SIM_STATE][k])
            assert all(np.array_equal(obs[key], episode[key][k]) for key in obs)
            obs, *_, info = env.step(action)
        assert info["is_success"]


# --- pictures ---


def test_goal_is_drawn_where_it_is_and_high_things_are_drawn_high(graphics):
    env = env_for("reach", pixels=True, image_size=400)
    for seed in range(3):
        obs, _ = env.reset(seed=seed)
        image = obs[CORNER_CAMERA]
        assert image.shape == (400, 400, 3) and image.dtype == np.uint8
        column, row = env.scene.to_pixels(env.scene.goal_xyz, 400).astype(int)
        red, green, blue = image[row, column].astype(int)
        assert red > 100 and red > 2 * max(green, blue), "a red ball marks the goal"
        raised = env.scene.to_pixels(env.scene.goal_xyz + np.array([0, 0, 0.1]), 400)
        assert raised[1] < row - 10


def test_pictures_are_the_same_after_what_draws_them_was_freed(graphics):
    env = env_for("drawer-close", render_size=64)
    env.reset(seed=0)
    before = env.render()
    env.scene.forget_pictures()
    assert not env.scene.holds_pictures
    assert np.array_equal(env.render(), before) and before.std() > 10


def test_actions_are_drawn_along_the_way_that_they_take_the_fingers():
    env = env_for("reach")
    env.reset(seed=0)
    actions = np.tile([1.0, 0.5, -0.5, 0.0], (15, 1))
    drawn = env.action_to_pixels(np.stack([actions, -actions]))
    assert drawn.shape == (2, 15, 2)
    assert np.allclose(env.action_to_pixels(actions[0]), drawn[0, 0])
    start = env.scene.to_pixels(env.scene.tool_xyz, env.config.render_size)
    for action in (*actions, *np.zeros((10, 4))):  # and time to come to rest
        env.step(action)
    end = env.scene.to_pixels(env.scene.tool_xyz, env.config.render_size)
    assert np.linalg.norm(end - start) > 20
    assert np.linalg.norm(end - drawn[0, -1]) < 0.15 * np.linalg.norm(end - start)


def test_missing_graphics_say_what_to_install():
    code = """
from diffpolicy.envs.metaworld import MetaworldEnv
env = MetaworldEnv()
env.reset(seed=0)
try:
    env.render()
except ImportError as error:
    print(error)
"""
    environment = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY")}
    environment["MUJOCO_GL"] = "glfw"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.count("\n") == 1
    assert "libegl1 libegl-mesa0 libgl1-mesa-dri and set MUJOCO_GL=egl" in done.stdout


# --- mistakes ---


@pytest.mark.parametrize("action", [[np.nan, 0, 0, 0], [0, 0, 0], np.zeros((4, 1))])
def test_bad_action_is_refused(action):
    env = env_for("reach")
    env.reset(seed=0)
    with pytest.raises(ValueError, match="action must be 4 finite numbers"):
        env.step(action)


def test_bad_state_is_refused_by_name():
    env = env_for("reach")
    env.reset(seed=0)
    good = env.get_state()
    with pytest.raises(ValueError, match=f"must be {len(good)} finite numbers"):
        env.reset(options={"state": good[:-1]})
    for name, value in (("task", 50), ("asked_task", 0.5), ("wording", -1)):
        bad = good.copy()
        bad[env.state_names.index(name)] = value
        with pytest.raises(ValueError, match=f"{name} must be an integer"):
            env.reset(options={"state": bad})


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"tasks": ("drawer-opn",)}, "Did you mean 'drawer-open'"),
        ({"tasks": ()}, "must name at least one"),
        ({"tasks": ("mt5",), "goal": "open the drawr"}, "Did you mean 'open the drawer'"),
        ({"tasks": ("drawer-open",), "swap": True}, "needs a second task"),
        ({"goals": "held_out"}, "holds none out"),
        ({"wordings": "unsen"}, "Did you mean 'unseen'"),
        ({"image_size": 0}, r"env\.image_size must be at least 1"),
    ],
)
def test_wrong_choice_is_refused_by_name(choices, message):
    with pytest.raises(ValueError, match=message):
        MetaworldConfig(**choices)
