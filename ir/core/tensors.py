"""Weights as ONNX tensors and back, without reading a byte until someone asks for it."""

from __future__ import annotations

import itertools
import math
import os
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype, to_torch_dtype

from .errors import BadInput, Missing
from .files import Stamp, check_unchanged
from .weights import ComputedWeight, FileWeight, MemoryWeight, Weight, tensor_bytes

_KEY = "graphwright.key"
_keys = itertools.count()
_STAMP = "graphwright.stamp"
"""Of the data file of an external tensor, as it was when its handle was first asked for."""

_UNPACKED: dict[onnx_ir.DataType, torch.dtype] = {
    onnx_ir.DataType.INT4: torch.int8,
    onnx_ir.DataType.UINT4: torch.uint8,
    onnx_ir.DataType.INT2: torch.int8,
    onnx_ir.DataType.UINT2: torch.uint8,
}
"""Integers narrower than a byte are read one to a byte: torch computes with nothing smaller."""

_NARROW = {"int4": "int8", "int2": "int8", "uint4": "uint8", "uint2": "uint8"}


class WeightTensor(onnx_ir.TensorProtocol):
    """An ONNX tensor whose numbers come from a ``Weight`` each time they are asked for."""

    def __init__(self, weight: Weight, name: str) -> None:
        self._weight = weight
        self.name = name
        self.dtype = from_torch_dtype(weight.dtype)
        self.shape = onnx_ir.Shape(weight.shape, frozen=True)
        self.doc_string = None
        self.metadata_props = {}
        self.meta = {}

    @property
    def raw(self) -> Weight:
        """The handle itself."""
        return self._weight

    @property
    def size(self) -> int:
        return self._weight.numel

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes

    def numpy(self) -> np.ndarray[Any, Any]:
        """The numbers, freshly read; bf16 and fp8 in the types of ``ml_dtypes``."""
        flat = np.frombuffer(tensor_bytes(self._weight.read()), dtype=self.dtype.numpy())
        return flat.reshape(self._weight.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        array = self.numpy()
        return array if dtype is None else array.astype(dtype)

    def __dlpack__(self, *, stream: Any = None) -> Any:
        return self._weight.read().__dlpack__(stream=stream)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)

    def tobytes(self) -> bytes:
        return tensor_bytes(self._weight.read()).tobytes()

    def tofile(self, file: BinaryIO) -> None:
        """Write the raw little-endian bytes, a piece of the tensor after the other."""
        for piece in self._weight.pieces():
            file.write(tensor_bytes(piece))

    def __repr__(self) -> str:
        return f"WeightTensor({self._weight!r}, name={self.name!r})"


def tensor_of(weight: Weight, name: str) -> onnx_ir.TensorProtocol:
    """The ONNX tensor of a weight. Raises ``BadInput`` where ONNX has no such dtype."""
    try:
        return WeightTensor(weight, name)
    except TypeError:
        raise BadInput(f"weight {name!r}: ONNX has no tensor type for {weight.dtype}") from None


def has_weight(tensor: onnx_ir.TensorProtocol) -> bool:
    """Whether ``weight_of`` can give a handle: false for strings and 4- and 6-bit floats."""
    if tensor.dtype in _UNPACKED:
        return True
    try:
        to_torch_dtype(tensor.dtype)
    except TypeError:
        return False
    return True


def weight_of(tensor: onnx_ir.TensorProtocol) -> Weight:
    """The handle of an ONNX tensor; the inverse of ``tensor_of``. Nothing is read.

    4- and 2-bit integers come unpacked, one to a byte. Raises ``BadInput`` for a dtype that torch
    has not and for external data outside the model's folder or of the wrong length, and
    ``Missing`` where the file of the external data is not there. From the first call on its file
    must stay as it is: reading refuses another, also by handles of later calls.
    """
    if isinstance(tensor, WeightTensor):
        return tensor.raw
    if not has_weight(tensor):
        raise BadInput(f"tensor {tensor.name!r}: torch has no dtype for {tensor.dtype.name}")
    shape = tuple(int(d) for d in tensor.shape.numpy())
    packed = _UNPACKED.get(tensor.dtype)
    dtype = to_torch_dtype(tensor.dtype) if packed is None else packed
    if isinstance(tensor, onnx_ir.ExternalTensor):
        path = _checked_path(tensor)
        stamp = tensor.meta.setdefault(_STAMP, Stamp.of(path.stat()))
        if packed is None:
            return FileWeight(path, tensor.offset or 0, shape, dtype, stamp=stamp)
        stored = FileWeight(path, tensor.offset or 0, (tensor.nbytes,), torch.uint8, stamp=stamp)
        return ComputedWeight(
            lambda: _unpacked(stored.read().numpy(), tensor.dtype, shape), shape, dtype,
            ("unpacked", tensor.dtype, shape, stored.key),
        )  # fmt: skip
    if isinstance(tensor.raw, torch.Tensor):
        return MemoryWeight(tensor.raw)
    if isinstance(tensor, onnx_ir.Tensor) and packed is None:
        return MemoryWeight(_from_numpy(tensor.numpy(), dtype))
    # A tensor inside a loaded proto copies its bytes at every access: no handle may hold them.
    key = tensor.meta.setdefault(_KEY, next(_keys))
    return ComputedWeight(
        lambda: _from_numpy(_numbers(tensor), dtype).clone(), shape, dtype, ("onnx", key)
    )


