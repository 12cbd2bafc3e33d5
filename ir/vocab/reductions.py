"""Ops along dimensions: sums, means, extrema, softmax, running sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir
import torch
from torch import Tensor
from torch.fx import Node

from . import fx, onnx
from .fx import AtenForm, aten
from .onnx import OnnxForm
from .rules import from_the_left, same
from .spec import REQUIRED, Attrs, OpSpec, Types


def _infer(operands: Sequence[Any], attrs: Attrs) -> Types:
    x = operands[0]
    if x.shape is None:
        return (x,)
    dims = from_the_left(attrs["dims"], len(x.shape)) or set(range(len(x.shape)))
    if attrs["keepdim"]:
        return (x.with_shape([1 if i in dims else d for i, d in enumerate(x.shape)]),)
    return (x.with_shape([d for i, d in enumerate(x.shape) if i not in dims]),)


def _decode(node: Node) -> fx.Reading | None:
    if node.kwargs.get("dtype") is not None or len(node.args) > 3:
        return None
    dims = fx.from_the_left(node, fx.argument(node, 1, "dim", ()))
    return node.args[:1], {"dims": dims, "keepdim": bool(fx.argument(node, 2, "keepdim", False))}


def _read(node: onnx_ir.Node) -> onnx.Reading | None:
    axes: Any = onnx.attribute(node, "axes")
    if onnx.input_of(node, 1) is not None:
        axes = onnx.integers_of(node.inputs[1])
        if axes is None:
            return None
    if not axes and onnx.attribute(node, "noop_with_empty_axes", 0):
        return None
    keepdim = bool(onnx.attribute(node, "keepdims", 1))
    dims = onnx.from_the_left(axes or (), onnx.rank_of(node.inputs[0]))
    return tuple(node.inputs[:1]), {"dims": dims, "keepdim": keepdim}


def _reduction(
    name: str, reduce: Callable[[Tensor, list[int], bool], Tensor], op_type: str, built: Any,
    *others: Any,
) -> OpSpec:  # fmt: skip
    def reference(x: Tensor, dims: Sequence[int], keepdim: bool = False) -> Tensor:
        return reduce(x, list(dims), keepdim)

    return OpSpec(
        name=name, operands=("x",), attrs={"dims": REQUIRED, "keepdim": False}, infer=_infer,
        reference=reference,
        aten=AtenForm(
            fx.calls(built, "dims", "keepdim"), (fx.sometimes(_decode, built, *others),)
        ),
        onnx=OnnxForm(onnx.with_axes(op_type), (onnx.sometimes(_read, op_type),)),
    )  # fmt: skip


def _softmax(x: Tensor, dim: int) -> Tensor:
    return torch.softmax(x, dim)


def _cumsum(x: Tensor, dim: int) -> Tensor:
    return torch.cumsum(x, dim)



def _read_cumsum(node: onnx_ir.Node) -> onnx.Reading | None:
    axis = onnx.integers_of(onnx.input_of(node, 1))
    if axis is None or onnx.attribute(node, "exclusive", 0) or onnx.attribute(node, "reverse", 0):
        return None
    dim = onnx.from_the_left(axis, onnx.rank_of(node.inputs[0]))[0]
    return tuple(node.inputs[:1]), {"dim": dim}


def _build_cumsum(b: onnx.Emitter, operands: Sequence[Any], attrs: Attrs) -> onnx_ir.Node:
    return b.emit("CumSum", [operands[0], b.integers([attrs["dim"]])])


OPS = (
    _reduction(
        "mean", lambda x, dims, keep: x.mean(dims, keepdim=keep), "ReduceMean",
        aten.mean.dim, aten.mean.default,
    ),
    _reduction(
        "sum", lambda x, dims, keep: x.sum(dims, keepdim=keep, dtype=x.dtype), "ReduceSum",
        aten.sum.dim_IntList, aten.sum.default,
    ),
    _reduction(
        "amax", lambda x, dims, keep: x.amax(dims, keepdim=keep), "ReduceMax", aten.amax.default
    ),
    _reduction(
        "amin", lambda x, dims, keep: x.amin(dims, keepdim=keep), "ReduceMin", aten.amin.default
    ),
    OpSpec(
        name="softmax", operands=("x",), attrs={"dim": REQUIRED}, infer=same, reference=_softmax,
        aten=AtenForm(
            fx.calls(aten.softmax.int, "dim"),
            (fx.sometimes(fx.one_dim, aten.softmax.int, aten._softmax.default),),
        ),
        onnx=OnnxForm(
            onnx.with_attrs("Softmax", axis="dim"), (onnx.always(onnx.on_axis(-1), "Softmax"),)
        ),
    ),
    OpSpec(
        name="cumsum", operands=("x",), attrs={"dim": REQUIRED}, infer=same, reference=_cumsum,
        aten=AtenForm(
            fx.calls(aten.cumsum.default, "dim"), (fx.sometimes(fx.one_dim, aten.cumsum.default),)
        ),
        onnx=OnnxForm(_build_cumsum, (onnx.sometimes(_read_cumsum, "CumSum"),)),
    ),
)  # fmt: skip
