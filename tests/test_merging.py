"""Merging: the episodes of every source, bit for bit, in order, each with its share of the wordings; or nothing at all."""

import collections
import errno
import os
import shutil
import tracemalloc

import numpy as np
import pytest
import zarr

from diffpolicy.merging import deal, merge, read_wordings
from diffpolicy.replay import ReplayBuffer
from diffpolicy.spec import FieldSpec
from tests.test_replay import (
    FIELDS,
    ROLES,
    assert_holds,
    demonstration,
    fail_at_write,
    make_store,
    make_v2_store,
    real,
    task_of,
)


def make_told_store(path, indices, **changed_fields):
    """A store of ours in which every episode has an instruction."""
    with ReplayBuffer.create(path, fields=FIELDS | changed_fields, fps=10, roles=ROLES) as buffer:
        for i in indices:
            buffer.append_episode(demonstration(i), f"task {i}")
    return path


# --- what comes out ---


def test_episodes_of_a_folder_of_zarr_v2_and_of_a_zip_come_out_bit_equal_and_in_order(tmp_path):
    first = make_v2_store(tmp_path / "a.zarr")
    shutil.make_archive(str(tmp_path / "b"), "zip", make_store(tmp_path / "b.zarr", 6))
    merged = merge([first, tmp_path / "b.zip"], tmp_path / "two.zarr", wordings=[["push"], ["shove"]])
    assert merged.num_episodes == (4, 6) and merged.left_out == {}
    assert merged.notes == (
        f"the instructions that {tmp_path / 'b.zip'} had are replaced",
        f"{first} does not say its frame rate; it is taken to be 10 Hz as the others'",
        "img becomes uint8 (float32 and uint8 in the sources)",
    )
    buffer = ReplayBuffer.open(tmp_path / "two.zarr")
    assert (buffer.zarr_format, buffer.is_ours, buffer.fps) == (3, True, 10)
    assert buffer.fields == FIELDS and buffer.roles == {**ROLES, "action": "action"}
    for i, index in enumerate([0, 1, 2, 3, 0, 1, 2, 3, 4, 5]):
        for key, expected in demonstration(index).items():
            np.testing.assert_array_equal(buffer.episode(i)[key], expected)
        assert buffer.episode_task(i) == ("push" if i < 4 else "shove")
    with ReplayBuffer.open(tmp_path / "two.zarr", mode="a") as buffer:
        buffer.append_episode(demonstration(7), "push")


def test_instructions_of_the_sources_are_kept_when_none_is_given(tmp_path):
    stores = [make_told_store(tmp_path / f"{i}.zarr", [i, i + 1]) for i in (0, 5)]
    merge(stores, tmp_path / "two.zarr")
    buffer = ReplayBuffer.open(tmp_path / "two.zarr")
    assert [buffer.episode_task(i) for i in range(4)] == ["task 0", "task 1", "task 5", "task 6"]
    merge([make_v2_store(tmp_path / "a.zarr")] * 2, tmp_path / "none.zarr")
    assert ReplayBuffer.open(tmp_path / "none.zarr").tasks == ()


def test_types_that_differ_become_one_that_holds_both(tmp_path):
    doubles = np.random.default_rng(0).normal(size=(86, 3))
    stores = [make_v2_store(tmp_path / "a.zarr"), make_v2_store(tmp_path / "b.zarr", state=doubles)]
    merged = merge(stores, tmp_path / "two.zarr")
    buffer = ReplayBuffer.open(tmp_path / "two.zarr")
    assert buffer.fields["state"].dtype == "float64" and buffer.fields["action"].dtype == "float32"
    np.testing.assert_array_equal(buffer.read("state", 86), doubles)
    assert "state becomes float64 (float32 and float64 in the sources)" in merged.notes


def test_pictures_between_0_and_1_stay_as_they_are_unless_others_are_uint8(tmp_path):
    unit = (np.concatenate([demonstration(i)["img"] for i in range(4)]) / 255).astype(np.float32)
    odd = make_v2_store(tmp_path / "odd.zarr", img=unit)
    merge([odd, make_v2_store(tmp_path / "b.zarr")], tmp_path / "two.zarr")
    np.testing.assert_array_equal(ReplayBuffer.open(tmp_path / "two.zarr").read("img", 0, 86), unit)
    with pytest.raises(ValueError, match=r"odd\.zarr: img must hold whole numbers in 0\.\.255 to become uint8"):
        merge([make_store(tmp_path / "c.zarr"), odd], tmp_path / "bad.zarr", wordings=[["a"], ["b"]])
    assert not (tmp_path / "bad.zarr").exists()


