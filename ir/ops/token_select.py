"""``token_select``: the chosen tokens of each row, as one op.

The ONNX form is ``GatherND`` over whole rows: a stock runtime copies each in one piece, where
``GatherElements`` would look up every number by an index of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.types import Type
from .base import Sample, own_op

if TYPE_CHECKING:
    import onnx_ir
    from onnx_ir.tape import Tape


def token_select(x: Tensor, index: Tensor) -> Tensor:
    """``out[b, i] = x[b, index[b, i]]``.

    x [B, N, ...] of any dtype, index [B, K] i64 with 0 <= index < N; [B, K, ...].
    """
    rows = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    return x[rows, index]


def _infer(operands: Sequence[Any], attrs: Mapping[str, Any]) -> tuple[Type, ...]:
    x, index = operands
    if index.shape is not None and len(index.shape) != 2:
        raise ValueError(f"token_select: index is {index}, it must have two dimensions")
    if x.shape is None or index.shape is None:
        return (x.with_shape(None),)
    if len(x.shape) < 2:
        raise ValueError(f"token_select: x is {x}, it must have two dimensions or more")
    rows = [s[0] for s in (x.shape, index.shape)]
    if all(isinstance(r, int) for r in rows) and rows[0] != rows[1]:
        raise ValueError(f"token_select: x has {rows[0]} rows and index {rows[1]}")
    return (x.with_shape((x.shape[0], index.shape[1], *x.shape[2:])),)


def _record(
    tape: Tape, operands: Sequence[onnx_ir.Value | None], attrs: Mapping[str, Any]
) -> onnx_ir.Value:
    from .emit import constant

    x, index = operands
    last = constant(tape, [-1])
    return tape.op("GatherND", [x, tape.op("Unsqueeze", [index, last])], {"batch_dims": 1})


def _samples() -> list[Sample]:
    rng = torch.Generator().manual_seed(0)
    cases = []
    for shape, count in (((2, 7, 5), 3), ((1, 1, 1), 1), ((3, 123, 8), 31), ((2, 9), 9)):
        x = torch.randn(shape, generator=rng)
        index = torch.stack(
            [torch.randperm(shape[1], generator=rng)[:count].sort().values for _ in range(shape[0])]
        )
        cases.append(Sample((x, index), {}, f"{'x'.join(map(str, shape))} keep {count}"))
    return cases


TOKEN_SELECT = own_op(
    token_select, infer=_infer, record=_record, samples=_samples, picks=True
)
