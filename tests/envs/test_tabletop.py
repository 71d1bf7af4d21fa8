import numpy as np
import pytest

from diffpolicy.envs.tabletop import (
    BLOCK_COLOURS,
    GOAL,
    PUSHER_COLOUR,
    TABLE_COLOUR,
    TOP_CAMERA,
    ZONE_COLOURS,
    TabletopConfig,
    TabletopEnv,
    instruction,
    passing_side,
)
from diffpolicy.envs.tabletop_expert import TabletopDemonstrator
from diffpolicy.spec import ENVIRONMENT_STATE, STATE

LAYOUTS = [(1, 1), (2, 2), (3, 3), (4, 4)]


def play(env, demonstrator, seed):
    """One demonstration: positions of the pusher (steps + 1, 2), rewards, and whether it succeeded."""
    env.reset(seed=seed)
    demonstrator.reset(env, np.random.default_rng([seed, 1]))
    path, rewards, done = [env.pusher_xy], [], False
    while not done:
        _, reward, terminated, truncated, info = env.step(demonstrator.act(env))
        path.append(env.pusher_xy)
        rewards.append(reward)
        done = terminated or truncated
    return np.array(path), np.array(rewards), info["is_success"]


def bump_into_things(env, rng, steps):
    """Actions that drive the pusher into blocks, the post and the edges."""
    for _ in range(steps):
        spots = [*env.block_xy, env.post_xy, rng.uniform(-50, 560, 2)]
        yield spots[rng.integers(len(spots))] + rng.normal(0, 20, 2)


def test_same_seed_gives_the_same_episode_and_another_seed_another():
    ends = []
    for seed in (5, 5, 6):
        env = TabletopEnv()
        env.reset(seed=seed)
        for action in bump_into_things(env, np.random.default_rng(0), 30):
            env.step(action)
        ends.append(env.get_state())
    assert np.array_equal(ends[0], ends[1])
    assert not np.array_equal(ends[0], ends[2])


@pytest.mark.parametrize(("num_blocks", "num_zones"), LAYOUTS)
def test_restored_state_goes_on_bit_for_bit_even_in_contact(num_blocks, num_zones):
    config = TabletopConfig(num_blocks=num_blocks, num_zones=num_zones)
    env, other = TabletopEnv(config), TabletopEnv(config)
    rng = np.random.default_rng(1)
    env.reset(seed=1)
    moved = env.block_xy
    for k, action in enumerate(bump_into_things(env, rng, 60)):
        if k % 3 == 0:
            other.reset(options={"state": env.get_state()})
            assert np.array_equal(other.get_state(), env.get_state())
            assert other.task == env.task
        expected, got = env.step(action), other.step(action)
        assert np.array_equal(other.get_state(), env.get_state())
        assert got[1:4] == expected[1:4]
        assert all(np.array_equal(got[0][key], expected[0][key]) for key in expected[0])
    assert np.abs(env.block_xy - moved).max() > 5, "the test must touch a block"


@pytest.mark.parametrize(("num_blocks", "num_zones"), LAYOUTS)
def test_no_start_is_solved_and_blocks_lie_apart_from_everything(num_blocks, num_zones):
    env = TabletopEnv(TabletopConfig(num_blocks=num_blocks, num_zones=num_zones))
    asked = set()
    for seed in range(200):
        obs, info = env.reset(seed=seed)
        assert not info["is_success"]
        to_zones = np.linalg.norm(env.block_xy[:, None] - env.zone_xy[None], axis=-1)
        assert to_zones.min() > env.config.zone_radius, "no block, asked or not, begins in a zone"
        gaps = np.linalg.norm(env.block_xy[:, None] - env.block_xy[None], axis=-1) + 1e3 * np.eye(num_blocks)
        assert gaps.min() > 2 * 24 * np.sqrt(2)
        zone_gaps = np.linalg.norm(env.zone_xy[:, None] - env.zone_xy[None], axis=-1) + 1e3 * np.eye(num_zones)
        assert zone_gaps.min() >= 2 * env.config.zone_radius
        assert np.allclose(obs[GOAL], [*env.block_xy[env.asked_block], *env.zone_xy[env.asked_zone]])
        asked.add(env.task)
    assert asked == set(env.tasks), "every sentence is asked"


