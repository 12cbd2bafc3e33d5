"""Linears and tables of few bits in standard ONNX ops alone: what every runtime reads.

linear_nbit    => matmul(x, DequantizeLinear(w)), w INT4 or INT8 [K, N], a scale a block of K
embedding_nbit => the rows' bytes gathered, parted into codes and scaled

ONNX Runtime (1.31, CPU) makes a ``MatMulNBits`` of the first as it loads the model, one with
``accuracy_level=4`` unless the session says otherwise (``session.qdq_matmulnbits_accuracy_level``).
That is the form of a linear with this level; with level 0 the weight stands as [N, K] before a
transposition, which is not joined: exact, and slow there. TensorRT takes signed codes without zero
points only, so a code c stands as c less the middle code. Codes of 2 and 3 bits are stored as INT4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ..core.errors import InvalidGraph
from .emit import cast, constant, derived
from .matmul_nbits import Form
from .pack import block_of, n_blocks, n_groups, unpack, unpack_zeros

if TYPE_CHECKING:
    from onnx_ir.tape import Tape

FORM = "dequantize-linear"


def record_linear(
    tape: Tape, operands: Sequence[ir.Value | None], attrs: Mapping[str, Any]
) -> ir.Value:
    """``x @ ((codes - zeros) * scales).T + bias``, see ``linear_nbit``."""
    x, codes, scales, zeros, bias = (*operands, None, None)[:5]
    if x is None or codes is None or scales is None or x.dtype is None:
        raise InvalidGraph("linear_nbit needs x with a known dtype, codes and scales")
    work = x.dtype if x.dtype == ir.DataType.FLOAT16 else ir.DataType.FLOAT
    inner = cast(tape, x, work)
    real = zeros if zeros is not None and zeros.dtype != ir.DataType.UINT8 else None
    weight = _Weight(tape, attrs, work)
    y = tape.op("MatMul", [inner, weight.dense(codes, scales, None if real else zeros)])
    if real is not None:
        wide = cast(tape, scales, work), cast(tape, real, work)
        y = tape.op("Add", [y, Form(tape, attrs).correction(inner, *wide)])
    if bias is not None:
        y = tape.op("Add", [y, cast(tape, bias, work)])
    return cast(tape, y, x.dtype) if work != x.dtype else y


class _Weight:
    """The stored operands of a linear as those of ``DequantizeLinear``."""

    def __init__(self, tape: Tape, attrs: Mapping[str, Any], work: ir.DataType) -> None:
        self._tape, self._work = tape, work
        self._bits, self._group = attrs["bits"], attrs["group"]
        self._rows, self._columns = attrs["out_features"], attrs["in_features"]
        self._block = block_of(self._group, self._columns)
        self._blocks = n_blocks(self._group, self._columns)
        self._joined = attrs["accuracy_level"] == 4
        self._narrow = ir.DataType.INT8 if self._bits == 8 else ir.DataType.INT4

    def dense(self, codes: ir.Value, scales: ir.Value, zeros: ir.Value | None) -> ir.Value:
        """The matrix [K, N]."""
        inputs = [
            self._stored(codes, self._narrow, self._codes, self._columns),
            self._stored(scales, self._work, lambda data: data, self._blocks),
        ]
        if zeros is not None:
            inputs.append(self._stored(zeros, self._narrow, self._zeros, self._blocks))
        # Also where a row has one scale: ONNX Runtime joins a form without blocks at either level,
        # into blocks of its own choice.
        attrs = {"axis": 0 if self._joined else 1, "block_size": self._block}
        matrix = self._tape.op("DequantizeLinear", inputs, attrs)
        return matrix if self._joined else self._tape.op("Transpose", [matrix], {"perm": [1, 0]})

    def _stored(
        self, data: ir.Value, dtype: ir.DataType, numbers: Callable[[Tensor], Tensor], columns: int
    ) -> ir.Value:
        """A constant [N, columns] as DequantizeLinear takes it, transposed where codes are."""
        source = data.const_value
        if source is None:
            raise InvalidGraph("linear_nbit as DequantizeLinear: its operands must be constants")
        shape = [columns, self._rows] if self._joined else [self._rows, columns]

        def make() -> ir.TensorProtocol:
            values = numbers(torch.from_numpy(np.ascontiguousarray(source.numpy())))
            values = values.expand(self._rows, columns)  # a row's one scale is that of its blocks
            values = (values.t() if self._joined else values).contiguous()
            if dtype == ir.DataType.INT4:
                return ir.PackedTensor(_nibbles(values), dtype, shape=shape)
            return ir.tensor(values.numpy().astype(dtype.numpy()), dtype=dtype)

        name = f"{data.name}.{'columns' if self._joined else 'rows'}"
        return derived(self._tape, name, make, dtype, shape)

    def _codes(self, data: Tensor) -> Tensor:
        codes = unpack(data, self._bits, self._group, self._columns)
        return codes.to(torch.int16).sub_(1 << (self._bits - 1)).to(torch.int8)

    def _zeros(self, data: Tensor) -> Tensor:
        zeros = unpack_zeros(data, self._bits, n_groups(self._group, self._columns))
        return zeros.to(torch.int16).sub_(1 << (self._bits - 1)).to(torch.int8)


def _nibbles(codes: Tensor) -> np.ndarray[Any, Any]:
    """Signed codes, the earlier of two in the low nibble of a byte."""
    flat = codes.reshape(-1).view(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, len(flat) % 2)) & 15
    packed: np.ndarray[Any, Any] = (flat[0::2] | (flat[1::2] << 4)).numpy()
    return packed


def record_embedding(
    tape: Tape, operands: Sequence[ir.Value | None], attrs: Mapping[str, Any]
) -> ir.Value:
    """Rows ``ids`` of ``(codes - zeros) * scales``, see ``embedding_nbit``."""
    ids, codes, scales, zeros = (*operands, None)[:4]
    if codes is None or ids is None or scales is None:
        raise InvalidGraph("embedding_nbit needs codes, ids and scales")
    numbers = _apart(tape, tape.op("Gather", [codes, ids]), attrs)
    if zeros is None:
        middle: ir.Value = constant(tape, 1 << (attrs["bits"] - 1), np.float32)
    else:
        row = tape.op("Gather", [zeros, ids])
        row = _apart(tape, row, attrs) if attrs["bits"] < 8 else _float(tape, row)
        groups = attrs["width"] // attrs["group"]
        bounds = (constant(tape, [n]) for n in (0, groups, -1))
        middle = tape.op("Unsqueeze", [tape.op("Slice", [row, *bounds]), constant(tape, [-1])])
    factors = _float(tape, tape.op("Gather", [scales, ids]))
    factors = tape.op("Unsqueeze", [factors, constant(tape, [-1])])
    rows = tape.op("Mul", [tape.op("Sub", [numbers, middle]), factors])
    shape = [tape.op("Shape", [ids]), constant(tape, [attrs["width"]])]
    return tape.op("Reshape", [rows, tape.op("Concat", shape, {"axis": 0})], {"allowzero": 1})


def _apart(tape: Tape, data: ir.Value, attrs: Mapping[str, Any]) -> ir.Value:
    """Codes of 4 or 8 bits as floats, each on its own in the last dimension."""
    if attrs["bits"] == 8:
        return _float(tape, data)
    last = tape.op("Unsqueeze", [data, constant(tape, [-1])])
    low = tape.op("BitwiseAnd", [last, constant(tape, 15, np.uint8)])
    high = tape.op("BitShift", [last, constant(tape, 4, np.uint8)], {"direction": "RIGHT"})
    pairs = tape.op("Concat", [low, high], {"axis": -1})
    lead = tape.op("Shape", [data], {"start": 0, "end": -1})
    count = tape.op("Mul", [tape.op("Shape", [data], {"start": -1}), constant(tape, [2])])
    shape = tape.op("Concat", [lead, count], {"axis": 0})
    return _float(tape, tape.op("Reshape", [pairs, shape], {"allowzero": 1}))


def _float(tape: Tape, data: ir.Value) -> ir.Value:
    return cast(tape, data, ir.DataType.FLOAT)
