"""The folder of a store: one writer at a time; what is put in its place is whole."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from diffpolicy.replay import ReplayBuffer
from diffpolicy.store_folder import LOCK_FILE, WriterLock, appears_whole, list_files
from tests.test_replay import make_store


def test_files_are_listed_alike_in_a_folder_and_in_its_zip(tmp_path):
    path = make_store(tmp_path / "a.zarr")
    files = list_files(path)
    assert files["meta/episode_ends/zarr.json"] == (path / "meta/episode_ends/zarr.json").stat().st_size
    shutil.make_archive(str(path), "zip", path)
    assert set(list_files(tmp_path / "a.zarr.zip")) == set(files)


# One writer at a time


def test_a_second_writer_is_refused_and_told_who_writes(tmp_path):
    path = make_store(tmp_path / "a.zarr")
    with ReplayBuffer.open(path, mode="a"):
        with pytest.raises(BlockingIOError, match=f"being written by process {os.getpid()}; a store takes one writer"):
            ReplayBuffer.open(path, mode="a")
        assert ReplayBuffer.open(path).num_episodes == 4  # readers may look on
    ReplayBuffer.open(path, mode="a").close()


def test_the_lock_file_of_a_dead_process_does_not_block(tmp_path):
    path = make_store(tmp_path / "a.zarr")
    (path / LOCK_FILE).write_text("4194304\n")
    ReplayBuffer.open(path, mode="a").close()


def test_a_lock_keeps_out_other_processes_until_it_is_released(tmp_path):
    code = "import sys; from pathlib import Path; from diffpolicy.store_folder import *; WriterLock(Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, tmp_path]
    lock = WriterLock(tmp_path)
    refused = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert "BlockingIOError" in refused.stderr and f"process {os.getpid()}" in refused.stderr
    lock.release()
    assert lock.released and not (tmp_path / LOCK_FILE).exists()
    subprocess.run(command, cwd=Path(__file__).parents[1], check=True)


def test_releasing_a_lock_leaves_the_lock_of_a_store_put_in_its_place(tmp_path):
    (tmp_path / "a").mkdir()
    lock = WriterLock(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "old")
    (tmp_path / "a").mkdir()
    other = WriterLock(tmp_path / "a")
    lock.release()
    assert (tmp_path / "a" / LOCK_FILE).exists()
    other.release()


# Whole or not at all


def test_a_folder_takes_its_place_only_when_it_is_done(tmp_path):
    with appears_whole(tmp_path / "a") as fresh:
        fresh.mkdir()
        (fresh / "file").write_text("new")
        assert not (tmp_path / "a").exists()
    with appears_whole(tmp_path / "a", replace=True) as fresh:
        fresh.mkdir()
        (fresh / "file").write_text("newer")
        assert (tmp_path / "a/file").read_text() == "new"
    assert (tmp_path / "a/file").read_text() == "newer"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"/a could not be written \(No space left on device\)"),
        (ValueError("something else"), "^something else$"),
    ],
)
def test_a_folder_that_was_not_finished_is_deleted_and_the_old_one_stays(tmp_path, error, message):
    (tmp_path / "a").mkdir()
    with pytest.raises(type(error), match=message):
        with appears_whole(tmp_path / "a", replace=True) as fresh:
            fresh.mkdir()
            (fresh / "half").write_text("")
            raise error
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_lies_there_is_not_overwritten_unless_asked(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(FileExistsError, match="/a exists already"):
        with appears_whole(tmp_path / "a"):
            pass


def test_a_missing_store_says_where_an_interrupted_rewrite_left_it(tmp_path):
    make_store(tmp_path / ".a.zarr.old-0123")
    with pytest.raises(FileNotFoundError, match=r"\.a\.zarr\.old-0123, which is whole"):
        ReplayBuffer.open(tmp_path / "a.zarr")
