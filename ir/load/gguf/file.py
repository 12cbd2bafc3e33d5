"""GGUF files: what they say of themselves, and where their tensors lie. Nothing is taken on trust.

Little-endian: ``GGUF``, version, counts; keys with typed values; per tensor a name, its dimensions
with the contiguous one first, a type and an offset into the data behind the header, which starts at
a multiple of ``general.alignment``. Read from ggml's ``docs/gguf.md`` and gguf 0.19.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ...core.errors import BadInput, Missing
from ...core.files import Stamp, open_regular
from ...core.weights import FileWeight

VERSIONS = (2, 3)
KINDS: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}  # fmt: skip
"""By ggml's number of a type: its name, elements of a block and bytes of one."""
WHOLE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types that hold numbers as they are."""
MOST_DIMS = 4
MOST_TEXT = 1 << 26
"""Bytes of one text, at most: a chat template has some thousands."""
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}  # fmt: skip
_TEXT, _ARRAY = 8, 9


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file."""

    name: str
    kind: str
    """``Q4_0``, ``F32``, ..."""
    shape: tuple[int, ...]
    """As torch has it: the contiguous dimension last."""
    data: FileWeight
    """Of a whole type the numbers; else bytes uint8 ``[rows, bytes of a row]``."""


@dataclass(frozen=True)
class GgufFile:
    """Keys and tensors of a file."""

    path: Path
    keys: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def arch(self) -> str:
        return str(self.keys.get("general.architecture", ""))


def read_gguf(path: Path) -> GgufFile:
    """Raises ``BadInput`` where the file is cut short, or says what cannot be, naming the key or
    the tensor; ``Missing`` where it is not there."""
    if not path.exists():
        raise Missing(f"{path}: no such file")
    with open_regular(path) as file:
        return _Reader(path, file).read()


class _Reader:
    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._stamp = Stamp.of(os.fstat(file.fileno()))
        self._at = "its header"

    def read(self) -> GgufFile:
        if self._take(4) != b"GGUF":
            raise BadInput(f"{self._path}: not a GGUF file")
        version = self._number("I")
        if version not in VERSIONS:
            hint = "; a big-endian one is not read" if version & 0xFFFF == 0 else ""
            raise BadInput(f"{self._path}: GGUF version {version}; 2 and 3 are read{hint}")
        tensors, count = self._number("Q"), self._number("Q")
        keys: dict[str, Any] = {}
        for _ in range(count):
            self._at = f"the key behind {list(keys)[-1]!r}" if keys else "its first key"
            name = self._text()
            self._at = f"the key {name!r}"
            if name in keys:
                raise BadInput(f"{self._path}: {self._at} is given twice")
            keys[name] = self._value(self._number("I"))
        if keys.get("split.count", 1) > 1:
            raise BadInput(f"{self._path}: one of {keys['split.count']} parts: join them with "
                           "llama-gguf-split --merge")  # fmt: skip
        entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        for index in range(tensors):
            self._at = f"tensor {index + 1} of {tensors}"
            name = self._text()
            if name in entries:
                raise BadInput(f"{self._path}: the tensor {name!r} is there twice")
            self._at = f"the tensor {name!r}"
            entries[name] = self._entry()
        alignment = keys.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise BadInput(f"{self._path}: general.alignment is {alignment}, no power of two")
        self._check_places(entries, alignment)
        start = -(-self._file.tell() // alignment) * alignment
        by_name = {name: self._tensor(name, entry, start) for name, entry in entries.items()}
        return GgufFile(self._path, keys, by_name)

    def _check_places(self, entries: Mapping[str, tuple[str, tuple[int, ...], int, int]],
                      alignment: int) -> None:  # fmt: skip
        """Each tensor begins at a multiple of the alignment, behind the one before it."""
        end = 0
        for name, (_, _, size, offset) in sorted(entries.items(), key=lambda pair: pair[1][3]):
            if offset % alignment or offset < end:
                raise BadInput(
                    f"{self._path}: the tensor {name!r} is at byte {offset} of the data: a multiple"
                    f" of {alignment} from {end} on is read"
                )
            end = offset + size

    def _take(self, size: int) -> bytes:
        content = self._file.read(size) if size <= self._stamp.size else b""
        if len(content) < size:
            raise BadInput(f"{self._path}: truncated in {self._at}")
        return content

    def _number(self, code: str) -> int:
        return int(self._scalar(code))

    def _scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _text(self) -> str:
        size = self._number("Q")
        if size > MOST_TEXT:
            raise BadInput(f"{self._path}: a text of {size} bytes in {self._at}")
        return self._take(size).decode("utf-8", "replace")

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _TEXT:
            return self._text()
        if kind != _ARRAY:
            raise BadInput(f"{self._path}: {self._at} has a value of unknown type {kind}")
        inner, count = self._number("I"), self._number("Q")
        if count > self._stamp.size or inner == _ARRAY:
            raise BadInput(f"{self._path}: {self._at} is an array of {count} values of type "
                           f"{inner}, which cannot be")  # fmt: skip
        if inner in _SCALARS:
            code = f"<{count}{_SCALARS[inner]}"
            return list(struct.unpack(code, self._take(struct.calcsize(code))))
        return [self._value(inner) for _ in range(count)]

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Type, shape, bytes and offset of a tensor."""
        count = self._number("I")
        if not 1 <= count <= MOST_DIMS:
            raise BadInput(f"{self._path}: {self._at} has {count} dimensions")
        shape = tuple(self._number("Q") for _ in range(count))[::-1]
        number, offset = self._number("I"), self._number("Q")
        if number not in KINDS:
            known = ", ".join(name for name, _, _ in KINDS.values())
            raise BadInput(f"{self._path}: {self._at} is of ggml's type {number}; {known} are read")
        kind, block, size = KINDS[number]
        if shape[-1] % block:
            raise BadInput(f"{self._path}: {self._at} is {list(shape)}: rows of {kind} are "
                           f"multiples of {block}")  # fmt: skip
        return kind, shape, prod(shape) // block * size, offset

    def _tensor(self, name: str, entry: tuple[str, tuple[int, ...], int, int],
                start: int) -> Tensor:  # fmt: skip
        kind, shape, size, offset = entry
        end = start + offset + size
        if end > self._stamp.size:
            raise BadInput(f"{self._path}: truncated: the tensor {name!r} ends at byte {end} of "
                           f"{self._stamp.size}")  # fmt: skip
        whole = WHOLE.get(kind)
        rows = prod(shape[:-1])
        stored = shape if whole else (rows, size // max(rows, 1))
        data = FileWeight(self._path, start + offset, stored, whole or torch.uint8,
                          stamp=self._stamp)  # fmt: skip
        return Tensor(name, kind, shape, data)
