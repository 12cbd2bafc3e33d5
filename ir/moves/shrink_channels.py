"""The move *shrink channels*: whole heads or units go, from the linears that make them to the one
that takes them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import Refusal
from ..core.view import Node, Value, View
from ..core.weights import Spool, Weight
from ..structure.channels import GROUPS, SHARED, Axis, Channels, Part
from ..structure.recognize import Linear
from ..structure.weights import readers
from ..vocab.builder import Builder


@dataclass(frozen=True)
class Kept:
    """Which channels stay: for each axis of parts, the indices among all its numbers."""

    sizes: Mapping[str, int]
    """The new size of each named part."""
    indices: Mapping[Axis, Tensor]

    def size(self, axis: Axis) -> int | None:
        """The new size of an axis; ``None`` where it stays as it is."""
        if not any(part.name for part in axis):
            return None
        size = 1
        for part in axis:
            count = self.sizes.get(part.name, part.size)
            assert isinstance(count, int)
            size *= count
        return size


def kept_units(channels: Channels, units: Sequence[int]) -> Kept:
    """Those of a feed-forward, ascending. Raises ``Refusal`` where none is left."""
    if not units:
        raise Refusal("no unit would be left")
    (axis,) = set(channels.sources.values())
    index = torch.tensor(sorted(units))
    return Kept({axis[0].name: len(index)}, {axis: index})


def kept_heads(channels: Channels, heads: Sequence[int]) -> Kept:
    """Query heads, ascending. Heads that share keys stay in equal numbers, or go together.

    Raises ``Refusal`` where they do not, and where none is left.
    """
    axes = set(channels.sources.values())
    queries, keys = max(axes, key=len), min(axes, key=len)
    groups, width = _number(keys[0]), _number(keys[-1])
    each = _number(queries[1]) if len(queries) > 2 else 1
    by_group: dict[int, list[int]] = {}
    for head in sorted(heads):
        by_group.setdefault(head // each, []).append(head)
    counts = {len(members) for members in by_group.values()}
    if not counts:
        raise Refusal("no head would be left")
    if len(counts) > 1:
        raise Refusal(
            f"heads that share keys would be removed unevenly: of {each} each, "
            f"{', '.join(str(len(by_group.get(g, ()))) for g in range(groups))} would stay"
        )
    columns = torch.arange(width)

    def numbers(chosen: Sequence[int]) -> Tensor:
        return (torch.tensor(chosen)[:, None] * width + columns).flatten()

    indices = {keys: numbers(list(by_group))}
    indices[queries] = numbers([head for members in by_group.values() for head in members])
    return Kept({GROUPS: len(by_group), SHARED: counts.pop()}, indices)


def _number(part: Part) -> int:
    assert isinstance(part.size, int)
    return part.size


@dataclass(frozen=True)
class Shrunk:
    """What becomes of one place."""

    channels: Channels
    kept: Kept
    sink: Tensor | None = None
    """``[out, kept]`` in place of the sink's columns that stay."""
    bias: Tensor | None = None
    """``[out]``, added to the sink's own."""


def reason_against_shrinking(view: View, channels: Channels) -> str | None:
    """Why channels cannot be taken away here, whichever they are; ``None`` where they can."""
    for linear in (*channels.linears.values(), channels.sink):
        reason = _reason_against(view, linear)
        if reason is not None:
            return reason
    for node in channels.nodes:
        if view.op(node) not in ("reshape", "expand"):
            continue
        if _written(view, node, channels, Kept({}, {})) is None:
            return f"{view.name(node)} computes sizes that cannot be written anew"
    return None


def _reason_against(view: View, linear: Linear) -> str | None:
    if view.op(linear.node) != "linear" or view.weight(view.tensor(linear.node, 1)) is None:
        return f"{linear.name} is stored in another form already: put this pass first"
    if len(readers(view, linear.weight)) > 1:
        return f"the weight of {linear.name} is shared"
    if linear.bias is not None and view.weight(linear.bias) is None:
        return f"the bias of {linear.name} is computed"
    if linear.bias is not None and len(view.users(linear.bias)) > 1:
        return f"the bias of {linear.name} is shared"
    return None


