"""Parts that fused attention is expanded into: heads, masks, rotary positions."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..core.types import UNKNOWN_DIM
from ..core.view import Operand, Value, View, is_value
from ..core.weights import ComputedWeight
from ..rewrite.rule import Build
from ..vocab.builder import Builder
from .fused import Inputs

INTEGER = torch.int64
"""The dtype of positions and lengths, which is that of sizes."""


def size(b: Builder, value: Value, dim: int) -> Any:
    """The size of a dimension: a number where it is known.

    Where an input of the graph has a dimension of this name it is taken from there, so that layers
    share what is computed from it, and none reads a value out of another one.
    """
    known = b.view.type(value).shape
    assert known is not None
    extent = known[dim]
    if isinstance(extent, int):
        return extent
    for source in b.view.inputs() if extent != UNKNOWN_DIM else ():
        shape = b.view.type(source).shape or ()
        if extent in shape:
            return b.size(source, dim=shape.index(extent))
    return b.size(value, dim=dim % len(known))


def shaped(b: Builder, value: Value, *sizes: tuple[Value, int] | int) -> Value:
    """``value`` reshaped to numbers and dimensions of other values, whose names it takes over."""
    parts = [part if isinstance(part, int) else size(b, *part) for part in sizes]
    reshaped = b.reshape(value, *parts)
    for axis, part in enumerate(sizes):
        if not isinstance(part, int):
            name_after(b, reshaped, axis, *part)
    return reshaped


def name_after(b: Builder, value: Value, axis: int, other: Value, dim: int) -> None:
    """Call a dimension as that of another value is called, which it equals."""
    shape = b.view.type(other).shape
    name = None if shape is None else shape[dim]
    if isinstance(name, str) and name != UNKNOWN_DIM:
        b.view.name_dim(value, axis, name)


def plus(b: Build, x: Any, y: Any) -> Any:
    """The sum of two sizes."""
    return x + y if isinstance(x, int) and isinstance(y, int) else b.add(x, y)


def split_heads(b: Build, node: Inputs, x: Value, heads: int) -> Value:
    """[batch, tokens, heads · width] => [batch, heads, tokens, width]"""
    width = node.width(x)
    if heads < 1 or width % heads:
        raise node.refuse(f"{width} features are not those of {heads} heads")
    apart = shaped(b, x, (x, 0), (x, 1), heads, width // heads)
    return b.transpose(apart, perm=(0, 2, 1, 3))


def join_heads(b: Build, node: Inputs, x: Value) -> Value:
    """[batch, heads, tokens, width] => [batch, tokens, heads · width]"""
    width = node.width(x, 1) * node.width(x)
    tokens = b.transpose(x, perm=(0, 2, 1, 3))
    return shaped(b, tokens, (x, 0), (x, 2), width)


def cut(b: Build, node: Inputs, x: Value, widths: tuple[int, ...]) -> list[Value]:
    """Parts of the last dimension, which must add up to it."""
    if sum(widths) != node.width(x):
        raise node.refuse(f"parts of {list(widths)} features are not the {node.width(x)} there are")
    last, start, parts = node.rank(x) - 1, 0, []
    for width in widths:
        parts.append(b.slice(x, start, start + width, dim=last))
        start += width
    return parts


def positions(b: Build, count: Any) -> Value:
    """0, 1, ... ``count`` - 1"""
    return b.arange(0, count, 1, dtype=INTEGER)


def places(b: Build, value: Value, dim: int) -> Value:
    """A position for each index of a dimension."""
    indices = positions(b, size(b, value, dim))
    name_after(b, indices, 0, value, dim)
    return indices


def lowest(node: Inputs, like: Value) -> float:
    """The least finite number of a value's dtype."""
    dtype = node.view.type(like).dtype
    if dtype is None or not dtype.is_floating_point:
        raise node.refuse(f"{node.view.name(like)} is not known to hold floats")
    return torch.finfo(dtype).min


def added(b: Build, *masks: Value | None) -> Value | None:
    """The sum of those masks that are there."""
    total = None
    for mask in masks:
        if mask is not None:
            total = mask if total is None else b.add(total, mask)
    return total


def filled(b: Build, visible: Value, fill: float, like: Value) -> Value:
    """A truth value for each key as what is added to its logit, in the dtype of ``like``."""
    dtype = b.view.type(like).dtype
    assert dtype is not None
    zero = ComputedWeight(lambda: torch.zeros((), dtype=dtype), (), dtype, ("zero", dtype))
    return b.where(visible, b.view.add_weight("zero", zero), fill)


