"""The folder that a store lies in: whether it is one, one writer at a time, a rewrite whole or not at all.

    demos.zarr/.writer.lock       held by the process that appends; ends with it, however it ends
    .demos.zarr.new-1a2b3c4d      a rewrite being built beside the store; renamed to demos.zarr when done
    .demos.zarr.old-1a2b3c4d      the store it replaces, for the moment between two renames

Knows files and processes, nothing of what is in a store.
"""

from __future__ import annotations

import os
import shutil
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

LOCK_FILE = ".writer.lock"


def check_is_store(path: Path, writable: bool) -> None:
    """Whether a zarr store lies at `path`, as far as its files tell: a folder, or a zip file to read.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: something else; says what.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist{_interrupted_swap(path)}")
    if path.is_dir():
        if not any(path.iterdir()):
            raise ValueError(f"{path} is an empty folder, not a zarr store")
        if not any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zarray")):
            inside = sorted(p.name for p in path.glob("*.zarr"))
            hint = f"; it holds {path / inside[0]}: open that" if inside else ""
            raise ValueError(f"{path} is not a zarr store: it has neither zarr.json (v3) nor .zgroup (v2){hint}")
    elif writable:
        raise ValueError(f"{path} is a file and can only be read; to append: diffpolicy data convert {path} DST")
    elif not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is a file but not a zip file; a zarr store is a folder or a zip of one")


def list_files(path: str | os.PathLike) -> dict[str, int]:
    """Every file of a store: name relative to its top, with / between folders -> size in bytes."""
    path = Path(path)
    if path.is_file():
        with zipfile.ZipFile(path) as archive:
            return {info.filename: info.compress_size for info in archive.infolist() if not info.is_dir()}
    return {p.relative_to(path).as_posix(): p.stat().st_size for p in sorted(path.rglob("*")) if p.is_file()}


class WriterLock:
    """At most one writer per store: an flock on a file in it, which ends with its process however that ends."""

    def __init__(self, path: Path):
        import fcntl  # POSIX only, and only writers need it

        self.path = path / LOCK_FILE
        while True:
            try:
                file: BinaryIO = open(self.path, "a+b")
            except OSError as error:
                raise OSError(error.errno, f"{path} cannot be written ({error.strerror})") from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                owner = file.read(32).decode(errors="replace").strip() or "unknown"
                file.close()
                raise BlockingIOError(
                    error.errno, f"{path} is being written by process {owner}; a store takes one writer at a time"
                ) from error
            # The previous owner removes the file when done; a lock on a removed file keeps nobody out.
            if self._is_current(file):
                break
            file.close()
        file.truncate(0)
        file.write(f"{os.getpid()}\n".encode())
        file.flush()
        self._file = file

    @property
    def released(self) -> bool:
        return self._file.closed

    def release(self) -> None:
        if not self._file.closed:
            if self._is_current(self._file):
                self.path.unlink()
            self._file.close()

    def _is_current(self, file: BinaryIO) -> bool:
        """Whether an open lock file is still the one at its path: it may have been removed, or its store replaced."""
        return self.path.exists() and os.path.samestat(os.fstat(file.fileno()), self.path.stat())


@contextmanager
def appears_whole(target: Path, replace: bool = False) -> Iterator[Path]:
    """A folder beside `target` to build a store in: renamed to it at the end, deleted if anything goes wrong."""
    if not replace and target.exists():
        raise FileExistsError(f"{target} exists already; choose another name, or delete it")
    tag = uuid.uuid4().hex[:8]
    fresh, old = (target.with_name(f".{target.name}.{which}-{tag}") for which in ("new", "old"))
    try:
        yield fresh
        if replace:
            os.rename(target, old)
        os.rename(fresh, target)
    except BaseException as error:
        shutil.rmtree(fresh, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, f"{target} could not be written ({error.strerror or error})") from error
        raise
    if replace:
        shutil.rmtree(old)


def _interrupted_swap(path: Path) -> str:
    """For the error about a missing store: where its content is if a rewrite was killed between its two renames."""
    if not path.parent.is_dir():
        return ""
    old = sorted(path.parent.glob(f".{path.name}.old-*"))
    return f", but an interrupted rewrite left {old[0]}, which is whole: rename it to {path.name}" if old else ""
