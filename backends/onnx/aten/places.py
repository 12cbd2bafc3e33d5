"""Ops that pick, move and repeat what is in a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from onnx_ir import Value

from ....ir.core.errors import Refusal
from ....ir.core.types import UNKNOWN_DIM, Dim, Type
from ....ir.onnx.parts import Operand
from ....ir.vocab import END
from .emit import Emit, Form, aten


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


def _repeat_each(
    e: Emit, x: Value, times: Operand, dim: int | None = None, _: Operand = None
) -> Value:  # fmt: skip
    """Each element along ``dim`` so many times, as heads of keys are for those that share them."""
    if not isinstance(times, int) or dim is None:
        raise Refusal("as many times as is computed, or all elements", e.node)
    axis, sizes = dim % e.rank(x), e.dims(x)
    wide = e.expand(e.unsqueeze(x, dims=(axis + 1,)), *sizes[: axis + 1], times, *sizes[axis + 1 :])
    size = sizes[axis]
    long = size * times if isinstance(size, int) else e.mul(size, times)
    return e.reshape(wide, *sizes[:axis], long, *sizes[axis + 1 :])


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
    zeros = [0] * (rank - pairs)
    starts, ends = list(pads[0::2])[::-1], list(pads[1::2])[::-1]
    vector = e.vector([*zeros, *starts, *zeros, *ends])
    return e.native("Pad", [x, vector, e.number(number, e.dtype)])


def _pad_with(
    e: Emit, x: Value, pads: Sequence[Operand], mode: str = "constant",
    number: Operand | None = None,
) -> Value:  # fmt: skip
    if mode != "constant":
        raise Refusal(f"padding by {mode}", e.node)
    return _pad(e, x, pads, 0 if number is None else number)


def _scatter_reduce(
    e: Emit, x: Value, dim: int, index: Value, source: Value, reduce: str,
    include_self: bool = True,
) -> Value:  # fmt: skip
    """mean => sum / count, of places that something came to; TAPAS has it of the cells of a table.

    torch.onnx (2.13) writes a mean as the last that came.
    """
    if reduce != "mean":
        raise Refusal(f"scatter_reduce by {reduce}", e.node)
    exact = e.dtype if e.dtype.is_floating_point else torch.float64
    held, given = e.cast_to(x, exact), e.cast_to(source, exact)
    axis = {"axis": dim % e.rank(x), "reduction": "add"}
    nothing = e.expand(e.number(0, exact), *e.dims(x))
    one = e.expand(e.number(1, exact), *e.dims(index))

    def summed(values: Value) -> Value:
        return e.native("ScatterElements", [nothing, index, values], axis, Type(exact, e.shape(x)))

    total, count = summed(given), summed(one)
    if include_self:
        total, count = e.add(total, held), e.add(count, 1.0)
    mean = e.div(total, e.clamp(count, min=1.0))
    if exact != e.dtype:
        mean = e.floor(mean)
    return e.cast_to(e.where(e.gt(count, 0.0), mean, held), e.dtype)


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
    aten.select.int: _select,
    aten.index.Tensor: _index,
    aten.stack.default: _stack,
    aten.unbind.int: _unbind,
    aten.repeat.default: _repeat,
    aten.repeat_interleave.self_int: _repeat_each,
    aten.roll.default: _roll,
    aten.flip.default: _flip,
    aten.constant_pad_nd.default: _pad,
    aten.pad.default: _pad_with,
    aten.scatter_reduce.two: _scatter_reduce,
    aten.triu.default: _triangle(True),
    aten.tril.default: _triangle(False),
}
