"""``sdpa``: the vocabulary's attention as an op of ours, for the form that aten has no op for.

Attention without a soft cap stays ``aten.scaled_dot_product_attention`` in an FX graph. The ONNX
form is that of every attention: stock ops, which runtimes fuse where they can.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..core.errors import InvalidGraph
from ..vocab import infer
from ..vocab.reference import sdpa
from .base import OwnOp, Sample

if TYPE_CHECKING:
    import onnx_ir
    from onnx_ir.tape import Tape


def _onnx(
    tape: Tape, operands: Sequence[onnx_ir.Value | None], attrs: Mapping[str, Any]
) -> onnx_ir.Value:
    """matmul(softmax(c·tanh(q·(scale/c) kᵀ) + mask), v); a fully masked row gives 0."""
    import onnx_ir as ir

    q, k, v, mask = operands
    if q is None or q.dtype is None or q.shape is None or not isinstance(q.shape[-1], int):
        raise InvalidGraph("sdpa: the head dimension is not known")
    if attrs["gqa"] or attrs["causal"]:
        raise InvalidGraph("sdpa that is causal or repeats heads has no ONNX form")
    rank, dtype = len(q.shape), q.dtype

    def number(value: float) -> ir.Value:
        array = np.asarray(value, dtype.numpy())
        return tape.op("Constant", [], {"value": ir.tensor(array, dtype=dtype)})

    scale = 1 / math.sqrt(q.shape[-1]) if attrs["scale"] is None else attrs["scale"]
    cap = attrs["softcap"]
    swapped = tape.op("Transpose", [k], {"perm": [*range(rank - 2), rank - 1, rank - 2]})
    scaled = tape.op("Mul", [q, number(scale if cap is None else scale / cap)])
    logits = tape.op("MatMul", [scaled, swapped])
    if cap is not None:
        logits = tape.op("Mul", [tape.op("Tanh", [logits]), number(cap)])
    if mask is None:
        return tape.op("MatMul", [tape.op("Softmax", [logits], {"axis": rank - 1}), v])
    if mask.dtype == ir.DataType.BOOL:
        mask = tape.op("Where", [mask, number(0.0), number(-math.inf)])
    weights = tape.op("Softmax", [tape.op("Add", [logits, mask])], {"axis": rank - 1})
    empty = tape.op("IsNaN", [weights])
    return tape.op("MatMul", [tape.op("Where", [empty, number(0.0), weights]), v])


def _samples() -> list[Sample]:
    rng = torch.Generator().manual_seed(0)
    cases = []
    for heads, tokens, keys, width in ((1, 1, 1, 2), (3, 5, 7, 12)):
        q, k, v = (torch.randn(2, heads, n, width, generator=rng) for n in (tokens, keys, keys))
        seen = torch.rand(2, 1, tokens, keys, generator=rng) > 0.3
        seen[0, 0, -1] = False
        lowest = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        for label, mask in (("free", None), ("bool", seen), ("added", lowest)):
            attrs = {"scale": 2.0, "softcap": 1.5}
            cases.append(Sample((q, k, v, mask), attrs, f"{label}-{tokens}x{keys}"))
        cases.append(Sample((q, k, v, seen), {}, f"uncapped-{tokens}x{keys}"))
    return cases


SDPA = OwnOp(reference=sdpa, infer=infer.sdpa, onnx=_onnx, samples=_samples)