def test_task_says_the_asked_block_and_zone():
    env = TabletopEnv()
    assert env.tasks == (
        "push the red block to the green zone",
        "push the red block to the orange zone",
        "push the blue block to the green zone",
        "push the blue block to the orange zone",
    )
    env.reset(seed=0)
    assert env.task == instruction(env.block_names[env.asked_block], env.zone_names[env.asked_zone])


def test_success_means_the_asked_block_in_the_asked_zone_and_no_other():
    env = TabletopEnv()
    env.reset(seed=0)
    start = env.get_state()
    names = list(env.state_names)
    for block in env.block_names:
        for zone in env.zone_names:
            state = start.copy()
            state[names.index(f"{block}_block_x")] = start[names.index(f"{zone}_zone_x")] + env.config.zone_radius - 1
            state[names.index(f"{block}_block_y")] = start[names.index(f"{zone}_zone_y")]
            _, info = env.reset(options={"state": state})
            *_, terminated, _, step_info = env.step(env.pusher_xy)
            right = instruction(block, zone) == env.task
            assert info["is_success"] == step_info["is_success"] == terminated == right


def test_reward_is_the_share_of_the_way_and_one_at_the_end():
    env = TabletopEnv()
    for seed in range(8):
        _, rewards, success = play(env, TabletopDemonstrator(), seed)
        assert success
        assert rewards[0] < 1e-9 and rewards[-1] == 1.0
        assert np.all((rewards >= 0) & (rewards <= 1))
        assert np.abs(np.diff(rewards)[:-1]).max() < 0.5, "it rises smoothly"


def test_episode_is_truncated_at_max_steps():
    env = TabletopEnv(TabletopConfig(max_steps=7))
    env.reset(seed=0)
    flags = [env.step(env.pusher_xy)[2:4] for _ in range(7)]
    assert flags == [(False, False)] * 6 + [(False, True)]


def test_post_stops_the_pusher_and_the_edges_keep_it_in():
    env = TabletopEnv()
    env.reset(seed=0)
    for target in (env.post_xy, (-300.0, 256.0), (-300.0, -300.0), (900.0, 900.0)):
        for _ in range(20):
            env.step(target)
            assert np.linalg.norm(env.pusher_xy - env.post_xy) > 45 + 16 - 3
            assert np.all((env.pusher_xy > 16 - 3) & (env.pusher_xy < 512 - 16 + 3))


def test_pusher_fits_behind_a_block_at_the_rail():
    env = TabletopEnv()
    env.reset(seed=0)
    names = list(env.state_names)
    state = env.get_state()
    state[names.index("red_block_x")], state[names.index("red_block_y")] = 64.0, 300.0
    state[names.index("red_block_angle")] = 0.0
    state[0:2] = (20.0, 300.0)  # between the block and the edge
    env.reset(options={"state": state})
    for _ in range(10):
        env.step((120.0, 300.0))
    assert env.block_xy[0, 0] > 120


@pytest.mark.parametrize("action", [[np.nan, 1.0], [1.0, np.inf], [1.0], [[1.0, 2.0]], [1.0, 2.0, 3.0]])
def test_bad_action_is_refused(action):
    env = TabletopEnv()
    env.reset(seed=0)
    with pytest.raises(ValueError, match="2 finite numbers"):
        env.step(np.array(action))


def test_bad_state_is_refused_by_name():
    env = TabletopEnv()
    env.reset(seed=0)
    good = env.get_state()
    with pytest.raises(ValueError, match="num_blocks=2"):
        env.reset(options={"state": good[:-1]})
    bad = good.copy()
    bad[env.state_names.index("asked_block")] = 2
    with pytest.raises(ValueError, match="asked_block"):
        env.reset(options={"state": bad})
    bad = good.copy()
    bad[env.state_names.index("start_distance")] = 10.0
    with pytest.raises(ValueError, match=r"start_distance must be above env\.zone_radius"):
        env.reset(options={"state": bad})


def test_wrong_choice_is_refused_by_name():
    with pytest.raises(ValueError, match=r"env\.num_blocks must be in \[1, 4\], got 5"):
        TabletopConfig(num_blocks=5)
    with pytest.raises(ValueError, match=r"env\.zone_radius"):
        TabletopConfig(zone_radius=100.0)


