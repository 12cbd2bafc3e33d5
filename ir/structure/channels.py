"""Where channels of a linear's result go until the next linear takes them up: heads, units.

An axis is a product of *parts*: that of ``q`` is (key heads, query heads that share one, size of a
head). ``reshape`` regroups parts, ``expand`` makes one, the others move axes. Parts that have a
name may be made smaller (``moves.shrink_channels``); the others keep their size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..core.errors import Refusal
from ..core.types import UNKNOWN_DIM, Dim
from ..core.view import Node, Value, View, is_value
from ..vocab import spec, traits
from ..vocab.rules import elementwise
from .recognize import Attention, Linear

GROUPS, SHARED, UNITS = "groups", "shared", "units"
"""Heads of keys; heads of queries that share one; units of a feed-forward."""


@dataclass(frozen=True)
class Part:
    size: Dim
    name: str = ""
    """Empty for a part that keeps its size."""


Axis = tuple[Part, ...]


@dataclass
class Channels:
    """The way from some linears (``sources``, each with the parts of its output) to ``sink``."""

    sources: Mapping[str, Axis]
    sink: Linear
    taken: Axis
    """The parts of what ``sink`` reads."""
    axes: dict[Value, tuple[Axis, ...]]
    """Of each value on the way, before anything goes."""
    nodes: Sequence[Node]
    """Between them, in the order of the graph."""
    linears: Mapping[str, Linear] = field(default_factory=dict)
    """The sources by name."""


def heads_of(
    view: View, site: Attention, linears: Mapping[str, Linear], order: Mapping[Node, int]
) -> Channels:
    """The channels of an attention. Raises ``Refusal`` where its heads cannot be told apart."""
    names = (site.q, site.k, site.v)
    if not all((*names, site.o)) or not site.heads or not site.kv_heads or not site.head_dim:
        raise Refusal("its queries, keys, values and outputs are not linears of known heads")
    if len(set(names)) < 3:
        raise Refusal("queries, keys and values come out of one linear")
    if site.kv_heads == 1:
        raise Refusal("all its heads share one key")
    groups, width = Part(site.kv_heads, GROUPS), Part(site.head_dim)
    each = site.heads // site.kv_heads
    queries = (groups, Part(each, SHARED), width) if each > 1 else (groups, width)
    parts: dict[str, Axis] = {site.q: queries, site.k: (groups, width), site.v: (groups, width)}
    return trace(view, parts, linears[site.o], linears, order)


def units_of(
    view: View, first: Sequence[Linear], last: Linear, linears: Mapping[str, Linear],
    order: Mapping[Node, int],
) -> Channels:  # fmt: skip
    """The channels of a feed-forward: from ``first`` (gate and up, or one) to ``last``."""
    parts: dict[str, Axis] = {x.name: (Part(last.in_features, UNITS),) for x in first}
    return trace(view, parts, last, linears, order)


def trace(
    view: View, sources: Mapping[str, Axis], sink: Linear, linears: Mapping[str, Linear],
    order: Mapping[Node, int],
) -> Channels:  # fmt: skip
    """Follow the sources' results to ``sink``. ``order`` is the place of each node in the graph.

    Raises ``Refusal`` where something else takes them, or where channels mix on the way.
    """
    starts = {name: linears[name] for name in sources}
    axes: dict[Value, tuple[Axis, ...]] = {}
    for name, axis in sources.items():
        linear = starts[name]
        size = 1
        for part in axis:
            size *= part.size if isinstance(part.size, int) else 1
        if size != linear.out_features:
            raise Refusal(f"{name} has {linear.out_features} outputs, not {size}")
        shape = view.type(linear.out).shape or ()
        axes[linear.out] = (*((Part(d),) for d in shape[:-1]), axis)
    nodes = _between(view, [linear.out for linear in starts.values()], sink.node, order)
    for node in nodes:
        for value, value_axes in zip(view.results(node), _step(view, node, axes), strict=True):
            axes[value] = value_axes
    taken = axes.get(view.tensor(sink.node))
    if taken is None or any(part.name for axis in taken[:-1] for part in axis):
        raise Refusal(f"{sink.name} does not take the channels as its inputs")
    return Channels(sources, sink, taken[-1], axes, nodes, starts)


def _between(
    view: View, values: Sequence[Value], sink: Node, order: Mapping[Node, int]
) -> list[Node]:
    seen: set[Node] = set()
    stack = list(values)
    while stack:
        value = stack.pop()
        if view.is_output(value):
            raise Refusal(f"{view.name(value)} is an output of the graph: heads of a cache stay")
        for user in view.users(value):
            if user is sink or user in seen:
                continue
            if order[user] > order[sink] or traits(view.op(user)).is_linear:
                raise Refusal(f"{view.name(user)} takes the channels too")
            seen.add(user)
            stack += view.results(user)
    return sorted(seen, key=order.__getitem__)


_Axes = tuple[Axis, ...]


def _step(view: View, node: Node, axes: Mapping[Value, _Axes]) -> list[_Axes]:
    """The axes of a node's results."""
    op, attrs = view.op(node), view.attrs(node)
    operands = view.operands(node)
    shapes = [view.type(value).shape or () for value in view.results(node)]
    if traits(op).shape_only:
        raise Refusal(f"{view.name(node)} reads the size of what carries channels")
    x = axes.get(operands[0]) if operands and is_value(operands[0]) else None
    if op == "sdpa":
        return [_attended(view, node, axes)]
    if x is not None and op == "reshape":
        return [_regrouped(x, shapes[0], view.name(node))]
    if x is not None and op == "transpose":
        return [tuple(x[i] for i in attrs["perm"])]
    if x is not None and op == "unsqueeze":
        return [_inserted(x, attrs["dims"], len(shapes[0]))]
    if x is not None and op == "squeeze":
        gone = {d % len(x) for d in attrs["dims"]}
        return [tuple(axis for i, axis in enumerate(x) if i not in gone)]
    if x is not None and op == "expand":
        return [_expanded(x, shapes[0])]
    if op in ("cast", "rope") or spec(op).infer is elementwise or traits(op).activation:
        return [_together(view, node, axes, shapes[0])]
    if x is not None and op in ("rms_norm", "layer_norm") and not _named(x[-1:]):
        return [x]
    if x is not None and op == "slice" and not _named(x[attrs["dim"] : attrs["dim"] + 1]):
        return [_resized(x, attrs["dim"], shapes[0])]
    if op == "concat":
        parts = [axes.get(o) if is_value(o) else None for o in operands]
        dim = attrs["dim"]
        known = [part for part in parts if part is not None]
        rest = {(*part[:dim], *part[dim + 1 :]) for part in known}
        if len(known) == len(parts) and len(rest) == 1 and not _named(known[0][dim : dim + 1]):
            return [_resized(known[0], dim, shapes[0])]
    raise Refusal(f"channels cannot be followed through {view.name(node)} ({op})")


