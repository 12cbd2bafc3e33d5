"""Ops that pick by an index: gather, index_select, topk; and the ranges that indices come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir
import torch
from onnx_ir.tensor_adapters import to_torch_dtype
from torch import Tensor
from torch.fx import Graph, Node

from ..core.types import UNKNOWN_DIM, Type
from . import fx, onnx
from .fx import AtenForm, aten
from .onnx import OnnxForm
from .spec import REQUIRED, Attrs, OpSpec, Types

# --- gather and index_select ----------------------------------------------------------------------


def _gather(x: Tensor, index: Tensor, dim: int) -> Tensor:
    return x.gather(dim, torch.where(index < 0, index + x.shape[dim], index))


def _infer_gather(operands: Sequence[Any], attrs: Attrs) -> Types:
    return (Type(operands[0].dtype, operands[1].shape),)


def _index_select(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Slices of ``x`` along ``dim``; the index may have any rank (ONNX's Gather)."""
    dim = dim % x.dim()
    index = torch.where(index < 0, index + x.shape[dim], index)
    flat = x.index_select(dim, index.reshape(-1))
    return flat.reshape((*x.shape[:dim], *index.shape, *x.shape[dim + 1 :]))


def _infer_index_select(operands: Sequence[Any], attrs: Attrs) -> Types:
    x, index = operands
    if x.shape is None or index.shape is None:
        return (x.with_shape(None),)
    dim = attrs["dim"] % len(x.shape)
    return (x.with_shape((*x.shape[:dim], *index.shape, *x.shape[dim + 1 :])),)


# --- topk -----------------------------------------------------------------------------------------


