"""Painting out: without the drawn goal, recordings look as the simulator draws them without one."""

import math
import os
from pathlib import Path

import numpy as np
import pytest

from diffpolicy.envs.pusht import TOP_CAMERA, PushtConfig, PushtEnv
from diffpolicy.paint_out import COVERS, GREEN, LEVELS, green_levels, painter, pusht_goal, remaining_green, remove_green
from diffpolicy.replay import ReplayBuffer
from diffpolicy.spec import FieldSpec

PROJECT = Path(__file__).parents[1]
DATA = PROJECT / os.environ.get("DIFFPOLICY_DATA", "../shared/data")
SETS = {"pusht_cchi_v7_replay.zarr": 256.0, "pusht_keypoint_x356_y356.zarr": 356.0}
"""Store -> x and y of its goal, pixels."""


def goal_env(xy: float, *, show_goal: bool) -> PushtEnv:
    return PushtEnv(PushtConfig(pixels=True, goal=(xy, xy, math.pi / 4), show_goal=show_goal))


def drawn(env: PushtEnv, states: np.ndarray) -> np.ndarray:
    """What the simulator shows of states (n, 5): (n, 96, 96, 3) uint8."""
    return np.stack([env.reset(options={"state": state})[0][TOP_CAMERA] for state in states])


def random_states(num: int, *, near: float) -> np.ndarray:
    """(num, 5) poses of block and pusher about a goal, many of them overlapping it and each other's edges."""
    rng = np.random.default_rng(0)
    block = near + rng.normal(0, 60, (num, 2))
    agent = block + rng.normal(0, 70, (num, 2))
    return np.column_stack([agent.clip(30, 480), block.clip(120, 400), rng.uniform(0, math.tau, num)])


def store_of(path: Path, frames: np.ndarray) -> ReplayBuffer:
    fields = {"img": FieldSpec(shape=frames.shape[1:], dtype="uint8"), "action": FieldSpec(shape=(2,), dtype="float32")}
    with ReplayBuffer.create(path, fields=fields, fps=10) as buffer:
        buffer.append_episode({"img": frames, "action": np.zeros((len(frames), 2), np.float32)})
    return ReplayBuffer.open(path)


def greenness(frames: np.ndarray) -> np.ndarray:
    """Levels by which green exceeds red and blue; positive in the goal's colour (94) and in no other of Push-T's."""
    red, green, blue = np.moveaxis(frames.astype(int), -1, 0)
    return green - (red + blue) // 2


def test_covers_are_the_colours_that_the_simulator_draws_with():
    env = PushtEnv(PushtConfig(pixels=True, image_size=512, show_goal=False))
    frame = env.reset(options={"state": [380.0, 130.0, 200.0, 300.0, 0.6]})[0][TOP_CAMERA]
    colours = {tuple(int(c) for c in colour) for colour in np.unique(frame.reshape(-1, 3), axis=0)}
    assert {tuple(map(int, colour)) for colour in COVERS[:4]} <= colours
    mark = env._canvas.contact_pen.collision_point_color
    assert (mark.r, mark.g, mark.b) == tuple(COVERS[4])
    shown = PushtEnv(PushtConfig(pixels=True, image_size=512)).reset(seed=0)[0][TOP_CAMERA]
    assert (shown == GREEN).all(-1).any() and not (frame == GREEN).all(-1).any()


@pytest.mark.parametrize(
    ("colour", "level", "share"),
    [
        ((144, 238, 144), 111, 1.0),  # the goal, uncovered
        ((159, 240, 159), 96, 96 / 111),  # its edge, uncovered
        ((143, 163, 184), 111, 0.0),  # the block's face
        ((78, 126, 255), 96, 0.0),  # the pusher's face
        ((231, 76, 60), 111, 0.0),  # a mark of contact
        ((144, 200, 164), 111, 0.5),  # half goal, half face
        ((255, 255, 255), 111, 0.0),
    ],
)
def test_share_of_green_in_plain_mixtures(colour, level, share):
    assert remaining_green(colour, level) == pytest.approx(share, abs=0.02)


def test_simulated_pictures_lose_their_goal_to_within_three_levels(tmp_path):
    states = random_states(300, near=300.0)
    with_goal, without = (drawn(goal_env(300.0, show_goal=show), states) for show in (True, False))
    paint = pusht_goal(store_of(tmp_path / "a.zarr", with_goal), "img")
    painted = paint(with_goal)
    off = np.abs(painted.astype(int) - without).max(axis=-1)  # (300, 96, 96)
    assert np.abs(with_goal.astype(int) - without).max() == 111
    assert off.max() <= 8 and (off > 3).mean() < 1e-5
    assert painted.dtype == np.uint8 and painted is not with_goal


