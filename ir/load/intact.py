"""Whether an artifact's model files are those that were written: their sizes and hashes, by its
manifest."""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..core.errors import BadInput, GraphwrightError
from .entry_files import PARTS, PATTERN, SOUND_FILE

MANIFEST = "graphwright.json"
FILES = ("model.onnx", "model.onnx.data", *PARTS, SOUND_FILE)
HASHED_BYTES = 1 << 30
"""Files up to this size are hashed whenever an artifact is opened: half a second. Of larger ones,
of which ``inspect`` reads next to nothing, the size is compared, unless all of it is read anyway.
"""

Opened = TypeVar("Opened")


def facts(folder: Path) -> dict[str, dict[str, Any]]:
    """``bytes`` and ``sha256`` of an artifact's model files by name, as the manifest holds them.

    Right after they were written this is one read out of the system's cache.
    """
    paths = [*(folder / name for name in FILES), *sorted(folder.glob(PATTERN))]
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": _hash(path)}
        for path in paths if path.is_file()
    }  # fmt: skip


def check_files(folder: Path, *, whole: bool = False) -> None:
    """Raise ``BadInput`` where a model file of an artifact is not the one that was written.

    ``whole``: files above ``HASHED_BYTES`` are hashed too. A manifest without hashes is one that an
    earlier release wrote, and nothing is checked. Hashes find damage and mistakes, not a person who
    changes the manifest as well.
    """
    while True:
        content = (folder / MANIFEST).read_bytes()
        wrong = _wrong(folder, _recorded(folder, content), whole)
        if not wrong:
            return
        if (folder / MANIFEST).read_bytes() == content:
            raise BadInput(wrong)
        # Another artifact has taken the place of this one meanwhile.


def open_whole(folder: Path, opened: Callable[[], Opened]) -> Opened:
    """What ``opened`` makes of an artifact's files, after ``check_files``: all of one artifact, and
    made again where another took its place meanwhile."""
    while True:
        # A folder that is held open is not mistaken for a later one.
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            check_files(folder)
            artifact = opened()
            if os.path.samestat(os.fstat(held), folder.stat()):
                return artifact
        except GraphwrightError:
            if os.path.samestat(os.fstat(held), folder.stat()):
                raise
        finally:
            os.close(held)


def _recorded(folder: Path, content: bytes) -> dict[str, Any]:
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{folder / MANIFEST}: not JSON: {error}") from None
    files = manifest.get("files", {}) if isinstance(manifest, dict) else {}
    known = files.values() if isinstance(files, dict) else [None]
    if not all(isinstance(file, dict) for file in known):
        raise BadInput(f"{folder / MANIFEST}: damaged: `files` should hold sizes and hashes")
    return {n: files[n] for n in files if n in FILES or fnmatch.fnmatchcase(n, PATTERN)}


def _wrong(folder: Path, files: dict[str, Any], whole: bool) -> str:
    """What is wrong of the first file that is not as it was; empty where none is."""
    for name, known in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path}: not there, though the artifact was written with it"
        size = path.stat().st_size
        if size != known.get("bytes"):
            return f"{path}: {size} bytes, but {known.get('bytes')} were written"
        if not whole and size > HASHED_BYTES:
            continue
        if _hash(path) != known.get("sha256"):
            return (
                f"{path}: not as it was written (its SHA-256 is another). Copy it again, or make "
                "the artifact again; given by its own name, model.onnx is opened unchecked"
            )
    return ""


def _hash(path: Path) -> str:
    stat = path.stat()
    return _sha256(path.resolve(), stat.st_ino, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache
def _sha256(path: Path, inode: int, size: int, changed: int) -> str:
    """The hash of a file that is told apart by these from what had its name before."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
