"""This process's memory: how much it has, what goes back to the system, and when Python looks for
cycles in it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

KEPT_BYTES = 1 << 29
"""Memory of its own that a process may have before anything is given back. What is given back is
cleared again when it is next used."""
GROWN_BYTES = 1 << 26
"""By how much it has to grow between two times that memory is given back, each of which walks
through all of it."""
_LEFT = {"bytes": 0}
"""Of its own, when memory was last given back, or less since."""


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Python's collector of cycles rests: for what makes a million objects that stay.

    It walks through all of them again and again to find none to free: an eighth of the time of a
    trace, and of importing torch and transformers. What is made inside is looked at afterwards.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@contextlib.contextmanager
def set_aside() -> Iterator[None]:
    """Python's collector of cycles looks at nothing that is there already until the block ends.

    A traced decoder is half a million objects, and each full collection walks through all of them.
    Where the process has set some aside before, it does nothing: these would be looked at again.
    """
    if _set_aside_before():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@functools.cache
def _set_aside_before() -> bool:
    """Whether the process had objects set aside when this was first asked: to ask is to count them,
    10 ms for a million."""
    return gc.get_freeze_count() > 0


def give_back(kept_bytes: int = KEPT_BYTES) -> None:
    """Return freed memory to the system where the process has more than ``kept_bytes``, and has
    grown since it last did.

    glibc keeps what was freed between smaller pieces that live on: quantizing a 0.5B model matrix
    by matrix grew the process by 1.5 GB of which nothing was in use. Does nothing elsewhere.
    """
    trim = _malloc_trim()
    if trim is None:
        return
    own = _own_bytes()
    if own <= max(kept_bytes, _LEFT["bytes"] + GROWN_BYTES):
        _LEFT["bytes"] = min(_LEFT["bytes"], own)
        return
    trim(0)
    _LEFT["bytes"] = _own_bytes()


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return None
    return trim


def _own_bytes() -> int:
    """Resident memory that belongs to no file; 0 where the system does not say."""
    try:
        _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    except OSError:
        return 0
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def peak_rss_bytes() -> int:
    """Peak resident memory of this process so far."""
    own = status_bytes("VmHWM")
    if own is not None:
        return own
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def status_bytes(field: str) -> int | None:
    """A size that Linux tells of this process (``VmHWM``, ``VmRSS``); ``None`` elsewhere.

    What ``getrusage`` tells would not do: a process inherits the peak of the one that started it.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    sizes = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return next((1024 * int(size) for size in sizes), None)
