"""ATen ops outside the vocabulary as ONNX: a table, and what its entries build with.

An entry gets an FX node's arguments in the order of the op's schema, tensors and sizes as ONNX
values, and returns what stands for its result (a tuple for several). It raises ``Refusal`` where it
does not cover a use; that node goes through ``torch.onnx`` then.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import onnx_ir
import torch
from onnx_ir import Value
from onnx_ir.tensor_adapters import from_torch_dtype
from torch.fx.node import Node as FxNode

from ..ir.core.errors import Refusal
from ..ir.core.types import UNKNOWN_DIM, Dim, Type
from ..ir.fx.read import GETITEM
from ..ir.onnx.builder import OnnxBuilder
from ..ir.onnx.parts import End, Operand, set_type
from ..ir.onnx.view import OnnxView
from ..ir.vocab import END

aten = torch.ops.aten
Form = Callable[..., Any]


class Emit(OnnxBuilder):
    """Builds at the end of an ONNX graph, in the name and scope of one FX node.

    ``e.add(x, 1)`` builds an op of the vocabulary, ``e.native`` a node that it has no word for.
    """

    def __init__(self, view: OnnxView, node: FxNode, place: End, result: Type) -> None:
        super().__init__(view, place)
        self.node = node
        self.result = result

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the node's result."""
        if self.result.dtype is None:
            raise Refusal("the result is not a tensor", self.node)
        return self.result.dtype

    def native(
        self, op_type: str, inputs: Sequence[Value | None],
        attrs: Mapping[str, Any] | None = None, type_: Type | None = None,
    ) -> Value:  # fmt: skip
        """A node of stock ONNX; its type is that of the FX node unless another is given."""
        self.view.at(self.before)
        value = self.view.emit(op_type, inputs, attrs).outputs[0]
        set_type(value, self.result if type_ is None else type_)
        return value

    def shape(self, x: Value) -> tuple[Dim, ...]:
        shape = self.view.type(x).shape
        if shape is None:
            raise Refusal(f"the shape of {self.view.name(x)} is not known", self.node)
        return shape

    def rank(self, x: Value) -> int:
        return len(self.shape(x))

    def dims(self, x: Value) -> list[Operand]:
        """The sizes of a value: numbers where they are known, else taken in the graph."""
        sizes = enumerate(self.shape(x))
        return [d if isinstance(d, int) else self.size(x, dim=i) for i, d in sizes]

    def number(self, number: Operand, dtype: torch.dtype) -> Value:
        """A number, or a size, as a tensor without dimensions."""
        if isinstance(number, Value):
            return self.cast_to(number, dtype)
        if not dtype.is_floating_point:
            number = bool(number) if dtype == torch.bool else int(number or 0)
        like = Value(name=None, type=onnx_ir.TensorType(from_torch_dtype(dtype)))
        return self.view.scalar(number, like)

    @overload
    def cast_to(self, x: Value, dtype: torch.dtype) -> Value: ...

    @overload
    def cast_to(self, x: Operand, dtype: torch.dtype) -> Operand: ...

    def cast_to(self, x: Operand, dtype: torch.dtype) -> Operand:
        """A tensor in a dtype. A number takes that of the tensor that it meets, and of whole
        numbers as many bits as that has: torch compares a u8 with 255 where -1 is written."""
        if isinstance(x, int) and dtype != torch.bool and not dtype.is_floating_point:
            return int(torch.tensor(x).to(dtype))
        if not isinstance(x, Value) or self.view.type(x).dtype == dtype:
            return x
        return self.cast(x, dtype=dtype)

    def vector(self, items: Sequence[Operand]) -> Value:
        """Numbers and sizes in a row: i64 ``[len(items)]``."""
        numbers = [item for item in items if isinstance(item, int)]
        if len(numbers) == len(items):
            return self.view.integers(numbers)
        parts = [
            self.view.integers([item]) if isinstance(item, int) else self.reshape(item, 1)
            for item in items
        ]
        return self.concat(*parts, dim=0)


# --- sizes ---------------------------------------------------------------------------------------


def _floordiv(e: Emit, a: Operand, b: Operand) -> Operand:
    """a // b of whole numbers: exact division of what is left after the remainder goes."""
    return e.div(e.sub(a, _mod(e, a, b)), b)


