"""``sdpa``: attention. Without a soft cap an FX graph has ATen's; for the other form it is an op of
ours.

The ONNX form is that of every attention: stock ops, which runtimes fuse where they can.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Graph, Node

from ..core.errors import InvalidGraph
from ..vocab import fx
from ..vocab.fx import AtenForm, aten
from ..vocab.rules import same_size
from ..vocab.spec import Attrs, Macs, Shape, Types
from .base import Sample, own_op
from .emit import constant

if TYPE_CHECKING:
    import onnx_ir
    from onnx_ir.tape import Tape


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    gqa: bool = False,
    softcap: float | None = None,
) -> Tensor:
    """``softmax(q kᵀ scale + mask) v`` on [..., tokens, head dim]; a fully masked row gives 0.

    ``mask`` is boolean (True attends) or added to the logits: of a row whose keys all have the
    lowest number of a half float, every key weighs the same. ``scale`` None means 1/√(head dim).
    With ``gqa`` each key/value head serves a run of query heads (arXiv 2305.13245). With
    ``softcap`` c the logits are ``c tanh(q kᵀ scale / c) + mask`` (Gemma 2, arXiv 2408.00118).
    """
    if gqa:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
        v = v.repeat_interleave(q.shape[-3] // v.shape[-3], -3)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    logits = torch.matmul(q, k.transpose(-1, -2)).float() * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if causal:
        rows = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device)
        logits = logits.masked_fill(~rows.tril(), -math.inf)
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, -math.inf)
    elif mask is not None:  # in the dtype of q, as models do: -65504 + 0.1 is -65504 in float16
        logits = (logits.to(q.dtype) + mask).float()
    weights = torch.softmax(logits, -1)
    weights = torch.where(torch.isnan(weights), torch.zeros_like(weights), weights)
    return torch.matmul(weights.to(v.dtype), v)


def _infer(operands: Sequence[Any], attrs: Attrs) -> Types:
    q, k, v = operands[:3]
    if q.shape is None or k.shape is None or v.shape is None:
        return (q,)
    same_size(q.shape[-1], k.shape[-1], "sdpa")
    same_size(k.shape[-2], v.shape[-2], "sdpa", "token")
    return (q.with_shape((*q.shape[:-1], v.shape[-1])),)


def _macs(operands: Sequence[Any], out: Shape) -> int:
    q, k = operands[:2]
    return int(math.prod(q[:-1]) * k[-2] * (q[-1] + out[-1]))


def _decode(node: Node) -> fx.Reading | None:
    if fx.argument(node, 4, "dropout_p", 0.0):
        return None
    attrs = {
        "scale": node.kwargs.get("scale"),
        "causal": bool(fx.argument(node, 5, "is_causal", False)),
        "gqa": bool(node.kwargs.get("enable_gqa", False)),
        "softcap": None,
    }
    return fx.strip((*node.args[:3], fx.argument(node, 3, "attn_mask"))), attrs


def _build(graph: Graph, operands: Sequence[Any], attrs: Attrs) -> Node:
    if attrs["softcap"] is not None:  # aten has no such attention
        return SDPA.call(graph, operands, attrs)
    q, k, v, mask = (*operands, None)[:4]
    kwargs: dict[str, Any] = {}
    if attrs["scale"] is not None:
        kwargs["scale"] = attrs["scale"]
    if attrs["gqa"]:
        kwargs["enable_gqa"] = True
    args = (q, k, v, mask, 0.0, attrs["causal"])
    return fx.call(graph, aten.scaled_dot_product_attention.default, args, kwargs)


def _record(
    tape: Tape, operands: Sequence[onnx_ir.Value | None], attrs: Mapping[str, Any]
) -> onnx_ir.Value:
    """matmul(softmax(c·tanh(q·(scale/c) kᵀ) + mask), v); a fully masked row gives 0."""
    import onnx_ir as ir

    q, k, v, mask = operands
    if q is None or q.dtype is None or q.shape is None or not isinstance(q.shape[-1], int):
        raise InvalidGraph("sdpa: the head dimension is not known")
    assert k is not None and v is not None
    if attrs["gqa"]:
        k, v = (_repeat_heads(tape, x, q) for x in (k, v))
    if attrs["causal"]:
        mask = _causal(tape, q, k, mask)
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


def _repeat_heads(tape: Tape, x: onnx_ir.Value, q: onnx_ir.Value) -> onnx_ir.Value:
    """Each head of ``[batch, heads, tokens, width]`` as often in a row as ``q`` needs it."""
    if q.shape is None or x.shape is None or len(x.shape) != 4:
        raise InvalidGraph("sdpa that repeats heads: only [batch, heads, tokens, width] is written")
    queries, heads = q.shape[1], x.shape[1]
    if not isinstance(queries, int) or not isinstance(heads, int):
        raise InvalidGraph("sdpa that repeats heads: their number is not known")
    apart = tape.op("Unsqueeze", [x, constant(tape, [2])])
    wide = tape.op("Expand", [apart, constant(tape, [1, 1, queries // heads, 1, 1])])
    sizes = [_size(tape, x, 0), constant(tape, [queries]), _size(tape, x, 2), _size(tape, x, 3)]
    target = tape.op("Concat", sizes, {"axis": 0})
    return tape.op("Reshape", [wide, target], {"allowzero": 1})


def _causal(
    tape: Tape, q: onnx_ir.Value, k: onnx_ir.Value, mask: onnx_ir.Value | None
) -> onnx_ir.Value:
    """A query sees the keys up to its own position, counted from the first of each."""
    import onnx_ir as ir

    square = tape.op("Concat", [_size(tape, q, -2), _size(tape, k, -2)], {"axis": 0})
    every = tape.op("Expand", [constant(tape, True, np.bool_), square])
    visible = tape.op("Trilu", [every], {"upper": 0})
    visible.dtype = ir.DataType.BOOL
    if mask is None:
        return visible
    if mask.dtype == ir.DataType.BOOL:
        both = tape.op("And", [visible, mask])
        both.dtype = ir.DataType.BOOL
        return both
    assert q.dtype is not None
    never = constant(tape, -math.inf, q.dtype.numpy())
    return tape.op("Where", [visible, mask, never])


def _size(tape: Tape, x: onnx_ir.Value, axis: int) -> onnx_ir.Value:
    """The size of a dimension as a vector of one."""
    end = {} if axis == -1 else {"end": axis + 1}
    return tape.op("Shape", [x], {"start": axis, **end})


def _samples() -> list[Sample]:
    rng = torch.Generator().manual_seed(0)
    cases = []
    for heads, tokens, keys, width in ((1, 1, 1, 2), (3, 5, 7, 12)):
        q, k, v = (torch.randn(2, heads, n, width, generator=rng) for n in (tokens, keys, keys))
        visible = torch.rand(2, 1, tokens, keys, generator=rng) > 0.3
        visible[0, 0, -1] = False
        lowest = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
        for label, mask in (("free", None), ("bool", visible), ("added", lowest)):
            attrs = {"scale": 2.0, "softcap": 1.5}
            cases.append(Sample((q, k, v, mask), attrs, f"{label}-{tokens}x{keys}"))
        cases.append(Sample((q, k, v, visible), {}, f"uncapped-{tokens}x{keys}"))
        cases.append(Sample((q, k, v, None), {"causal": True}, f"causal-{tokens}x{keys}"))
        cases.append(Sample((q, k, v, lowest), {"causal": True}, f"causal-added-{tokens}x{keys}"))
        if heads > 1:
            grouped = (q, k[:, :1].contiguous(), v[:, :1].contiguous(), visible)
            cases.append(Sample(grouped, {"gqa": True}, f"grouped-{tokens}x{keys}"))
    return cases


SDPA = own_op(
    sdpa, infer=_infer, record=_record, samples=_samples,
    heavy=True, macs=Macs(_macs, reads=2),
    aten=AtenForm(_build, (fx.sometimes(_decode, aten.scaled_dot_product_attention.default),)),
)  # fmt: skip
