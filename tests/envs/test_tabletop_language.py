from collections import Counter

import numpy as np
import pytest

from diffpolicy.demos import collect
from diffpolicy.envs.table_picture import BLOCK_COLOURS, PUSHER_COLOUR, TABLE_COLOUR, ZONE_COLOURS
from diffpolicy.envs.tabletop_goals import (
    BLOCKS,
    DIRECTIONS,
    EDGES,
    GOALS,
    HELD_OUT,
    NAMES,
    WORDINGS,
    ZONES,
    shortfalls,
    targets,
)
from diffpolicy.envs.tabletop_language import TOP_CAMERA, TabletopLanguageConfig, TabletopLanguageEnv
from diffpolicy.envs.tabletop_language_expert import TabletopLanguageDemonstrator
from diffpolicy.replay import ReplayBuffer
from diffpolicy.spec import ENVIRONMENT_STATE, GOAL_IMAGE, STATE

TRAIN = tuple(name for name in NAMES if name not in HELD_OUT)
BESIDE = {(g.block, g.place, g.other): name for name, g in zip(NAMES, GOALS, strict=True) if g.kind == "beside"}


def make(**choices):
    return TabletopLanguageEnv(TabletopLanguageConfig(**choices))


def scene(env):
    """What a seed decides apart from what is asked: everything in the state but the last two numbers."""
    return env.get_state()[:-2]


def play(env, demonstrator, seed):
    """Plays one demonstration; returns the pusher's path (steps + 1, 2), the last info and all goals met on the way."""
    demonstrator.reset(env, np.random.default_rng([seed, 1]))
    path, met, done = [env.pusher_xy], set(), False
    while not done:
        _, _, terminated, truncated, info = env.step(demonstrator.act(env))
        path.append(env.pusher_xy)
        met.update(info["goals_reached"])
        done = terminated or truncated
    return np.array(path), info, met


def with_block_at(env, block, xy):
    """The state of env with one block elsewhere, and where the episode found it left as it was."""
    state = env.get_state()
    first = env.state_names.index(f"{block}_block_x")
    state[first : first + 2] = xy
    return state


# ------------------------------------------------------------------------------------------------------ goals and words


def test_eighty_goals_have_sentences_of_their_own():
    assert len(NAMES) == len(GOALS) == 80
    sentences = [s for words in WORDINGS.values() for s in (*words.seen, *words.unseen)]
    assert len(set(sentences)) == len(sentences)
    for name, words in WORDINGS.items():
        assert words.seen[0] == name
        assert len(words.seen) >= 4 and len(words.unseen) >= 2
    assert NAMES[0] == "push the red block to the green zone"
    assert {"push the purple block to the top edge", "push the blue block left of the yellow one"} <= set(NAMES)


def test_unseen_sentences_are_made_of_words_that_demonstrations_say():
    said = {word for name in TRAIN for sentence in WORDINGS[name].seen for word in sentence.split()}
    for name in NAMES:
        assert {word for sentence in WORDINGS[name].unseen for word in sentence.split()} <= said


def test_a_fifth_of_the_goals_is_held_out_and_every_part_of_them_is_demonstrated():
    assert len(HELD_OUT) == 16
    shown = [goal for goal in GOALS if not goal.is_held_out]
    for kind, places in (("zone", ZONES), ("edge", EDGES), ("beside", tuple(DIRECTIONS))):
        of_kind = [goal for goal in shown if goal.kind == kind]
        assert {goal.block for goal in of_kind} == set(BLOCKS)
        assert {goal.place for goal in of_kind} == set(places)
    pairs = {(goal.block, goal.kind, goal.place) for goal in shown}
    assert all((goal.block, goal.kind, goal.place) not in pairs for goal in GOALS if goal.is_held_out)


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("push the red block to the green zone", (92, 92 + 59), (92, 92 + 61)),
        ("push the red block to the left edge", (89, 256), (91, 256)),
        ("push the red block to the left edge", (80, 161), (80, 159)),  # farther down is a corner
        ("push the red block to the bottom edge", (256, 512 - 89), (256, 512 - 91)),
        ("push the red block left of the blue one", (300 - 90 - 35, 250), (300 - 90 - 37, 250)),
        ("push the red block above the blue one", (300, 250 - 90 + 35), (300, 250 - 90 + 37)),
    ],
)
def test_goal_is_reached_inside_its_region_and_not_outside(name, inside, outside):
    blocks = np.array([(0.0, 0.0), (300.0, 250.0), (400.0, 150.0), (380.0, 380.0)])
    zones = np.array([(92.0, 92.0), (420.0, 92.0), (92.0, 420.0), (420.0, 420.0)])
    points = np.zeros((4, 2, 2))
    points[0] = inside, outside  # of the red block
    missing = shortfalls(points, blocks, zones)[0, :, NAMES.index(name)]
    assert missing[0] == 0 and missing[1] == pytest.approx(1.0, abs=0.01)


