"""ONNX and the vocabulary: how each native op is read, and how each op of ours is built.

A reader turns a node into ``(operands, attributes)``, or ``None`` where this use means more than
the vocabulary says (a shape that is not a constant, an exotic attribute): the node is then native.
Ops without an ONNX counterpart live in the domain ``graphwright`` until ``lower`` writes them out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import onnx_ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype, to_torch_dtype

DOMAIN = "graphwright"
"""The domain of vocabulary ops that stock ONNX lacks."""

Reading = tuple[tuple[Any, ...], dict[str, Any]]
Reader = Callable[[onnx_ir.Node], Reading | None]


class Emitter(Protocol):
    """What a builder uses to add nodes: see ``onnx.OnnxView``."""

    def emit(
        self, op_type: str, inputs: Sequence[Any], attrs: Mapping[str, Any] | None = None,
        *, domain: str = "", outputs: int = 1,
    ) -> onnx_ir.Node:
        """Insert one native node."""  # fmt: skip

    def integers(self, values: Sequence[int]) -> onnx_ir.Value:
        """A 1-D int64 constant."""

    def scalar(self, number: Any, like: onnx_ir.Value | None) -> onnx_ir.Value:
        """A constant without dimensions, of the dtype of ``like``."""


Builder = Callable[[Emitter, Sequence[Any], Mapping[str, Any]], onnx_ir.Node]


def constant(value: onnx_ir.Value | None) -> np.ndarray[Any, Any] | None:
    """The numbers of a small constant, or ``None``."""
    if value is None or value.const_value is None or value.const_value.size > 1024:
        return None
    return value.const_value.numpy()


def integers_of(value: onnx_ir.Value | None) -> tuple[int, ...] | None:
    array = constant(value)
    if array is None or array.dtype.kind not in "iu":
        return None
    return tuple(int(v) for v in array.reshape(-1))


def attribute(node: onnx_ir.Node, name: str, default: Any = None) -> Any:
    found = node.attributes.get(name)
    return default if found is None else found.value


def rank_of(value: Any) -> int | None:
    shape = value.shape if isinstance(value, onnx_ir.Value) else None
    return None if shape is None else len(shape)


def _input(node: onnx_ir.Node, index: int) -> onnx_ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _wrap(dims: Sequence[int], rank: int | None) -> tuple[int, ...]:
    return tuple(d % rank if rank else d for d in dims)


def _plain(node: onnx_ir.Node) -> Reading | None:
    inputs = list(node.inputs)
    while inputs and inputs[-1] is None:
        inputs.pop()
    return tuple(inputs), {}


def _two(node: onnx_ir.Node) -> Reading | None:
    return (tuple(node.inputs), {}) if len(node.inputs) == 2 else None


def _dropout(node: onnx_ir.Node) -> Reading | None:
    training = constant(_input(node, 2))
    if len(node.outputs) > 1 or (_input(node, 2) is not None and training is None):
        return None
    return None if training is not None and bool(training) else (tuple(node.inputs[:1]), {})


def _gelu(node: onnx_ir.Node) -> Reading | None:
    return tuple(node.inputs), {"approximate": attribute(node, "approximate", "none")}


def _clip(node: onnx_ir.Node) -> Reading | None:
    bounds = []
    for index in (1, 2):
        value = _input(node, index)
        array = constant(value)
        if value is not None and array is None:
            return None
        bounds.append(None if array is None else array.reshape(()).item())
    return tuple(node.inputs[:1]), {"min": bounds[0], "max": bounds[1]}


def _cast(node: onnx_ir.Node) -> Reading | None:
    try:
        dtype = to_torch_dtype(onnx_ir.DataType(attribute(node, "to")))
    except TypeError:
        return None
    return tuple(node.inputs), {"dtype": dtype}


def _reduce(node: onnx_ir.Node) -> Reading | None:
    axes: Any = attribute(node, "axes")
    if _input(node, 1) is not None:
        axes = integers_of(node.inputs[1])
        if axes is None:
            return None
    if not axes and attribute(node, "noop_with_empty_axes", 0):
        return None
    keepdim = bool(attribute(node, "keepdims", 1))
    dims = _wrap(axes or (), rank_of(node.inputs[0]))
    return tuple(node.inputs[:1]), {"dims": dims, "keepdim": keepdim}


def _softmax(node: onnx_ir.Node) -> Reading | None:
    axis = attribute(node, "axis", -1)
    return tuple(node.inputs), {"dim": _wrap((axis,), rank_of(node.inputs[0]))[0]}


def _cumsum(node: onnx_ir.Node) -> Reading | None:
    axis = integers_of(_input(node, 1))
    if axis is None or attribute(node, "exclusive", 0) or attribute(node, "reverse", 0):
        return None
    return tuple(node.inputs[:1]), {"dim": _wrap(axis, rank_of(node.inputs[0]))[0]}


def _conv(node: onnx_ir.Node) -> Reading | None:
    rank = rank_of(node.inputs[1])
    pads = attribute(node, "pads")
    if rank is None or attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    space = rank - 2
    pads = tuple(pads or (0,) * (2 * space))
    if pads[:space] != pads[space:]:
        return None
    attrs = {
        "stride": tuple(attribute(node, "strides", (1,) * space)),
        "padding": pads[:space],
        "dilation": tuple(attribute(node, "dilations", (1,) * space)),
        "groups": attribute(node, "group", 1),
    }
    return tuple(node.inputs), attrs


def _layer_norm(node: onnx_ir.Node) -> Reading | None:
    rank = rank_of(node.inputs[0])
    axis = attribute(node, "axis", -1)
    if len(node.outputs) > 1 or (axis >= 0 and rank is None):
        return None
    dims = -axis if axis < 0 else rank - axis
    return tuple(node.inputs), {"dims": dims, "eps": float(attribute(node, "epsilon", 1e-5))}


def _rms_norm(node: onnx_ir.Node) -> Reading | None:
    rank = rank_of(node.inputs[0])
    if attribute(node, "axis", -1) not in (-1, None if rank is None else rank - 1):
        return None
    return tuple(node.inputs), {"eps": float(attribute(node, "epsilon", 1e-5))}


def _reshape(node: onnx_ir.Node) -> Reading | None:
    shape = integers_of(node.inputs[1])
    if shape is None or 0 in shape:
        return tuple(node.inputs), {}
    return (node.inputs[0], *shape), {}


def _transpose(node: onnx_ir.Node) -> Reading | None:
    perm = attribute(node, "perm")
    rank = rank_of(node.inputs[0])
    if perm is None and rank is None:
        return None
    perm = tuple(reversed(range(rank))) if perm is None else tuple(perm)  # type: ignore[arg-type]
    return tuple(node.inputs), {"perm": perm}


def _axes(node: onnx_ir.Node) -> Reading | None:
    axes = integers_of(_input(node, 1))
    if axes is None:
        return None
    extra = len(axes) if node.op_type == "Unsqueeze" else 0
    rank = rank_of(node.inputs[0])
    return tuple(node.inputs[:1]), {"dims": _wrap(axes, None if rank is None else rank + extra)}


def _concat(node: onnx_ir.Node) -> Reading | None:
    axis = _wrap((attribute(node, "axis"),), rank_of(node.inputs[0]))[0]
    return tuple(node.inputs), {"dim": axis}


def _slice(node: onnx_ir.Node) -> Reading | None:
    steps = integers_of(_input(node, 4)) if _input(node, 4) is not None else (1,)
    axes = integers_of(_input(node, 3)) if _input(node, 3) is not None else (0,)
    if axes is None or steps is None or len(axes) != 1 or len(steps) != 1:
        return None
    ends = [integers_of(node.inputs[i]) for i in (1, 2)]
    if any(e is not None and len(e) != 1 for e in ends):
        return None
    operands = [e[0] if e is not None else node.inputs[i + 1] for i, e in enumerate(ends)]
    dim = _wrap(axes, rank_of(node.inputs[0]))[0]
    return (node.inputs[0], *operands), {"dim": dim, "step": steps[0]}


def _gather(node: onnx_ir.Node) -> Reading | None:
    return tuple(node.inputs), {"dim": _wrap((attribute(node, "axis", 0),),
                                             rank_of(node.inputs[0]))[0]}  # fmt: skip


def _embedding(node: onnx_ir.Node) -> Reading | None:
    data = node.inputs[0]
    if attribute(node, "axis", 0) != 0 or data is None or data.const_value is None:
        return None
    return (tuple(node.inputs), {}) if rank_of(data) == 2 else None


def _split(node: onnx_ir.Node) -> Reading | None:
    axis = _wrap((attribute(node, "axis", 0),), rank_of(node.inputs[0]))[0]
    sizes = integers_of(_input(node, 1))
    if _input(node, 1) is None:
        sizes = _even_sizes(node, axis)
    if sizes is None:
        return None
    return tuple(node.inputs[:1]), {"sizes": sizes, "dim": axis}


def _even_sizes(node: onnx_ir.Node, axis: int) -> tuple[int, ...] | None:
    """Sizes of a Split without any: equal parts, the last one smaller."""
    shape, parts = node.inputs[0].shape, len(node.outputs)  # type: ignore[union-attr]
    total = None if shape is None else shape[axis]
    if not isinstance(total, int):
        return None
    size = -(-total // parts)
    return tuple(min(size, total - size * i) for i in range(parts))


def _equal_parts(node: onnx_ir.Node) -> tuple[int, ...] | None:
    """Sizes of a Split that is told only how many parts to make; the last one may be smaller."""
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    size = None if shape is None else shape[attribute(node, "axis", 0)]
    if not isinstance(size, int):
        return None
    part = -(-size // len(node.outputs))
    return tuple(min(part, size - at) for at in range(0, size, part))


def _topk(node: onnx_ir.Node) -> Reading | None:
    k = integers_of(_input(node, 1))
    if k is None:
        return None
    attrs = {
        "k": k[0],
        "dim": _wrap((attribute(node, "axis", -1),), rank_of(node.inputs[0]))[0],
        "largest": bool(attribute(node, "largest", 1)),
        "sorted": bool(attribute(node, "sorted", 1)),
    }
    return tuple(node.inputs[:1]), attrs


def _range(node: onnx_ir.Node) -> Reading | None:
    dtype = node.outputs[0].dtype
    if dtype is None:
        return None
    numbers = [constant(v) for v in node.inputs]
    operands = [
        v if n is None else n.reshape(()).item() for v, n in zip(node.inputs, numbers, strict=True)
    ]
    return tuple(operands), {"dtype": to_torch_dtype(dtype)}


READERS: dict[tuple[str, str], list[tuple[str, Reader, bool]]] = {}
"""(domain, op type) to candidates: vocabulary op, reader, whether it may answer ``None``."""


def _register(reader: Reader, partial: bool = False, **names: str) -> None:
    for op, op_types in names.items():
        for op_type in op_types.split():
            READERS.setdefault(("", op_type), []).append((op, reader, partial))


_register(
    _plain, add="Add", sub="Sub", mul="Mul", div="Div", pow="Pow", eq="Equal", lt="Less",
    le="LessOrEqual", gt="Greater", ge="GreaterOrEqual", logical_and="And", logical_or="Or",
    logical_not="Not", isnan="IsNaN", neg="Neg", abs="Abs", sqrt="Sqrt", reciprocal="Reciprocal",
    exp="Exp", log="Log", erf="Erf", tanh="Tanh", sigmoid="Sigmoid", sin="Sin", cos="Cos",
    floor="Floor", relu="Relu", identity="Identity", where="Where", matmul="MatMul",
)  # fmt: skip
_register(_two, True, maximum="Max", minimum="Min")
_register(_dropout, True, identity="Dropout")
_register(_gelu, gelu="Gelu")
_register(_clip, True, clamp="Clip")
_register(_cast, True, cast="Cast")
_register(_reduce, True, mean="ReduceMean", sum="ReduceSum", amax="ReduceMax", amin="ReduceMin")
_register(_softmax, softmax="Softmax")
_register(_cumsum, True, cumsum="CumSum")
_register(_conv, True, conv="Conv")
_register(_layer_norm, True, layer_norm="LayerNormalization")
_register(_rms_norm, True, rms_norm="RMSNormalization")
_register(_reshape, reshape="Reshape", expand="Expand")
_register(_transpose, True, transpose="Transpose")
_register(_axes, True, unsqueeze="Unsqueeze", squeeze="Squeeze")
_register(_concat, concat="Concat")
_register(_slice, True, slice="Slice")
_register(_embedding, True, embedding="Gather")
_register(_gather, index_select="Gather", gather="GatherElements")
_register(_split, True, split="Split")
_register(_topk, True, topk="TopK")
_register(_range, True, arange="Range")

_SAME = {
    "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "pow": "Pow", "maximum": "Max",
    "minimum": "Min", "eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater",
    "ge": "GreaterOrEqual", "logical_and": "And", "logical_or": "Or", "logical_not": "Not",
    "isnan": "IsNaN", "neg": "Neg", "abs": "Abs", "sqrt": "Sqrt", "reciprocal": "Reciprocal",
    "exp": "Exp", "log": "Log", "erf": "Erf", "tanh": "Tanh", "sigmoid": "Sigmoid", "sin": "Sin",
    "cos": "Cos", "floor": "Floor", "relu": "Relu", "identity": "Identity", "where": "Where",
    "matmul": "MatMul",
}  # fmt: skip
_REDUCE = {"mean": "ReduceMean", "sum": "ReduceSum", "amax": "ReduceMax", "amin": "ReduceMin"}


def _same(op_type: str) -> Builder:
    def build(b: Emitter, operands: Sequence[Any], attrs: Mapping[str, Any]) -> onnx_ir.Node:
        alike = operands[1:] if op_type == "Where" else operands
        like = next((o for o in alike if isinstance(o, onnx_ir.Value)), None)
        inputs = [o if isinstance(o, onnx_ir.Value) else b.scalar(o, like) for o in operands]
        return b.emit(op_type, inputs)

    return build


def _with(op_type: str, **renamed: str) -> Builder:
    """A builder that renames attributes (``dim="axis"``) and passes the operands on."""

    def build(b: Emitter, operands: Sequence[Any], attrs: Mapping[str, Any]) -> onnx_ir.Node:
        return b.emit(op_type, operands, {new: attrs[old] for old, new in renamed.items()})

    return build


def _with_axes(op_type: str, key: str = "dims") -> Builder:
    def build(b: Emitter, operands: Sequence[Any], attrs: Mapping[str, Any]) -> onnx_ir.Node:
        extra = {"keepdims": int(attrs["keepdim"])} if "keepdim" in attrs else {}
        return b.emit(op_type, [*operands, b.integers(attrs[key])], extra)

    return build


def _build_clip(b: Emitter, operands: Sequence[Any], attrs: Mapping[str, Any]) -> onnx_ir.Node:
    x = operands[0]
    bounds = [None if attrs[k] is None else b.scalar(attrs[k], x) for k in ("min", "max")]
    return b.emit("Clip", [x, *bounds])


def _build_cast(b: Emitter, operands: Sequence[Any], attrs: Mapping[str, Any]) -> onnx_ir.Node:
    return b.emit("Cast", operands, {"to": int(from_torch_dtype(attrs["dtype"]))})


def _build_ne(b: Emitter, operands: Sequence[Any], attrs: Mapping[str, Any]) -> onnx_ir.Node:
    return b.emit("Not", [_same("Equal")(b, operands, attrs).outputs[0]])


def _build_conv(b: Emitter, operands: Sequence[Any], attrs: Mapping[str, Any]) -> onnx_ir.Node:
    return b.emit("Conv", operands, {
        "strides": attrs["stride"], "dilations": attrs["dilation"], "group": attrs["groups"],
        "pads": (*attrs["padding"], *attrs["padding"]),
    })  # fmt: skip


def _build_layer_norm(
    b: Emitter, operands: Sequence[Any], attrs: Mapping[str, Any]
) -> onnx_ir.Node:
    if len(operands) < 2 or operands[1] is None:
        return b.emit("layer_norm", operands, attrs, domain=DOMAIN)
    return b.emit("LayerNormalization", operands, {"axis": -attrs["dims"], "epsilon": attrs["eps"]})


def _build_shaped(op_type: str) -> Builder:
    def build(b: Emitter, operands: Sequence[Any], attrs: Mapping[str, Any]) -> onnx_ir.Node:
        x, *shape = operands
        if op_type == "Expand":
            shape = [1 if isinstance(s, int) and s == -1 else s for s in shape]
        if len(shape) == 1 and isinstance(shape[0], onnx_ir.Value) and rank_of(shape[0]) == 1:
            return b.emit(op_type, [x, shape[0]])
        return b.emit(op_type, [x, _vector(b, shape)])

    return build


def _vector(b: Emitter, items: Sequence[Any]) -> onnx_ir.Value:
    """A 1-D int64 value out of numbers and scalar values."""
    if all(isinstance(i, int) for i in items):
        return b.integers(items)
    parts = [
        b.integers([item])
        if isinstance(item, int)
        else b.emit("Reshape", [item, b.integers([1])]).outputs[0]
        for item in items
    ]
    return b.emit("Concat", parts, {"axis": 0}).outputs[0]


def _build_slice(b: Emitter, operands: Sequence[Any], attrs: Mapping[str, Any]) -> onnx_ir.Node:
    x, start, end = operands
    ends = [_vector(b, [start]), _vector(b, [end])]
    return b.emit("Slice", [x, *ends, b.integers([attrs["dim"]]), b.integers([attrs["step"]])])


def _build_split(b: Emitter, operands: Sequence[Any], attrs: Mapping[str, Any]) -> onnx_ir.Node:
    sizes = attrs["sizes"]
    inputs = [operands[0], b.integers(sizes)]
    return b.emit("Split", inputs, {"axis": attrs["dim"]}, outputs=len(sizes))


def _build_topk(b: Emitter, operands: Sequence[Any], attrs: Mapping[str, Any]) -> onnx_ir.Node:
    native = {"axis": attrs["dim"], "largest": int(attrs["largest"]),
              "sorted": int(attrs["sorted"])}  # fmt: skip
    return b.emit("TopK", [operands[0], b.integers([attrs["k"]])], native, outputs=2)


def _build_cumsum(b: Emitter, operands: Sequence[Any], attrs: Mapping[str, Any]) -> onnx_ir.Node:
    return b.emit("CumSum", [operands[0], b.integers([attrs["dim"]])])


def _build_arange(b: Emitter, operands: Sequence[Any], attrs: Mapping[str, Any]) -> onnx_ir.Node:
    like = next((o for o in operands if isinstance(o, onnx_ir.Value)), None)
    if like is None:
        like = b.scalar(torch.zeros((), dtype=attrs["dtype"]), None)
    inputs = [o if isinstance(o, onnx_ir.Value) else b.scalar(o, like) for o in operands]
    return b.emit("Range", inputs)


BUILDERS: dict[str, Builder] = {
    **{op: _same(op_type) for op, op_type in _SAME.items()},
    **{op: _with_axes(op_type) for op, op_type in _REDUCE.items()},
    "ne": _build_ne,
    "clamp": _build_clip,
    "cast": _build_cast,
    "softmax": _with("Softmax", dim="axis"),
    "cumsum": _build_cumsum,
    "conv": _build_conv,
    "embedding": _with("Gather"),
    "layer_norm": _build_layer_norm,
    "reshape": _build_shaped("Reshape"),
    "expand": _build_shaped("Expand"),
    "transpose": _with("Transpose", perm="perm"),
    "unsqueeze": _with_axes("Unsqueeze"),
    "squeeze": _with_axes("Squeeze"),
    "concat": _with("Concat", dim="axis"),
    "slice": _build_slice,
    "gather": _with("GatherElements", dim="axis"),
    "index_select": _with("Gather", dim="axis"),
    "split": _build_split,
    "topk": _build_topk,
    "arange": _build_arange,
}
"""Ops that ONNX writes itself; all others are emitted in the domain ``graphwright``."""