def refuse_changed(tensor: onnx_ir.TensorProtocol) -> None:
    """Raise ``BadInput`` where the external data of a tensor is no longer what ``weight_of`` saw,
    ``Missing`` where it is gone."""
    if isinstance(tensor, onnx_ir.ExternalTensor) and _STAMP in tensor.meta:
        check_unchanged(Path(tensor.path), tensor.meta[_STAMP])


def _numbers(tensor: onnx_ir.TensorProtocol) -> np.ndarray[Any, Any]:
    refuse_changed(tensor)
    return tensor.numpy()


def _unpacked(
    raw: np.ndarray[Any, Any], dtype: onnx_ir.DataType, shape: tuple[int, ...]
) -> torch.Tensor:
    """The numbers in packed bytes, the lowest bits first, one to a byte."""
    bits, mask = dtype.bitwidth, (1 << dtype.bitwidth) - 1
    parts = [(raw >> shift) & mask for shift in range(0, 8, bits)]
    codes = np.stack(parts, -1).reshape(-1)[: math.prod(shape)].reshape(shape)
    if _UNPACKED[dtype] == torch.uint8:
        return torch.from_numpy(codes)
    sign = 1 << (bits - 1)
    return torch.from_numpy(((codes ^ sign).astype(np.int8) - sign).astype(np.int8))


def _from_numpy(array: np.ndarray[Any, Any], dtype: torch.dtype) -> torch.Tensor:
    if array.dtype.name in _NARROW:
        # Their numbers lie in a byte each, whose high bits do not say the sign.
        array = array.astype(_NARROW[array.dtype.name])
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    with warnings.catch_warnings():
        # torch warns of read-only memory; a weight's readers must not write to it anyway.
        warnings.filterwarnings("ignore", message=".*not writable.*", category=UserWarning)
        flat = torch.from_numpy(raw)
    return flat.view(dtype).reshape(array.shape)


def _checked_path(tensor: onnx_ir.ExternalTensor) -> Path:
    """The data file of an external tensor, known to exist, in the model's folder, long enough."""
    path = Path(tensor.path)
    base = os.fspath(tensor.base_dir)
    if base and not _is_inside(path, Path(base)):
        raise BadInput(
            f"tensor {tensor.name!r}: its external data {os.fspath(tensor.location)!r} lies "
            f"outside the model's folder {base}; such a file is not read"
        )
    if path.exists() and not path.is_file():
        raise BadInput(
            f"tensor {tensor.name!r}: its external data {path} is not a file, but a folder, a pipe "
            "or a device"
        )
    if not path.is_file():
        raise Missing(
            f"tensor {tensor.name!r}: its external data file {path} is not there; "
            "put it next to the .onnx file"
        )
    if tensor.length not in (None, tensor.nbytes):
        raise BadInput(
            f"{path}: tensor {tensor.name!r} declares {tensor.length} bytes of external data, "
            f"its type needs {tensor.nbytes}"
        )
    end = (tensor.offset or 0) + tensor.nbytes
    size = path.stat().st_size
    if end > size:
        raise BadInput(f"{path}: truncated: tensor {tensor.name!r} ends at byte {end} of {size}")
    return path


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a file lies in a model's folder, or in the store that links in this folder lead to.

    The cache of the Hugging Face hub keeps each file once, in ``blobs``, and links to it from
    ``snapshots/REVISION``: a link there may lead to that store's own blobs, and nowhere else. The
    runtime's own rule is as narrow (1.31 refuses the blobs of the whole cache, which ``belongs``
    lets through): what it would not run is not read.
    """
    real = path.resolve()
    if real.is_relative_to(folder.resolve()):
        return True
    folder = folder.absolute()
    named = Path(os.path.normpath(path.absolute()))
    stores = [p.parent / "blobs" for p in (folder, *folder.parents) if p.name == "snapshots"]
    return named.is_relative_to(folder) and any(real.parent == s.resolve() for s in stores)
