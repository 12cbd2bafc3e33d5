"""``--resume``: what a run has computed lies in ``OUT.partial`` until its artifact is published.

Only what takes time is kept: codes of matrices, factors, scores, outputs; of a search what it
surveyed and each point that it measured. A resumed run rewrites
the graph again from the start, takes these from the folder, and ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ...backends.artifacts.claim import claimed
from ...ir.core.errors import FULL, BadInput, DiskFull, GraphwrightError
from ...ir.core.weights import FileWeight, mapped, tensor_bytes

MARKS_FILE = "run.json"
SUFFIX = ".result"
UNFINISHED = ".new"
"""What a file is called while it is written."""
_ALIGNMENT = 64
"""Bytes to whose multiples tensors in a file are aligned."""


class FolderStore:
    """Results in a folder, a file each. The folder is made with the first one."""

    def __init__(self, folder: Path, marks: Mapping[str, str]) -> None:
        self.folder, self.marks = folder, dict(marks)
        self._own: set[str] = set()
        """The keys that this process has written."""

    def recall(self, key: str) -> Any:
        """What was kept, its tensors mapped from the file: nobody may write to them. ``KeyError``
        where nothing was; ``BadInput`` for a damaged file, of an earlier run by checksums."""
        path = self._path(key)
        if not path.is_file():
            raise KeyError(key)
        try:
            return _unpacked(path, check=key not in self._own)
        except (ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
            raise BadInput(
                f"{path}: damaged ({error}); remove {self.folder}, or run without --resume"
            ) from None

    def keep(self, key: str, result: Any) -> None:
        """Raises ``DiskFull`` where it does not fit."""
        path = self._path(key)
        new = path.with_suffix(UNFINISHED)
        try:
            self._make_folder()
            with new.open("wb") as file:
                for part in _packed(result):
                    file.write(part)
            new.replace(path)
            self._own.add(key)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise DiskFull(
                f"the disk of {self.folder.parent} ran full. Free some space or choose another "
                "--out"
            ) from None

    def _make_folder(self) -> None:
        marks = self.folder / MARKS_FILE
        if marks.is_file():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        new = marks.with_name(f"{MARKS_FILE}{UNFINISHED}")
        new.write_text(json.dumps(self.marks, indent=1, sort_keys=True))
        new.replace(marks)

    def _path(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}{SUFFIX}"


def _packed(result: Any) -> Iterator[bytes | memoryview]:
    """A result as bytes: the length of a JSON text, that text, and the tensors that it numbers."""
    tensors: list[torch.Tensor] = []
    text = json.dumps(_described(result, tensors)).encode()
    yield struct.pack("<Q", len(text))
    yield text
    at = 8 + len(text)
    for tensor in tensors:
        raw = tensor_bytes(tensor)
        yield bytes(-at % _ALIGNMENT)
        yield raw
        at += -at % _ALIGNMENT + raw.nbytes


def _described(result: Any, tensors: list[torch.Tensor]) -> Any:
    """What JSON can say of a result; its tensors are collected in order. A container is a list of
    its kind and its items, so that no dictionary passes for a tensor."""
    if isinstance(result, torch.Tensor):
        tensors.append(result.detach())
        return {
            "dtype": str(result.dtype).removeprefix("torch."), "shape": list(result.shape),
            "crc32": zlib.crc32(tensor_bytes(result)),
        }  # fmt: skip
    if isinstance(result, dict):
        return ["dict", *([key, _described(value, tensors)] for key, value in result.items())]
    if isinstance(result, list | tuple):
        return ["list", *(_described(value, tensors) for value in result)]
    return result


def _unpacked(path: Path, *, check: bool) -> Any:
    """The inverse of ``_packed``. Raises ``ValueError`` and its like where the file is none, or,
    where that is to be checked, a tensor is not the one that was written."""
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > size - 8:
            raise ValueError("it is cut short")
        described = json.loads(file.read(length))
    at = 8 + length

    def build(part: Any) -> Any:
        nonlocal at
        if isinstance(part, dict):
            weight = FileWeight(
                path, at + -at % _ALIGNMENT, tuple(part["shape"]), getattr(torch, part["dtype"])
            )
            at = weight.offset + weight.nbytes
            if at > size:
                raise ValueError("it is cut short")
            tensor = mapped(weight)
            if check and zlib.crc32(tensor_bytes(tensor)) != part["crc32"]:
                raise ValueError("a checksum is wrong")
            return tensor
        if isinstance(part, list):
            kind, *items = part
            if kind == "dict":
                return {key: build(value) for key, value in items}
            return [build(value) for value in items]
        return part

    return build(described)


@contextlib.contextmanager
def remembering(
    out: Path | None, marks: Mapping[str, str], *, resume: bool = False
) -> Iterator[FolderStore | None]:
    """The memory of a run that writes to ``out``; ``None`` where it writes nothing.

    ``marks`` say by name what decides the run's results. The folder goes when the block ends well
    or with an error that users see; where the process is stopped, it stays. Raises
    ``BadInput`` as ``claimed``, and where ``resume`` is asked for and the folder is of another run.
    """
    if out is None:
        if resume:
            raise BadInput("--resume goes on with a run that was to write an artifact: give its -o")
        yield None
        return
    with claimed(out) as folder:
        if resume:
            _check_marks(folder, marks)
        else:
            _clear(folder)
        try:
            yield FolderStore(folder, marks)
        except GraphwrightError:
            _clear(folder)
            raise
        _clear(folder)


def _clear(folder: Path) -> None:
    """Remove a state; first what makes it one, so that no half of it passes for a whole."""
    (folder / MARKS_FILE).unlink(missing_ok=True)
    for path in folder.glob("*"):
        if path.suffix in (SUFFIX, UNFINISHED):
            path.unlink()


def _check_marks(folder: Path, marks: Mapping[str, str]) -> None:
    """Whether the state in a folder is that of this run; none at all is fine."""
    if not (folder / MARKS_FILE).exists():
        _clear(folder)
        return
    try:
        known = json.loads((folder / MARKS_FILE).read_text(encoding="utf-8"))
    except ValueError:
        known = None
    if not isinstance(known, dict):
        raise BadInput(f"{folder}: damaged; remove it, or run without --resume")
    for name in sorted({*known, *marks}):
        if known.get(name) != marks.get(name):
            raise BadInput(
                f"--resume: {folder} is of a run with another {name}: it had "
                f"{_short(known.get(name))}, this one has {_short(marks.get(name))}. Give what it "
                "had, or run without --resume to start anew"
            )


def _short(text: object) -> str:
    shown = str(text) if text else "none"
    return shown if len(shown) <= 200 else f"{shown[:200]}..."
