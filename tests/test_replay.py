"""The replay store: what is read equals what was written, whatever happens to the writer."""

import errno
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.storage import ZipStore, _local

from diffpolicy.replay import ReplayBuffer
from diffpolicy.spec import FieldSpec
from diffpolicy.store_folder import LOCK_FILE, list_files

DATA = Path(os.environ.get("DIFFPOLICY_DATA", Path(__file__).parents[1] / "../shared/data"))
FIELDS = {
    "img": FieldSpec(shape=(40, 40, 3), dtype="uint8"),  # 4800 bytes a step: sharded
    "state": FieldSpec(shape=(3,), dtype="float32", names=("x", "y", "angle"), units="m, m, rad"),
    "action": FieldSpec(shape=(2,), dtype="float32"),
}
ROLES = {"img": "observation.images.top", "state": "observation.state"}


def demonstration(index: int) -> dict[str, np.ndarray]:
    """Episode `index` of every store in this file: 20 to 40 steps of noise that depends on the index alone."""
    rng = np.random.default_rng(index)
    length = 20 + index % 21
    return {
        "img": rng.integers(0, 256, (length, 40, 40, 3)).astype(np.uint8),
        "state": rng.normal(size=(length, 3)).astype(np.float32),
        "action": rng.normal(size=(length, 2)).astype(np.float32),
    }


def task_of(index: int) -> str:
    return ("", "push the T", "push the L")[index % 3]


def make_store(path: Path, num_episodes: int = 4) -> Path:
    with ReplayBuffer.create(path, fields=FIELDS, fps=10, roles=ROLES) as buffer:
        for i in range(num_episodes):
            buffer.append_episode(demonstration(i), task_of(i))
    return path


def make_v2_store(path: Path, **changes: np.ndarray) -> Path:
    """A store as the field has it: zarr v2, pictures in float32, chunks that differ between arrays, no attributes."""
    data = {key: np.concatenate([demonstration(i)[key] for i in range(4)]) for key in FIELDS}
    data["img"] = data["img"].astype(np.float32)
    root = zarr.open_group(path, mode="w", zarr_format=2)
    for chunk, (key, values) in zip((16, 7, 100), (data | changes).items(), strict=True):
        root.create_array(f"data/{key}", data=values, chunks=(chunk, *values.shape[1:]))
    root.create_array("meta/episode_ends", data=np.cumsum([20, 21, 22, 23]), chunks=(208,))
    return path


def assert_holds(buffer: ReplayBuffer, indices: list[int]) -> None:
    assert buffer.num_episodes == len(indices)
    for i, index in enumerate(indices):
        episode, expected = buffer.episode(i), demonstration(index)
        for key in FIELDS:
            assert episode[key].dtype == expected[key].dtype
            np.testing.assert_array_equal(episode[key], expected[key], err_msg=f"episode {i}, {key}")
        assert buffer.episode_task(i) == task_of(index)


def real(name: str) -> Path:
    if not (DATA / name).exists():
        pytest.skip(f"{name} is not in {DATA}; set DIFFPOLICY_DATA")
    return DATA / name


# Reading and writing


def test_episodes_read_back_bit_equal_with_their_tasks(tmp_path):
    assert_holds(ReplayBuffer.open(make_store(tmp_path / "a.zarr")), [0, 1, 2, 3])


def test_a_store_says_what_it_was_created_with(tmp_path):
    buffer = ReplayBuffer.open(make_store(tmp_path / "a.zarr"))
    assert buffer.fields == FIELDS
    assert buffer.roles == {**ROLES, "action": "action"}
    assert (buffer.fps, buffer.zarr_format, buffer.tasks) == (10, 3, ("push the T", "push the L"))
    assert buffer.episode_ends.tolist() == [20, 41, 63, 86]
    assert buffer.episode_lengths.tolist() == [20, 21, 22, 23]
    assert (len(buffer), buffer.num_steps, buffer.episode_slice(-1)) == (4, 86, slice(63, 86))
    assert [len(episode["action"]) for episode in buffer] == [20, 21, 22, 23]


def test_a_store_opened_again_grows_where_it_ended(tmp_path):
    path = make_store(tmp_path / "a.zarr", 2)
    with ReplayBuffer.open(path, mode="a") as buffer:
        buffer.append_episode(demonstration(2), task_of(2))
    assert_holds(ReplayBuffer.open(path), [0, 1, 2])