def _mod(e: Emit, a: Operand, b: Operand) -> Value:
    """The remainder with the sign of the divisor, as Python and ONNX's integer Mod have it."""
    like = a if isinstance(a, Value) else b
    assert isinstance(like, Value)  # what takes two numbers is not in the graph
    pair = [e.number(item, e.view.type(like).dtype or torch.int64) for item in (a, b)]
    return e.native("Mod", pair, type_=e.view.type(like))


def _divided(e: Emit, a: Operand, b: Operand) -> Operand:
    """a // b, by a plain division where neither can be negative."""
    signs = [is_never_negative(arg) for arg in e.node.args]
    return e.div(a, b) if all(signs) else _floordiv(e, a, b)


def is_never_negative(arg: Any) -> bool:
    """Whether an argument of an FX node is a number or a size that is known to be 0 or above."""
    value = arg.meta.get("val") if isinstance(arg, FxNode) else arg
    if isinstance(value, torch.SymInt):
        return bool(value.node.expr.is_nonnegative)
    return isinstance(value, int) and value >= 0


def _item(e: Emit, x: Value) -> Value:
    """The only number of a tensor: of whole numbers as a size, of floats in their dtype."""
    dtype = e.view.type(x).dtype
    is_float = dtype is not None and dtype.is_floating_point
    return e.reshape(x if is_float else e.cast_to(x, torch.int64))


# --- filled tensors ------------------------------------------------------------------------------


def _filled(e: Emit, sizes: Sequence[Operand], number: Operand) -> Value:
    value = e.number(number, e.dtype)
    return e.expand(value, *sizes) if sizes else value


def _full(e: Emit, sizes: Sequence[Operand], number: Operand, *_: Any) -> Value:
    return _filled(e, sizes, number)


def _constant(number: float) -> Form:
    return lambda e, sizes, *_: _filled(e, sizes, number)


def _new(number: float) -> Form:
    return lambda e, x, sizes, *_: _filled(e, sizes, number)


def _new_full(e: Emit, x: Value, sizes: Sequence[Operand], number: Operand, *_: Any) -> Value:
    return _filled(e, sizes, number)


def _like(number: float) -> Form:
    return lambda e, x, *_: _filled(e, e.dims(x), number)


def _full_like(e: Emit, x: Value, number: Operand, *_: Any) -> Value:
    return _filled(e, e.dims(x), number)


def _scalar_tensor(e: Emit, number: Operand, *_: Any) -> Value:
    return e.number(number, e.dtype)


# --- elementwise ---------------------------------------------------------------------------------


OF_BOOLS = {
    "mul": "logical_and", "add": "logical_or", "minimum": "logical_and", "maximum": "logical_or",
}  # fmt: skip
"""What these ops are on truth values, which ONNX's take none of."""


def _promoted(op: str) -> Form:
    """An op of the vocabulary on operands in the dtype of the result."""

    def form(e: Emit, a: Operand, b: Operand) -> Value:
        fitting = OF_BOOLS.get(op, op) if e.dtype == torch.bool else op
        return e.build(fitting, *(e.cast_to(x, e.dtype) for x in (a, b)))

    return form


def _scaled_sum(op: str) -> Form:
    """add(a, b, alpha) => add(a, alpha b)"""

    def form(e: Emit, a: Operand, b: Operand, alpha: float = 1) -> Value:
        a, b = (e.cast_to(x, e.dtype) for x in (a, b))
        assert b is not None
        scaled = e.mul(b, alpha) if isinstance(b, Value) else b * alpha
        return e.build(op, a, scaled)

    return form


def _rsub(e: Emit, a: Value, b: Operand, alpha: Operand = 1) -> Value:
    if alpha != 1:
        raise Refusal(f"rsub with alpha={alpha}", e.node)
    return e.sub(e.cast_to(b, e.dtype), e.cast_to(a, e.dtype))


def _div(e: Emit, a: Operand, b: Operand, rounding_mode: str | None = None) -> Operand:
    if rounding_mode == "trunc" and e.dtype.is_floating_point:
        raise Refusal("division of floats that rounds towards zero", e.node)
    a, b = (e.cast_to(x, e.dtype) for x in (a, b))
    if rounding_mode == "floor" and not e.dtype.is_floating_point:
        return _floordiv(e, a, b)
    quotient = e.div(a, b)
    return e.floor(quotient) if rounding_mode == "floor" else quotient


def _floor_divide(e: Emit, a: Operand, b: Operand) -> Operand:
    return _div(e, a, b, "floor")


