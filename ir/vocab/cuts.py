"""Ops that join and cut along a dimension: concat, slice, split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir
import torch
from torch import Tensor
from torch.fx import Graph, Node

from ..core.types import UNKNOWN_DIM, Dim
from . import fx, onnx
from .fx import AtenForm, aten
from .onnx import OnnxForm
from .rules import same_size
from .spec import END, REQUIRED, Attrs, OpSpec, Types

# --- concat ---------------------------------------------------------------------------------------


def _concat(*xs: Tensor, dim: int) -> Tensor:
    return torch.cat(xs, dim)


def _infer_concat(operands: Sequence[Any], attrs: Attrs) -> Types:
    shapes = [x.shape for x in operands]
    if None in shapes:
        return (operands[0].with_shape(None),)
    dim = attrs["dim"] % len(shapes[0])
    for shape in shapes[1:]:
        rest = [(a, b) for i, (a, b) in enumerate(zip(shapes[0], shape, strict=True)) if i != dim]
        for a, b in rest:
            same_size(a, b, "concat", "the other")
    out = list(shapes[0])
    out[dim] = _sum([s[dim] for s in shapes])
    return (operands[0].with_shape(out),)


def _sum(sizes: Sequence[Dim]) -> Dim:
    """As torch writes it, ``past + seq + 1``; unknown where that takes more than putting different
    names in a row."""
    number = sum(s for s in sizes if isinstance(s, int))
    names = sorted(s for s in sizes if isinstance(s, str))
    if not names:
        return number
    if len(set(names)) < len(names) or not all(name.isidentifier() for name in names):
        return UNKNOWN_DIM
    return " + ".join([*names, str(number)] if number else names)


def _decode_concat(node: Node) -> fx.Reading | None:
    parts: Any = node.args[0]
    # Beside others, torch takes a vector of nothing for nothing, of whatever rank those are.
    parts = [part for part in parts if not _is_nothing(part)] or parts
    rank = fx.rank_of(parts[0])
    dim = fx.argument(node, 1, "dim", 0)
    return tuple(parts), {"dim": dim % rank if rank else dim}


def _is_nothing(part: Any) -> bool:
    val = part.meta.get("val") if isinstance(part, Node) else None
    # A size that data decide is no number, and asking whether it is 0 would be an error.
    return isinstance(val, Tensor) and val.dim() == 1 and type(val.shape[0]) is int and not len(val)


def _build_aten_concat(graph: Graph, operands: Sequence[Any], attrs: Attrs) -> Node:
    return fx.call(graph, aten.cat.default, (list(operands), attrs["dim"]))


# --- slice ----------------------------------------------------------------------------------------


def _slice(x: Tensor, start: Any, end: Any, *, dim: int, step: int = 1) -> Tensor:
    size = x.shape[dim]
    start, end, step = int(start), int(end), int(step)
    to_the_first = step < 0 and end < -size
    index = range(size)[start : None if to_the_first else end : step]
    return x.index_select(dim, torch.tensor(list(index), dtype=torch.int64, device=x.device))


def _infer_slice(operands: Sequence[Any], attrs: Attrs) -> Types:
    x, start, end = operands
    if x.shape is None:
        return (x,)
    dim = attrs["dim"] % len(x.shape)
    out = list(x.shape)
    size = x.shape[dim]
    if isinstance(size, int) and isinstance(start, int) and isinstance(end, int):
        out[dim] = len(range(*slice(start, end, attrs["step"]).indices(size)))
    elif not (isinstance(end, int) and end >= 1 << 31 and attrs["step"] == 1):
        out[dim] = UNKNOWN_DIM
    elif start == -1:
        out[dim] = 1  # the last of something: no dimension here is empty
    elif start != 0:
        named = isinstance(start, int) and start > 0 and size != UNKNOWN_DIM
        out[dim] = f"{size} - {start}" if named else UNKNOWN_DIM
    return (x.with_shape(out),)


def _decode_slice(node: Node) -> fx.Reading | None:
    dim = fx.from_the_left(node, fx.argument(node, 1, "dim", 0))[0]
    start, end = fx.argument(node, 2, "start"), fx.argument(node, 3, "end")
    start = 0 if start is None else start
    end = END if end is None else end
    return (node.args[0], start, end), {"dim": dim, "step": fx.argument(node, 4, "step", 1)}


def _build_aten_slice(graph: Graph, operands: Sequence[Any], attrs: Attrs) -> Node:
    x, start, end = operands
    return fx.call(graph, aten.slice.Tensor, (x, attrs["dim"], start, end, attrs["step"]))


def _is_single(value: onnx_ir.Value | None) -> bool:
    return value is not None and value.shape is not None and value.shape.dims == (1,)


def _read_slice(node: onnx_ir.Node) -> onnx.Reading | None:
    inputs = [onnx.input_of(node, index) for index in (3, 4)]
    axes = (0,) if inputs[0] is None else onnx.integers_of(inputs[0])
    steps = (1,) if inputs[1] is None else onnx.integers_of(inputs[1])
    if axes is None or steps is None or len(axes) != 1 or len(steps) != 1:
        return None
    ends = [onnx.integers_of(node.inputs[i]) for i in (1, 2)]
    counts = [len(e) for e in ends if e is not None]
    if any(count != 1 for count in counts):
        return None
    if not any([*inputs, *counts]) and not any(_is_single(node.inputs[i]) for i in (1, 2)):
        return None  # nothing says that it cuts along one dimension alone
    operands = [e[0] if e is not None else node.inputs[i + 1] for i, e in enumerate(ends)]
    dim = onnx.from_the_left(axes, onnx.rank_of(node.inputs[0]))[0]
    return (node.inputs[0], *operands), {"dim": dim, "step": steps[0]}


def _build_slice(b: onnx.Emitter, operands: Sequence[Any], attrs: Attrs) -> onnx_ir.Node:
    x, start, end = operands
    ends = [onnx.vector(b, [start]), onnx.vector(b, [end])]
    return b.emit("Slice", [x, *ends, b.integers([attrs["dim"]]), b.integers([attrs["step"]])])


# --- split ----------------------------------------------------------------------------------------


def _split(x: Tensor, sizes: Sequence[int], dim: int) -> tuple[Tensor, ...]:
    return torch.split(x, list(sizes), dim)


def _infer_split(operands: Sequence[Any], attrs: Attrs) -> Types:
    x = operands[0]
    if x.shape is None:
        return (x,) * len(attrs["sizes"])
    dim = attrs["dim"] % len(x.shape)
    size = x.shape[dim]
    if isinstance(size, int) and sum(attrs["sizes"]) != size:
        raise ValueError(f"split: {attrs['sizes']} do not add up to {size}")
    return tuple(x.with_shape((*x.shape[:dim], s, *x.shape[dim + 1 :])) for s in attrs["sizes"])


def _decode_split(node: Node) -> fx.Reading | None:
    dim = fx.from_the_left(node, fx.argument(node, 2, "dim", 0))[0]
    sizes: Any = node.args[1]
    if isinstance(sizes, int):
        total = node.args[0].meta["val"].shape[dim]  # type: ignore[union-attr]
        if not isinstance(total, int):
            return None
        sizes = [min(sizes, total - at) for at in range(0, total, sizes)]
    if isinstance(sizes, Node) or not all(isinstance(s, int) for s in sizes):
        return None
    return node.args[:1], {"sizes": tuple(sizes), "dim": dim}


def _read_split(node: onnx_ir.Node) -> onnx.Reading | None:
    axis = onnx.from_the_left((onnx.attribute(node, "axis", 0),), onnx.rank_of(node.inputs[0]))[0]
    lengths = onnx.input_of(node, 1)
    sizes = _even_sizes(node, axis) if lengths is None else onnx.integers_of(lengths)
    return None if sizes is None else (tuple(node.inputs[:1]), {"sizes": sizes, "dim": axis})


def _even_sizes(node: onnx_ir.Node, axis: int) -> tuple[int, ...] | None:
    """Sizes of a Split without any: equal parts, the last one smaller."""
    shape, parts = node.inputs[0].shape, len(node.outputs)  # type: ignore[union-attr]
    total = None if shape is None else shape[axis]
    if not isinstance(total, int):
        return None
    size = -(-total // parts)
    return tuple(min(size, total - size * i) for i in range(parts))


def _build_split(b: onnx.Emitter, operands: Sequence[Any], attrs: Attrs) -> onnx_ir.Node:
    sizes = attrs["sizes"]
    inputs = [operands[0], b.integers(sizes)]
    return b.emit("Split", inputs, {"axis": attrs["dim"]}, outputs=len(sizes))


OPS = (
    OpSpec(
        name="concat", operands=("*xs",), attrs={"dim": REQUIRED}, infer=_infer_concat,
        reference=_concat,
        aten=AtenForm(_build_aten_concat, (fx.always(_decode_concat, aten.cat.default),)),
        onnx=OnnxForm(
            onnx.with_attrs("Concat", axis="dim"), (onnx.always(onnx.on_axis(), "Concat"),)
        ),
    ),
    OpSpec(
        name="slice", operands=("x", "start", "end"), attrs={"dim": REQUIRED, "step": 1},
        infer=_infer_slice, reference=_slice, rearranges=True,
        aten=AtenForm(_build_aten_slice, (fx.always(_decode_slice, aten.slice.Tensor),)),
        onnx=OnnxForm(_build_slice, (onnx.sometimes(_read_slice, "Slice"),)),
    ),
    OpSpec(
        name="split", operands=("x",), attrs={"sizes": REQUIRED, "dim": REQUIRED},
        infer=_infer_split, reference=_split, multi_result=True,
        aten=AtenForm(fx.calls(aten.split_with_sizes.default, "sizes", "dim"), (fx.sometimes(
            _decode_split, aten.split.Tensor, aten.split_with_sizes.default,
        ),)),
        onnx=OnnxForm(_build_split, (onnx.sometimes(_read_split, "Split"),)),
    ),
)  # fmt: skip
