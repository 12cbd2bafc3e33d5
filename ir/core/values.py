"""What flows through a graph: torch tensors, and values that torch has no form for.

The latter are opaque: they pass from node to node as Python objects, in the forms that ONNX Runtime
and onnx's evaluator take. A tensor of strings, or of a dtype that torch lacks, is a numpy array; a
sequence is a list, a map a dict, an empty optional ``None``. 4- and 2-bit integers are tensors, one
number to a byte, as weights of them are.
"""

from __future__ import annotations

import zlib
from typing import Any

import ml_dtypes
import numpy as np
import torch

_RAW = {
    dtype: getattr(ml_dtypes, name)
    for dtype, name in {
        torch.bfloat16: "bfloat16",
        torch.float8_e4m3fn: "float8_e4m3fn",
        torch.float8_e4m3fnuz: "float8_e4m3fnuz",
        torch.float8_e5m2: "float8_e5m2",
        torch.float8_e5m2fnuz: "float8_e5m2fnuz",
        torch.float8_e8m0fnu: "float8_e8m0fnu",
    }.items()
}
"""The dtypes that torch and numpy exchange as bytes."""
_TORCH = {np.dtype(name): dtype for dtype, name in _RAW.items()}
_BYTES = {
    np.dtype(ml_dtypes.int4): np.int8,
    np.dtype(ml_dtypes.uint4): np.uint8,
    np.dtype(ml_dtypes.int2): np.int8,
    np.dtype(ml_dtypes.uint2): np.uint8,
}
"""Integers narrower than a byte, and what holds one."""


def to_numpy(value: Any) -> Any:
    """A tensor as an array of the same memory; an opaque value as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    tensor = value.detach().cpu()
    raw = _RAW.get(tensor.dtype)
    if raw is None:
        return tensor.numpy()
    bits = torch.uint16 if tensor.element_size() == 2 else torch.uint8
    return tensor.contiguous().view(bits).numpy().view(raw)


def to_value(value: Any) -> Any:
    """The inverse of ``to_numpy``, of what a runtime gives: a tensor where torch has one."""
    if not isinstance(value, np.ndarray | np.generic):
        return value
    array = np.asarray(value)
    array = array.astype(_BYTES.get(array.dtype, array.dtype), copy=False)
    if array.dtype in _TORCH:
        raw = np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")
        return torch.from_numpy(raw).view(_TORCH[array.dtype]).reshape(array.shape)
    if array.dtype.kind not in "biufc":
        return array.astype(object) if array.dtype.kind == "U" else array
    if array.dtype == np.uint64:
        array = array.view(np.uint64)  # numpy has two dtypes of this name, and torch knows one
    if not array.flags.writeable:
        array = array.copy()
    return torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape)


_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


def is_opaque(value: Any) -> bool:
    """Whether a value is none that torch computes with: it stores wide unsigned integers alone."""
    return not isinstance(value, torch.Tensor) or value.dtype in _UNSIGNED


def numbers(value: Any) -> torch.Tensor:
    """A value as a tensor, by which two of them can be compared.

    A tensor is itself. Strings become checksums, a tensor of them i64 in its shape; of a sequence
    or a map the numbers are laid end to end, f64 [n].
    """
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, str):
        return torch.tensor(zlib.crc32(value.encode()))
    if isinstance(value, np.ndarray) and value.dtype == object:
        sums = [zlib.crc32(str(text).encode()) for text in value.reshape(-1)]
        return torch.tensor(sums, dtype=torch.int64).reshape(value.shape)
    if isinstance(value, np.ndarray | np.generic):
        return torch.from_numpy(np.asarray(value, dtype=np.float64))
    if isinstance(value, dict):
        value = [part for pair in sorted(value.items()) for part in pair]
    if isinstance(value, list):
        parts = [torch.tensor([len(value)]), *(numbers(part).reshape(-1) for part in value)]
        return torch.cat([part.double() for part in parts])
    return torch.as_tensor([] if value is None else value)
