"""Files that a model is read from: regular ones, of its own folder, the same from start to end."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO, NamedTuple

from .errors import BadInput, Missing


class Stamp(NamedTuple):
    """What is another after a file was written to or replaced, as a rule."""

    device: int
    inode: int
    size: int
    time_ns: int

    @classmethod
    def of(cls, stat: os.stat_result) -> Stamp:
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


def open_regular(path: Path) -> BinaryIO:
    """A regular file, open to read. Raises ``BadInput`` for all that is none: a pipe would be
    waited for, and a device has no end. ``FileNotFoundError`` where nothing is there."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    what = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
    raise BadInput(f"{path}: {what}, not a regular file: it is not read")


def check_unchanged(path: Path, stamp: Stamp) -> None:
    """Raise ``BadInput`` where a file is no longer the one of this stamp, ``Missing`` where it is
    gone."""
    try:
        current = Stamp.of(path.stat())
    except FileNotFoundError:
        raise gone(path) from None
    if current != stamp:
        raise changed(path)


def gone(path: Path) -> Missing:
    return Missing(f"{path}: the weights were here and are gone")


def changed(path: Path) -> BadInput:
    return BadInput(
        f"{path}: changed since it was opened: start again, and leave the file as it is until the "
        "end"
    )


def is_own(path: Path, folder: Path) -> bool:
    """Whether a file is one of a model's folder once all links are followed.

    A model in the cache of the Hugging Face hub is a folder ``snapshots/REVISION`` of links into
    ``blobs`` beside ``snapshots``: those are its own files too.
    """
    store = _hub_store(folder)
    places = [folder.resolve(), *([] if store is None else [store / "blobs"])]
    return any(path.resolve().is_relative_to(place) for place in places)


def belongs(path: Path, folder: Path) -> bool:
    """``is_own``, or in the ``blobs`` of the whole cache, into which newer hubs link on
    (``huggingface_hub.utils._shared_blobs``)."""
    store = _hub_store(folder)
    shared = store is not None and path.resolve().is_relative_to(store.parent / "blobs")
    return shared or is_own(path, folder)


def _hub_store(folder: Path) -> Path | None:
    """The folder in the hub's cache of the model that ``folder`` is a snapshot of."""
    home = folder.resolve()
    places = (home, *home.parents)
    return next((place.parent for place in places if place.name == "snapshots"), None)