def _named(axes: Sequence[Axis]) -> bool:
    return any(part.name for axis in axes for part in axis)


def _resized(x: _Axes, dim: int, shape: Sequence[Dim]) -> _Axes:
    return (*x[:dim], (Part(shape[dim]),), *x[dim + 1 :])


def _inserted(x: _Axes, dims: Sequence[int], rank: int) -> _Axes:
    new = {d % rank for d in dims}
    rest = iter(x)
    return tuple((Part(1),) if i in new else next(rest) for i in range(rank))


def _expanded(x: _Axes, shape: Sequence[Dim]) -> _Axes:
    """An axis of size 1 behind the heads of keys that gets a size repeats them for the queries."""
    expanded = []
    padded = [*[(Part(1),)] * (len(shape) - len(x)), *x]
    for i, (axis, size) in enumerate(zip(padded, shape, strict=True)):
        if axis != (Part(1),) or size == 1:
            expanded.append(axis)
            continue
        behind = i > 0 and any(part.name == GROUPS for part in padded[i - 1])
        expanded.append((Part(size, SHARED if behind else ""),))
    return tuple(expanded)


def _regrouped(x: _Axes, shape: Sequence[Dim], name: str) -> _Axes:
    """The parts in other axes: each of the new ones takes as many as make its size."""
    parts = [part for axis in x for part in axis if part.size != 1 or part.name]
    groups: list[Axis] = []
    for dim in shape:
        taken: list[Part] = []
        while parts and _size(taken) != dim and _fits(taken, parts[0], dim):
            taken.append(parts.pop(0))
        if _size(taken) != dim:
            raise Refusal(f"{name} cuts across the channels")
        groups.append(tuple(taken) or (Part(1),))
    while parts and parts[0].size == 1 and groups:
        groups[-1] = (*groups[-1], parts.pop(0))
    if parts:
        raise Refusal(f"{name} cuts across the channels")
    return tuple(groups)


def _size(parts: Sequence[Part]) -> Dim:
    numbers, names = 1, []
    for part in parts:
        if isinstance(part.size, int):
            numbers *= part.size
        else:
            names.append(part.size)
    if len(names) == 1 and numbers == 1:
        return names[0]
    return UNKNOWN_DIM if names else numbers


def _fits(taken: Sequence[Part], part: Part, dim: Dim) -> bool:
    size = _size([*taken, part])
    if not isinstance(size, int) or not isinstance(dim, int):
        return size == dim
    return dim % size == 0


def _together(
    view: View, node: Node, axes: Mapping[Value, _Axes], shape: Sequence[Dim]
) -> _Axes:
    """Of an op that combines numbers at one place: its operands carry the same channels there, or
    none."""
    operands = [o for o in view.operands(node) if is_value(o)]
    known = [axes[o] for o in operands if o in axes]
    joined: list[Axis] = []
    for place in range(-len(shape), 0):
        there = (x[place] for x in known if len(x) >= -place)
        named = {axis for axis in there if _named([axis])}
        if len(named) > 1:
            raise Refusal(f"{view.name(node)} combines channels of two kinds")
        joined.append(named.pop() if named else (Part(shape[place]),))
    for operand in operands:
        dims = () if operand in axes else view.type(operand).shape or ()
        for place in range(-min(len(dims), len(shape)), 0):
            if dims[place] != 1 and _named([joined[place]]):
                raise Refusal(f"{view.name(operand)} holds a number for each channel")
    return tuple(joined)


def _attended(view: View, node: Node, axes: Mapping[Value, _Axes]) -> _Axes:
    operands = view.operands(node)
    q, k, v = (axes.get(o) if is_value(o) else None for o in operands[:3])
    if q is None or k is None or v is None or len(q) != 4 or k[1] != v[1]:
        raise Refusal("queries, keys and values do not come from its linears alone")
    heads = q[1][:1] if view.attrs(node)["gqa"] else q[1]
    if k[1] != heads:
        raise Refusal("keys are not repeated as queries are grouped")
    if _named([*q[2:], *k[2:], *v[2:]]):
        raise Refusal("heads are told apart by what is within them")
    for operand in filter(is_value, operands[3:]):
        dims = view.type(operand).shape or ()
        if len(dims) > 2 and dims[-3] != 1:
            raise Refusal(f"{view.name(operand)} is another mask for each head")
    return (*q[:3], v[3])
