"""Rewriting: the episodes that stay are the same bit for bit, and a failure leaves everything as it was."""

import errno
import os
import time

import numpy as np
import pytest
import zarr
from zarr.storage import _local

from diffpolicy.replay import ReplayBuffer
from diffpolicy.rewriting import _runs_of_rows, convert, drop_episodes
from diffpolicy.spec import FieldSpec
from tests.test_replay import (
    FIELDS,
    assert_holds,
    demonstration,
    fail_at_write,
    make_store,
    make_v2_store,
    real,
    task_of,
)


def test_drop_in_place_keeps_the_other_episodes_bit_equal(tmp_path):
    path = make_store(tmp_path / "a.zarr", 6)
    drop_episodes(path, [1, 4])
    assert_holds(ReplayBuffer.open(path), [0, 2, 3, 5])
    assert [p.name for p in tmp_path.iterdir()] == ["a.zarr"]
    with ReplayBuffer.open(path, mode="a") as buffer:
        buffer.append_episode(demonstration(7), task_of(7))
    assert_holds(ReplayBuffer.open(path), [0, 2, 3, 5, 7])
    assert ReplayBuffer.open(path).fields == FIELDS


def test_drop_in_place_is_refused_while_another_writes(tmp_path):
    path = make_store(tmp_path / "a.zarr")
    with ReplayBuffer.open(path, mode="a"):
        with pytest.raises(BlockingIOError, match="one writer at a time"):
            drop_episodes(path, [0])
    assert_holds(ReplayBuffer.open(path), [0, 1, 2, 3])


def test_drop_with_out_leaves_the_source_alone(tmp_path):
    path = make_store(tmp_path / "a.zarr")
    drop_episodes(path, [0], out=tmp_path / "b.zarr")
    assert_holds(ReplayBuffer.open(path), [0, 1, 2, 3])
    assert_holds(ReplayBuffer.open(tmp_path / "b.zarr"), [1, 2, 3])


@pytest.mark.parametrize(
    ("episodes", "message"),
    [([4], r"episodes 0\.\.3, so \[4\] cannot"), ([-1], r"\[-1\] cannot"), (range(4), "would leave none")],
)
def test_drop_refuses_what_is_not_there_and_everything(tmp_path, episodes, message):
    path = make_store(tmp_path / "a.zarr")
    with pytest.raises(ValueError, match=message):
        drop_episodes(path, episodes)
    assert_holds(ReplayBuffer.open(path), [0, 1, 2, 3])


def test_drop_from_zarr_v2_needs_out_and_keeps_types(tmp_path):
    path = make_v2_store(tmp_path / "a.zarr")
    with pytest.raises(ValueError, match="--out"):
        drop_episodes(path, [0])
    drop_episodes(path, [0], out=tmp_path / "b.zarr")
    buffer = ReplayBuffer.open(tmp_path / "b.zarr")
    assert buffer.fields["img"].dtype == "float32"
    np.testing.assert_array_equal(buffer.episode(0)["img"], demonstration(1)["img"])