def test_every_target_lies_where_its_goal_is_reached():
    blocks = np.array([(150.0, 200.0), (300.0, 250.0), (390.0, 125.0), (380.0, 380.0)])
    zones = np.array([(92.0, 92.0), (420.0, 92.0), (92.0, 420.0), (420.0, 420.0)])
    missing = shortfalls(targets(blocks, zones), blocks, zones)  # (4, 20, 20)
    assert np.all(missing[:, range(20), range(20)] == 0)


def test_goal_is_not_reached_by_moving_the_other_block():
    env = make()
    found = 0
    for seed in range(60):
        env.reset(seed=seed)
        goal = GOALS[env.asked]
        if goal.kind != "beside":
            continue
        opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}[goal.place]
        mirrored = BESIDE[(goal.other, opposite, goal.block)]
        _, info = env.reset(options={"state": with_block_at(env, goal.block, env.asked_target)})
        assert info["is_success"] and env.goal in info["goals_reached"]
        assert mirrored not in info["goals_reached"]
        found += mirrored in env.scene_goals
    assert found > 0, "the test must meet a scene that allows both"


# --------------------------------------------------------------------------------------------- what a seed decides


def test_same_seed_shows_the_same_scene_whatever_is_asked_and_however():
    options = [
        {}, {"swap": True}, {"goals": "held_out"}, {"goals": "all"}, {"wordings": "unseen"},
        {"wordings": "first"}, {"goals": "held_out", "swap": True},
    ]  # fmt: skip
    envs = [make(**choices) for choices in options]
    differ = Counter()
    for seed in range(20):
        for env in envs:
            env.reset(seed=seed)
            assert np.array_equal(scene(env), scene(envs[0]))
            assert env.scene_goals == envs[0].scene_goals
            assert env.goal in env.scene_goals
            differ[id(env)] += env.goal != envs[0].goal
    plain, swap, held_out, _, unseen, first, held_out_swap = envs
    assert differ[id(swap)] == 20 and differ[id(held_out)] == 20
    assert differ[id(unseen)] == differ[id(first)] == 0, "how it is said does not change what is asked"
    assert held_out.goal in HELD_OUT and held_out_swap.goal in HELD_OUT and held_out.goal != held_out_swap.goal
    assert plain.goal not in HELD_OUT and swap.goal not in HELD_OUT
    assert unseen.task in WORDINGS[unseen.goal].unseen
    assert first.task == first.goal
    plain.reset(seed=0)
    again = plain.get_state()
    plain.reset(seed=1)
    assert not np.array_equal(plain.get_state(), again)


@pytest.mark.parametrize("name", ["push the red block to the cyan zone", "push the purple block above the red one"])
def test_asked_goal_is_asked_in_the_first_scene_that_allows_it(name):
    env, plain, same = make(goal=name), make(), 0
    for seed in range(30):
        env.reset(seed=seed)
        plain.reset(seed=seed)
        assert env.goal == name and name in env.scene_goals
        if name in plain.scene_goals:
            assert np.array_equal(scene(env), scene(plain))
            same += 1
    assert 0 < same < 30


def test_scene_does_not_give_the_task_away():
    env, guess = make(), []
    for seed in range(150):
        _, info = env.reset(seed=seed)
        assert not info["is_success"] and info["goals_reached"] == ()
        assert set(info["goal_rewards"].values()) == {0.0}
        train = [name for name in env.scene_goals if name not in HELD_OUT]
        assert len(train) >= 8 and len(env.scene_goals) - len(train) >= 2
        kinds = Counter(GOALS[NAMES.index(name)].kind for name in train)
        guess.append(max(1 / len(kinds) / n for n in kinds.values()))  # the kind is drawn, then the goal
    assert np.mean(guess) < 0.2


def test_every_goal_and_every_seen_wording_comes_up():
    env, asked = make(goals="all"), Counter()
    for seed in range(450):
        env.reset(seed=seed)
        asked[env.goal] += 1
        assert env.task in WORDINGS[env.goal].seen
    kinds = Counter()
    for name, count in asked.items():
        kinds[GOALS[NAMES.index(name)].kind] += count
    assert len(asked) >= 74, "rare goals need more seeds"
    assert min(kinds.values()) > 0.25 * 450


# ------------------------------------------------------------------------------------------------------- episodes


