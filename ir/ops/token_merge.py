"""``token_merge``: tokens of each row put together, as weighted means or sums.

The ONNX form is ``ScatterElements`` with ``add``, twice: exporters write a mean of scattered
numbers without its reduction, so sums and counts are taken apart here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..core.types import Type
from .base import Sample, own_op
from .emit import cast, constant

if TYPE_CHECKING:
    import onnx_ir
    from onnx_ir.tape import Tape

_LEAST = 1e-12
"""Weight by which an empty group is divided: its row is then 0."""


def token_merge(
    x: Tensor, into: Tensor, weight: Tensor | None = None, *, count: int, mean: bool = True
) -> Tensor:
    """``out[b, j] = Σ w[b, i] x[b, i] / Σ w[b, i]`` over all i with ``into[b, i] = j``.

    x [B, N, D], into [B, N] i64 with 0 <= into < count, weight [B, N] (all 1 if absent); out
    [B, count, D]. Without ``mean`` it is the sum alone. A row that no token goes into is 0.
    """
    wide = x.float()
    weights = torch.ones(x.shape[:2], device=x.device) if weight is None else weight.float()
    places = into.unsqueeze(2)
    zeros = wide.new_zeros(x.shape[0], count, x.shape[2])
    total = zeros.scatter_add(1, places.expand_as(wide), wide * weights.unsqueeze(2))
    if mean:
        counted = zeros[..., :1].scatter_add(1, places, weights.unsqueeze(2))
        total = total / counted.clamp(min=_LEAST)
    return total.to(x.dtype)


def _infer(operands: Sequence[Any], attrs: Mapping[str, Any]) -> tuple[Type, ...]:
    x, into = operands[:2]
    for name, operand, rank in (("x", x, 3), ("into", into, 2)):
        if operand.shape is not None and len(operand.shape) != rank:
            raise ValueError(f"token_merge: {name} is {operand}, it must have {rank} dimensions")
    if x.shape is None:
        return (x,)
    shapes: list[tuple[Any, ...]] = [x.shape, into.shape or ()]
    sizes = [s[1] for s in shapes if len(s) > 1 and isinstance(s[1], int)]
    if len(set(sizes)) > 1:
        raise ValueError(f"token_merge: x has {sizes[0]} tokens and into {sizes[1]}")
    return (x.with_shape((x.shape[0], attrs["count"], x.shape[2])),)


def _record(
    tape: Tape, operands: Sequence[onnx_ir.Value | None], attrs: Mapping[str, Any]
) -> onnx_ir.Value:
    import onnx_ir as ir

    x, into, *weights = operands
    weight = weights[0] if weights else None
    assert x is not None and into is not None and x.dtype is not None
    last = constant(tape, [-1])
    wide = cast(tape, x, ir.DataType.FLOAT)
    places = tape.op("Unsqueeze", [into, last])
    if weight is not None:
        weight = tape.op("Unsqueeze", [cast(tape, weight, ir.DataType.FLOAT), last])
        wide = tape.op("Mul", [wide, weight])
    total = _sums(tape, wide, places, attrs["count"])
    if attrs["mean"]:
        if weight is None:
            one = tape.op("Constant", [], {"value": ir.tensor(np.ones(1, np.float32))})
            weight = tape.op("Expand", [one, tape.op("Shape", [places])])
        counted = _sums(tape, weight, places, attrs["count"])
        counted = tape.op("Max", [counted, constant(tape, _LEAST, np.float32)])
        total = tape.op("Div", [total, counted])
    total.dtype = ir.DataType.FLOAT
    return cast(tape, total, x.dtype)


def _sums(
    tape: Tape, tokens: onnx_ir.Value, places: onnx_ir.Value, count: int
) -> onnx_ir.Value:
    """``tokens [B, N, D]`` added up by ``places [B, N, 1]``: ``[B, count, D]``."""
    shape = tape.op("Shape", [tokens])
    ends = [tape.op("Gather", [shape, constant(tape, [axis])]) for axis in (0, 2)]
    target = tape.op("Concat", [ends[0], constant(tape, [count]), ends[1]], {"axis": 0})
    zeros = tape.op("Expand", [constant(tape, 0, np.float32), target])
    spread = tape.op("Expand", [places, shape])
    return tape.op("ScatterElements", [zeros, spread, tokens], {"axis": 1, "reduction": "add"})


def _samples() -> list[Sample]:
    rng = torch.Generator().manual_seed(0)
    cases = []
    for shape, count in (((2, 7, 5), 3), ((1, 1, 1), 1), ((3, 123, 8), 31)):
        x = torch.randn(shape, generator=rng)
        into = torch.randint(0, count, shape[:2], generator=rng)
        into[0, 0] = count - 1
        weight = torch.randint(1, 5, shape[:2], generator=rng).float()
        label = f"{'x'.join(map(str, shape))} into {count}"
        cases.append(Sample((x, into, weight), {"count": count}, label))
        cases.append(Sample((x, into, None), {"count": count + 1}, f"{label}, one of them empty"))
        cases.append(Sample((x, into, None), {"count": count, "mean": False}, f"{label}, summed"))
    return cases


TOKEN_MERGE = own_op(token_merge, infer=_infer, record=_record, samples=_samples)