def test_episodes_larger_than_a_shard_read_back_equal(tmp_path):
    fields = {"img": FieldSpec(shape=(512, 512, 3), dtype="uint8"), "action": FieldSpec(shape=(1,), dtype="float64")}
    img = np.random.default_rng(0).integers(0, 256, (50, 1, 512, 3)).astype(np.uint8).repeat(512, axis=1)
    action = np.arange(50.0)[:, None]
    with ReplayBuffer.create(tmp_path / "a.zarr", fields=fields, fps=None) as buffer:
        buffer.append_episode({"img": img[:23], "action": action[:23]})
        buffer.append_episode({"img": img[23:], "action": action[23:]})
        assert buffer.rows_per_file("img") < 23
        np.testing.assert_array_equal(buffer.read("img"), img)
        np.testing.assert_array_equal(buffer.read("action", 20, 30), action[20:30])


def test_black_frames_are_written_like_any_other(tmp_path):
    """zarr leaves out chunks of zeros by default, and then a lost file cannot be told from a black one."""
    path = tmp_path / "a.zarr"
    zeros = {key: np.zeros((20, *spec.shape), spec.dtype) for key, spec in FIELDS.items()}
    with ReplayBuffer.create(path, fields=FIELDS, fps=10) as buffer:
        buffer.append_episode(zeros)
    assert (path / "data/img/c/0/0/0/0").exists() and (path / "data/action/c/0/0").exists()


def test_an_open_reader_can_be_pickled_for_worker_processes(tmp_path):
    buffer = ReplayBuffer.open(make_store(tmp_path / "a.zarr"))
    assert_holds(pickle.loads(pickle.dumps(buffer)), [0, 1, 2, 3])


def test_importing_replay_does_not_import_torch():
    code = "import sys, diffpolicy.replay, diffpolicy.validation; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": None}, r"must have the keys .*\['action'\] missing"),
        ({"actoin": np.zeros((20, 2), "f4")}, "Did you mean 'action'"),
        ({"action": np.zeros((19, 2), "f4")}, "same length"),
        ({"action": np.zeros((20, 3), "f4")}, r"step of action must have shape \(2,\), got \(3,\)"),
        ({"action": np.zeros((20, 2))}, r"action must be float32.*got float64.*astype"),
        ({"action": np.where(np.arange(40) == 31, np.nan, 0).reshape(20, 2).astype("f4")}, "action .* nan at row 15"),
        ({"state": np.full((20, 3), np.inf, "f4")}, "state .* got inf at row 0"),
    ],
)
def test_an_episode_that_does_not_fit_is_refused_by_name(tmp_path, change, message):
    with ReplayBuffer.open(make_store(tmp_path / "a.zarr"), mode="a") as buffer:
        episode = {key: value for key, value in (demonstration(0) | change).items() if value is not None}
        with pytest.raises(ValueError, match=message):
            buffer.append_episode(episode)
        buffer.append_episode(demonstration(4), task_of(4))
    assert_holds(ReplayBuffer.open(tmp_path / "a.zarr"), [0, 1, 2, 3, 4])


def test_an_episode_without_steps_is_refused(tmp_path):
    with ReplayBuffer.open(make_store(tmp_path / "a.zarr"), mode="a") as buffer:
        with pytest.raises(ValueError, match="length of at least 1"):
            buffer.append_episode({key: value[:0] for key, value in demonstration(0).items()})


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({}, {}, "at least one key"),
        ({"a": FieldSpec(shape=(2,), dtype="float32", names=("x",))}, {}, "2 numbers in one step, got 1 names"),
        ({"a": FieldSpec(shape=(0,), dtype="float32")}, {}, "sizes of at least 1"),
        ({"a": FieldSpec(shape=(2,), dtype="object")}, {}, "numbers or booleans"),
        (FIELDS, {"roles": {"sate": "observation.state"}}, "Did you mean 'state'"),
        (FIELDS, {"roles": {"state": "obs"}}, "role of state must be"),
        (FIELDS, {"fps": 0}, "fps must be a positive number"),
    ],
)
def test_a_store_that_makes_no_sense_is_not_created(tmp_path, fields, options, message):
    with pytest.raises(ValueError, match=message):
        ReplayBuffer.create(tmp_path / "a.zarr", fields=fields, **({"fps": 10} | options))
    assert not (tmp_path / "a.zarr").exists()