def lifted(b: Build, mask: Value) -> Value:
    """An added float mask of which no element is the least of its dtype, which opset 23's
    ``Attention`` takes for minus infinity in ONNX Runtime: a row of such elements alone gives 0
    there, and the mean of all values as torch adds them. Half of it weighs 0 beside others too."""
    dtype = b.view.type(mask).dtype
    assert dtype is not None
    least = torch.finfo(dtype).min
    return b.where(b.eq(mask, least), least / 2, mask)


def without_lift(view: View, mask: Value) -> Value:
    """The mask that ``lifted`` was given; one that it has not made as it is."""
    maker = view.producer(mask)
    if maker is None or view.op(maker) != "where":
        return mask
    at, half, kept = view.operands(maker)
    test = view.producer(at) if is_value(at) else None
    if not is_value(kept) or test is None or view.op(test) != "eq":
        return mask
    compared, least = view.operands(test)
    numbers = view.number(least), view.number(half)
    if None in numbers or compared is not kept:
        return mask
    whole, part = (float(number or 0) for number in numbers)
    return kept if whole == 2 * part < -1e38 else mask


def padding(b: Build, node: Inputs, mask: Value, keys: Value, batch: Value) -> Value:
    """Which keys a fused attention's mask lets be seen, [batch, 1, 1 or queries, keys].

    It is 0 and 1 for each key, or for each query and key, or a number of keys for each row.
    """
    rank = node.rank(mask)
    if rank == 2:
        return b.unsqueeze(b.gt(mask, 0), dims=(1, 2))
    if rank == 3:
        return b.unsqueeze(b.gt(mask, 0), dims=(1,))
    if rank != 1:
        raise node.refuse(f"a mask of {rank} dimensions is not read")
    counts, rows = (b.view.type(v).shape or ("?",) for v in (mask, batch))
    if counts[0] != rows[0]:
        raise node.refuse(f"the mask {b.view.type(mask)} is not known to be one number for a row")
    ends = b.unsqueeze(b.cast(mask, dtype=torch.int64), dims=(1, 2, 3))
    return b.lt(places(b, keys, 2), ends)


def causal(b: Build, queries: Value, keys: Value, before: Operand) -> Value:
    """Which of the keys a query sees, [queries, keys]: those up to its own place, ``before`` of
    them having been there before the first query. Both are [batch, heads, tokens, width]."""
    rows = b.add(places(b, queries, 2), before)
    return b.le(places(b, keys, 2), b.unsqueeze(rows, dims=(1,)))


# --- rotary positions -----------------------------------------------------------------------------


def rotate(
    b: Build, node: Inputs, x: Value, cos: Value, sin: Value, *, interleaved: bool
) -> Value:
    """Turn the first features of ``x`` [batch, heads, tokens, width] by the half tables ``cos`` and
    ``sin`` [batch or 1, tokens, r / 2]; features beyond r stay.

    Pairs are features r / 2 apart, or neighbours where ``interleaved``.
    """
    width, turned = node.width(x), 2 * node.width(cos)
    if turned > width:
        raise node.refuse(f"the tables turn {turned} of {width} features")
    head = x if turned == width else b.slice(x, 0, turned, dim=3)
    halves = [b.unsqueeze(table, dims=(1,)) for table in (cos, sin)]
    if interleaved:
        result = _rotate_neighbours(b, head, *halves)
    else:
        wide = [b.concat(table, table, dim=3) for table in halves]
        result = b.rope(head, *wide)
    if turned == width:
        return result
    return b.concat(result, b.slice(x, turned, width, dim=3), dim=3)


def _rotate_neighbours(b: Build, x: Value, cos: Value, sin: Value) -> Value:
    width = size(b, x, 3)
    even, odd = (b.slice(x, start, width, dim=3, step=2) for start in (0, 1))
    first = b.sub(b.mul(even, cos), b.mul(odd, sin))
    second = b.add(b.mul(even, sin), b.mul(odd, cos))
    pairs = b.concat(b.unsqueeze(first, dims=(4,)), b.unsqueeze(second, dims=(4,)), dim=4)
    return shaped(b, pairs, (x, 0), (x, 1), (x, 2), (x, 3))


def rows_of(b: Build, table: Value, places: Value) -> Value:
    """Rows of a table of rotary positions, [batch, tokens, r / 2]."""
    return b.index_select(table, b.cast(places, dtype=torch.int64), dim=0)


def default_scale(node: Inputs, width: int) -> float:
    """The scale of the logits: 1/√width where the node gives none, or 0."""
    return float(node.attr("scale", 0.0)) or 1 / math.sqrt(width)
