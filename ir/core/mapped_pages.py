"""Pages that mirror a file leave this process's memory once they were used.

A mapped file takes no memory of its own, but each page that was touched counts as the process's
until the system is short: a model of 13 GB looks like a process of 13 GB.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

LEAST_BYTES = 1 << 20
"""Smaller tensors are left where they are."""
LEAST_FILE = 1 << 27
"""Bytes of a folder's largest file below which its files stay: to find what is mapped takes tens of
milliseconds."""
RELEASE_SECONDS = 0.1
_MAPPINGS = Path("/proc/self/smaps")


class Extent(NamedTuple):
    """Bytes of this process's memory, whole pages."""

    start: int
    end: int


def release_in_turn(model: torch.nn.Module) -> None:
    """Let each module's mapped parameters leave memory after it has run; they are read again when
    they are next touched.

    For a module whose parameters nothing writes to: what was written to a mapped page since is lost
    with it. Does nothing where the system does not say what is mapped.
    """
    advise = _advise()
    if advise is None:
        return
    files = [extent for extent, _ in _file_mappings()]
    for part in model.modules():
        own = (_pages(parameter) for parameter in part._parameters.values())
        extents = [e for e in own if e is not None and _within(e, files)]
        if extents:
            part.register_forward_hook(functools.partial(_release, advise, extents))


def release_files(folder: Path) -> None:
    """Let what is mapped of the files in ``folder`` leave memory until it is touched again; small
    ones stay."""
    advise = _advise()
    if advise is None or not _is_large(folder):
        return
    there = folder.resolve()
    _release(advise, [e for e, path in _file_mappings() if Path(path).parent == there])


@contextlib.contextmanager
def releasing_files(folder: Path, seconds: float = RELEASE_SECONDS) -> Iterator[None]:
    """``release_files`` again and again while the block runs, ``seconds`` apart, and at its end.

    For a long run over a large file that takes each page once: no more of it is in memory than what
    is read in that time.
    """
    if not _is_large(folder):
        yield
        return
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(seconds):
            release_files(folder)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        release_files(folder)


def _is_large(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(e.is_file() and e.stat().st_size >= LEAST_FILE for e in entries)


def _release(advise: Callable[[Extent], None], extents: Iterable[Extent], *_: object) -> None:
    for extent in extents:
        advise(extent)


def _pages(tensor: torch.Tensor | None) -> Extent | None:
    """The whole pages of a tensor: those at its ends may hold others' numbers too."""
    if tensor is None or tensor.device.type != "cpu" or tensor.nbytes < LEAST_BYTES:
        return None
    start, page = tensor.data_ptr(), mmap.PAGESIZE
    return Extent(-(-start // page) * page, (start + tensor.nbytes) // page * page)


def _within(extent: Extent, mappings: Iterable[Extent]) -> bool:
    return any(m.start <= extent.start and extent.end <= m.end for m in mappings)


def _file_mappings() -> Iterator[tuple[Extent, str]]:
    """The mappings of files of which no page was written to, and their files' paths."""
    extent, path = Extent(0, 0), ""
    for line in _MAPPINGS.read_text().splitlines():
        first, *rest = line.split(maxsplit=5)
        if not first.endswith(":"):
            start, end = (int(text, 16) for text in first.split("-"))
            extent, path = Extent(start, end), rest[4] if len(rest) == 5 else ""
        elif first == "Anonymous:" and path.startswith("/") and rest[0] == "0":
            yield extent, path


@functools.cache
def _advise() -> Callable[[Extent], None] | None:
    if not hasattr(mmap, "MADV_DONTNEED") or not _MAPPINGS.is_file():
        return None
    call = ctypes.CDLL(None).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return lambda extent: call(extent.start, extent.end - extent.start, mmap.MADV_DONTNEED)