def _remainder(e: Emit, a: Operand, b: Operand) -> Value:
    """The remainder with the sign of the divisor, as torch has it: exact, and ``a`` by infinity."""
    a, b = (e.cast_to(x, e.dtype) for x in (a, b))
    if not e.dtype.is_floating_point:
        return _mod(e, a, b)
    rest = e.native("Mod", [e.number(x, e.dtype) for x in (a, b)], {"fmod": 1})
    if isinstance(b, int | float):
        beyond = e.lt(rest, 0.0) if b > 0 else e.gt(rest, 0.0)
    else:
        beyond = e.logical_and(e.ne(rest, 0.0), e.ne(e.lt(rest, 0.0), e.lt(b, 0.0)))
    return e.where(beyond, e.add(rest, b), rest)


def _same(op_type: str, **attrs: Any) -> Form:
    """An ONNX op that does what the ATen op does, on tensors of the result's dtype."""
    return lambda e, *xs: e.native(op_type, [e.cast_to(x, e.dtype) for x in xs], attrs)


def _rounded(op_type: str) -> Form:
    """A rounding, which leaves whole numbers; ONNX's takes floats only."""

    def form(e: Emit, x: Value) -> Value:
        return e.native(op_type, [x]) if e.dtype.is_floating_point else x

    return form


def _xor(e: Emit, a: Value, b: Value) -> Value:
    if e.dtype != torch.bool:
        return e.native("BitwiseXor", [e.cast_to(x, e.dtype) for x in (a, b)])
    return e.native("Xor", [e.cast_to(x, torch.bool) for x in (a, b)])


def _masked_fill(e: Emit, x: Value, mask: Value, number: Operand) -> Value:
    return e.where(mask, e.number(number, e.dtype), e.cast_to(x, e.dtype))


def _leaky_relu(e: Emit, x: Value, slope: float = 0.01) -> Value:
    return e.native("LeakyRelu", [x], {"alpha": float(slope)})


