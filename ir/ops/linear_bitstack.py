"""``linear_bitstack``: a linear whose weight is a sum of blocks of signs times low-rank magnitudes.

``W = sum_i G_i * (U_i V_i)``, G_i of +1 and -1 in one bit each. Operands are stacked, block by
block; any number of leading blocks is a weight, a coarser one the fewer they are.

In the ONNX form each block keeps its own initializers, joined by ``Concat``, so that a file can be
cut after any block (``load.bitstack_size``). Bytes become signs by a table, magnitudes by a batched
MatMul;
the runtime folds all of it into one dense matrix when it loads. Measured with ONNX Runtime 1.31 on
one AVX-512 core, 16 matrices of 512 x 512 in 8 blocks of rank 1, for 1 row: 0.3 ms a call (all 16),
0.44 s to load. While it folds it holds 19 bytes for each weight and block. With optimisation off
the matrices are made at each call: 70 ms (by shifting bits: 131 ms), and only one at a time is
held.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ..core.errors import InvalidGraph
from ..core.joined_weights import StackedWeight
from ..core.tensors import tensor_of, weight_of
from ..core.types import Type
from ..vocab.linear import linear_macs
from ..vocab.spec import Attrs, Macs
from .base import Sample, own_op
from .emit import cast, constant
from .stored_types import stored_linear_type

if TYPE_CHECKING:
    from onnx_ir.tape import Tape


def linear_bitstack(
    x: Tensor,
    signs: Tensor,
    factors: Tensor,
    bias: Tensor | None = None,
    *,
    in_features: int,
    out_features: int,
) -> Tensor:
    """``x @ W.T + bias`` in the dtype of ``x``, summed in float32; W as ``dense`` gives it.

    x [..., K]; signs uint8 [blocks, ceil(N K / 8)] (``pack_signs``); factors f16
    [blocks, rank, N + K], the columns of U before the rows of V; bias [N].
    """
    weight = dense(signs, factors, out_features)
    wide_bias = None if bias is None else bias.float()
    return torch.nn.functional.linear(x.float(), weight, wide_bias).to(x.dtype)


def dense(signs: Tensor, factors: Tensor, out_features: int) -> Tensor:
    """The matrix ``sum_i G_i * (U_i V_i)`` f32 [N, K] of stacked operands."""
    left, right = factors.float().tensor_split([out_features], -1)
    weight = factors.new_zeros((out_features, right.shape[-1]), dtype=torch.float32)
    for plane, u, v in zip(signs, left, right, strict=True):
        weight += (u.T @ v).mul_(unpack_signs(plane, *weight.shape))
    return weight


def _dense(columns: int, operands: Sequence[Tensor | None], attrs: Attrs) -> Tensor:
    signs, factors = operands[:2]
    assert signs is not None and factors is not None
    return dense(signs, factors, attrs["out_features"])


def pack_signs(positive: Tensor) -> Tensor:
    """Bools [N, K] (true for +1), row after row, eight a byte, the earliest highest, zeros last."""
    flat = positive.reshape(-1)
    bytes_ = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(torch.uint8)
    # Eight bytes of 0 or 1, the earliest lowest, meet in the highest byte of the product, the
    # earliest highest. No two of the 64 terms share a bit, so that nothing is carried.
    gathered = (bytes_.view(torch.int64) * (0x8040201008040201 - (1 << 64))) >> 56
    return gathered.to(torch.uint8)


def unpack_signs(signs: Tensor, rows: int, columns: int) -> Tensor:
    """+1 and -1 f32 [..., rows, columns] out of bytes [..., ceil(rows columns / 8)]."""
    bits = (torch.arange(256)[:, None] >> torch.arange(7, -1, -1)) & 1
    # The eight signs of a byte are looked up as one number.
    table = (bits * 2 - 1).to(torch.int8).view(torch.int64).flatten()
    planes = table.index_select(0, signs.flatten().int()).view(torch.int8)
    flat = planes.reshape(*signs.shape[:-1], -1)[..., : rows * columns].float()
    return flat.reshape(*signs.shape[:-1], rows, columns)


def operand_types(
    in_features: int, out_features: int, *, blocks: int, rank: int
) -> tuple[Type, Type]:
    """Types of signs and factors."""
    return (
        Type(torch.uint8, (blocks, -(-in_features * out_features // 8))),
        Type(torch.float16, (blocks, rank, out_features + in_features)),
    )


def _infer(operands: Sequence[Any], attrs: Mapping[str, Any]) -> tuple[Type, ...]:
    x, signs, factors, bias = (*operands, None)[:4]
    blocks = signs.shape[0] if signs.shape else None
    rank = factors.shape[1] if factors.rank == 3 else None
    stored: dict[str, tuple[Type | None, Type | None]] = {}
    if blocks is not None and rank is not None:
        types = operand_types(
            attrs["in_features"], attrs["out_features"], blocks=blocks, rank=rank
        )  # fmt: skip
        stored = {"signs": (signs, types[0]), "factors": (factors, types[1])}
    return stored_linear_type("linear_bitstack", x, stored, bias, attrs)


def _record(tape: Tape, operands: Sequence[ir.Value | None], attrs: Mapping[str, Any]) -> ir.Value:
    x, signs, factors, bias = (*operands, None)[:4]
    if x is None or signs is None or factors is None or x.dtype is None:
        raise InvalidGraph("linear_bitstack needs x with a known dtype, signs and factors")
    # In float32 for every dtype: the dense matrix is folded in it, and the provider's half types
    # go through it anyway.
    work = ir.DataType.FLOAT
    rows, columns = attrs["out_features"], attrs["in_features"]
    wide = cast(tape, _joined(tape, factors), work)
    ends = constant(tape, [rows, columns])
    left, right = tape.op_multi_out("Split", [wide, ends], {"axis": 2}, num_outputs=2)
    left = tape.op("Transpose", [left], {"perm": [0, 2, 1]})
    plane = _plane(tape, _joined(tape, signs), rows, columns)
    blocks = tape.op("Mul", [plane, tape.op("MatMul", [left, right])])
    weight = tape.op("ReduceSum", [blocks, constant(tape, [0])], {"keepdims": 0})
    turned = tape.op("Transpose", [weight], {"perm": [1, 0]})
    y = tape.op("MatMul", [cast(tape, x, work), turned])
    if bias is not None:
        y = tape.op("Add", [y, cast(tape, bias, work)])
    return cast(tape, y, x.dtype) if work != x.dtype else y


def _joined(tape: Tape, value: ir.Value) -> ir.Value:
    """The stacked operand, put together from the initializers of its blocks."""
    handle = None if value.const_value is None else weight_of(value.const_value)
    if not isinstance(handle, StackedWeight):
        return value
    parts = [
        tape.initializer(tensor_of(part, name), name)
        for part, name in zip(handle.parts, handle.names, strict=True)
    ]
    assert value.dtype is not None
    for part in parts:
        part.dtype = value.dtype
    return tape.op("Concat", parts, {"axis": 0})


def _plane(tape: Tape, signs: ir.Value, rows: int, columns: int) -> ir.Value:
    """+1 and -1 [blocks, rows, columns]: a byte picks a row of eight from a table."""
    bits = (np.arange(256)[:, None] >> np.arange(7, -1, -1)) & 1
    table = constant(tape, bits * 2 - 1, np.float32)
    indices = cast(tape, signs, ir.DataType.INT32)
    flat = tape.op("Gather", [table, indices], {"axis": 0})
    missing = -rows * columns % 8
    if missing:
        flat = tape.op("Reshape", [flat, constant(tape, [-1, rows * columns + missing])])
        ends = [constant(tape, [n]) for n in (0, rows * columns, 1)]
        flat = tape.op("Slice", [flat, *ends])
    return tape.op("Reshape", [flat, constant(tape, [-1, rows, columns])])


def _samples() -> list[Sample]:
    cases: list[tuple[Any, ...]] = [
        # N, K, blocks, rank, x dtype, leading shape, bias
        (24, 64, 3, 2, torch.float32, (5,), False),
        (7, 45, 1, 1, torch.float32, (2, 3), True),
        (1, 1, 2, 1, torch.float32, (1,), False),
        (5, 123, 4, 3, torch.float32, (1, 5), True),
        (123, 5, 2, 5, torch.float32, (1, 1), False),
        (9, 64, 3, 1, torch.float16, (5,), True),
        (16, 45, 2, 2, torch.bfloat16, (1, 5), True),
    ]
    return [_sample(seed, *case) for seed, case in enumerate(cases)]


def _sample(
    seed: int, fan_out: int, fan_in: int, blocks: int, rank: int, dtype: torch.dtype,
    lead: tuple[int, ...], bias: bool,
) -> Sample:  # fmt: skip
    rng = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 2, (blocks, fan_out, fan_in), generator=rng).bool()
    operands = (
        torch.randn(*lead, fan_in, generator=rng).to(dtype),
        torch.stack([pack_signs(plane) for plane in drawn]),
        torch.rand(blocks, rank, fan_out + fan_in, generator=rng).half(),
        torch.randn(fan_out, generator=rng).to(dtype) if bias else None,
    )
    label = f"{fan_out}x{fan_in}-{blocks}b-r{rank}-{str(dtype).removeprefix('torch.')}"
    return Sample(operands, {"in_features": fan_in, "out_features": fan_out}, label)


LINEAR_BITSTACK = own_op(
    linear_bitstack, infer=_infer, record=_record, samples=_samples,
    heavy=True, macs=Macs(linear_macs), dense=_dense, stored_linear=lambda attrs: "blocks of signs",
)  # fmt: skip