def test_a_rewrite_that_fails_leaves_the_source_and_nothing_else(tmp_path, monkeypatch):
    path = make_store(tmp_path / "a.zarr")
    for number in (0, 8, 20):
        with monkeypatch.context() as patch:
            fail_at_write(patch, number, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            with pytest.raises(OSError, match=r"a\.zarr could not be written .No space left"):
                drop_episodes(path, [1])
    assert_holds(ReplayBuffer.open(path), [0, 1, 2, 3])
    assert [p.name for p in tmp_path.iterdir()] == ["a.zarr"]


def test_a_failed_rewrite_deletes_its_folder_only_when_no_write_is_under_way(tmp_path, monkeypatch):
    """zarr raises at the first failure; a write that comes later must not bring the deleted folder back."""
    fields = {"img": FieldSpec(shape=(512, 512, 3), dtype="uint8")}
    with ReplayBuffer.create(tmp_path / "a.zarr", fields=fields, fps=10) as buffer:
        for _ in range(2):
            buffer.append_episode({"img": np.zeros((20, 512, 512, 3), np.uint8)})  # in three shards
    monkeypatch.setattr(ReplayBuffer, "rows_per_file", lambda self, key: 20)  # two of them are written at once
    write = _local._put

    def put(path, value, exclusive=False):
        if path.name != "zarr.json" and path.parts[-4] == "0":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if path.name != "zarr.json":
            time.sleep(0.2)
        path.parent.mkdir(parents=True, exist_ok=True)
        return write(path, value, exclusive)

    monkeypatch.setattr(_local, "_put", put)
    with pytest.raises(OSError, match=r"a\.zarr could not be written .No space left"):
        drop_episodes(tmp_path / "a.zarr", [1])
    time.sleep(0.3)
    assert [p.name for p in tmp_path.iterdir()] == ["a.zarr"]


@pytest.mark.parametrize(
    ("spans", "size", "groups"),
    [
        ([(0, 4), (4, 6)], 10, [[(0, 6)]]),  # spans that touch are read together
        ([(0, 4), (6, 9)], 10, [[(0, 4), (6, 9)]]),
        ([(0, 7), (9, 12)], 4, [[(0, 4)], [(4, 7), (9, 10)], [(10, 12)]]),
    ],
)
def test_rows_are_read_in_groups_of_a_file(spans, size, groups):
    runs = _runs_of_rows([slice(*span) for span in spans], size)
    assert [[(run.start, run.stop) for run in group] for group in runs] == groups


def test_convert_makes_float_pictures_uint8_and_keeps_the_rest(tmp_path):
    src = make_v2_store(tmp_path / "a.zarr")
    root = zarr.open_group(src, mode="r+")
    root.update_attributes({"license": "MIT"})
    root["data/action"].update_attributes({"frame": "world"})
    root.create_array("meta/operator", data=np.array([3, 1, 4, 1]))
    roles = {"img": "observation.images.top"}
    convert(src, tmp_path / "b.zarr", fps=10, roles=roles, task="push the T")
    buffer = ReplayBuffer.open(tmp_path / "b.zarr")
    assert (buffer.zarr_format, buffer.fps, buffer.tasks) == (3, 10, ("push the T",))
    assert buffer.roles == {**roles, "action": "action"}
    assert buffer.fields["img"].dtype == "uint8"
    for i in range(4):
        assert buffer.episode_task(i) == "push the T"
        for key, expected in demonstration(i).items():
            np.testing.assert_array_equal(buffer.episode(i)[key], expected)
    copy = zarr.open_group(tmp_path / "b.zarr", mode="r")
    assert copy.attrs["license"] == "MIT" and copy["data/action"].attrs["frame"] == "world"
    assert copy["meta/operator"][:].tolist() == [3, 1, 4, 1]


def test_convert_keeps_pictures_between_0_and_1_and_nan_as_they_are(tmp_path):
    img = (np.concatenate([demonstration(i)["img"] for i in range(4)]) / 255).astype(np.float32)
    action = np.full((86, 2), np.nan, np.float32)
    convert(make_v2_store(tmp_path / "a.zarr", img=img, action=action), tmp_path / "b.zarr")
    buffer = ReplayBuffer.open(tmp_path / "b.zarr")
    assert buffer.read("img").tobytes() == img.tobytes()
    assert buffer.read("action").tobytes() == action.tobytes()


@pytest.mark.parametrize(
    ("task", "message"), [(" ", "must say something, got ' '"), ("push \udcff", "must be UTF-8 text")]
)
def test_convert_refuses_an_instruction_that_says_nothing_clear(tmp_path, task, message):
    with pytest.raises(ValueError, match=message):
        convert(make_v2_store(tmp_path / "old.zarr"), tmp_path / "new.zarr", task=task)
    assert not (tmp_path / "new.zarr").exists()


def test_convert_refuses_to_overwrite_and_unknown_roles(tmp_path):
    src = make_v2_store(tmp_path / "a.zarr")
    with pytest.raises(FileExistsError, match="exists already"):
        convert(src, src)
    with pytest.raises(ValueError, match="Did you mean 'img'"):
        convert(src, tmp_path / "b.zarr", roles={"imgs": "observation.images.top"})
    assert [p.name for p in tmp_path.iterdir()] == ["a.zarr"]


def test_a_few_pusht_episodes_convert_to_the_same_numbers(tmp_path):
    source = ReplayBuffer.open(real("pusht_cchi_v7_replay.zarr"))
    drop_episodes(source.path, range(3, 206), out=tmp_path / "three.zarr")
    convert(tmp_path / "three.zarr", tmp_path / "b.zarr", fps=10)
    buffer = ReplayBuffer.open(tmp_path / "b.zarr")
    assert buffer.episode_ends.tolist() == [161, 279, 420] and buffer.fields["img"].dtype == "uint8"
    for key in source.keys:
        np.testing.assert_array_equal(buffer.read(key), source.read(key, 0, 420))
