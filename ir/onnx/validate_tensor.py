"""Tensors of a file: their dtype is one, and they hold as many bytes as their shape needs."""

from __future__ import annotations

import math
import re

import onnx
import onnx_ir

from ..core.errors import BadInput

_T = onnx.TensorProto
DTYPES = frozenset(_T.DataType.values()) - {_T.UNDEFINED}
_FIELDS = {
    "float_data": {_T.FLOAT: 1, _T.COMPLEX64: 2},
    "double_data": {_T.DOUBLE: 1, _T.COMPLEX128: 2},
    "int64_data": {_T.INT64: 1},
    "uint64_data": {_T.UINT64: 1, _T.UINT32: 1},
    "string_data": {_T.STRING: 1},
}
"""Typed fields: the dtypes that they hold, and how many entries a number takes. All others, narrow
ones packed, are in ``int32_data``."""

_PACKED = frozenset({
    onnx_ir.DataType.INT2, onnx_ir.DataType.UINT2, onnx_ir.DataType.INT4, onnx_ir.DataType.UINT4,
    onnx_ir.DataType.FLOAT4E2M1,
})  # fmt: skip
"""Several numbers of these are in one entry."""


def check_tensor(tensor: onnx.TensorProto, where: str) -> None:
    """Raise ``BadInput`` where dtype, shape and bytes contradict each other.

    External data is held against its file when the weight is first seen (``core.tensors``).
    """
    if tensor.data_type not in DTYPES:
        raise BadInput(f"{where} is of the dtype {tensor.data_type}, which there is not")
    if tensor.HasField("segment"):
        raise BadInput(f"{where} is a segment of a tensor, and segments are not read")
    if any(d < 0 for d in tensor.dims):
        raise BadInput(f"{where} has a dimension of less than 0: {list(tensor.dims)}")
    if tensor.data_location == _T.EXTERNAL:
        _check_location(tensor, where)
        return
    dtype = onnx_ir.DataType(tensor.data_type)
    count = math.prod(tensor.dims)
    if tensor.HasField("raw_data"):
        if tensor.data_type == _T.STRING:
            raise BadInput(f"{where} holds text as raw bytes")
        needed, length, what = -(-count * dtype.bitwidth // 8), len(tensor.raw_data), "bytes"
    else:
        field, entries = _field(tensor.data_type)
        length, what = len(getattr(tensor, field)), f"entries of {field}"
        packed = 8 // dtype.bitwidth if dtype in _PACKED else 1
        needed = -(-count * entries // packed)
    if length != needed:
        raise BadInput(
            f"{where} holds {length} {what}, and {dtype.name} {list(tensor.dims)} takes {needed}: "
            "the file is damaged or cut short"
        )


def _field(data_type: int) -> tuple[str, int]:
    for field, entries in _FIELDS.items():
        if data_type in entries:
            return field, entries[data_type]
    return "int32_data", 1


def _check_location(tensor: onnx.TensorProto, where: str) -> None:
    """Numbers are digits alone: runtimes take no blanks, signs or letters for one."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if len(entries) < len(tensor.external_data):
        raise BadInput(f"{where} says one thing of its external data twice")
    location = entries.get("location", "")
    if not location or "\0" in location:
        raise BadInput(f"{where} names no file for its external data: {location!r}")
    for key in ("offset", "length"):
        if key in entries and not re.fullmatch(r"[0-9]{1,19}", entries[key], re.ASCII):
            raise BadInput(f"{where}: the {key} of its external data is {entries[key]!r}")