def test_a_store_filled_at_once_holds_what_one_grown_by_episodes_holds(tmp_path):
    episodes = [demonstration(i) for i in range(4)]
    with ReplayBuffer.create(tmp_path / "b.zarr", fields=FIELDS, fps=10, roles=ROLES) as buffer:
        buffer.fill([20, 21, 22, 23], [task_of(i) for i in range(4)], lambda key: (data[key] for data in episodes))
        assert_holds(buffer, [0, 1, 2, 3])
        buffer.append_episode(demonstration(4), task_of(4))
    assert_holds(ReplayBuffer.open(tmp_path / "b.zarr"), [0, 1, 2, 3, 4])
    assert list_files(tmp_path / "b.zarr") == list_files(make_store(tmp_path / "a.zarr", 5))


def test_only_an_empty_store_is_filled_and_only_with_rows_that_add_up(tmp_path):
    path = make_store(tmp_path / "a.zarr")
    with pytest.raises(ValueError, match="open to read only"):
        ReplayBuffer.open(path).fill([20], [""], lambda key: [demonstration(0)[key]])
    with ReplayBuffer.open(path, mode="a") as buffer:
        with pytest.raises(ValueError, match="must be empty to be filled, got 4 episodes"):
            buffer.fill([20], [""], lambda key: [demonstration(0)[key]])
    with ReplayBuffer.create(tmp_path / "b.zarr", fields=FIELDS, fps=10) as buffer:
        with pytest.raises(ValueError, match="add up to 21 steps, got 20 rows of action"):
            buffer.fill([21], [""], lambda key: [demonstration(0)[key]])


def test_create_refuses_to_overwrite(tmp_path):
    path = make_store(tmp_path / "a.zarr")
    with pytest.raises(FileExistsError, match="exists already"):
        ReplayBuffer.create(path, fields=FIELDS, fps=10)
    assert_holds(ReplayBuffer.open(path), [0, 1, 2, 3])


def test_a_reader_cannot_append(tmp_path):
    with pytest.raises(ValueError, match="open to read only"):
        ReplayBuffer.open(make_store(tmp_path / "a.zarr")).append_episode(demonstration(4))


def test_unknown_keys_rows_and_episodes_are_named(tmp_path):
    buffer = ReplayBuffer.open(make_store(tmp_path / "a.zarr"))
    with pytest.raises(ValueError, match=r"got 'acton'\. Did you mean 'action'"):
        buffer.read("acton")
    with pytest.raises(ValueError, match=r"0\.\.86, got \[80, 87\)"):
        buffer.read("action", 80, 87)
    with pytest.raises(IndexError, match=r"episodes 0\.\.3, got 4"):
        buffer.episode(4)
    with pytest.raises(IndexError, match=r"episodes 0\.\.3, got 4"):
        buffer.episode_task(4)


# Opening what is not a store


def test_what_is_not_a_store_is_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/notes.txt").write_text("hello")
    zarr.open_group(tmp_path / "no_data", mode="w")
    root = zarr.open_group(tmp_path / "no_ends", mode="w")
    root.create_array("data/action", data=np.zeros((5, 2)))
    make_store(tmp_path / "broken")
    (tmp_path / "broken/zarr.json").write_text("{")
    make_store(tmp_path / "sets/a.zarr")
    for name, error, message in [
        ("nothing", FileNotFoundError, "does not exist"),
        ("empty", ValueError, "empty folder"),
        ("folder", ValueError, "not a zarr store"),
        ("folder/notes.txt", ValueError, "not a zip file"),
        ("no_data", ValueError, "no data group"),
        ("no_ends", ValueError, "no meta/episode_ends"),
        ("broken", ValueError, "unreadable zarr metadata"),
        ("sets", ValueError, r"it holds .*a\.zarr"),
    ]:
        with pytest.raises(error, match=message) as caught:
            ReplayBuffer.open(tmp_path / name)
        assert "\n" not in str(caught.value) and name in str(caught.value)


def test_reading_from_a_store_without_episodes_says_so(tmp_path):
    with ReplayBuffer.create(tmp_path / "a.zarr", fields=FIELDS, fps=10):
        pass
    buffer = ReplayBuffer.open(tmp_path / "a.zarr")
    assert (buffer.num_episodes, buffer.num_steps) == (0, 0)
    with pytest.raises(ValueError, match="no finished episodes"):
        buffer.read("action")


