"""Files of the graph's own inputs, ``.npz`` and ``.safetensors``: the first rows of each array."""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch

from ...ir.core.errors import BadInput
from ...ir.core.memory import refuse_beyond_memory
from ...ir.core.weights import read_safetensors_header


@dataclass(frozen=True)
class Rows:
    """The beginning of an array: ``tensor`` holds the first of its rows, ``shape`` is the whole."""

    tensor: torch.Tensor
    shape: tuple[int, ...]

    def along(self, axis: int) -> Rows:
        """With this dimension as the first; of the one that is the first now all rows are here."""
        shape = self.shape[axis : axis + 1] + self.shape[:axis] + self.shape[axis + 1 :]
        return Rows(self.tensor.movedim(axis, 0), shape) if axis else self


def read_rows(path: Path, rows: int) -> dict[str, Rows]:
    """At least the first ``rows`` of each array of a file, or all that there are, by name.

    Of an ``.npz`` no more is unpacked, whatever the file claims to hold: zeros pack a thousand to
    one. Raises ``BadInput`` for what is damaged, holds objects, or does not fit into memory.
    """
    if path.suffix.lower() == ".npz":
        return dict(_npz(path, rows))
    handles = dict(read_safetensors_header(path))
    return {name: Rows(handle.read(), handle.shape) for name, handle in handles.items()}


def _npz(path: Path, rows: int) -> Iterator[tuple[str, Rows]]:
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as file:
                    yield member.removesuffix(".npy"), _array(file, rows, f"{path}: {member}")
    except (ValueError, TypeError, EOFError, OSError, RuntimeError, OverflowError, zlib.error,
            zipfile.BadZipFile) as error:  # fmt: skip
        raise BadInput(f"{path}: not an .npz file of numbers ({error})") from None


def _array(file: IO[bytes], rows: int, where: str) -> Rows:
    shape, transposed, dtype = _header(file)
    if dtype.hasobject or min(shape, default=0) < 0:
        raise ValueError(f"{where}: {dtype} of the shape {shape}")
    # What is stored column by column has a part of each row at its end.
    held = shape if transposed else (min(rows, shape[0]), *shape[1:]) if shape else ()
    size = math.prod(held) * dtype.itemsize
    refuse_beyond_memory(2 * size, f"{where}: {list(held)} of {dtype}")
    data = file.read(size)
    if len(data) < size:
        raise ValueError(f"{where}: truncated: {len(data)} of {size} bytes")
    array = np.frombuffer(bytearray(data), dtype).reshape(held, order="F" if transposed else "C")
    # An array without dimensions gets one by being made contiguous.
    return Rows(torch.from_numpy(np.ascontiguousarray(array)).reshape(held), shape)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[np.void]]:
    version = np.lib.format.read_magic(file)
    try:
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(file)
        if version == (2, 0):
            return np.lib.format.read_array_header_2_0(file)
    except (SyntaxError, tokenize.TokenError) as error:
        # What is no literal numpy reads once more, as Python 2 wrote it, by the tokenizer.
        raise ValueError(f"no header of an array: {error}") from None
    raise ValueError(f"arrays of format {version} hold more than numbers")


def equally_many(held: Mapping[str, Rows]) -> int | None:
    """How many rows all of the arrays have; ``None`` where they differ or have none."""
    counts = {rows.shape[0] if rows.shape else 0 for rows in held.values()}
    return counts.pop() or None if len(counts) == 1 else None
