"""Ops that pass numbers on, as they are, cast, bounded or chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype, to_torch_dtype
from torch import Tensor
from torch.fx import Graph, Node

from ..core.types import DTYPE_NAMES, Type, broadcast
from . import fx, onnx
from .fx import AtenForm, aten
from .onnx import OnnxForm
from .rules import promote, same, tensors
from .spec import REQUIRED, Attrs, OpSpec, Types


def _decode_dropout(node: Node) -> fx.Reading | None:
    return None if fx.argument(node, 2, "train") else (node.args[:1], {})


def _read_dropout(node: onnx_ir.Node) -> onnx.Reading | None:
    flag = onnx.input_of(node, 2)
    training = onnx.constant(flag)
    if len(node.outputs) > 1 or (flag is not None and training is None):
        return None
    return None if training is not None and bool(training) else (tuple(node.inputs[:1]), {})


def _clamp(x: Tensor, min: float | None = None, max: float | None = None) -> Tensor:
    return torch.clamp(x, min, max)


def _decode_clamp(node: Node) -> fx.Reading | None:
    low, high = fx.argument(node, 1, "min"), fx.argument(node, 2, "max")
    if isinstance(low, Node) or isinstance(high, Node):
        return None
    return node.args[:1], {"min": low, "max": high}


def _read_clip(node: onnx_ir.Node) -> onnx.Reading | None:
    bounds = []
    for index in (1, 2):
        value = onnx.input_of(node, index)
        array = onnx.constant(value)
        if value is not None and array is None:
            return None
        bounds.append(None if array is None else array.reshape(()).item())
    if bounds == [None, None]:
        return None
    return tuple(node.inputs[:1]), {"min": bounds[0], "max": bounds[1]}


def _read_open_clip(node: onnx_ir.Node) -> onnx.Reading | None:
    """Clip(x) without bounds => x"""
    bounds = [onnx.input_of(node, index) for index in (1, 2)]
    return (tuple(node.inputs[:1]), {}) if bounds == [None, None] else None


def _build_clip(b: onnx.Emitter, operands: Sequence[Any], attrs: Attrs) -> onnx_ir.Node:
    x = operands[0]
    bounds = [None if attrs[k] is None else b.scalar(attrs[k], x) for k in ("min", "max")]
    return b.emit("Clip", [x, *bounds])


_SATURATES = {
    dtype: int(torch.tensor(1e6).to(dtype).float().isfinite())
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
}
"""Whether torch makes the largest number of one that is too large for the dtype, else infinity or
NaN: of the first dtype torch 2.13 does, 2.11 does not."""


def _infer_cast(operands: Sequence[Any], attrs: Attrs) -> Types:
    return (Type(attrs["dtype"], operands[0].shape),)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)


def _decode_to_copy(node: Node) -> fx.Reading | None:
    dtype = node.kwargs.get("dtype")
    if dtype is None or node.kwargs.get("memory_format") is not None:
        return None
    return node.args[:1], {"dtype": dtype}


def _decode_to_dtype(node: Node) -> fx.Reading | None:
    return node.args[:1], {"dtype": node.args[1]}


def _build_to_copy(graph: Graph, operands: Sequence[Any], attrs: Attrs) -> Node:
    return fx.call(graph, aten._to_copy.default, tuple(operands), {"dtype": attrs["dtype"]})


def _read_cast(node: onnx_ir.Node) -> onnx.Reading | None:
    try:
        dtype = to_torch_dtype(onnx_ir.DataType(onnx.attribute(node, "to")))
    except TypeError:
        return None
    saturates = onnx.attribute(node, "saturate", 1)
    if dtype not in DTYPE_NAMES or _SATURATES.get(dtype, saturates) != saturates:
        return None
    return tuple(node.inputs), {"dtype": dtype}


def _build_cast(b: onnx.Emitter, operands: Sequence[Any], attrs: Attrs) -> onnx_ir.Node:
    dtype = attrs["dtype"]
    overflow = {} if _SATURATES.get(dtype, 1) else {"saturate": 0}
    return b.emit("Cast", operands, {"to": int(from_torch_dtype(dtype)), **overflow})


def _infer_where(operands: Sequence[Any], attrs: Attrs) -> Types:
    shape = broadcast(*(t.shape for t in tensors(operands)))
    return (Type(promote(operands[1:]), shape),)


def _decode_masked_fill(node: Node) -> fx.Reading | None:
    """masked_fill(x, condition, number) => where(condition, number, x), in the dtype of x."""
    x, condition, number = node.args
    if isinstance(number, float) and fx.is_integral(x):
        return None
    return (condition, number, x), {}


def _build_aten_where(graph: Graph, operands: Sequence[Any], attrs: Attrs) -> Node:
    _, a, b = operands
    if isinstance(a, Node):
        target = aten.where.self if isinstance(b, Node) else aten.where.ScalarOther
    else:
        target = aten.where.ScalarSelf if isinstance(b, Node) else aten.where.Scalar
    return fx.call(graph, target, tuple(operands))


def _build_where(b: onnx.Emitter, operands: Sequence[Any], attrs: Attrs) -> onnx_ir.Node:
    like = next((o for o in operands[1:] if isinstance(o, onnx_ir.Value)), None)
    return b.emit("Where", onnx.as_values(b, operands, like))


OPS = (
    OpSpec(
        name="identity", operands=("x",), infer=same, reference=lambda x: x, rearranges=True,
        aten=AtenForm(
            fx.calls(aten.alias.default),
            (
                fx.always(
                    fx.first, aten.clone.default, aten.alias.default, aten.detach.default,
                    aten.contiguous.default, aten.lift_fresh_copy.default,
                ),
                fx.sometimes(_decode_dropout, aten.dropout.default),
            ),
        ),
        onnx=OnnxForm(onnx.same("Identity"), (
            onnx.always(onnx.plain, "Identity"), onnx.sometimes(_read_dropout, "Dropout"),
            onnx.sometimes(_read_open_clip, "Clip"),
        )),
    ),
    OpSpec(
        name="clamp", operands=("x",), attrs={"min": None, "max": None}, infer=same,
        reference=_clamp,
        aten=AtenForm(
            fx.calls(aten.clamp.default, "min", "max"),
            (fx.sometimes(_decode_clamp, aten.clamp.default, aten.clamp_min.default),),
        ),
        onnx=OnnxForm(_build_clip, (onnx.sometimes(_read_clip, "Clip"),)),
    ),
    OpSpec(
        name="cast", operands=("x",), attrs={"dtype": REQUIRED}, infer=_infer_cast,
        reference=_cast, rearranges=True,
        aten=AtenForm(_build_to_copy, (
            fx.sometimes(_decode_to_copy, aten._to_copy.default),
            fx.always(_decode_to_dtype, aten.to.dtype),
        )),
        onnx=OnnxForm(_build_cast, (onnx.sometimes(_read_cast, "Cast"),)),
    ),
    OpSpec(
        name="where", operands=("condition", "a", "b"), infer=_infer_where, reference=torch.where,
        aten=AtenForm(_build_aten_where, (
            fx.always(
                fx.plain, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf,
                aten.where.Scalar,
            ),
            fx.sometimes(_decode_masked_fill, aten.masked_fill.Scalar),
        )),
        onnx=OnnxForm(_build_where, (onnx.always(onnx.plain, "Where"),)),
    ),
)  # fmt: skip