def test_episode_ends_that_do_not_increase_are_refused(tmp_path):
    path = make_v2_store(tmp_path / "a.zarr")
    zarr.open_group(path, mode="r+")["meta/episode_ends"][2] = 41
    with pytest.raises(ValueError, match=r"must increase.*41 then 41 at \[2\]"):
        ReplayBuffer.open(path)


def test_a_key_shorter_than_the_episodes_is_refused(tmp_path):
    path = make_v2_store(tmp_path / "a.zarr", action=np.zeros((80, 2)))
    with pytest.raises(ValueError, match="data/action has 80 rows, but episode_ends says 86"):
        ReplayBuffer.open(path)


def test_a_store_of_a_later_format_is_refused(tmp_path):
    path = make_store(tmp_path / "a.zarr")
    zarr.open_group(path, mode="r+").update_attributes({"format_version": 99})
    with pytest.raises(ValueError, match="format_version 99"):
        ReplayBuffer.open(path)


# Stores of the field


def test_zarr_v2_with_differing_chunks_reads_the_same_episodes(tmp_path):
    buffer = ReplayBuffer.open(make_v2_store(tmp_path / "a.zarr"))
    assert (buffer.zarr_format, buffer.fps, buffer.tasks, buffer.roles) == (2, None, (), {"action": "action"})
    for i in range(4):
        np.testing.assert_array_equal(buffer.episode(i)["state"], demonstration(i)["state"])
        assert buffer.episode_task(i) == ""


def test_zarr_v2_cannot_be_appended_to(tmp_path):
    with pytest.raises(ValueError, match=r"zarr v2 and can only be read; to append: diffpolicy data convert"):
        ReplayBuffer.open(make_v2_store(tmp_path / "a.zarr"), mode="a")


def test_a_zip_of_a_store_reads_the_same(tmp_path):
    shutil.make_archive(str(tmp_path / "a.zarr"), "zip", make_store(tmp_path / "a.zarr"))
    assert_holds(ReplayBuffer.open(tmp_path / "a.zarr.zip"), [0, 1, 2, 3])
    with pytest.raises(ValueError, match="can only be read"):
        ReplayBuffer.open(tmp_path / "a.zarr.zip", mode="a")


def test_a_zip_written_by_zarr_reads_too(tmp_path):
    with ZipStore(tmp_path / "a.zip", mode="w") as store:
        root = zarr.group(store, zarr_format=2)
        root.create_array("data/action", data=np.arange(10.0))
        root.create_array("meta/episode_ends", data=np.array([4, 10]))
    np.testing.assert_array_equal(ReplayBuffer.open(tmp_path / "a.zip").episode(1)["action"], np.arange(4.0, 10.0))


def test_stale_consolidated_metadata_is_ignored(tmp_path):
    path = make_store(tmp_path / "a.zarr", 2)
    zarr.consolidate_metadata(str(path))
    with ReplayBuffer.open(path, mode="a") as buffer:
        buffer.append_episode(demonstration(2), task_of(2))
    assert_holds(ReplayBuffer.open(path), [0, 1, 2])


def test_float_pictures_read_as_uint8_without_loss(tmp_path):
    buffer = ReplayBuffer.open(make_v2_store(tmp_path / "a.zarr"))
    frames = buffer.read_images_uint8("img")
    assert frames.dtype == np.uint8
    np.testing.assert_array_equal(frames, np.concatenate([demonstration(i)["img"] for i in range(4)]))
    with pytest.raises(ValueError, match="state must hold pictures"):
        buffer.read_images_uint8("state")


def test_a_lost_chunk_is_not_read_as_zeros(tmp_path):
    path = make_store(tmp_path / "ours.zarr")
    (path / "data/action/c/0/0").unlink()
    with pytest.raises(
        ValueError, match=r"action\[0:86\] cannot be read \(.*data/action/c/0/0 is missing\).*data validate"
    ):
        ReplayBuffer.open(path).read("action")


def test_a_chunk_that_another_writer_left_out_is_said_aloud_once(tmp_path):
    path = make_v2_store(tmp_path / "theirs.zarr")
    (path / "data/state/1.0").unlink()
    buffer = ReplayBuffer.open(path)
    with pytest.warns(UserWarning, match=r"data/state/1.0 is missing and is read as 0") as said:
        assert not buffer.read("state", 7, 14).any()
        buffer.read("state")
    assert len(said) == 1