def _elu(e: Emit, x: Value, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Value:
    if (scale, input_scale) != (1, 1):
        raise Refusal("elu with scales", e.node)
    return e.native("Elu", [x], {"alpha": float(alpha)})


def _hardtanh(e: Emit, x: Value, low: float = -1, high: float = 1) -> Value:
    return e.clamp(x, min=low, max=high)


def _type_as(e: Emit, x: Value, y: Value) -> Operand:
    return e.cast_to(x, e.dtype)


def _softmax(e: Emit, x: Value, dim: int, *_: Any) -> Value:
    return e.softmax(e.cast_to(x, e.dtype), dim=dim % max(e.rank(x), 1))


def _log_softmax(e: Emit, x: Value, dim: int, *_: Any) -> Value:
    return e.native("LogSoftmax", [e.cast_to(x, e.dtype)], {"axis": dim})


# --- sums and norms ------------------------------------------------------------------------------


def _vector_norm(
    e: Emit, x: Value, order: float = 2, dim: Any = None, keepdim: bool = False, *_: Any
) -> Value:
    """norm(x, 2) => sqrt(sum(x x)), of half precision in f32: a square is out of range soon"""
    if order != 2:
        raise Refusal(f"a norm of order {order}", e.node)
    dims = _all_dims(e, x, dim)
    x = e.cast_to(x, torch.promote_types(e.dtype, torch.float32))
    return e.cast_to(e.sqrt(e.sum(e.mul(x, x), dims=dims, keepdim=bool(keepdim))), e.dtype)


def _all_dims(e: Emit, x: Value, dim: Any) -> tuple[int, ...]:
    rank = e.rank(x)
    dims = [dim] if isinstance(dim, int) else list(dim or range(rank))
    return tuple(d % rank for d in dims)


def _any(reduction: str) -> Form:
    """any(x) => amax(x), all(x) => amin(x), of what is not zero"""

    def form(e: Emit, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
        bits = e.cast_to(e.cast_to(x, torch.bool), torch.int32)
        best = e.build(reduction, bits, dims=_all_dims(e, x, dim), keepdim=bool(keepdim))
        # Of nothing, the greatest is the least number that there is.
        return e.cast_to(e.gt(best, 0), e.dtype)

    return form


def _arg(op_type: str) -> Form:
    def form(e: Emit, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
        if dim is None:
            return e.native(op_type, [e.reshape(x, -1)], {"axis": 0, "keepdims": 0})
        return e.native(op_type, [x], {"axis": dim, "keepdims": int(keepdim)})

    return form


def _addmm(e: Emit, b: Value, x: Value, w: Value, beta: float = 1, alpha: float = 1) -> Value:
    """addmm(b, x, w) => add(matmul(x, w), b)"""
    if (beta, alpha) != (1, 1):
        raise Refusal(f"addmm with beta={beta} and alpha={alpha}", e.node)
    return e.add(e.matmul(x, w), b)


def _first_alone(e: Emit) -> None:
    """Refuse unless nothing but the first of the node's results is read."""
    items = [user for user in e.node.users if user.target is GETITEM]
    if any(item.users and item.args[1] != 0 for item in items):
        raise Refusal("results beside the first are read", e.node)


def _batch_norm(
    e: Emit, x: Value, weight: Value | None, bias: Value | None, mean: Value, var: Value,
    momentum: float, eps: float,
) -> tuple[Value]:  # fmt: skip
    _first_alone(e)
    if weight is None or bias is None:
        raise Refusal("batch_norm without weight or bias", e.node)
    inputs = [x, weight, bias, mean, var]
    return (e.native("BatchNormalization", inputs, {"epsilon": eps}),)


def _batch_norm_of(
    e: Emit, x: Value, weight: Value | None, bias: Value | None, mean: Value, var: Value,
    training: bool, momentum: float, eps: float, *_: Any,
) -> Value:  # fmt: skip
    if training:
        raise Refusal("batch_norm that takes its statistics from the batch", e.node)
    return _batch_norm(e, x, weight, bias, mean, var, momentum, eps)[0]


def _native_layer_norm(
    e: Emit, x: Value, shape: Sequence[int], weight: Value | None, bias: Value | None, eps: float
) -> tuple[Value]:
    _first_alone(e)
    return (e.layer_norm(x, weight, bias, dims=len(shape), eps=eps),)


def _mean_pool(e: Emit, x: Value, size: Sequence[int]) -> Value:
    """adaptive_avg_pool2d(x, [1, 1]) => mean(x, the last two)"""
    if list(size) != [1, 1]:
        raise Refusal(f"adaptive pooling to {list(size)}", e.node)
    rank = e.rank(x)
    return e.mean(x, dims=(rank - 2, rank - 1), keepdim=True)


def _convolution(
    e: Emit, x: Value, weight: Value, bias: Value | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], transposed: bool,
    output_padding: Sequence[int], groups: int,
) -> Value:  # fmt: skip
    if not transposed:
        raise Refusal("a convolution of an unknown rank", e.node)
    return _conv_transpose(e, x, weight, bias, stride, padding, output_padding, groups, dilation)


def _conv_transpose(
    e: Emit, x: Value, weight: Value, bias: Value | None, stride: Sequence[int],
    padding: Sequence[int], output_padding: Sequence[int], groups: int, dilation: Sequence[int],
) -> Value:  # fmt: skip
    space = e.rank(x) - 2

    def wide(sizes: Sequence[int]) -> list[int]:
        return list(sizes) * (space if len(sizes) == 1 else 1)

    attrs = {
        "strides": wide(stride), "dilations": wide(dilation), "group": groups,
        "pads": wide(padding) * 2, "output_padding": wide(output_padding),
    }  # fmt: skip
    inputs = [x, weight] if bias is None else [x, weight, bias]
    return e.native("ConvTranspose", inputs, attrs)


# --- places --------------------------------------------------------------------------------------


def _select(e: Emit, x: Value, dim: int, index: Operand) -> Value:
    """select(x, dim, i) => index_select(x, i, dim) of a single place"""
    place = index if isinstance(index, Value) else e.number(index, torch.int64)
    return e.index_select(x, place, dim=dim % e.rank(x))


def _index(e: Emit, x: Value, indices: Sequence[Value | None]) -> Value:
    """x[i, j] => GatherND(x, the indices side by side), the indexed dimensions in front."""
    places = [i for i, index in enumerate(indices) if index is not None]
    chosen = [index for index in indices if index is not None]
    if any(e.view.type(index).dtype not in (torch.int64, torch.int32) for index in chosen):
        raise Refusal("an index that is not a whole number: its result has no known size", e.node)
    if len(chosen) == 1:
        return e.index_select(x, chosen[0], dim=places[0])
    rank, width = e.rank(x), max(e.rank(index) for index in chosen)
    rest = [d for d in range(rank) if d not in places]
    perm = (*places, *rest)
    front = x if perm == tuple(range(rank)) else e.transpose(x, perm=perm)
    columns = [e.unsqueeze(index, dims=(width,)) for index in _broadcast(e, chosen, width)]
    table = e.concat(*columns, dim=width)
    first = places[0]
    adjacent = places == list(range(first, first + len(places)))
    shape = e.result.shape
    if not adjacent or not first:
        return e.native("GatherND", [front, table])
    if shape is None:
        raise Refusal("the shape of the result is not known", e.node)
    moved = (*shape[first : first + width], *shape[:first], *shape[first + width :])
    gathered = e.native("GatherND", [front, table], type_=Type(e.dtype, moved))
    back = (*range(width, width + first), *range(width), *range(width + first, len(shape)))
    return e.transpose(gathered, perm=back)


def _broadcast(e: Emit, indices: Sequence[Value], rank: int) -> list[Value]:
    """Indices in one shape. Zeros of the others' shapes are added: no size has to be known."""
    indices = [e.cast_to(index, torch.int64) for index in indices]
    wide = []
    for index in indices:
        for other in indices:
            if other is not index and not _covers(e.shape(index), e.shape(other)):
                index = e.add(index, e.mul(other, 0))
        missing = rank - e.rank(index)
        wide.append(e.unsqueeze(index, dims=tuple(range(missing))) if missing else index)
    return wide


def _covers(ours: tuple[Dim, ...], theirs: tuple[Dim, ...]) -> bool:
    """Whether a tensor keeps its shape when it meets another."""
    pairs = zip(reversed(ours), reversed(theirs), strict=False)
    return len(ours) >= len(theirs) and all(y in (1, x) and y != UNKNOWN_DIM for x, y in pairs)


def _stack(e: Emit, xs: Sequence[Value], dim: int = 0) -> Value:
    dim %= e.rank(xs[0]) + 1
    return e.concat(*[e.unsqueeze(x, dims=(dim,)) for x in xs], dim=dim)


def _unbind(e: Emit, x: Value, dim: int = 0) -> tuple[Value, ...]:
    dim %= e.rank(x)
    count = e.shape(x)[dim]
    if not isinstance(count, int):
        raise Refusal(f"unbind of {count} parts", e.node)
    return tuple(_select(e, x, dim, i) for i in range(count))


def _repeat(e: Emit, x: Value, times: Sequence[Operand]) -> Value:
    missing = len(times) - e.rank(x)
    wide = e.unsqueeze(x, dims=tuple(range(missing))) if missing else x
    return e.native("Tile", [wide, e.vector(times)])


def _roll(e: Emit, x: Value, shifts: Any, dims: Any = ()) -> Value:
    shifts = [shifts] if isinstance(shifts, int) else list(shifts)
    dims = [dims] if isinstance(dims, int) else list(dims)
    if not dims or not all(isinstance(shift, int) for shift in shifts):
        raise Refusal("a roll of all elements, or by a computed distance", e.node)
    for shift, dim in zip(shifts, (d % e.rank(x) for d in dims), strict=True):
        size = e.shape(x)[dim]
        if not isinstance(size, int) or not size:
            raise Refusal(f"a roll along a dimension of {size}", e.node)
        cut = size - shift % size
        head, tail = e.slice(x, 0, cut, dim=dim), e.slice(x, cut, END, dim=dim)
        x = e.concat(tail, head, dim=dim)
    return x


def _flip(e: Emit, x: Value, dims: Sequence[int]) -> Value:
    for dim in dims:
        x = e.slice(x, -1, -END, dim=dim % e.rank(x), step=-1)
    return x


def _pad(e: Emit, x: Value, pads: Sequence[Operand], number: Operand = 0) -> Value:
    """Pads come in pairs, the last dimension first; ONNX wants all starts and then all ends."""
    rank, pairs = e.rank(x), len(pads) // 2
    kept = [0] * (rank - pairs)
    starts, ends = list(pads[0::2])[::-1], list(pads[1::2])[::-1]
    vector = e.vector([*kept, *starts, *kept, *ends])
    return e.native("Pad", [x, vector, e.number(number, e.dtype)])


def _pad_with(
    e: Emit, x: Value, pads: Sequence[Operand], mode: str = "constant",
    number: Operand | None = None,
) -> Value:  # fmt: skip
    if mode != "constant":
        raise Refusal(f"padding by {mode}", e.node)
    return _pad(e, x, pads, 0 if number is None else number)


def _triangle(upper: bool) -> Form:
    def form(e: Emit, x: Value, diagonal: Operand = 0) -> Value:
        inputs = [x] if diagonal == 0 else [x, e.number(diagonal, torch.int64)]
        if e.dtype in _TRILU:
            return e.native("Trilu", inputs, {"upper": int(upper)})
        wide = torch.float32 if e.dtype.is_floating_point else torch.int64
        inputs[0], type_ = e.cast_to(x, wide), Type(wide, e.result.shape)
        return e.cast_to(e.native("Trilu", inputs, {"upper": int(upper)}, type_), e.dtype)

    return form


_TRILU = frozenset({torch.float32, torch.float64, torch.int64, torch.bool})
"""The dtypes that ONNX Runtime (1.31) has ``Trilu`` of."""


FORMS: dict[Any, Form] = {
    operator.add: lambda e, a, b: e.add(a, b),
    operator.sub: lambda e, a, b: e.sub(a, b),
    operator.mul: lambda e, a, b: e.mul(a, b),
    operator.neg: lambda e, a: e.neg(a),
    operator.floordiv: _divided,
    operator.mod: _mod,
    torch.sym_max: lambda e, a, b: e.maximum(a, b),
    torch.sym_min: lambda e, a, b: e.minimum(a, b),
    aten._local_scalar_dense.default: _item,
    aten.item.default: _item,
    aten.zeros.default: _constant(0),
    aten.ones.default: _constant(1),
    aten.full.default: _full,
    aten.new_zeros.default: _new(0),
    aten.new_ones.default: _new(1),
    aten.new_full.default: _new_full,
    aten.zeros_like.default: _like(0),
    aten.ones_like.default: _like(1),
    aten.full_like.default: _full_like,
    aten.scalar_tensor.default: _scalar_tensor,
    aten.min.other: _promoted("minimum"),
    aten.max.other: _promoted("maximum"),
    aten.add.Tensor: _scaled_sum("add"),
    aten.add.Scalar: _scaled_sum("add"),
    aten.sub.Tensor: _scaled_sum("sub"),
    aten.sub.Scalar: _scaled_sum("sub"),
    aten.rsub.Scalar: _rsub,
    aten.rsub.Tensor: _rsub,
    aten.div.Tensor: _div,
    aten.div.Scalar: _div,
    aten.div.Tensor_mode: _div,
    aten.div.Scalar_mode: _div,
    aten.floor_divide.default: _floor_divide,
    aten.remainder.Scalar: _remainder,
    aten.remainder.Tensor: _remainder,
    aten.masked_fill.Scalar: _masked_fill,
    aten.masked_fill.Tensor: _masked_fill,
    aten.ceil.default: _rounded("Ceil"),
    aten.round.default: _rounded("Round"),
    aten.sign.default: _same("Sign"),
    aten.tan.default: _same("Tan"),
    aten.logical_xor.default: _xor,
    aten.bitwise_xor.Tensor: _xor,
    aten.__xor__.Tensor: _xor,
    aten.leaky_relu.default: _leaky_relu,
    aten.elu.default: _elu,
    aten.hardtanh.default: _hardtanh,
    aten.type_as.default: _type_as,
    aten.softmax.int: _softmax,
    aten.log_softmax.int: _log_softmax,
    aten._log_softmax.default: _log_softmax,
    aten.linalg_vector_norm.default: _vector_norm,
    aten.any.default: _any("amax"),
    aten.any.dim: _any("amax"),
    aten.all.default: _any("amin"),
    aten.all.dim: _any("amin"),
    aten.argmax.default: _arg("ArgMax"),
    aten.argmin.default: _arg("ArgMin"),
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _addmm,
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten.native_layer_norm.default: _native_layer_norm,
    aten.adaptive_avg_pool2d.default: _mean_pool,
    aten._adaptive_avg_pool2d.default: _mean_pool,
    aten.batch_norm.default: _batch_norm_of,
    aten.convolution.default: _convolution,
    aten.conv_transpose1d.default: _conv_transpose,
    aten.conv_transpose2d.input: _conv_transpose,
    aten.select.int: _select,
    aten.index.Tensor: _index,
    aten.stack.default: _stack,
    aten.unbind.int: _unbind,
    aten.repeat.default: _repeat,
    aten.roll.default: _roll,
    aten.flip.default: _flip,
    aten.constant_pad_nd.default: _pad,
    aten.pad.default: _pad_with,
    aten.triu.default: _triangle(True),
    aten.tril.default: _triangle(False),
}
"""Native target to its form."""