def test_keys_that_not_all_sources_share_are_left_out_and_it_says_why(tmp_path):
    wide = {"state": FieldSpec(shape=(3,), dtype="float32", names=("x", "y", "yaw"), units="m, m, rad")}
    stores = [make_told_store(tmp_path / "a.zarr", [0]), make_told_store(tmp_path / "b.zarr", [1], **wide)]
    grown = zarr.open_group(make_v2_store(tmp_path / "c.zarr"), mode="r+")
    grown.create_array("data/force", data=np.zeros((86, 1)))
    left_out = merge([*stores, tmp_path / "c.zarr"], tmp_path / "out.zarr", wordings=[["a"], ["b"], ["c"]]).left_out
    assert ReplayBuffer.open(tmp_path / "out.zarr").keys == ("action", "img")
    assert set(left_out) == {"state", "force"}
    assert "its names differs" in left_out["state"] and "yaw" in left_out["state"]
    assert left_out["force"] == f"{stores[0]}, {stores[1]} does not have it"


def test_chosen_keys_alone_are_kept(tmp_path):
    store = make_told_store(tmp_path / "a.zarr", [0, 1])
    merged = merge([store], tmp_path / "out.zarr", keys=["action", "state"], roles={"state": "observation.pose"})
    buffer = ReplayBuffer.open(tmp_path / "out.zarr")
    assert buffer.keys == ("action", "state") and merged.left_out == {"img": "not among the keys to keep"}
    assert buffer.roles["state"] == "observation.pose"


def test_what_lies_beside_the_episodes_is_named_when_it_is_left_behind(tmp_path):
    root = zarr.open_group(make_v2_store(tmp_path / "a.zarr"), mode="r+")
    root.update_attributes({"license": "MIT"})
    root.create_array("meta/operator", data=np.zeros(4))
    notes = merge([tmp_path / "a.zarr"], tmp_path / "out.zarr").notes
    assert f"license, meta/operator of {tmp_path / 'a.zarr'} do not come along" in notes


def test_repainting_reaches_every_camera_frame_and_nothing_else(tmp_path):
    asked = []

    def negative(buffer, key):
        asked.append((buffer.path.name, key))
        return lambda frames: 255 - frames

    stores = [make_v2_store(tmp_path / "a.zarr"), make_store(tmp_path / "b.zarr")]
    merge(stores, tmp_path / "out.zarr", wordings=[["a"], ["b"]], repaint=negative)
    buffer = ReplayBuffer.open(tmp_path / "out.zarr")
    assert asked == [("a.zarr", "img"), ("b.zarr", "img")]
    for i in range(8):
        np.testing.assert_array_equal(buffer.episode(i)["img"], 255 - demonstration(i % 4)["img"])
        np.testing.assert_array_equal(buffer.episode(i)["state"], demonstration(i % 4)["state"])
    with pytest.raises(ValueError, match="no camera to repaint"):
        merge(stores, tmp_path / "no.zarr", wordings=[["a"], ["b"]], keys=["action"], repaint=negative)


def test_memory_holds_blocks_and_not_the_store(tmp_path, monkeypatch):
    monkeypatch.setattr("diffpolicy.replay.BLOCK_BYTES", 1 << 20)
    fields = {"img": FieldSpec(shape=(256, 256, 3), dtype="uint8"), "action": FieldSpec(shape=(2,), dtype="float32")}
    with ReplayBuffer.create(tmp_path / "a.zarr", fields=fields, fps=10) as buffer:
        data = {"img": np.zeros((640, 256, 256, 3), np.uint8), "action": np.zeros((640, 2), np.float32)}  # 126 MB
        buffer.append_episode(data)
    del data
    tracemalloc.start()
    merge([tmp_path / "a.zarr"], tmp_path / "out.zarr")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert ReplayBuffer.open(tmp_path / "out.zarr").num_steps == 640
    assert peak < 80e6  # a file of 16 MiB is read, regrouped and encoded at a time