def test_restored_state_goes_on_bit_for_bit():
    env, other, rng = make(pixels=True, goal_image=True), make(pixels=True, goal_image=True), np.random.default_rng(0)
    env.reset(seed=4)
    before = env.block_xy
    for step in range(40):
        if step % 4 == 0:
            other.reset(options={"state": env.get_state()})
            assert (other.task, other.goal, other.scene_goals) == (env.task, env.goal, env.scene_goals)
        action = env.block_xy[rng.integers(4)] + rng.normal(0, 15, 2)
        ours, theirs = env.step(action), other.step(action)
        assert np.array_equal(env.get_state(), other.get_state())
        assert ours[1:3] == theirs[1:3] and ours[4] == theirs[4]
        assert all(np.array_equal(ours[0][key], theirs[0][key]) for key in ours[0])
    assert np.abs(env.block_xy - before).max() > 20, "the test must push a block"


def test_reward_rises_with_the_block_and_is_one_at_the_goal_alone():
    env = make()
    env.reset(seed=1)
    block = BLOCKS[env.asked_block]
    start, target = env.block_xy[env.asked_block], env.asked_target
    rewards = []
    for share in (0.0, 0.2, 0.4, 1.0):
        env.reset(options={"state": with_block_at(env, block, start + share * (target - start))})
        _, reward, terminated, _, info = env.step(env.pusher_xy)
        assert reward == info["goal_rewards"][env.goal]
        assert terminated == info["is_success"] == (reward == 1.0) == (env.goal in info["goals_reached"])
        rewards.append(reward)
    assert rewards[0] == 0.0 and rewards[-1] == 1.0
    assert rewards == sorted(rewards) and rewards[1] > 0


def test_demonstrator_reaches_what_is_asked_and_nothing_else_on_the_way():
    exact, alone, moved_others, steps = [], [], [], []
    for goals in ("train", "held_out"):
        env, demonstrator = make(goals=goals), TabletopLanguageDemonstrator()
        for seed in range(60):
            env.reset(seed=seed)
            path, info, met = play(env, demonstrator, seed)
            alone.append(met == {env.goal})
            exact.append(info["goals_reached"] == (env.goal,))
            steps.append(len(path) - 1)
            moved = np.linalg.norm(env.block_xy - env.start_xy, axis=-1)
            moved_others.append(np.delete(moved, env.asked_block).max())
    assert np.mean(exact) >= 0.96
    assert np.mean(alone) >= 0.95
    assert np.mean(np.array(moved_others) > 20) <= 0.05
    assert 12 <= np.mean(steps) <= 25


def test_demonstrator_goes_round_a_block_in_its_way_on_either_side():
    env, demonstrator, sides = make(), TabletopLanguageDemonstrator(), set()
    env.reset(seed=0)
    way = env.asked_target - env.block_xy[env.asked_block]
    forward = way / np.linalg.norm(way)
    state = env.get_state()
    state[0:2] = env.block_xy[env.asked_block] + 70 * forward  # in front of the block
    for seed in range(10):
        env.reset(options={"state": state})
        path, info, _ = play(env, demonstrator, seed)
        assert info["is_success"]
        aside = (path - state[0:2]) @ np.array([-forward[1], forward[0]])
        sides.add(np.sign(aside[np.abs(aside).argmax()]))
    assert sides == {-1.0, 1.0}


def test_collected_episodes_carry_seen_words_of_training_goals(tmp_path):
    env = make(pixels=True, image_size=16)
    collect(env, TabletopLanguageDemonstrator(), out=tmp_path / "demos.zarr", episodes=12)
    sentences = {sentence for name in TRAIN for sentence in WORDINGS[name].seen}
    buffer = ReplayBuffer.open(tmp_path / "demos.zarr")
    told = [buffer.episode_task(i) for i in range(12)]
    assert set(told) <= sentences and len(set(told)) > 6
    assert buffer.fields[TOP_CAMERA].shape == (16, 16, 3)


# ------------------------------------------------------------------------------------------------ what there is to see


def test_observations_lie_in_the_declared_space_and_do_not_tell_what_is_asked():
    env, other = make(pixels=True), make(pixels=True, swap=True)
    obs, _ = env.reset(seed=3)
    assert env.observation_space.contains(obs)
    assert {key: value.shape for key, value in obs.items()} == {
        STATE: (2,),
        ENVIRONMENT_STATE: (16,),
        TOP_CAMERA: (64, 64, 3),
    }
    for key, names in env.observation_names.items():
        assert obs[key].shape == (len(names),)
    same, _ = other.reset(seed=3)
    assert other.task != env.task
    assert all(np.array_equal(obs[key], same[key]) for key in obs)


