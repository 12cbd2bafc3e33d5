"""``linear_nbit`` for ONNX Runtime.

The form is ``com.microsoft::MatMulNBits``, whatever the width. Measured with ONNX Runtime 1.31
on one AVX-512 core, N x K = 1536 x 384 and 384 x 1536 alike, group 32, in ms for 1 / 16 / 128 rows
(dense float32 MatMul: 0.037 / 0.17 / 1.33):

* 4 bits, no or integer zero points: 0.048 / 0.26 / 1.42, with graph optimisation on and off.
* 4 bits, float zero points as operand: right, but 0.94 / 1.13 / 5.3; and for 8 bits refused at run
  time. With the default zero point and the correction ``groupsum(x) @ C``, C = (mid - zero) * scale
  in [groups, N]: 0.051 / 0.27 / 1.50. So real zero points take the correction.
* 8 bits: 0.80 / 1.0 / 2.5. ``accuracy_level=4``: 0.018 / 0.14 / 1.1, and 0.018 / 0.16 / 1.2 for 4
  bits; it rounds the activations to 8 bits and moves the result by 5.4e-3 (relative L2), which the
  reference follows to 3e-7. Scales and zero points must then be initializers: see ``written``.
* 2 bits: MatMulNBits of 2 bits takes 1.08 / 1.27 / 2.5 to 6.5 at level 0, and it has no 3 bits. So
  codes of 2 and 3 bits stay packed in the file and are widened to nibbles in the graph, with
  bitwise ops, which the runtime folds when it loads: then 0.048 / 0.26 / 1.41, at 4 bits of memory
  a weight. With optimisation off the widening runs at each call (3.4 ms).
* 2 bits, ``accuracy_level=4``: as they are. For 2048 x 4096, in ms for 1 / 32 rows: 0.076 / 1.9 in
  groups of 64, 0.053 / 1.3 of 128, but 0.14 / 11.8 of 32 (4 bits: 0.081 / 1.9 of 32).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..core.errors import InvalidGraph
from ..vocab.onnx import MICROSOFT
from .emit import cast, constant, derived
from .pack import block_of, n_blocks, n_groups
from .pack import zero_bytes as row_zero_bytes

if TYPE_CHECKING:
    from onnx_ir.tape import Tape


HALF_FORM = "matmul-nbits-half"


def record(tape: Tape, operands: Sequence[ir.Value | None], attrs: Mapping[str, Any]) -> ir.Value:
    """In float16 and float32. The CPU provider has no bfloat16 kernels: there in float32."""
    return _recorded(tape, operands, attrs, frozenset({ir.DataType.FLOAT16}))


def record_half(
    tape: Tape, operands: Sequence[ir.Value | None], attrs: Mapping[str, Any]
) -> ir.Value:
    """For the CUDA provider, in the dtype of ``x``. Scales are stored in it: bfloat16's are rounded
    to 8 bits of mantissa when they are written, so that every runtime computes with the same."""
    return _recorded(tape, operands, attrs, frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16}))


def _recorded(
    tape: Tape, operands: Sequence[ir.Value | None], attrs: Mapping[str, Any],
    dtypes: frozenset[ir.DataType],
) -> ir.Value:  # fmt: skip
    x, codes, scales, zeros, bias = (*operands, None, None)[:5]
    if x is None or codes is None or scales is None or x.dtype is None:
        raise InvalidGraph("linear_nbit needs x with a known dtype, codes and scales")
    form = Form(tape, attrs)
    real = zeros if zeros is not None and zeros.dtype != ir.DataType.UINT8 else None
    # A real zero point is the small difference of large numbers: not for 8 bits of mantissa.
    coarse = real is not None and x.dtype == ir.DataType.BFLOAT16
    work = x.dtype if x.dtype in dtypes and not coarse else ir.DataType.FLOAT
    inner = cast(tape, x, work)
    if work == ir.DataType.BFLOAT16 and scales.const_value is not None:
        scales = form.written(scales, work, form.blocks if not form.replicated else 1)
    written = form.written(scales, work, form.blocks) if form.level else None
    if written is not None and (real is None or not form.replicated):
        wide = written  # the same numbers: the stored ones need not be in the file beside them
    else:
        wide = cast(tape, scales, work)
    integer = None if real is not None else zeros
    y = tape.op(
        "MatMulNBits",
        _trimmed([
            inner, form.codes(codes),
            form.scales(wide) if written is None else written,
            form.zeros(integer),
        ]),
        form.attributes(),
        domain=MICROSOFT,
        version=1,
    )
    if real is not None:
        y = tape.op("Add", [y, form.correction(inner, wide, cast(tape, real, work))])
    if bias is not None:
        y = tape.op("Add", [y, cast(tape, bias, work)])
    return cast(tape, y, x.dtype) if work != x.dtype else y


def _trimmed(inputs: list[ir.Value | None]) -> list[ir.Value | None]:
    return inputs if inputs[-1] is not None else inputs[:-1]


class Form:
    """The operands of MatMulNBits, from the stored ones; ``canonical.nbit`` reads them back."""

    def __init__(self, tape: Tape, attrs: Mapping[str, Any]) -> None:
        self.tape = tape
        self.bits: int = attrs["bits"]
        self.fan_in: int = attrs["in_features"]
        self.fan_out: int = attrs["out_features"]
        self.level: int = attrs.get("accuracy_level", 0)
        self.block = block_of(attrs["group"], self.fan_in)
        self.blocks = n_blocks(attrs["group"], self.fan_in)
        self.replicated = n_groups(attrs["group"], self.fan_in) != self.blocks
        self.widened = self.bits == 3 or (self.bits == 2 and not self.level)
        """Whether codes are stored in fewer bits than the node takes."""

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return cast(self.tape, value, dtype)

    def attributes(self) -> dict[str, int]:
        width = 4 if self.widened else self.bits
        sizes = {"K": self.fan_in, "N": self.fan_out, "bits": width, "block_size": self.block}
        return {**sizes, "accuracy_level": self.level} if self.level else sizes

    def codes(self, codes: ir.Value) -> ir.Value:
        if not self.widened:
            return codes
        tape = self.tape
        low = codes if self.bits == 2 else self._bytes(codes, 0, self.block // 4)
        pairs = self._shifted(low, [0, 4])
        nibbles = tape.op("BitwiseOr", [self._field(pairs, 0b11, 0), self._field(pairs, 0b1100, 2)])
        nibbles = self._joined(nibbles)
        if self.bits == 2:
            return nibbles
        high = self._shifted(self._bytes(codes, self.block // 4, self.block * 3 // 8), [0, 2, 4, 6])
        top = tape.op("BitwiseOr", [self._field(high, 0b1, 2), self._field(high, 0b10, 5)])
        return tape.op("BitwiseOr", [nibbles, self._joined(top)])

    def _bytes(self, codes: ir.Value, start: int, end: int) -> ir.Value:
        bounds = [constant(self.tape, [n]) for n in (start, end, 2)]
        return self.tape.op("Slice", [codes, *bounds])

    def _shifted(self, data: ir.Value, by: list[int]) -> ir.Value:
        column = self.tape.op("Unsqueeze", [data, constant(self.tape, [-1])])
        shifts = constant(self.tape, by, np.uint8)
        return self.tape.op("BitShift", [column, shifts], {"direction": "RIGHT"})

    def _field(self, data: ir.Value, mask: int, places: int) -> ir.Value:
        field = self.tape.op("BitwiseAnd", [data, constant(self.tape, mask, np.uint8)])
        shift = [field, constant(self.tape, places, np.uint8)]
        return self.tape.op("BitShift", shift, {"direction": "LEFT"}) if places else field

    def _joined(self, data: ir.Value) -> ir.Value:
        shape = constant(self.tape, [self.fan_out, self.blocks, self.block // 2])
        return self.tape.op("Reshape", [data, shape])

    def scales(self, scales: ir.Value) -> ir.Value:
        """One scale a block: a row's own scale is repeated in the graph, not in the file."""
        return self._expanded(scales, self.blocks) if self.replicated else scales

    def written(self, data: ir.Value, dtype: ir.DataType, columns: int) -> ir.Value:
        """``data`` [N, 1 or columns] in its final form, as an initializer of the artifact.

        With ``accuracy_level=4`` ONNX Runtime 1.31 packs scales and zero points when it loads;
        where a node computes them (a Cast, with optimisation off) it gives wrong results silently.
        """
        source, name = data.const_value, data.name
        if source is None:
            raise InvalidGraph("linear_nbit: with accuracy_level=4 the scales must be constants")
        shape = [self.fan_out, columns]
        if source.dtype == dtype and list(source.shape.numpy()) == shape:
            return data

        def make() -> ir.TensorProtocol:
            wide = source.numpy().astype(dtype.numpy())
            return ir.tensor(np.ascontiguousarray(np.broadcast_to(wide, shape)), dtype=dtype)

        return derived(self.tape, f"{name}.written", make, dtype, shape)

    def _expanded(self, data: ir.Value, columns: int) -> ir.Value:
        return self.tape.op("Expand", [data, constant(self.tape, [self.fan_out, columns])])

    def zeros(self, zeros: ir.Value | None) -> ir.Value | None:
        if zeros is None and not self.widened:
            return None
        if zeros is None:
            middle = constant(self.tape, [[(1 << (self.bits - 1)) * 0x11]], np.uint8)
            return self._expanded(middle, row_zero_bytes(self.bits, self.blocks))
        if self.bits == 2 and not self.widened:
            return self._written_zeros(zeros, -(-self.blocks // 4))
        columns = row_zero_bytes(self.bits, self.blocks)
        if not self.replicated:
            return zeros
        if self.level:
            return self._written_zeros(zeros, columns)
        if self.bits < 8:
            four = constant(self.tape, 4, np.uint8)
            high = self.tape.op("BitShift", [zeros, four], {"direction": "LEFT"})
            zeros = self.tape.op("BitwiseOr", [zeros, high])
        return self._expanded(zeros, columns)

    def _written_zeros(self, zeros: ir.Value, columns: int) -> ir.Value:
        source = zeros.const_value
        if source is None:
            raise InvalidGraph("linear_nbit: with accuracy_level=4 the zeros must be constants")
        shape = [self.fan_out, columns]

        def make() -> ir.TensorProtocol:
            one = source.numpy()
            if self.bits == 2:
                return ir.tensor(self._quarters(one))
            one = one | (one << 4) if self.bits < 8 else one
            return ir.tensor(np.ascontiguousarray(np.broadcast_to(one, shape)))

        return derived(self.tape, f"{zeros.name}.written", make, ir.DataType.UINT8, shape)

    def _quarters(self, nibbles: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Zero points stored two a byte as four a byte; a row's one for each of its blocks."""
        apart = np.stack((nibbles & 15, nibbles >> 4), -1).reshape(self.fan_out, -1)
        wide = np.zeros((self.fan_out, -(-self.blocks // 4) * 4), np.uint8)
        wide[:, : self.blocks] = apart[:, :1] if self.replicated else apart[:, : self.blocks]
        parts = wide.reshape(self.fan_out, -1, 4)
        packed: np.ndarray[Any, Any] = np.bitwise_or.reduce(
            parts << np.array([0, 2, 4, 6], np.uint8), -1
        )
        return packed

    def correction(self, x: ir.Value, scales: ir.Value, zeros: ir.Value) -> ir.Value:
        """``groupsum(x) @ ((mid - zeros) * scales).T`` [..., N]."""
        tape = self.tape
        work = scales.dtype or ir.DataType.FLOAT
        middle = constant(tape, 1 << (self.bits - 1), work.numpy())
        offset = tape.op("Mul", [tape.op("Sub", [middle, zeros]), scales])
        # By MatMul: ONNX Runtime 1.31's ReduceSum keeps the shape of a tensor without elements.
        x = x if self.replicated else self._grouped(x)
        width = self.fan_in if self.replicated else self.block
        sums = tape.op("MatMul", [x, constant(tape, [[1]] * width, work.numpy())])
        if not self.replicated:
            sums = tape.op("Squeeze", [sums, constant(tape, [-1])])
        return tape.op("MatMul", [sums, tape.op("Transpose", [offset], {"perm": [1, 0]})])

    def _grouped(self, x: ir.Value) -> ir.Value:
        tape, missing = self.tape, self.block * self.blocks - self.fan_in
        if missing:
            pads, axes = constant(tape, [0, missing]), constant(tape, [-1])
            x = tape.op("Pad", [x, pads, None, axes])
        lead = tape.op("Shape", [x], {"start": 0, "end": -1})
        shape = [lead, constant(tape, [self.blocks, self.block])]
        return tape.op("Reshape", [x, tape.op("Concat", shape, {"axis": 0})])
