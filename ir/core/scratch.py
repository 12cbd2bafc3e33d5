"""Temporary folders that go with their process; those of a killed process go with the next one."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
import weakref
from pathlib import Path

PREFIX = "graphwright-scratch-"


class Scratch:
    """A folder in the system's temporary one; ``path`` is there until ``close``, the end of a
    ``with`` block, or that of the object or the process.

    Its process holds a lock on it. What nobody locks was left by a process that was killed, and is
    removed when another process makes its first.
    """

    def __init__(self, purpose: str) -> None:
        sweep()
        self.path, lock = _new_folder(purpose)
        self._close = weakref.finalize(self, _remove, self.path, lock)

    def close(self) -> None:
        """Remove the folder and what is in it; more than once is fine."""
        self._close()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.close()


def _new_folder(purpose: str) -> tuple[Path, int]:
    """A new folder, and the descriptor that locks it."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{purpose}-"))
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if path.is_dir():
            return path, lock
        os.close(lock)  # a process that swept was faster than the lock


@functools.cache
def sweep() -> None:
    """Remove the folders of processes that were killed; once in a process."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another person's, or in use
            _sweep(path)


def _sweep(path: Path) -> None:
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(lock)


def _remove(path: Path, lock: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)
