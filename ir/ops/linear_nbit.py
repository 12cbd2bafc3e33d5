"""``linear_nbit``: a linear whose weight is stored in 2, 3, 4 or 8 bits (layout: ``pack``).

The ONNX form is ``com.microsoft::MatMulNBits``, whatever the width. Measured with ONNX Runtime 1.31
on one AVX-512 core, N x K = 1536 x 384 and 384 x 1536 alike, group 32, in ms for 1 / 16 / 128 rows
(dense float32 MatMul: 0.037 / 0.17 / 1.33):

* 4 bits, no or integer zero points: 0.048 / 0.26 / 1.42, with graph optimisation on and off.
* 4 bits, float zero points as operand: right, but 0.94 / 1.13 / 5.3; and for 8 bits refused at run
  time. With the default zero point and the correction ``groupsum(x) @ C``, C = (mid - zero) * scale
  in [groups, N]: 0.051 / 0.27 / 1.50. So real zero points take the correction.
* 8 bits: 0.80 / 1.0 / 2.5. ``accuracy_level=4``: 0.018 / 0.14 / 1.1, and 0.018 / 0.16 / 1.2 for 4
  bits; it rounds the activations to 8 bits and moves the result by 5.4e-3 (relative L2), which the
  reference follows to 3e-7. Scales and zero points must then be initializers: see ``written``.
* 2 bits: MatMulNBits of 2 bits takes 1.08 / 1.27 / 2.5 to 6.5, and it has no 3 bits. So codes of
  2 and 3 bits stay packed in the file and are widened to nibbles in the graph, with bitwise ops,
  which the runtime folds when it loads: then 0.048 / 0.26 / 1.41, at 4 bits of memory a weight.
  With optimisation off the widening runs at each call (3.4 ms).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ..core.errors import InvalidGraph
from ..core.types import Type
from ..vocab.linear import linear_macs
from ..vocab.onnx import MICROSOFT
from ..vocab.spec import Attrs, Macs
from .base import Sample, own_op
from .emit import cast, constant, derived
from .pack import block_of, check_format, dequantize, n_blocks, n_groups, pack, pack_zeros
from .pack import zero_bytes as row_zero_bytes

if TYPE_CHECKING:
    from onnx_ir.tape import Tape


def linear_nbit(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    group: int,
    in_features: int,
    out_features: int,
    accuracy_level: int = 0,
) -> Tensor:
    """``x @ ((codes - zeros) * scales).T + bias``, summed in float32, in the dtype of ``x``.

    x [..., K]; codes uint8 [N, blocks, bytes]; scales float [N, groups]; zeros absent (all are
    2^(bits-1)), uint8 [N, zero bytes] or float [N, groups]; bias [N]. ``accuracy_level`` is
    MatMulNBits' attribute: 0 computes in the dtype of ``x``; 4 rounds ``x`` to 8 bits in each
    stored block first (``rounded``), but for what real zero points add.
    """
    form = {"bits": bits, "group": group, "in_features": in_features}
    weight = dequantize(codes, scales, zeros, **form)
    wide_bias = None if bias is None else bias.float()
    wide = x.float()
    if accuracy_level != 4:
        return torch.nn.functional.linear(wide, weight, wide_bias).to(x.dtype)
    whole = zeros if zeros is None or not zeros.is_floating_point() else None
    coded = weight if whole is zeros else dequantize(codes, scales, whole, **form)
    y = torch.nn.functional.linear(rounded(wide, block_of(group, in_features)), coded, wide_bias)
    if zeros is not whole:
        y = y + torch.nn.functional.linear(wide, weight - coded)
    return y.to(x.dtype)


def rounded(x: Tensor, block: int) -> Tensor:
    """``x`` [..., K] as signed 8-bit codes times ``max |x| / 127`` of each block of columns.

    ONNX Runtime 1.31 does the same on the CPU: with it ``accuracy_level=4`` agrees to 3e-7.
    """
    columns = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -columns % block))
    blocks = padded.reshape(*x.shape[:-1], padded.shape[-1] // block, block)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.round(blocks / torch.where(scale > 0, scale, 1.0))
    return (codes * scale).reshape(padded.shape)[..., :columns]


def _dense(columns: int, operands: Sequence[Tensor | None], attrs: Attrs) -> Tensor:
    codes, scales, zeros = operands[:3]
    assert codes is not None and scales is not None
    form = {name: attrs[name] for name in ("bits", "group", "in_features")}
    return dequantize(codes, scales, zeros, **form)


def _form(attrs: Attrs) -> str:
    return f"{attrs['bits']} bits, " + (f"group {attrs['group']}" if attrs["group"] else "rows")


def operand_types(
    in_features: int,
    out_features: int,
    *,
    bits: int,
    group: int,
    zeros: Literal["none", "integer", "real"] = "none",
    scale_dtype: torch.dtype = torch.float16,
) -> tuple[Type, Type, Type | None]:
    """Types of codes, scales and zeros of a linear in this format.

    Raises ``BadInput`` where the format has no storage form.
    """
    check_format(bits, group)
    groups = n_groups(group, in_features)
    row = (n_blocks(group, in_features), block_of(group, in_features) * bits // 8)
    scales = Type(scale_dtype, (out_features, groups))
    integer = Type(torch.uint8, (out_features, row_zero_bytes(bits, groups)))
    zero = {"none": None, "integer": integer, "real": scales}[zeros]
    return Type(torch.uint8, (out_features, *row)), scales, zero


def _infer(operands: Sequence[Any], attrs: Mapping[str, Any]) -> tuple[Type, ...]:
    x, codes, scales, zeros, bias = (*operands, None, None)[:5]
    fan_in, fan_out = attrs["in_features"], attrs["out_features"]
    real = zeros is not None and zeros.dtype != torch.uint8
    expected = operand_types(
        fan_in, fan_out, bits=attrs["bits"], group=attrs["group"],
        zeros="none" if zeros is None else "real" if real else "integer",
        scale_dtype=scales.dtype,
    )  # fmt: skip
    given = dict(zip(("codes", "scales", "zeros"), (codes, scales, zeros), strict=True))
    for (name, got), want in zip(given.items(), expected, strict=True):
        if got is not None and want is not None:
            _same("shape of " + name, got.shape, want.shape)
            _same("dtype of " + name, got.dtype, want.dtype)
    if bias is not None:
        _same("shape of bias", bias.shape, (fan_out,))
    if x.shape is None:
        return (x,)
    if isinstance(x.shape[-1], int):
        _same("last dimension of x", x.shape[-1], fan_in)
    return (x.with_shape((*x.shape[:-1], fan_out)),)


def _same(what: str, got: Any, want: Any) -> None:
    if got is not None and got != want:
        raise ValueError(f"linear_nbit: {what} is {got}, expected {want}")


def _record(tape: Tape, operands: Sequence[ir.Value | None], attrs: Mapping[str, Any]) -> ir.Value:
    x, codes, scales, zeros, bias = (*operands, None, None)[:5]
    if x is None or codes is None or scales is None or x.dtype is None:
        raise InvalidGraph("linear_nbit needs x with a known dtype, codes and scales")
    form = Form(tape, attrs)
    # The CPU provider has no bfloat16 kernels, so those graphs compute in float32.
    work = x.dtype if x.dtype == ir.DataType.FLOAT16 else ir.DataType.FLOAT
    inner = cast(tape, x, work)
    real = zeros if zeros is not None and zeros.dtype != ir.DataType.UINT8 else None
    wide = scales if form.level and real is None else cast(tape, scales, work)
    integer = None if real is not None else zeros
    y = tape.op(
        "MatMulNBits",
        _trimmed([
            inner, form.codes(codes),
            form.written(scales, work, form.blocks) if form.level else form.scales(wide),
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

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return cast(self.tape, value, dtype)

    def attributes(self) -> dict[str, int]:
        width = 8 if self.bits == 8 else 4
        sizes = {"K": self.fan_in, "N": self.fan_out, "bits": width, "block_size": self.block}
        return {**sizes, "accuracy_level": self.level} if self.level else sizes

    def codes(self, codes: ir.Value) -> ir.Value:
        if self.bits in (4, 8):
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

    def _field(self, data: ir.Value, mask: int, left: int) -> ir.Value:
        field = self.tape.op("BitwiseAnd", [data, constant(self.tape, mask, np.uint8)])
        shift = [field, constant(self.tape, left, np.uint8)]
        return self.tape.op("BitShift", shift, {"direction": "LEFT"}) if left else field

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
        columns = row_zero_bytes(self.bits, self.blocks)
        if zeros is None:
            middle = (1 << (self.bits - 1)) * 0x11
            narrow = self.bits in (2, 3)
            return (
                self._expanded(constant(self.tape, [[middle]], np.uint8), columns)
                if narrow
                else None
            )
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
        source, narrow = zeros.const_value, self.bits < 8
        if source is None:
            raise InvalidGraph("linear_nbit: with accuracy_level=4 the zeros must be constants")
        shape = [self.fan_out, columns]

        def make() -> ir.TensorProtocol:
            one = source.numpy()
            one = one | (one << 4) if narrow else one
            return ir.tensor(np.ascontiguousarray(np.broadcast_to(one, shape)))

        return derived(self.tape, f"{zeros.name}.written", make, ir.DataType.UINT8, shape)

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


def _samples() -> list[Sample]:
    cases: list[tuple[Any, ...]] = [
        # bits, group, K, N, zeros, scale dtype, x dtype, leading shape, bias, accuracy level
        (4, 32, 64, 24, "none", torch.float32, torch.float32, (5,), False),
        (4, 16, 45, 7, "integer", torch.float16, torch.float32, (2, 3), True),
        (4, 32, 123, 5, "real", torch.float16, torch.float32, (1, 5), True),
        (4, 0, 123, 5, "none", torch.float16, torch.float32, (5,), False),
        (4, 0, 384, 3, "integer", torch.float32, torch.float32, (1, 1), False),
        (4, 0, 48, 6, "real", torch.float32, torch.float32, (3,), True),
        (4, 16, 1, 1, "none", torch.float32, torch.float32, (1,), False),
        (8, 64, 128, 9, "none", torch.float16, torch.float32, (5,), True),
        (8, 32, 45, 4, "integer", torch.float32, torch.float32, (2, 1), False),
        (8, 0, 96, 4, "integer", torch.float32, torch.float32, (5,), False),
        (8, 16, 33, 4, "real", torch.float32, torch.float32, (5,), False),
        (2, 16, 123, 5, "none", torch.float32, torch.float32, (5,), False),
        (2, 32, 64, 8, "real", torch.float32, torch.float32, (1, 2), True),
        (2, 0, 45, 3, "integer", torch.float32, torch.float32, (5,), False),
        (3, 32, 123, 5, "none", torch.float32, torch.float32, (5,), False),
        (3, 16, 80, 8, "integer", torch.float32, torch.float32, (1, 3), True),
        (3, 0, 45, 3, "real", torch.float16, torch.float32, (5,), False),
        (4, 32, 64, 16, "integer", torch.float16, torch.float16, (5,), True),
        (4, 32, 45, 16, "real", torch.float32, torch.bfloat16, (5,), True),
        (4, 32, 123, 24, "none", torch.float16, torch.float32, (2, 5), True, 4),
        (4, 16, 64, 24, "real", torch.float16, torch.float32, (5,), True, 4),
        (4, 0, 123, 24, "integer", torch.float32, torch.float32, (5,), False, 4),
        (8, 64, 128, 24, "none", torch.float16, torch.float32, (1, 5), True, 4),
        (8, 32, 45, 7, "integer", torch.float32, torch.float32, (5,), False, 4),
        (4, 0, 384, 3, "integer", torch.float16, torch.float32, (1, 1), False, 4),
        (8, 0, 96, 4, "integer", torch.float32, torch.float32, (5,), False, 4),
    ]
    return [_sample(seed, *case) for seed, case in enumerate(cases)]


def _sample(
    seed: int, bits: int, group: int, fan_in: int, fan_out: int, kind: str,
    scale_dtype: torch.dtype, dtype: torch.dtype, lead: tuple[int, ...], bias: bool, level: int = 0,
) -> Sample:  # fmt: skip
    rng = torch.Generator().manual_seed(seed)
    groups = n_groups(group, fan_in)
    codes = torch.randint(0, 1 << bits, (fan_out, fan_in), generator=rng, dtype=torch.uint8)
    scales = (torch.rand(fan_out, groups, generator=rng) * 0.05 + 0.01).to(scale_dtype)
    scales *= torch.randint(0, 2, scales.shape, generator=rng) * 2 - 1
    zeros = None
    if kind == "integer":
        drawn = torch.randint(0, 1 << bits, (fan_out, groups), generator=rng, dtype=torch.uint8)
        zeros = pack_zeros(drawn, bits)
    if kind == "real":
        zeros = (torch.rand(fan_out, groups, generator=rng) * (1 << bits)).to(scale_dtype)
    return Sample(
        (
            torch.randn(*lead, fan_in, generator=rng).to(dtype),
            pack(codes, bits, group),
            scales,
            zeros,
            torch.randn(fan_out, generator=rng).to(dtype) if bias else None,
        ),
        {
            "bits": bits, "group": group, "in_features": fan_in, "out_features": fan_out,
            "accuracy_level": level,
        },
        f"{bits}bit-g{group}-{fan_out}x{fan_in}-{kind}-{str(dtype).removeprefix('torch.')}-l{level}",
    )


LINEAR_NBIT = own_op(
    linear_nbit, infer=_infer, record=_record, samples=_samples,
    heavy=True, macs=Macs(linear_macs), dense=_dense, stored_linear=_form,
)  # fmt: skip
