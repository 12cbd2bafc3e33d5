"""The place of an artifact: one run at a time works there, in ``OUT.partial`` beside it.

All that a run leaves before its artifact is whole lies in that folder: the state that ``--resume``
goes on with, the new artifact in the making, and, where two names cannot be exchanged, the older
one for the moment between two renames. What a killed run left half done is put right by the next.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from ...ir.core.errors import BadInput
from ...ir.core.scratch import sweep

LOCK_FILE, NEW, OLD = "lock", "new", "old"
_OURS = re.compile(r"lock|(new|old)(\.partial)?|run\.json(\.new)?|[0-9a-f]{24}\.(result|new)")
"""Names that a run may leave in its folder."""
_held: dict[Path, tuple[int, int]] = {}
"""The process and the thread that hold a claim; a forked process has inherited those of another."""


def partial_folder(out: Path) -> Path:
    """Where a run that writes to ``out`` works."""
    out = out.absolute()
    return out.with_name(f"{out.name}.partial")


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[Path]:
    """The folder ``partial_folder(out)``, this thread's alone while the block runs; it may claim it
    again inside. At the end it goes, unless there is a state to go on with.

    Raises ``BadInput`` where another run holds it, and where something else is in its way.
    """
    folder = partial_folder(out)
    me = os.getpid(), threading.get_ident()
    if _held.get(folder) == me:
        yield folder
        return
    sweep()
    lock = _locked(folder, out)
    _held[folder] = me
    try:
        recover(out)
        yield folder
    finally:
        del _held[folder]
        # Whoever opened the lock file before this line finds that it is no longer the one there.
        (folder / LOCK_FILE).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()
        os.close(lock)


def _locked(folder: Path, out: Path) -> int:
    """The descriptor of the folder's lock file, which this process now holds."""
    while True:
        lock = _opened(folder, out)
        if lock is None:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise BadInput(
                f"{out}: another run is writing there; wait until it ends, or choose another --out"
            ) from None
        except OSError:
            return lock  # a file system without locks
        if _is_still(folder / LOCK_FILE, lock):
            return lock
        os.close(lock)


def _opened(folder: Path, out: Path) -> int | None:
    """The lock file, made where it is not there; ``None`` where another run has just removed the
    folder."""
    _check_ours(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{out}: {error.strerror}: choose another --out") from None
    try:
        return os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BadInput(f"{folder}: {error.strerror}: choose another --out") from None


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether a path names the file that was opened by it."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _check_ours(folder: Path) -> None:
    """Raise ``BadInput`` where the folder is not one that a run left."""
    if not folder.exists() and not folder.is_symlink():
        return
    real = folder.is_dir() and not folder.is_symlink()
    with contextlib.suppress(FileNotFoundError):
        if real and all(_OURS.fullmatch(path.name) for path in folder.iterdir()):
            return
        raise BadInput(
            f"{folder} is in the way: the state of the run goes there, and it is no such state. "
            "Move it, or choose another --out"
        )


def recover(out: Path) -> None:
    """Put right what a run left that ended while it wrote or switched ``out``."""
    folder = partial_folder(out)
    new, old = folder / NEW, folder / OLD
    if old.is_dir() and not out.exists():
        old.rename(out)
    for leftover in (new, old, partial_folder(new)):
        shutil.rmtree(leftover, ignore_errors=True)


def switch(out: Path) -> None:
    """Let the new artifact take the place of ``out``, at once for whoever reads there.

    Where the system cannot exchange two names there is a moment without ``out``; whatever ends the
    process in it, ``recover`` puts the older one back. Raises ``OSError``.
    """
    new, old = partial_folder(out) / NEW, partial_folder(out) / OLD
    if not out.exists():
        new.rename(out)
    elif not _exchanged(new, out):
        out.rename(old)
        new.rename(out)


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def _exchanged(a: Path, b: Path) -> bool:
    """Exchange what two names stand for by ``renameat2``; false where that does not work."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    names = os.fsencode(a), os.fsencode(b)
    return bool(call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)
