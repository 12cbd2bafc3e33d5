"""A safetensors file, written one tensor after the other."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...ir.core.weights import SAFETENSORS_DTYPES, tensor_bytes

_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, which is made when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]


def write(path: Path, entries: Sequence[Entry]) -> None:
    """Write the file. Raises ``ValueError`` where a tensor is not what its entry says."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        size = entry.dtype.itemsize * torch.Size(entry.shape).numel()
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype], "shape": list(entry.shape),
            "data_offsets": [end, end + size],
        }  # fmt: skip
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            tensor = entry.make()
            if (tensor.dtype, tuple(tensor.shape)) != (entry.dtype, entry.shape):
                raise ValueError(f"{entry.name}: {tensor.dtype} {list(tensor.shape)} was made")
            file.write(tensor_bytes(tensor))