# Writers that die


WRITER = """
import sys
from diffpolicy.replay import ReplayBuffer
from tests.test_replay import demonstration, task_of
with ReplayBuffer.open(sys.argv[1], mode="a") as buffer:
    while True:
        buffer.append_episode(demonstration(buffer.num_episodes), task_of(buffer.num_episodes))
        print(buffer.num_episodes, flush=True)
"""


@pytest.mark.filterwarnings("ignore:.*was not finished")
def test_kill_9_at_random_moments_loses_no_finished_episode(tmp_path):
    path = make_store(tmp_path / "a.zarr", 1)
    moments = random.Random(0)
    finished = 1
    for _ in range(5):
        command = [sys.executable, "-W", "ignore", "-c", WRITER, path]
        writer = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE)
        assert int(writer.stdout.readline()) == finished + 1  # goes on where the last one ended
        time.sleep(moments.uniform(0, 0.2))
        writer.send_signal(signal.SIGKILL)
        said = [int(line) for line in writer.communicate()[0].split()]
        finished = max([finished + 1, *said])
        buffer = ReplayBuffer.open(path)
        assert buffer.num_episodes in (finished, finished + 1)  # it may die between finishing and saying so
        finished = buffer.num_episodes
        assert_holds(buffer, list(range(finished)))
    with ReplayBuffer.open(path, mode="a") as buffer:
        buffer.append_episode(demonstration(finished), task_of(finished))
        assert_holds(buffer, list(range(finished + 1)))
    assert not list(path.rglob("*.partial")) and not (path / LOCK_FILE).exists()


def fail_at_write(monkeypatch, number: int, error: BaseException) -> list[str]:
    """Lets `number` more files be written and then raises `error` once; the list says when that happened."""
    write, count, happened = _local._put, [number], []

    def put(path, value, exclusive=False):
        if count[0] == 0 and not happened:
            happened.append(str(path))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".0123.partial").write_bytes(b"half a file")
            raise error
        count[0] -= 1
        return write(path, value, exclusive)

    monkeypatch.setattr(_local, "_put", put)
    return happened


class Killed(BaseException):
    """Stands for SIGKILL at one exact write."""


@pytest.mark.filterwarnings("ignore:.*was not finished")
def test_a_death_at_any_write_leaves_the_earlier_episodes(tmp_path, monkeypatch):
    store = make_store(tmp_path / "a.zarr", 2)
    for number in range(100):
        path = shutil.copytree(store, tmp_path / f"{number}.zarr")
        buffer = ReplayBuffer.open(path, mode="a")
        with monkeypatch.context() as patch:
            happened = fail_at_write(patch, number, Killed())
            try:
                buffer.append_episode(demonstration(2), task_of(2))
            except Killed:
                pass
        buffer._lock._file.close()  # as the kernel does
        if not happened:
            break
        assert_holds(ReplayBuffer.open(path), [0, 1])
        with ReplayBuffer.open(path, mode="a") as buffer:
            buffer.append_episode(demonstration(2), task_of(2))
        assert_holds(ReplayBuffer.open(path), [0, 1, 2])
    assert number >= 10  # tasks, three keys and two arrays of meta, each resized and written


@pytest.mark.parametrize("number", [0, 3, 6, 10])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_full_or_forbidden_disk_is_named_and_the_writer_goes_on(tmp_path, monkeypatch, number, code):
    path = make_store(tmp_path / "a.zarr", 2)
    with ReplayBuffer.open(path, mode="a") as buffer:
        with monkeypatch.context() as patch:
            fail_at_write(patch, number, OSError(code, os.strerror(code)))
            message = f"a.zarr: episode 2 could not be written .{os.strerror(code)}.*2 earlier episodes are intact"
            with pytest.raises(OSError, match=message) as caught:
                buffer.append_episode(demonstration(2), task_of(2))
        assert caught.value.errno == code
        assert_holds(buffer, [0, 1])
        buffer.append_episode(demonstration(5), task_of(5))
    assert_holds(ReplayBuffer.open(path), [0, 1, 5])


