"""Two-goal Push-T: the world of Push-T, bit for bit, in which only words say where the block belongs."""

import math

import numpy as np
import pytest

from diffpolicy.envs import ENVIRONMENTS, make_env
from diffpolicy.envs.base import LanguageEnv
from diffpolicy.envs.pusht import TOP_CAMERA, PushtConfig, PushtEnv
from diffpolicy.envs.pusht_language import CENTRE, GOAL_POSES, LOWER_RIGHT, PushtLanguageConfig, PushtLanguageEnv
from diffpolicy.spec import ENVIRONMENT_STATE, GOAL_IMAGE, STATE

CENTRE_NAME, LOWER_RIGHT_NAME = GOAL_POSES
SEEDS = range(100_000, 100_200)


def make(**choices) -> PushtLanguageEnv:
    return PushtLanguageEnv(PushtLanguageConfig(**choices))


def asked(seeds=SEEDS, **choices) -> list[tuple[str, str]]:
    """(goal, words) of each seed."""
    env = make(**choices)
    return [(env.goal, env.task) for seed in seeds if env.reset(seed=seed)]


# --- sentences ---


def test_there_are_enough_sentences_and_each_means_one_goal():
    everything = [s for words in (CENTRE, LOWER_RIGHT) for s in (*words.seen, *words.unseen)]
    assert len(set(everything)) == len(everything)
    for words in (CENTRE, LOWER_RIGHT):
        assert len(words.seen) >= 8 and len(words.unseen) >= 4


@pytest.mark.parametrize("words", [CENTRE, LOWER_RIGHT])
def test_unseen_sentences_are_made_of_words_that_demonstrations_of_the_same_goal_use(words):
    vocabulary = {word for sentence in words.seen for word in sentence.split()}
    for sentence in words.unseen:
        assert set(sentence.split()) <= vocabulary


def test_every_word_that_tells_the_goals_apart_is_in_several_seen_sentences():
    for words, places in ((CENTRE, ("centre", "middle")), (LOWER_RIGHT, ("lower right", "bottom right"))):
        for place in places:
            assert sum(place in sentence for sentence in words.seen) >= 5
        for sentence in (*words.seen, *words.unseen):
            assert sum(place in sentence for place in places) == 1


def test_no_sentence_is_longer_than_the_tiny_text_tower_reads():
    from diffpolicy.encoders.clip_towers import Tokenizer

    read = Tokenizer(context_length=32)
    for words in (CENTRE, LOWER_RIGHT):
        for sentence in (*words.seen, *words.unseen):
            read(sentence)  # raises if it is too long


# --- the same world ---


def test_states_observations_and_noise_are_those_of_pusht_to_the_last_bit():
    theirs = PushtEnv(PushtConfig(pixels=True, show_goal=False, action_noise=2.0))
    ours = make(pixels=True, action_noise=2.0)
    rng = np.random.default_rng(0)
    for seed in (0, 100_000, 100_003):
        expected, _ = theirs.reset(seed=seed)
        got, _ = ours.reset(seed=seed)
        for _ in range(30):
            assert set(got) == {STATE, ENVIRONMENT_STATE, TOP_CAMERA}
            for key, value in expected.items():
                np.testing.assert_array_equal(got[key], value)
            action = ours.get_state()[2:4] + rng.normal(0, 60, 2)
            expected, got = theirs.step(action)[0], ours.step(action)[0]
        np.testing.assert_array_equal(ours.get_state(), theirs.get_state())


@pytest.mark.parametrize("start_states", ["published", "gym_pusht"])
def test_what_is_asked_does_not_change_the_scene(start_states):
    envs = [
        make(start_states=start_states, action_noise=1.0, **c) for c in ({}, {"swap": True}, {"wordings": "unseen"})
    ]
    for seed in (3, 4, None, None):
        for env in envs:
            env.reset(seed=seed)
            env.step((200.0, 200.0))
        for env in envs[1:]:
            np.testing.assert_array_equal(env.get_state(), envs[0].get_state())


# --- what is asked ---


def test_goal_is_drawn_evenly_and_independently_of_the_start_state():
    env = make()
    goals, starts = [], []
    for seed in range(600):
        env.reset(seed=seed)
        goals.append(env.goal == CENTRE_NAME)
        starts.append(env.get_state())
    goals, starts = np.array(goals, float), np.array(starts)
    assert abs(goals.mean() - 0.5) < 0.07  # 3.4 standard deviations
    correlations = [np.corrcoef(goals, column)[0, 1] for column in starts.T]
    assert np.abs(correlations).max() < 0.14


def test_a_seed_asks_the_same_again_and_no_option_moves_the_draw_of_another():
    goals = [goal for goal, _ in asked()]
    assert asked() == asked()
    for choices in ({"wordings": "unseen"}, {"wordings": "first"}, {"goals": "all"}, {"goal_image": True}):
        assert [goal for goal, _ in asked(**choices)] == goals
    always = asked(goal=CENTRE_NAME)
    assert [goal for goal, _ in always] == [CENTRE_NAME] * len(SEEDS)
    assert [words for goal, words in asked() if goal == CENTRE_NAME] == [
        words for (_, words), goal in zip(always, goals, strict=True) if goal == CENTRE_NAME
    ]


def test_swap_asks_the_other_goal_for_every_seed():
    for (goal, _), (other, words) in zip(asked(), asked(swap=True), strict=True):
        assert {goal, other} == set(GOAL_POSES)
        assert words in PushtLanguageEnv.wordings[other].seen
    assert {goal for goal, _ in asked(goal=CENTRE_NAME, swap=True)} == {LOWER_RIGHT_NAME}


