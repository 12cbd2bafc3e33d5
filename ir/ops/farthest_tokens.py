"""``farthest_tokens``: of each row the tokens that lie farthest from each other, greedily.

The ONNX form is its steps one after another, three stock nodes each: there is no loop in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import InvalidGraph
from ..core.types import Type
from .base import TOLERANCES, Sample, own_op
from .emit import cast, constant

if TYPE_CHECKING:
    import onnx_ir
    from onnx_ir.tape import Tape

_TAKEN = -1.0
"""A token's distance to itself: below every other, so that none is taken twice."""


def farthest_tokens(x: Tensor, *, count: int) -> Tensor:
    """``t[b, i] = argmax_j min_{s < i} x[b, t[b, s], j]``, the places in the order of choice.

    x [B, N, N] holds distances, symmetric and not below 0; what stands on the diagonal is not read.
    The first is the token whose nearest other is farthest. [B, count] i64, count <= N. Greedy
    max-min diversity: DivPrune (Alvar et al. 2025, arXiv 2503.02175).
    """
    tokens = x.shape[1]
    itself = torch.eye(tokens, dtype=torch.bool, device=x.device)
    distance = x.float().masked_fill(itself, _TAKEN)
    least = min(2, tokens)
    reached = distance.topk(least, dim=2, largest=False).values[:, None, :, -1]
    places: list[Tensor] = []
    for _ in range(count):
        place = reached.argmax(dim=2)
        row = distance.gather(1, place.unsqueeze(2).expand(-1, 1, tokens))
        reached = row if not places else torch.minimum(reached, row)
        places.append(place)
    return torch.cat(places, dim=1)


def _infer(operands: Sequence[Any], attrs: Mapping[str, Any]) -> tuple[Type, ...]:
    (x,) = operands
    if x.shape is None:
        return (Type(torch.int64, None),)
    if len(x.shape) != 3 or x.shape[1] != x.shape[2]:
        raise ValueError(f"farthest_tokens: x is {x}, [rows, tokens, tokens] is needed")
    if isinstance(x.shape[1], int) and not 0 < attrs["count"] <= x.shape[1]:
        raise ValueError(f"farthest_tokens: count={attrs['count']} of {x.shape[1]} tokens")
    return (Type(torch.int64, (x.shape[0], attrs["count"])),)


def _record(
    tape: Tape, operands: Sequence[onnx_ir.Value | None], attrs: Mapping[str, Any]
) -> onnx_ir.Value:
    import onnx_ir as ir

    (x,) = operands
    tokens = x.shape[1] if x is not None and x.shape is not None else None
    if x is None or not isinstance(tokens, int):
        raise InvalidGraph("farthest_tokens needs a number of tokens that is known")
    every = np.arange(tokens)
    same = tape.op("Equal", [constant(tape, every[:, None]), constant(tape, every[None])])
    distance = tape.op(
        "Where", [same, constant(tape, _TAKEN, np.float32), cast(tape, x, ir.DataType.FLOAT)]
    )
    least = min(2, tokens)
    nearest, _ = tape.op_multi_out(
        "TopK", [distance, constant(tape, [least])], {"axis": 2, "largest": 0}, num_outputs=2
    )
    reached = tape.op("Slice", [nearest, *(constant(tape, [n]) for n in (least - 1, least, 2))])
    reached = tape.op("Transpose", [reached], {"perm": [0, 2, 1]})
    places: list[ir.Value] = []
    for _ in range(attrs["count"]):
        place = tape.op("ArgMax", [reached], {"axis": 2})
        row = tape.op("GatherND", [distance, place], {"batch_dims": 1})
        reached = tape.op("Min", [reached, row]) if places else row
        places.append(place)
    joined = tape.op("Concat", places, {"axis": 1})
    return tape.op("Squeeze", [joined, constant(tape, [2])])


def _samples() -> list[Sample]:
    rng = torch.Generator().manual_seed(0)
    cases = []
    for rows, tokens, count in ((2, 7, 3), (1, 1, 1), (3, 41, 41)):
        points = torch.randn(rows, tokens, 4, generator=rng)
        distance = torch.cdist(points, points)
        cases.append(Sample((distance,), {"count": count}, f"{rows}x{tokens} keep {count}"))
    alike = torch.zeros(1, 5, 5)
    cases.append(Sample((alike,), {"count": 5}, "all alike"))
    return cases


FARTHEST_TOKENS = own_op(
    farthest_tokens, infer=_infer, record=_record, samples=_samples,
    tolerances={**TOLERANCES, torch.int64: 0.0},
)  # fmt: skip