def test_a_failed_append_returns_only_when_no_write_is_under_way(tmp_path, monkeypatch):
    """zarr raises at the first failure; a write of the failed episode must not land on top of the next one."""
    fields = {"img": FieldSpec(shape=(512, 512, 3), dtype="uint8"), "action": FieldSpec(shape=(1,), dtype="float32")}
    write, under_way, finished = _local._put, [], []

    def put(path, value, exclusive=False):
        if path.name != "zarr.json":
            if path.parts[-4] == "0":  # the first of three shards
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            under_way.append(path)
            time.sleep(0.2)
            finished.append(path)
        return write(path, value, exclusive)

    episode = {"img": np.zeros((40, 512, 512, 3), np.uint8), "action": np.zeros((40, 1), np.float32)}
    with ReplayBuffer.create(tmp_path / "a.zarr", fields=fields, fps=10) as buffer:
        buffer._arrays = {key: buffer._arrays[key] for key in ("img", "action")}  # the failing key first
        with monkeypatch.context() as patch:
            patch.setattr(_local, "_put", put)
            with pytest.raises(OSError, match="No space left"):
                buffer.append_episode(episode)
            assert set(under_way) == set(finished) and len(finished) == 2


READER = """
import sys
from diffpolicy.replay import ReplayBuffer
try:
    ReplayBuffer.open(sys.argv[1]).read("img")
except ValueError as error:
    print(error)
"""


def test_a_damaged_store_read_as_a_whole_is_one_error_and_nothing_else_on_the_screen(tmp_path):
    fields = {"img": FieldSpec(shape=(96, 96, 3), dtype="uint8")}
    with ReplayBuffer.create(tmp_path / "a.zarr", fields=fields, fps=10) as buffer:
        buffer.append_episode({"img": np.random.default_rng(0).integers(0, 256, (1500, 96, 96, 3)).astype(np.uint8)})
    with open(tmp_path / "a.zarr/data/img/c/0/0/0/0", "r+b") as file:
        file.write(bytes(1000))
    done = subprocess.run([sys.executable, "-c", READER, tmp_path / "a.zarr"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert len(done.stdout.splitlines()) == 1 and "img[0:1500] cannot be read" in done.stdout


def test_leftovers_are_ignored_by_readers_and_trimmed_by_writers_aloud(tmp_path):
    path = make_store(tmp_path / "a.zarr", 2)
    array = zarr.open_group(path, mode="r+")["data/img"]
    array.resize((50, 40, 40, 3))  # an episode of 9 rows was begun after row 41
    with pytest.warns(UserWarning, match=r"a\.zarr: episode 2 was not finished.*9 rows are ignored"):
        assert_holds(ReplayBuffer.open(path), [0, 1])
    with pytest.warns(UserWarning, match="9 rows are trimmed"):
        ReplayBuffer.open(path, mode="a").close()
    assert zarr.open_group(path)["data/img"].shape[0] == 41
    assert_holds(ReplayBuffer.open(path), [0, 1])


def test_lost_episode_ends_do_not_make_the_next_writer_trim_everything(tmp_path):
    path = make_store(tmp_path / "a.zarr")
    (path / "meta/episode_ends/c/0").unlink()
    with pytest.raises(ValueError, match="must increase"):
        ReplayBuffer.open(path, mode="a")
    assert zarr.open_group(path)["data/action"].shape == (86, 2)


# Real demonstrations


def test_pusht_has_the_published_episodes_and_ranges():
    buffer = ReplayBuffer.open(real("pusht_cchi_v7_replay.zarr"))
    assert buffer.num_episodes == 206 and buffer.num_steps == 25_650
    assert buffer.episode_ends[:5].tolist() == [161, 279, 420, 579, 738]
    assert (buffer.episode_lengths.min(), buffer.episode_lengths.max()) == (49, 246)
    action, agent = buffer.read("action"), buffer.read("state")[:, :2]
    assert action.min(axis=0).tolist() == [12, 25] and action.max(axis=0).tolist() == [511, 511]
    np.testing.assert_array_equal(agent.min(axis=0), np.float32([13.456424, 32.938293]))
    np.testing.assert_array_equal(agent.max(axis=0), np.float32([496.14618, 510.9579]))


def test_pusht_with_the_other_goal_reads_across_its_differing_chunks():
    buffer = ReplayBuffer.open(real("pusht_keypoint_x356_y356.zarr"))
    assert (buffer.num_episodes, buffer.num_steps) == (151, 24_644)
    episode = buffer.episode(7)
    assert {len(values) for values in episode.values()} == {buffer.episode_lengths[7]}
    assert episode["img"].dtype == np.uint8 and episode["img"].shape[1:] == (96, 96, 3)