def test_swap_refuses_a_start_that_fulfils_the_other_goal():
    env = make(goal=CENTRE_NAME, swap=True)
    with pytest.raises(ValueError, match=r"env\.swap asks for another goal .*choose another start state"):
        env.reset(options={"state": [60.0, 60.0, *GOAL_POSES[LOWER_RIGHT_NAME]]})


@pytest.mark.parametrize("wordings", ["seen", "unseen", "first"])
def test_every_sentence_of_a_choice_is_said_and_no_other(wordings):
    said = {words for _, words in asked(range(400), wordings=wordings)}
    expected = set()
    for words in (CENTRE, LOWER_RIGHT):
        expected |= {"seen": set(words.seen), "unseen": set(words.unseen), "first": {words.seen[0]}}[wordings]
    assert said == expected


# --- judging ---


@pytest.mark.parametrize("name", GOAL_POSES)
def test_both_goals_are_judged_and_the_asked_one_ends_the_episode(name):
    (other,) = set(GOAL_POSES) - {name}
    state = [60.0, 60.0, *GOAL_POSES[name]]
    for goal in (name, other):
        env = make(goal=goal)
        env.reset(seed=0, options={"state": state})
        _, reward, terminated, truncated, info = env.step((60.0, 60.0))
        assert info["goals_reached"] == (name,)
        assert info["goal_rewards"][name] == 1.0 and info["goal_rewards"][other] < 0.2
        assert reward == info["goal_rewards"][goal]
        assert (terminated, info["is_success"], truncated) == (goal == name, goal == name, False)


def test_reward_is_that_of_pusht_with_the_same_goal():
    plain, told = PushtEnv(PushtConfig(goal=(356, 356, math.pi / 4))), make(goal=LOWER_RIGHT_NAME)
    state = [60.0, 60.0, 340.0, 350.0, 0.9]
    infos = [env.reset(options={"state": state})[1] for env in (plain, told)]
    assert infos[0]["coverage"] == infos[1]["coverage"] > 0.4
    assert plain.step((60.0, 60.0))[1] == told.step((60.0, 60.0))[1]


# --- pictures ---


def test_observed_images_hide_the_goal_unless_asked_and_render_shows_it():
    green = (144, 238, 144)
    state = [60.0, 60.0, 150.0, 420.0, 0.0]
    hidden, shown = make(pixels=True), make(pixels=True, show_goal=True)
    pictures = {}
    for seed in range(6):
        obs, _ = hidden.reset(seed=seed, options={"state": state})
        assert not (obs[TOP_CAMERA] == green).all(-1).any()
        obs, _ = shown.reset(seed=seed, options={"state": state})
        pictures.setdefault(shown.goal, []).append(obs[TOP_CAMERA])
        assert (hidden.render() == green).all(-1).any()
        np.testing.assert_array_equal(hidden.render(), shown.render())
    assert len(pictures) == 2
    rows = {name: np.argwhere((frames[0] == green).all(-1)).mean(axis=0) for name, frames in pictures.items()}
    assert (rows[LOWER_RIGHT_NAME] - rows[CENTRE_NAME]).min() > 10  # image pixels, down and to the right
    for frames in pictures.values():
        for frame in frames:
            np.testing.assert_array_equal(frame, frames[0])


@pytest.mark.parametrize("name", GOAL_POSES)
def test_goal_image_shows_the_block_at_the_asked_goal_at_every_step(name):
    env = make(goal=name, goal_image=True)
    obs, _ = env.reset(seed=0)
    first = obs[GOAL_IMAGE].copy()
    assert env.observation_space.contains(obs) and first.shape == (96, 96, 3)
    obs[GOAL_IMAGE][:] = 0  # what a caller does to its observation stays with the caller
    np.testing.assert_array_equal(env.step((400.0, 400.0))[0][GOAL_IMAGE], first)
    np.testing.assert_array_equal(env.reset(seed=1)[0][GOAL_IMAGE], first)
    block = np.abs(first.astype(int) - (143, 163, 184)).max(-1) == 0  # the face of the block
    with_goal = PushtEnv(PushtConfig(goal=GOAL_POSES[name], pixels=True)).reset(options={"state": [30, 30, 60, 400, 0]})
    goal = (with_goal[0][TOP_CAMERA] == (144, 238, 144)).all(-1)
    assert (block & goal).sum() > 0.95 * block.sum() > 100
    assert not (first == (144, 238, 144)).all(-1).any()


# --- family and errors ---


def test_it_is_listed_and_is_told_in_words():
    env = make_env("pusht_language", environment_state="pose")
    assert isinstance(env, LanguageEnv) and ENVIRONMENTS["pusht_language"][1].fps == 10
    obs, _ = env.reset(seed=0)
    assert obs[ENVIRONMENT_STATE].shape == (3,) and env.task and env.scene_goals == tuple(env.wordings)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"goal": "push the T to the center"}, "Did you mean 'push the T to the centre'"),
        ({"goals": "heldout"}, "Did you mean 'held_out'"),
        ({"goals": "held_out"}, "holds none out; use train or all"),
        ({"wordings": "unsaid"}, "env.wordings must be one of"),
        ({"environment_state": "poses"}, "Did you mean 'pose'"),
        ({"action_noise": -1.0}, "env.action_noise must be"),
    ],
)
def test_bad_choice_is_named(choice, message):
    with pytest.raises(ValueError, match=message):
        PushtLanguageConfig(**choice)
