"""``rope``: rotary position embedding in its half-split form, as one op.

The ONNX form is the plain arithmetic: a stock runtime fuses it where it can.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.errors import InvalidGraph
from ..core.types import Type
from .base import Sample, own_op
from .emit import constant

if TYPE_CHECKING:
    import onnx_ir
    from onnx_ir.tape import Tape


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x cos + [-x₂, x₁] sin`` with x = [x₁, x₂] halved along the last dimension (2104.09864).

    x [..., D] with D even; cos and sin broadcast to x.
    """
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def _infer(operands: Sequence[Any], attrs: Mapping[str, Any]) -> tuple[Type, ...]:
    x: Type = operands[0]
    if x.shape and isinstance(x.shape[-1], int) and x.shape[-1] % 2:
        raise ValueError(f"rope: the last dimension of x is {x.shape[-1]}, it must be even")
    return (x,)


def _record(
    tape: Tape, operands: Sequence[onnx_ir.Value | None], attrs: Mapping[str, Any]
) -> onnx_ir.Value:
    x, cos, sin = operands
    size = x.shape[-1] if x is not None and x.shape is not None else None
    if not isinstance(size, int):
        raise InvalidGraph("rope needs a last dimension of known size")
    # Slices, as exporters write them, so that the artifact is read back as this op.
    start, half, end, last = (constant(tape, [n]) for n in (0, size // 2, size, -1))
    low = tape.op("Slice", [x, start, half, last])
    high = tape.op("Slice", [x, half, end, last])
    rotated = tape.op("Concat", [tape.op("Neg", [high]), low], {"axis": -1})
    return tape.op("Add", [tape.op("Mul", [x, cos]), tape.op("Mul", [rotated, sin])])


def _samples() -> list[Sample]:
    rng = torch.Generator().manual_seed(0)
    cases = []
    for shape in ((1, 2, 5, 8), (3, 1, 1, 2)):
        tables = [torch.randn(shape[0], 1, *shape[2:], generator=rng) for _ in range(2)]
        x = torch.randn(shape, generator=rng)
        cases.append(Sample((x, *tables), {}, "x".join(map(str, shape))))
    return cases


ROPE = own_op(rope, infer=_infer, record=_record, samples=_samples)