def shrink_channels(
    view: View, places: Sequence[Shrunk], *, spool: Spool, rule: str, step: int = 0
) -> None:
    """Keep of the sources' rows and of the sinks' columns what is kept, and the sizes between.

    Where what goes is zero on either side, and no sink or bias is given, the graph computes what it
    did. The weights' names stay. Raises ``Refusal`` as ``reason_against_shrinking``, before
    anything is changed.
    """
    for place in places:
        reason = reason_against_shrinking(view, place.channels)
        if reason is not None:
            raise Refusal(reason, place.channels.sink.node)
    with view.made_by(rule, step), view.one_edit():
        for place in places:
            _shrink(view, place, spool)


def _shrink(view: View, place: Shrunk, spool: Spool) -> None:
    channels, kept = place.channels, place.kept
    for name, axis in channels.sources.items():
        _keep_rows(view, channels.linears[name], kept.indices[axis], spool)
    for node in channels.nodes:
        _renew(view, node, channels, kept)
    _keep_columns(view, channels, kept, place.sink, spool)
    if place.bias is not None:
        _add_bias(view, channels.sink, place.bias, spool)


def _keep_rows(view: View, linear: Linear, index: Tensor, spool: Spool) -> None:
    for value in (linear.weight, linear.bias):
        if value is not None:
            view.resize_weight(value, spool.store(_held(view, value).read()[index]))


def _keep_columns(
    view: View, channels: Channels, kept: Kept, columns: Tensor | None, spool: Spool
) -> None:
    value = channels.sink.weight
    weight = _held(view, value).read()
    index = _taken(channels, kept)
    matrix = weight[:, index] if columns is None else columns.to(weight.dtype)
    if matrix.shape != (len(weight), len(index)):
        raise Refusal(f"{list(matrix.shape)} are not the columns that stay of {channels.sink.name}")
    view.resize_weight(value, spool.store(matrix))


def _taken(channels: Channels, kept: Kept) -> Tensor:
    """Which columns of the sink stay. Parts of size 1 may have left the axis on the way."""
    real = tuple(part for part in channels.taken if part.size != 1)
    for axis, index in kept.indices.items():
        if tuple(part for part in axis if part.size != 1) == real:
            return index
    raise Refusal(f"{channels.sink.name} takes the channels in another order")


def _renew(view: View, node: Node, channels: Channels, kept: Kept) -> None:
    """Make a ``reshape`` or ``expand`` again for the new sizes."""
    if view.op(node) not in ("reshape", "expand"):
        return
    result = view.result(node)
    if all(kept.size(axis) is None for axis in channels.axes[result]):
        return
    sizes = _written(view, node, channels, kept)
    assert sizes is not None
    b, attrs = Builder(view, node), dict(view.attrs(node))
    if "allowzero" in attrs:
        attrs["allowzero"] = False
    new = b.build(view.op(node), view.tensor(node), *sizes, like=result, **attrs)
    channels.axes[new] = channels.axes[result]
    view.replace(result, new)
    view.erase_dead(node)
    view.refresh_types([view.maker(new)])


def _written(view: View, node: Node, channels: Channels, kept: Kept) -> list[int] | None:
    """The sizes of a ``reshape`` or ``expand`` in numbers: those that are not known keep their
    place or are what the others leave. ``None`` where that is not enough."""
    before, after = channels.axes[view.tensor(node)], channels.axes[view.result(node)]
    expands = view.op(node) == "expand"
    numbers: list[int] = []
    for place, axis in enumerate(after):
        size = kept.size(axis)
        sizes = [part.size for part in axis]
        if size is not None:
            numbers.append(size)
        elif all(isinstance(known, int) for known in sizes):
            numbers.append(math.prod(known for known in sizes if isinstance(known, int)))
        elif expands:
            numbers.append(-1)
        elif place < len(before) and before[place] == axis:
            numbers.append(0)
        elif -1 in numbers:
            return None
        else:
            numbers.append(-1)
    return numbers


def _add_bias(view: View, linear: Linear, bias: Tensor, spool: Spool) -> None:
    if linear.bias is not None:
        old = _held(view, linear.bias).read()
        view.set_weight(linear.bias, spool.store((old.double() + bias.double()).to(old.dtype)))
        return
    dtype = _held(view, linear.weight).dtype
    value = view.add_weight(f"{linear.name}.bias", spool.store(bias.to(dtype)))
    x, weight = view.operands(linear.node)[:2]
    out = Builder(view, linear.node).build("linear", x, weight, value, like=linear.out)
    view.replace(linear.out, out)
    view.erase_dead(linear.node)


def _held(view: View, value: Value) -> Weight:
    weight = view.weight(value)
    assert weight is not None
    return weight