def _topk(
    x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[Tensor, Tensor]:
    values, indices = torch.topk(x, k, dim, largest, sorted)
    return values, indices


def _infer_topk(operands: Sequence[Any], attrs: Attrs) -> Types:
    x = operands[0]
    if x.shape is None:
        return x, Type(torch.int64, None)
    out = list(x.shape)
    size = out[attrs["dim"] % len(out)]
    if isinstance(size, int) and attrs["k"] > size:
        raise ValueError(f"topk: k={attrs['k']} of {size}")
    out[attrs["dim"] % len(out)] = attrs["k"]
    return x.with_shape(out), Type(torch.int64, tuple(out))


def _decode_topk(node: Node) -> fx.Reading | None:
    attrs = {
        "k": node.args[1],
        "dim": fx.from_the_left(node, fx.argument(node, 2, "dim", -1))[0],
        "largest": bool(fx.argument(node, 3, "largest", True)),
        "sorted": bool(fx.argument(node, 4, "sorted", True)),
    }
    return None if isinstance(attrs["k"], Node) else (node.args[:1], attrs)


def _read_topk(node: onnx_ir.Node) -> onnx.Reading | None:
    k = onnx.integers_of(onnx.input_of(node, 1))
    if k is None:
        return None
    axis = onnx.attribute(node, "axis", -1)
    attrs = {
        "k": k[0],
        "dim": onnx.from_the_left((axis,), onnx.rank_of(node.inputs[0]))[0],
        "largest": bool(onnx.attribute(node, "largest", 1)),
        "sorted": bool(onnx.attribute(node, "sorted", 1)),
    }
    return tuple(node.inputs[:1]), attrs


def _build_topk(b: onnx.Emitter, operands: Sequence[Any], attrs: Attrs) -> onnx_ir.Node:
    native = {"axis": attrs["dim"], "largest": int(attrs["largest"]),
              "sorted": int(attrs["sorted"])}  # fmt: skip
    return b.emit("TopK", [operands[0], b.integers([attrs["k"]])], native, outputs=2)


# --- ranges ---------------------------------------------------------------------------------------


def _arange(start: Any, end: Any, step: Any, dtype: torch.dtype) -> Tensor:
    numbers = (x.item() if isinstance(x, Tensor) else x for x in (start, end, step))
    return torch.arange(*numbers, dtype=dtype)


def _infer_arange(operands: Sequence[Any], attrs: Attrs) -> Types:
    if all(isinstance(o, int) for o in operands):
        return (Type(attrs["dtype"], (len(range(*operands)),)),)
    return (Type(attrs["dtype"], (UNKNOWN_DIM,)),)


def _decode_arange(node: Node) -> fx.Reading | None:
    args = {1: (0, *node.args, 1), 2: (*node.args, 1), 3: node.args}[len(node.args)]
    dtype: Any = node.kwargs.get("dtype") or torch.int64
    if not dtype.is_floating_point:  # XLNet's and Funnel's steps are 1.0 and 2.0
        args = tuple(int(a) if isinstance(a, float) and a.is_integer() else a for a in args)
    return tuple(args), {"dtype": dtype}


def _build_aten_arange(graph: Graph, operands: Sequence[Any], attrs: Attrs) -> Node:
    kwargs = {"dtype": attrs["dtype"], "device": torch.device("cpu"), "pin_memory": False}
    return fx.call(graph, aten.arange.start_step, tuple(operands), kwargs)


def _read_range(node: onnx_ir.Node) -> onnx.Reading | None:
    dtype = node.outputs[0].dtype
    if dtype is None:
        return None
    numbers = [onnx.constant(v) for v in node.inputs]
    operands = [
        v if n is None else n.reshape(()).item() for v, n in zip(node.inputs, numbers, strict=True)
    ]
    return tuple(operands), {"dtype": to_torch_dtype(dtype)}


def _build_range(b: onnx.Emitter, operands: Sequence[Any], attrs: Attrs) -> onnx_ir.Node:
    like = next((o for o in operands if isinstance(o, onnx_ir.Value)), None)
    if like is None:
        like = b.scalar(torch.zeros((), dtype=attrs["dtype"]), None)
    return b.emit("Range", onnx.as_values(b, operands, like))


OPS = (
    OpSpec(
        name="gather", operands=("x", "index"), attrs={"dim": REQUIRED}, infer=_infer_gather,
        reference=_gather, picks=True,
        aten=AtenForm(
            fx.indexed_call(aten.gather.default), (fx.always(fx.indexed, aten.gather.default),)
        ),
        onnx=OnnxForm(
            onnx.with_attrs("GatherElements", axis="dim"),
            (onnx.always(onnx.on_axis(0), "GatherElements"),),
        ),
    ),
    OpSpec(
        name="index_select", operands=("x", "index"), attrs={"dim": REQUIRED},
        infer=_infer_index_select, reference=_index_select, picks=True,
        aten=AtenForm(
            fx.indexed_call(aten.index_select.default),
            (fx.always(fx.indexed, aten.index_select.default),),
        ),
        onnx=OnnxForm(
            onnx.with_attrs("Gather", axis="dim"), (onnx.always(onnx.on_axis(0), "Gather"),)
        ),
    ),
    OpSpec(
        name="topk", operands=("x",),
        attrs={"k": REQUIRED, "dim": -1, "largest": True, "sorted": True},
        infer=_infer_topk, reference=_topk, multi_result=True,
        aten=AtenForm(
            fx.calls(aten.topk.default, "k", "dim", "largest", "sorted"),
            (fx.sometimes(_decode_topk, aten.topk.default),),
        ),
        onnx=OnnxForm(_build_topk, (onnx.sometimes(_read_topk, "TopK"),)),
    ),
    OpSpec(
        name="arange", operands=("start", "end", "step"), attrs={"dtype": REQUIRED},
        infer=_infer_arange, reference=_arange,
        aten=AtenForm(_build_aten_arange, (fx.always(
            _decode_arange, aten.arange.default, aten.arange.start, aten.arange.start_step,
        ),)),
        onnx=OnnxForm(_build_range, (onnx.sometimes(_read_range, "Range"),)),
    ),
)  # fmt: skip