@pytest.mark.parametrize("size", [64, 256])
def test_every_block_zone_and_the_pusher_are_seen_where_they_are(size):
    env, scale = make(pixels=True, image_size=size), size / 512
    for seed in range(5):
        image = env.reset(seed=seed)[0][TOP_CAMERA].astype(int)
        seen = [(PUSHER_COLOUR, env.pusher_xy)]
        seen += [(BLOCK_COLOURS[name], xy) for name, xy in zip(BLOCKS, env.block_xy, strict=True)]
        for name, xy in zip(ZONES, env.zone_xy, strict=True):
            if np.linalg.norm(xy - env.pusher_xy) > 40:
                seen.append((0.45 * np.array(ZONE_COLOURS[name]) + 0.55 * np.array(TABLE_COLOUR), xy))  # see-through
        for colour, (x, y) in seen:
            assert np.abs(image[int(y * scale), int(x * scale)] - colour).max() <= 2


def test_grey_table_changes_colours_and_nothing_else():
    light, grey = make(pixels=True), make(pixels=True, table="grey")
    for seed in range(3):
        ours, theirs = light.reset(seed=seed)[0], grey.reset(seed=seed)[0]
        assert np.array_equal(light.get_state(), grey.get_state())
        (x, y), image = grey.pusher_xy * 64 / 512, theirs[TOP_CAMERA]
        assert np.array_equal(image[0, 0], (122, 116, 104)) and np.array_equal(image[int(y), int(x)], (250, 250, 250))
        assert np.array_equal(ours[TOP_CAMERA][0, 0], TABLE_COLOUR)
        for name, (bx, by) in zip(BLOCKS, grey.block_xy * 64 / 512, strict=True):
            assert np.abs(image[int(by), int(bx)].astype(int) - BLOCK_COLOURS[name]).max() <= 2


def test_shapes_can_be_told_apart_without_their_colours():
    image = make(pixels=True, image_size=512).reset(seed=0)[0][TOP_CAMERA].astype(int)
    areas = {name: int((np.abs(image - BLOCK_COLOURS[name]).max(-1) <= 2).sum()) for name in BLOCKS}
    expected = {"red": 50**2, "blue": np.pi * 27**2, "yellow": 3**1.5 / 4 * 32**2, "purple": 2 * 32**2}
    assert areas == pytest.approx(expected, rel=0.08), "pixels on the rim are mixed with the table"


def test_goal_image_shows_the_asked_block_where_it_belongs():
    env = make(pixels=True, goal_image=True, image_size=256)
    for seed in range(5):
        obs, _ = env.reset(seed=seed)
        assert env.observation_space.contains(obs)
        column, row = (env.asked_target * 0.5).astype(int)
        colour = BLOCK_COLOURS[BLOCKS[env.asked_block]]
        assert np.abs(obs[GOAL_IMAGE][row, column].astype(int) - colour).max() <= 2
        assert np.abs(obs[TOP_CAMERA][row, column].astype(int) - colour).max() > 20
        later = env.step(env.pusher_xy)[0]
        assert np.array_equal(later[GOAL_IMAGE], obs[GOAL_IMAGE])


# ----------------------------------------------------------------------------------------------------------- errors


def test_wrong_choice_is_refused_by_name():
    with pytest.raises(ValueError, match=r"env\.goal must be one of .* Did you mean 'push the red block"):
        make(goal="push the red blok to the green zone")
    with pytest.raises(ValueError, match=r"env\.goals must be one of .*'heldout'.* Did you mean 'held_out'"):
        make(goals="heldout")
    with pytest.raises(ValueError, match=r"env\.table must be one of \['grey', 'light'\], got 'gray'"):
        make(table="gray")
    with pytest.raises(ValueError, match=r"env\.wordings"):
        make(wordings="all")
    with pytest.raises(ValueError, match=r"env\.image_size must be at least 1"):
        make(image_size=0)


def test_bad_action_and_bad_state_are_refused():
    env = make()
    with pytest.raises(ValueError, match="reset"):
        env.step(np.zeros(2))
    env.reset(seed=0)
    with pytest.raises(ValueError, match="2 finite numbers"):
        env.step(np.array([np.nan, 1.0]))
    good = env.get_state()
    with pytest.raises(ValueError, match="finite numbers"):
        env.reset(options={"state": good[:-1]})
    for name, value in (("asked_goal", 80), ("wording", 8), ("asked_goal", 0.5)):
        bad = good.copy()
        bad[env.state_names.index(name)] = value
        with pytest.raises(ValueError, match=name):
            env.reset(options={"state": bad})
    bad = good.copy()
    bad[env.state_names.index("asked_goal")] = next(i for i in range(80) if NAMES[i] not in env.scene_goals)
    with pytest.raises(ValueError, match="straight push"):
        env.reset(options={"state": bad})