# --- wordings ---


@pytest.mark.parametrize(("num_wordings", "num_episodes"), [(3, 7), (12, 206), (5, 5), (4, 2)])
def test_wordings_are_dealt_evenly_and_the_seed_decides_the_order(num_wordings, num_episodes):
    wordings = [f"wording {i}" for i in range(num_wordings)]
    dealt = deal(wordings, num_episodes, (0, 0))
    counts = collections.Counter({wording: 0 for wording in wordings}) + collections.Counter(dealt)
    assert len(dealt) == num_episodes
    assert max(counts.values()) - min([*counts.values()] if len(counts) == num_wordings else [0]) <= 1
    assert deal(wordings, num_episodes, (0, 0)) == dealt
    if num_episodes > 5:
        assert deal(wordings, num_episodes, (1, 0)) != dealt != deal(wordings, num_episodes, (0, 1))


def test_wordings_that_find_no_episode_are_counted(tmp_path):
    notes = merge(
        [make_v2_store(tmp_path / "a.zarr")], tmp_path / "o.zarr", wordings=[[str(i) for i in range(6)]]
    ).notes
    assert f"2 of 6 wordings for {tmp_path / 'a.zarr'} find no episode; it has 4" in notes


def test_wordings_are_read_from_text_and_from_files(tmp_path):
    file = tmp_path / "w.txt"
    file.write_text("push it\n\n  schieb es über die Linie \n", encoding="utf-8")
    assert read_wordings("push it | shove it") == ("push it", "shove it")
    assert read_wordings(f"@{file}") == ("push it", "schieb es über die Linie")


def test_a_byte_order_mark_is_no_part_of_the_first_wording(tmp_path):
    file = tmp_path / "w.txt"
    file.write_bytes(b"\xef\xbb\xbfpush it\r\nshove it\r\n")
    assert read_wordings(f"@{file}") == ("push it", "shove it")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"w\.txt with an empty wording"),
        (b"\n \n", r"w\.txt with an empty wording"),
        (b"push it\n\xff\n", r"w\.txt must be UTF-8 text, got invalid start byte at byte 8"),
        (b"push it\nshove it\npush it\n", r"w\.txt has 'push it' twice"),
    ],
)
def test_a_file_of_wordings_that_says_nothing_clear_is_refused(tmp_path, content, message):
    (tmp_path / "w.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_wordings(f"@{tmp_path / 'w.txt'}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty wording"),
        ("push | ", "empty wording"),
        ("a | a", "'a' twice"),
        ("push \udcff", "must be UTF-8 text"),
    ],
)
def test_an_instruction_that_says_nothing_clear_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        read_wordings(text)


def test_a_file_of_wordings_that_is_missing_is_named():
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt does not exist; @FILE names"):
        read_wordings("@nothing.txt")


# --- what is refused ---


def refuse(tmp_path, sources, message, **choices):
    with pytest.raises(ValueError, match=message):
        merge(sources, tmp_path / "out.zarr", **choices)
    assert [p.name for p in tmp_path.iterdir() if "out.zarr" in p.name] == []


def test_an_action_of_another_shape_is_refused_with_key_and_sources(tmp_path):
    stores = [make_v2_store(tmp_path / "a.zarr"), make_v2_store(tmp_path / "b.zarr", action=np.zeros((86, 3)))]
    refuse(tmp_path, stores, r"action cannot be merged: its shape differs, \(2,\) in .*a\.zarr, \(3,\) in .*b\.zarr")


def test_a_chosen_key_that_does_not_fit_is_refused(tmp_path):
    stores = [make_v2_store(tmp_path / "a.zarr"), make_v2_store(tmp_path / "b.zarr", state=np.zeros((86, 5)))]
    refuse(tmp_path, stores, "state cannot be merged: its shape differs", keys=["action", "state"])
    refuse(tmp_path, stores, "Did you mean 'state'", keys=["action", "stat"])


@pytest.mark.parametrize("fps", [None, 30.0])
def test_frame_rates_that_differ_are_refused(tmp_path, fps):
    stores = [make_told_store(tmp_path / "a.zarr", [0])]
    if fps is None:
        with ReplayBuffer.create(tmp_path / "b.zarr", fields=FIELDS, fps=30, roles=ROLES) as buffer:
            buffer.append_episode(demonstration(1), "task 1")
        stores.append(tmp_path / "b.zarr")
    refuse(tmp_path, stores, r"the same frame rate: .*a\.zarr says 10, .* says 30", fps=fps)


