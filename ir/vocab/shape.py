"""Ops that give a tensor another shape, or say what shape it has."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import onnx_ir
import torch
from torch import Tensor
from torch.fx import Graph, Node

from ..core.types import UNKNOWN_DIM, Dim, Type
from . import fx, onnx
from .fx import AtenForm, aten
from .onnx import OnnxForm
from .rules import from_the_left
from .spec import REQUIRED, Attrs, OpSpec, Types

# --- reshape and expand ---------------------------------------------------------------------------


def _sizes(shape: Sequence[Any]) -> list[int]:
    if len(shape) == 1 and isinstance(shape[0], Tensor) and shape[0].dim() == 1:
        return [int(s) for s in shape[0]]
    return [int(s) for s in shape]


def _reshape(x: Tensor, *shape: Any, allowzero: bool = False) -> Tensor:
    """Unless it is allowed, a 0 that is written out, or in a vector of sizes, keeps a dimension."""
    sizes = _sizes(shape)
    if not allowzero:
        vector = len(shape) == 1 and isinstance(shape[0], Tensor) and shape[0].dim() == 1
        for i, size in enumerate(sizes):
            if size == 0 and (vector or not isinstance(shape[i], Tensor)):
                sizes[i] = x.shape[i]
    return x.reshape(sizes)


def _infer_reshape(operands: Sequence[Any], attrs: Attrs) -> Types:
    x, *dims = operands
    if not all(isinstance(d, int) for d in dims):
        known = all(isinstance(d, int) or (isinstance(d, Type) and d.rank == 0) for d in dims)
        shape = [d if isinstance(d, int) and d > 0 else UNKNOWN_DIM for d in dims]
        return (x.with_shape(shape if known else None),)
    if 0 in dims and not attrs.get("allowzero"):
        return (x.with_shape(_with_kept(x, dims)),)
    total = x.numel
    if total is None:
        return (x.with_shape([UNKNOWN_DIM if d == -1 else d for d in dims]),)
    rest = math.prod(d for d in dims if d != -1)
    if total % max(rest, 1) if -1 in dims else rest != total:
        raise ValueError(f"reshape: {x} has not the elements of {dims}")
    return (x.with_shape([total // max(rest, 1) if d == -1 else d for d in dims]),)


def _with_kept(x: Type, dims: Sequence[int]) -> list[Dim]:
    """Sizes of which a 0 keeps the dimension of ``x`` and -1 is what the others leave."""
    if x.shape is None:
        return [d if d > 0 else UNKNOWN_DIM for d in dims]
    if any(d == 0 for d in dims[len(x.shape) :]):
        raise ValueError(f"reshape: {x} has no dimensions for all zeros of {dims}")
    kept = [x.shape[i] if d == 0 else d for i, d in enumerate(dims)]
    return [_left(x.shape, kept) if d == -1 else d for d in kept]


def _left(shape: Sequence[Dim], taken: Sequence[Dim]) -> Dim:
    """The product of ``shape`` over that of ``taken``, where it is a number or a name."""
    over = list(shape)
    for name in (d for d in taken if isinstance(d, str)):
        if name == UNKNOWN_DIM or name not in over:
            return UNKNOWN_DIM
        over.remove(name)
    names = [d for d in over if isinstance(d, str)]
    above = math.prod(d for d in over if isinstance(d, int))
    below = math.prod(d for d in taken if isinstance(d, int) and d != -1)
    if not names and below and above % below == 0:
        return above // below
    return names[0] if len(names) == 1 and above == below else UNKNOWN_DIM


def _decode_reshape(node: Node) -> fx.Reading | None:
    """To ATen a size of 0 is 0."""
    operands = (node.args[0], *node.args[1])  # type: ignore[misc]
    return operands, {"allowzero": 0 in operands[1:]}


def _read_reshape(node: onnx_ir.Node) -> onnx.Reading | None:
    x, sizes = node.inputs[0], onnx.integers_of(node.inputs[1])
    allowed = bool(onnx.attribute(node, "allowzero", 0))
    if sizes is None:
        return tuple(node.inputs), {"allowzero": allowed}
    if allowed or x is None or 0 not in sizes:
        return (x, *sizes), {"allowzero": allowed and 0 in sizes}
    own = () if x.shape is None else [d if isinstance(d, int) else 0 for d in x.shape.dims]
    kept = [s or size for s, size in itertools.zip_longest(sizes, own[: len(sizes)], fillvalue=0)]
    return (x, *kept), {"allowzero": False}


def _expand(x: Tensor, *shape: Any) -> Tensor:
    """Broadcast to a shape; -1 keeps a dimension, and so does 1 (ONNX's rule)."""
    sizes = _sizes(shape)
    offset = len(sizes) - x.dim()
    kept = [
        x.shape[i - offset] if i >= offset and s in (-1, 1) else s for i, s in enumerate(sizes)
    ]
    return x.expand(kept)


def _infer_expand(operands: Sequence[Any], attrs: Attrs) -> Types:
    x, *dims = operands
    if x.shape is None or not all(isinstance(d, int) for d in dims):
        return (x.with_shape(None),)
    offset = len(dims) - len(x.shape)
    shape = [
        (x.shape[i - offset] if i >= offset and d in (-1, 1) else d) for i, d in enumerate(dims)
    ]
    return (x.with_shape(shape),)


def _build_aten_expand(graph: Graph, operands: Sequence[Any], attrs: Attrs) -> Node:
    x, *sizes = operands
    rank = fx.rank_of(x)
    new = 0 if rank is None else len(sizes) - rank
    kept = [-1 if i >= new and isinstance(s, int) and s == 1 else s for i, s in enumerate(sizes)]
    return fx.call(graph, aten.expand.default, (x, kept))


def _build_aten_reshape(graph: Graph, operands: Sequence[Any], attrs: Attrs) -> Node:
    x, *sizes = operands
    if not attrs["allowzero"]:
        kept = [i for i, size in enumerate(sizes) if isinstance(size, int) and size == 0]
        for i in kept:
            sizes[i] = fx.call(graph, aten.sym_size.int, (x, i))
    return fx.call(graph, aten.reshape.default, (x, sizes))


def _build_reshape(b: onnx.Emitter, operands: Sequence[Any], attrs: Attrs) -> onnx_ir.Node:
    x, *sizes = operands
    allowed = attrs["allowzero"]
    if _is_vector(sizes):
        return b.emit("Reshape", [x, sizes[0]], {"allowzero": 1} if allowed else {})
    # A size of 0 that is computed is not "as the operand has it".
    computed = not all(isinstance(s, int) for s in sizes) and -1 not in sizes and 0 not in sizes
    exact = computed or (allowed and 0 in sizes)
    return b.emit("Reshape", [x, onnx.vector(b, sizes)], {"allowzero": 1} if exact else {})


def _build_expand(b: onnx.Emitter, operands: Sequence[Any], attrs: Attrs) -> onnx_ir.Node:
    x, *sizes = operands
    sizes = [1 if isinstance(s, int) and s == -1 else s for s in sizes]
    return b.emit("Expand", [x, sizes[0] if _is_vector(sizes) else onnx.vector(b, sizes)])


def _is_vector(sizes: Sequence[Any]) -> bool:
    """Whether all sizes are one operand."""
    return len(sizes) == 1 and isinstance(sizes[0], onnx_ir.Value) and onnx.rank_of(sizes[0]) == 1


# --- the order of dimensions ----------------------------------------------------------------------


def _transpose(x: Tensor, perm: Sequence[int]) -> Tensor:
    return x.permute(list(perm))


def _infer_transpose(operands: Sequence[Any], attrs: Attrs) -> Types:
    x = operands[0]
    if x.shape is None:
        return (x,)
    if sorted(attrs["perm"]) != list(range(len(x.shape))):
        raise ValueError(f"transpose: {x} has not the dimensions of perm={list(attrs['perm'])}")
    return (x.with_shape([x.shape[i] for i in attrs["perm"]]),)


def _decode_transpose(node: Node) -> fx.Reading | None:
    rank = fx.rank_of(node.args[0])
    if rank is None:
        return None
    perm = list(range(rank))
    if node.target is aten.permute.default:
        perm = [d % rank for d in node.args[1]]  # type: ignore[operator, union-attr, misc]
    elif rank == 2 and len(node.args) == 1:
        perm = [1, 0]
    elif len(node.args) == 3:
        a, b = (int(d) % rank for d in node.args[1:])  # type: ignore[arg-type]
        perm[a], perm[b] = b, a
    return node.args[:1], {"perm": tuple(perm)}


def _read_transpose(node: onnx_ir.Node) -> onnx.Reading | None:
    perm = onnx.attribute(node, "perm")
    rank = onnx.rank_of(node.inputs[0])
    if perm is not None:
        return tuple(node.inputs), {"perm": tuple(perm)}
    return None if rank is None else (tuple(node.inputs), {"perm": tuple(reversed(range(rank)))})


# --- dimensions of size one -----------------------------------------------------------------------


def _unsqueeze(x: Tensor, dims: Sequence[int]) -> Tensor:
    rank = x.dim() + len(dims)
    for dim in sorted(d % rank for d in dims):
        x = x.unsqueeze(dim)
    return x


def _infer_unsqueeze(operands: Sequence[Any], attrs: Attrs) -> Types:
    x = operands[0]
    if x.shape is None:
        return (x,)
    rank = len(x.shape) + len(attrs["dims"])
    ones, rest = from_the_left(attrs["dims"], rank), iter(x.shape)
    return (x.with_shape([1 if i in ones else next(rest) for i in range(rank)]),)


def _decode_unsqueeze(node: Node) -> fx.Reading | None:
    rank = fx.rank_of(node.args[0])
    if rank is None:
        return None
    return node.args[:1], {"dims": (node.args[1] % (rank + 1),)}  # type: ignore[operator]


def _build_aten_unsqueeze(graph: Graph, operands: Sequence[Any], attrs: Attrs) -> Node:
    node = operands[0]
    for dim in sorted(attrs["dims"]):
        node = fx.call(graph, aten.unsqueeze.default, (node, dim))
    return node  # type: ignore[no-any-return]


def _squeeze(x: Tensor, dims: Sequence[int]) -> Tensor:
    wrong = [x.shape[d] for d in dims if x.shape[d] != 1]
    if wrong:
        raise ValueError(f"squeeze: a dimension of {wrong[0]} is not 1")
    return x.squeeze(tuple(dims))


def _infer_squeeze(operands: Sequence[Any], attrs: Attrs) -> Types:
    """Dimensions that have a name are 1 where the graph says that they go."""
    x = operands[0]
    if x.shape is None:
        return (x,)
    gone = from_the_left(attrs["dims"], len(x.shape))
    wrong = [d for i, d in enumerate(x.shape) if i in gone and isinstance(d, int) and d != 1]
    if wrong:
        raise ValueError(f"squeeze: a dimension of {wrong[0]} is not 1")
    return (x.with_shape([d for i, d in enumerate(x.shape) if i not in gone]),)


def _is_one(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) and size == 1


def _decode_squeeze(node: Node) -> fx.Reading | None:
    """ATen leaves a dimension that is not 1; the tracer vouches that a symbolic one is not."""
    dims = fx.from_the_left(node, node.args[1])
    val = node.args[0].meta.get("val")  # type: ignore[union-attr]
    if isinstance(val, torch.Tensor):
        dims = tuple(d for d in dims if val.dim() and _is_one(val.shape[d]))
    return node.args[:1], {"dims": dims}


def _build_squeeze(b: onnx.Emitter, operands: Sequence[Any], attrs: Attrs) -> onnx_ir.Node:
    if not attrs["dims"]:  # to ONNX no axes are all axes
        return b.emit("Identity", operands)
    return onnx.with_axes("Squeeze")(b, operands, attrs)


def _read_axes(node: onnx_ir.Node) -> onnx.Reading | None:
    axes = onnx.integers_of(onnx.input_of(node, 1))
    if axes is None:
        return None
    extra = len(axes) if node.op_type == "Unsqueeze" else 0
    rank = onnx.rank_of(node.inputs[0])
    dims = onnx.from_the_left(axes, None if rank is None else rank + extra)
    return tuple(node.inputs[:1]), {"dims": dims}


# --- sizes ----------------------------------------------------------------------------------------


def _size(x: Tensor, dim: int) -> int:
    return x.shape[dim]


def _infer_size(operands: Sequence[Any], attrs: Attrs) -> Types:
    return (Type(torch.int64, ()),)


def _decode_size(node: Node) -> fx.Reading | None:
    return node.args[:1], {"dim": fx.from_the_left(node, node.args[1])[0]}


def _lower_size(e: onnx.Lowering) -> onnx_ir.Value:
    """size(x, d) => squeeze(Shape(x, start=d, end=d+1))

    Where it is wanted as a vector, reshape(size, 1), that is the Shape itself.
    """
    dim, view = e.attrs["dim"], e.view
    view.at(e.node)
    shape = view.emit("Shape", [e.operands[0]], {"start": dim, "end": dim + 1}).outputs[0]
    shape.shape, shape.type = onnx_ir.Shape([1]), onnx_ir.TensorType(onnx_ir.DataType.INT64)
    for user in view.users(e.node.outputs[0]):
        if view.op(user) == "reshape" and view.operands(user)[1:] == (1,):
            view.replace(user.outputs[0], shape)
            view.erase(user)
    scalar: onnx_ir.Value = view.emit("Squeeze", [shape, view.integers([0])]).outputs[0]
    return scalar


OPS = (
    OpSpec(
        name="reshape", operands=("x", "*shape"), attrs={"allowzero": False},
        infer=_infer_reshape, reference=_reshape, rearranges=True,
        aten=AtenForm(_build_aten_reshape, (fx.always(
            _decode_reshape, aten.view.default, aten.reshape.default, aten._unsafe_view.default,
        ),)),
        onnx=OnnxForm(_build_reshape, (onnx.always(_read_reshape, "Reshape"),)),
    ),
    OpSpec(
        name="expand", operands=("x", "*shape"), infer=_infer_expand, reference=_expand,
        rearranges=True,
        aten=AtenForm(_build_aten_expand, (fx.always(fx.shaped, aten.expand.default),)),
        onnx=OnnxForm(_build_expand, (onnx.always(onnx.shaped, "Expand"),)),
    ),
    OpSpec(
        name="transpose", operands=("x",), attrs={"perm": REQUIRED}, infer=_infer_transpose,
        reference=_transpose, rearranges=True,
        aten=AtenForm(fx.calls(aten.permute.default, "perm"), (fx.sometimes(
            _decode_transpose, aten.t.default, aten.transpose.int, aten.permute.default,
            aten.numpy_T.default,
        ),)),
        onnx=OnnxForm(
            onnx.with_attrs("Transpose", perm="perm"),
            (onnx.sometimes(_read_transpose, "Transpose"),),
        ),
    ),
    OpSpec(
        name="unsqueeze", operands=("x",), attrs={"dims": REQUIRED}, infer=_infer_unsqueeze,
        reference=_unsqueeze, rearranges=True,
        aten=AtenForm(
            _build_aten_unsqueeze, (fx.sometimes(_decode_unsqueeze, aten.unsqueeze.default),)
        ),
        onnx=OnnxForm(
            onnx.with_axes("Unsqueeze"), (onnx.sometimes(_read_axes, "Unsqueeze"),)
        ),
    ),
    OpSpec(
        name="squeeze", operands=("x",), attrs={"dims": REQUIRED}, infer=_infer_squeeze,
        reference=_squeeze, rearranges=True,
        aten=AtenForm(
            fx.calls(aten.squeeze.dims, "dims"),
            (fx.always(_decode_squeeze, aten.squeeze.dim, aten.squeeze.dims),),
        ),
        onnx=OnnxForm(_build_squeeze, (onnx.sometimes(_read_axes, "Squeeze"),)),
    ),
    OpSpec(
        name="size", operands=("x",), attrs={"dim": REQUIRED}, infer=_infer_size,
        reference=_size, shape_only=True,
        aten=AtenForm(
            fx.calls(aten.sym_size.int, "dim"), (fx.always(_decode_size, aten.sym_size.int),)
        ),
        onnx=OnnxForm(lower=_lower_size),
    ),
)  # fmt: skip