def test_pixels_outside_the_goal_stay_as_they_are():
    frames = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    green = np.zeros((8, 8), int)
    green[2, 3] = LEVELS
    painted = remove_green(frames, green)
    changed = (painted != frames).any(axis=(0, 3))
    assert not changed[green == 0].any()


def test_levels_of_green_are_read_off_mixtures_with_white_alone():
    frames = np.array([(255, 255, 255), (144, 238, 144), (200, 247, 200), (248, 248, 248), (143, 163, 184)], np.uint8)
    levels, on_line = green_levels(frames)
    assert levels.tolist() == [0, 111, 55, 0, 0] and on_line.tolist() == [True, True, True, False, False]


def test_a_camera_without_a_goal_and_a_goal_that_moves_are_refused(tmp_path):
    state = np.array([[60.0, 60.0, 150.0, 400.0, 0.0]])
    nothing = np.repeat(drawn(goal_env(256.0, show_goal=False), state), 3, axis=0)
    with pytest.raises(ValueError, match="no light green goal in img"):
        pusht_goal(store_of(tmp_path / "a.zarr", nothing), "img")
    here, there = (drawn(goal_env(xy, show_goal=True), state) for xy in (256.0, 356.0))
    frames = np.concatenate([here, here, here, there])
    paint = pusht_goal(store_of(tmp_path / "b.zarr", frames), "img")
    paint(frames[:3])
    with pytest.raises(ValueError, match=r"shows green at pixel .* one that moves cannot be painted out"):
        paint(frames)


def test_an_unknown_painter_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"--paint-out must be one of .*Did you mean 'pusht_goal'"):
        painter("pusht")


# --- the human recordings ---


@pytest.fixture(scope="module", params=SETS)
def recording(request):
    """(x and y of the goal, states, recorded, painted) of 150 frames of a human set."""
    path = DATA / request.param
    if not path.exists():
        pytest.skip(f"the real demonstrations {path.name} are not in {DATA}")
    buffer = ReplayBuffer.open(path)
    paint = pusht_goal(buffer, "img")
    starts = np.linspace(0, buffer.num_steps - 30, 5).astype(int)
    frames = np.concatenate([buffer.read("img", start, start + 30) for start in starts]).astype(np.uint8)
    states = np.concatenate([buffer.read("state", start, start + 30) for start in starts])
    return SETS[request.param], states, frames, paint(frames)


def test_painted_recordings_equal_the_simulator_without_a_goal_wherever_they_equal_it_with_one(recording):
    xy, states, recorded, painted = recording
    with_goal, without = (drawn(goal_env(xy, show_goal=show), states) for show in (True, False))
    goal = (with_goal != without).any(axis=(0, 3))  # (96, 96) what a goal can change
    agrees = (np.abs(recorded.astype(int) - with_goal).max(axis=-1) <= 2) & goal
    assert agrees[:, goal].mean() > 0.9  # an older pygame drew the edges a little differently
    off = np.abs(painted.astype(int) - without).max(axis=-1)
    assert off[agrees].max() <= 4 and off[agrees].mean() < 0.1
    # Over all pixels, disagreement of drawing included, the painted set is as near as the recorded one was.
    assert np.abs(painted.astype(int) - without).mean() < np.abs(recorded.astype(int) - with_goal).mean() + 0.02


def test_the_place_of_the_goal_is_no_more_off_than_the_place_of_the_other_goal(recording):
    xy, states, recorded, painted = recording
    without = drawn(goal_env(xy, show_goal=False), states)
    places = [(drawn(goal_env(at, show_goal=True), states[:1]) != without[:1]).any(axis=(0, 3)) for at in SETS.values()]
    if xy == 356.0:
        places.reverse()
    only_here, only_there = places[0] & ~places[1], places[1] & ~places[0]

    def bias(frames: np.ndarray) -> np.ndarray:  # (2,) mean signed error at both places, levels of 255
        error = frames.astype(float) - without
        return np.array([error[:, place].mean() for place in (only_here, only_there)])

    assert abs(np.subtract(*bias(recorded))) > 20
    assert abs(np.subtract(*bias(painted))) < 0.5


def test_nothing_green_is_left_to_tell_the_goal_by(recording):
    _, _, recorded, painted = recording
    assert greenness(recorded).max() == 94
    assert greenness(painted).max() <= 2


def test_where_nothing_lies_on_it_the_goal_is_pure_white(recording):
    _, _, recorded, painted = recording
    levels, on_line = green_levels(recorded)
    uncovered = on_line & (levels > 0)
    assert uncovered.sum() > 1000
    assert np.abs(painted[uncovered].astype(int) - 255).max() <= 1