def test_instructions_that_some_episodes_lack_are_refused(tmp_path):
    stores = [make_told_store(tmp_path / "a.zarr", [0]), make_store(tmp_path / "b.zarr")]
    assert task_of(0) == ""
    refuse(tmp_path, stores, r"b\.zarr has 2 episodes without an instruction.*one --instruction for each source")


def test_another_number_of_instructions_than_sources_is_refused(tmp_path):
    stores = [make_v2_store(tmp_path / name) for name in ("a.zarr", "b.zarr")]
    refuse(tmp_path, stores, "one instruction for each of the 2 sources, in order, got 1", wordings=[["push"]])


def test_roles_that_contradict_are_refused_until_one_is_given(tmp_path):
    first = make_told_store(tmp_path / "a.zarr", [0])
    with ReplayBuffer.create(tmp_path / "b.zarr", fields=FIELDS, fps=10, roles={"img": "observation.images.side"}) as b:
        b.append_episode(demonstration(1), "task 1")
    refuse(tmp_path, [first, b.path], r"role of img differs: observation\.images\.top in .*--role img=ROLE")
    merge([first, b.path], tmp_path / "c.zarr", roles={"img": "observation.images.top"})
    assert ReplayBuffer.open(tmp_path / "c.zarr").roles["img"] == "observation.images.top"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_named_by_file_episode_and_row(tmp_path, bad):
    state = np.concatenate([demonstration(i)["state"] for i in range(4)])
    state[45, 1] = bad
    stores = [make_v2_store(tmp_path / "a.zarr"), make_v2_store(tmp_path / "b.zarr", state=state)]
    refuse(
        tmp_path, stores, r"b\.zarr: state is NaN or infinite in row 45, step 4 of episode 2; drop it with .* 2 --out"
    )


def test_nothing_is_overwritten(tmp_path):
    store = make_told_store(tmp_path / "a.zarr", [0])
    with pytest.raises(FileExistsError, match="exists already"):
        merge([store], store)
    assert ReplayBuffer.open(store).num_episodes == 1


def assert_nothing_but_the_source(tmp_path):
    assert [p.name for p in tmp_path.iterdir()] == ["a.zarr"]
    assert_holds(ReplayBuffer.open(tmp_path / "a.zarr"), [0, 1, 2, 3])


@pytest.mark.parametrize("number", [0, 9, 25])
def test_a_merge_that_fills_the_disk_leaves_nothing(tmp_path, monkeypatch, number):
    store = make_store(tmp_path / "a.zarr")
    with monkeypatch.context() as patch:
        fail_at_write(patch, number, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with pytest.raises(OSError, match=r"out\.zarr could not be written .No space left"):
            merge([store, store], tmp_path / "out.zarr", wordings=[["a"], ["b"]])
    assert_nothing_but_the_source(tmp_path)


def test_a_merge_that_the_user_interrupts_leaves_nothing(tmp_path):
    store = make_store(tmp_path / "a.zarr")

    def interrupt(key: str, done: int, total: int):
        if key == "state":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge([store, store], tmp_path / "out.zarr", wordings=[["a"], ["b"]], progress=interrupt)
    assert_nothing_but_the_source(tmp_path)


# --- the human sets ---


def test_both_human_push_t_sets_merge_to_their_known_sizes(tmp_path):
    names = "pusht_cchi_v7_replay.zarr", "pusht_keypoint_x356_y356.zarr"
    sources = [real(name) for name in names]
    keys = ["action", "keypoint", "state"]
    merge(sources, tmp_path / "two.zarr", wordings=[["centre"], ["corner"]], keys=keys, fps=10)
    buffer = ReplayBuffer.open(tmp_path / "two.zarr")
    assert (buffer.num_episodes, buffer.num_steps, buffer.tasks) == (206 + 151, 25_650 + 24_644, ("centre", "corner"))
    for key in keys:
        for source, start in zip(sources, (0, 25_650), strict=True):
            theirs = ReplayBuffer.open(source)
            np.testing.assert_array_equal(buffer.read(key, start, start + theirs.num_steps), theirs.read(key))
