"""What a store may hold: sizes of its files, pictures without loss, and errors that say where."""

from pathlib import Path

import numpy as np
import pytest

from diffpolicy.spec import FieldSpec
from diffpolicy.store_layout import (
    FORMAT,
    FORMAT_VERSION,
    check_episode,
    check_task_ids,
    chunk_shapes,
    finished_ends,
    is_image,
    own_attrs,
    to_uint8,
)

STORE = Path("a.zarr")


@pytest.mark.parametrize(
    ("step_shape", "dtype", "chunk", "shard"),
    [
        ((2,), "float32", (4096, 2), None),  # 8 bytes a step
        ((500,), "float64", (32, 500), None),  # 4000 bytes a step: 128 KiB hold 32
        ((96, 96, 3), "uint8", (4, 96, 96, 3), (512, 96, 96, 3)),
        ((480, 640, 3), "uint8", (1, 480, 640, 3), (16, 480, 640, 3)),
        ((4000, 4000, 3), "uint8", (1, 4000, 4000, 3), (4, 4000, 4000, 3)),  # a step is larger than a shard should be
    ],
)
def test_large_steps_are_sharded_and_small_ones_lie_in_plain_chunks(step_shape, dtype, chunk, shard):
    assert chunk_shapes(step_shape, np.dtype(dtype)) == (chunk, shard)


@pytest.mark.parametrize(
    ("shape", "dtype", "answer"),
    [
        ((96, 96, 3), "float32", True),
        ((96, 96, 1), "uint8", True),
        ((96, 96, 4), "uint8", False),
        ((9, 2), "f4", False),
    ],
)
def test_pictures_are_known_by_their_shape(shape, dtype, answer):
    assert is_image(FieldSpec(shape=shape, dtype=dtype)) is answer


def test_float_pictures_of_whole_numbers_become_uint8():
    frames = np.arange(0.0, 256.0, dtype=np.float32).reshape(1, 8, 32, 1)
    assert to_uint8(frames, "img", 0).dtype == np.uint8
    np.testing.assert_array_equal(to_uint8(frames, "img", 0), frames)


@pytest.mark.parametrize("value", [0.5, 256, -1, np.nan])
def test_pictures_that_would_lose_something_are_refused_with_their_row(value):
    frames = np.zeros((3, 4, 4, 3), np.float32)
    frames[1, 2, 3, 0] = value
    with pytest.raises(ValueError, match=r"img must hold whole numbers in 0\.\.255.*\[101, 2, 3, 0\]"):
        to_uint8(frames, "img", 100)


def test_the_length_of_an_episode_is_that_of_all_its_keys():
    fields = {"state": FieldSpec(shape=(3,), dtype="float32"), "action": FieldSpec(shape=(2,), dtype="int64")}
    episode = {"state": np.zeros((7, 3), np.float32), "action": np.zeros((7, 2), np.int64)}
    assert check_episode(STORE, fields, episode) == 7
    with pytest.raises(ValueError, match="same length of at least 1"):
        check_episode(STORE, fields, episode | {"action": np.zeros((6, 2), np.int64)})


def test_an_end_that_was_about_to_be_written_is_no_episode():
    assert finished_ends(STORE, np.array([4, 9, 0])).tolist() == [4, 9]
    assert finished_ends(STORE, np.array([0])).tolist() == []
    assert finished_ends(STORE, np.array([4, 9], np.uint8)).dtype == np.int64


@pytest.mark.parametrize(
    ("ends", "where"), [([4, 4], r"4 then 4 at \[1\]"), ([4, 0, 9], r"4 then 0"), ([-1, 2], "0 then -1")]
)
def test_ends_that_do_not_increase_are_refused_with_their_place(ends, where):
    with pytest.raises(ValueError, match=where):
        finished_ends(STORE, np.array(ends))


def test_every_episode_has_a_task_that_exists_or_none():
    check_task_ids(STORE, np.array([-1, 0, 1]), 3, 2)
    with pytest.raises(ValueError, match=r"must be in -1\.\.1, got 0\.\.2"):
        check_task_ids(STORE, np.array([0, 2, 1]), 3, 2)
    with pytest.raises(ValueError, match="2 entries for 3 episodes"):
        check_task_ids(STORE, np.array([0, 1]), 3, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": FORMAT_VERSION + 1}, "format_version"),
        ({"format_version": None}, "format_version None"),
        ({"keys": []}, "must map keys to role, names and units"),
        ({"tasks": [3]}, "must be a list of instructions"),
    ],
)
def test_attributes_of_ours_that_were_changed_are_refused(change, message):
    attrs = {"format": FORMAT, "format_version": FORMAT_VERSION, "keys": {"action": {"role": ""}}, "tasks": ["push"]}
    assert own_attrs(STORE, attrs) == ({"action": {"role": ""}}, ["push"])
    assert own_attrs(STORE, attrs | change | {"format": "another"}) == ({}, [])  # nothing of ours is expected there
    with pytest.raises(ValueError, match=message):
        own_attrs(STORE, attrs | change)