def test_observations_lie_in_the_declared_space():
    env = TabletopEnv(TabletopConfig(pixels=True))
    obs, _ = env.reset(seed=0)
    assert env.observation_space.contains(obs)
    assert {key: value.shape for key, value in obs.items()} == {
        STATE: (2,),
        ENVIRONMENT_STATE: (14,),
        GOAL: (4,),
        TOP_CAMERA: (96, 96, 3),
    }
    for key, names in env.observation_names.items():
        assert obs[key].shape == (len(names),)
    assert len(env.get_state()) == len(env.state_names)
    assert TOP_CAMERA not in TabletopEnv().reset(seed=0)[0]


@pytest.mark.parametrize("size", [96, 384])
def test_every_object_is_seen_where_it_is_in_its_colour(size):
    env = TabletopEnv(TabletopConfig(num_blocks=4, num_zones=4, pixels=True, image_size=size))
    for seed in range(5):
        obs, _ = env.reset(seed=seed)
        image, scale = obs[TOP_CAMERA].astype(int), size / 512
        assert image.shape == (size, size, 3)
        things = [(PUSHER_COLOUR, env.pusher_xy)]
        things += [(BLOCK_COLOURS[name], xy) for name, xy in zip(env.block_names, env.block_xy, strict=True)]
        for name, xy in zip(env.zone_names, env.zone_xy, strict=True):
            things.append((0.45 * np.array(ZONE_COLOURS[name]) + 0.55 * np.array(TABLE_COLOUR), xy))  # see-through
        for colour, (x, y) in things:
            assert np.abs(image[int(y * scale), int(x * scale)] - colour).max() <= 2


def test_picture_shows_the_action_where_action_to_pixels_says():
    env = TabletopEnv(TabletopConfig(render_size=400))
    env.reset(seed=0)
    before = env.render()
    assert before.shape == (400, 400, 3) and before.dtype == np.uint8
    target = np.array([60.0, 300.0])
    env.step(target)
    column, row = env.action_to_pixels(target)
    changed = np.argwhere(np.abs(env.render().astype(int) - before).sum(-1) > 0)
    near = changed[np.linalg.norm(changed + 0.5 - (row, column), axis=1) < 10]
    assert len(near) > 10
    assert np.allclose(near.mean(0) + 0.5, (row, column), atol=0.5)
    assert env.action_to_pixels(np.zeros((3, 5, 2))).shape == (3, 5, 2)


def test_passing_side_is_read_at_the_height_of_the_post():
    post = np.array([256.0, 370.0])
    left = np.array([[300.0, 460.0], [200.0, 380.0], [180.0, 360.0], [300.0, 200.0]])
    mirrored = np.column_stack([512 - left[:, 0], left[:, 1]])
    assert passing_side(left, post) == "left"
    assert passing_side(mirrored, post) == "right"
    assert passing_side(left[:2], post) == "none"
    with pytest.raises(ValueError, match=r"\(steps, 2\)"):
        passing_side(left[0], post)


def test_demonstrator_solves_nearly_all_and_takes_both_sides_from_any_start():
    env, demonstrator = TabletopEnv(), TabletopDemonstrator()
    sides, solved = [], []
    for seed in range(60):
        path, _, success = play(env, demonstrator, seed)
        assert passing_side(path, env.post_xy) == demonstrator.side
        sides.append(demonstrator.side)
        solved.append(success)
    assert np.mean(solved) >= 0.9
    assert 0.3 <= np.mean([side == "left" for side in sides]) <= 0.7


def test_demonstrator_has_two_ways_from_one_start():
    env, demonstrator = TabletopEnv(), TabletopDemonstrator()
    env.reset(seed=3)
    state, found = env.get_state(), {}
    for k in range(12):
        env.reset(options={"state": state})
        demonstrator.reset(env, np.random.default_rng(k))
        path, done = [env.pusher_xy], False
        while not done:
            *_, terminated, truncated, info = env.step(demonstrator.act(env))
            path.append(env.pusher_xy)
            done = terminated or truncated
        assert info["is_success"]
        side = passing_side(np.array(path), state[-5:-3])
        found[side] = found.get(side, 0) + 1
    assert set(found) == {"left", "right"}
