"""From what ``torch.export`` traces to a functional program, without tracing it a second time.

``run_decompositions({})`` runs the whole model through fake tensors again: on a decoder of 24
layers it takes as long as the export or three times that. Of what it does, most graphs need two
things: the composite ops that may return their argument itself (``to``, ``reshape``,
``contiguous``) say which of the two they do, which the exporter's types tell, and writes become the
ops that make a new tensor (``writes``).
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx import Graph, Node

from .writes import Writes, is_composite
from .written_views import CASTS, only_casts

aten = torch.ops.aten

_Homes = dict[str, tuple[Node, int]]

_SIZED = {
    aten.flatten.using_ints: aten.reshape.default, aten.view_as.default: aten.reshape.default,
    aten.unflatten.int: aten.reshape.default, aten.expand_as.default: aten.expand.default,
    aten.reshape_as.default: aten.reshape.default,
}  # fmt: skip
"""Ops whose result has sizes of tensors or products of them, and the op that takes those."""
_LIKE = frozenset({aten.view_as.default, aten.expand_as.default, aten.reshape_as.default})
"""Those of them that take the sizes of their second argument."""
_PERMUTED = frozenset({
    aten.numpy_T.default, aten.mT.default, aten.swapaxes.default, aten.swapdims.default,
    aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist,
})  # fmt: skip
"""Views that put the axes in another order."""
_VIEWS = _PERMUTED | {
    aten.chunk.default, aten.broadcast_to.default, aten.narrow.default, aten.split.sizes,
}  # fmt: skip
"""Composite views that are another one for the vocabulary."""
_DROPOUT = frozenset({aten.dropout.default, aten.dropout_.default})
_KEPT = frozenset({
    aten.reshape.default, aten.contiguous.default, aten.matmul.default, aten.batch_norm.default,
})  # fmt: skip
"""Composite ops that the vocabulary reads as they are; where nothing writes, whether a result is a
view makes no difference."""


def functional(program: ExportedProgram) -> ExportedProgram:
    """The program without writes and without ops that may or may not copy; meaning and types stay.

    Where a program writes to what it has not made, or to what it may show under a name that is not
    known here, holds a graph within the graph or a composite op that has no form of its own here,
    the exporter decomposes it. Otherwise it is edited in place.
    """
    graph = program.graph
    _settle_dropout(graph)
    writes = Writes(graph)
    if not _is_plain(program, writes):
        decomposed: ExportedProgram = program.run_decompositions({})
        return decomposed
    writes.settle()
    homes = _homes(graph)
    for node in list(graph.nodes):
        if node.target in _VIEWS:
            _settle_view(node)
        elif node.target in CASTS:
            _settle_cast(graph, node)
        elif node.target in _SIZED:
            _settle_size(graph, node, homes)
    return program


def _is_plain(program: ExportedProgram, writes: Writes) -> bool:
    outputs = program.graph_signature.output_specs
    if any(spec.kind != OutputKind.USER_OUTPUT for spec in outputs):
        return False
    return all(_is_plain_node(node) or writes.settled(node) for node in program.graph.nodes)


def _is_plain_node(node: Node) -> bool:
    """Whether a node is functional as it is, or after it is settled."""
    target = node.target
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    if isinstance(target, torch._ops.HigherOrderOperator):
        return False
    if not isinstance(target, torch._ops.OpOverload):
        return True  # arithmetic on sizes
    if target in CASTS:
        return only_casts(node)
    if target in _VIEWS:
        return _other_view(node) is not None
    if target in _SIZED or target in _KEPT:
        return True
    schema = target._schema
    if schema.is_mutable or torch.Tag.maybe_aliasing_or_mutating in target.tags:
        return False
    aliases = any(argument.alias_info is not None for argument in schema.arguments)
    return not (aliases and is_composite(target))


def _other_view(node: Node) -> tuple[Any, tuple[Any, ...]] | None:
    """The op and the arguments that a view of ``_VIEWS`` becomes; ``None`` where they would hold a
    size that is no number."""
    source, *rest = node.args
    assert isinstance(source, Node)
    value: torch.Tensor = source.meta["val"]
    if node.target in _PERMUTED:
        numbered = torch.empty(tuple(range(value.dim())), device="meta")
        axes: torch.Size = node.target(numbered, *rest).shape
        return aten.permute.default, (source, list(axes))
    if node.target is aten.broadcast_to.default:
        return aten.expand.default, node.args
    if node.target is aten.split.sizes:
        return aten.split_with_sizes.default, node.args
    if node.target is aten.narrow.default:
        axis, start, length = rest
        if not isinstance(start, int) or not isinstance(length, int) or start < 0:
            return None
        return aten.slice.Tensor, (source, axis, start, start + length)
    chunks, axis = (*rest, 0)[:2]
    assert isinstance(chunks, int) and isinstance(axis, int)
    size = value.shape[axis]
    if not isinstance(size, int) or not size:
        return None
    return aten.split.Tensor, (source, -(-size // chunks), axis)


def _settle_dropout(graph: Graph) -> None:
    """dropout(x, p, False), dropout_(x, p, False) => x

    It returns ``x`` itself, to which something may write later: the exporter's decomposition makes
    another tensor of it, and what is written to one is lost for the other.
    """
    for node in list(graph.nodes):
        if node.target in _DROPOUT and node.args[2] is False:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _settle_view(node: Node) -> None:
    """chunk(x, n) => split(x, size); narrow(x, d, a, n) => slice(x, d, a, a + n)

    broadcast_to(x, s) => expand(x, s); x.T, movedim(x, ...), swapaxes(x, ...) => permute(x, axes)
    """
    view = _other_view(node)
    assert view is not None
    node.target, node.args = view


def _settle_cast(graph: Graph, node: Node) -> None:
    """to(x, dtype) => _to_copy(x, dtype), or x where it has that dtype"""
    source = node.args[0]
    assert isinstance(source, Node)
    dtype = node.meta["val"].dtype
    cast = source
    if source.meta["val"].dtype != dtype:
        with graph.inserting_before(node):
            cast = graph.call_function(aten._to_copy.default, (source,), {"dtype": dtype})
        cast.meta = dict(node.meta)
    node.replace_all_uses_with(cast)
    graph.erase_node(node)


def _settle_size(graph: Graph, node: Node, homes: _Homes) -> None:
    """flatten(x), unflatten(x, d, s), view_as(x, y) => reshape(x, sizes)

    expand_as(x, y) => expand(x, sizes)
    """
    sizes = [_size(node, s, homes) if isinstance(s, list) else s for s in _sizes(node)]
    with graph.inserting_before(node):
        new = graph.call_function(_SIZED[node.target], (node.args[0], sizes))  # type: ignore[index]
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _sizes(node: Node) -> list[Any]:
    """Of each axis of a node's result its size as the call names it, or the axes whose sizes it is
    the product of, each with its tensor."""
    place = 1 if node.target in _LIKE else 0
    like = node.args[place]
    assert isinstance(like, Node)
    axes = [(like, axis) for axis in range(like.meta["val"].dim())]
    others: list[Any] = [[axis] for axis in axes]
    if place:
        return others
    places: tuple[Any, ...] = node.args[1:]
    if node.target is aten.unflatten.int:
        cut, sizes = places[0] % len(axes), places[1]
        return [*others[:cut], *sizes, *others[cut + 1 :]]
    bounds = (*places, *(0, -1)[len(places) :])
    first, last = (bound % max(len(axes), 1) for bound in bounds)
    return [*others[:first], axes[first : last + 1], *others[last + 1 :]]


def _size(before: Node, factors: Sequence[tuple[Node, int]], homes: _Homes) -> int | Node:
    """A product of sizes: a number, or the node that computes it ahead of ``before``."""
    graph = before.graph
    number = 1
    nodes: list[Node] = []
    for holder, axis in factors:
        size = holder.meta["val"].shape[axis]
        if isinstance(size, int):
            number *= size
            continue
        nodes.append(_size_node(graph, *homes.get(str(size), (holder, axis)), before))
    product: int | Node = nodes[0] if nodes else number
    rest = [*nodes[1:], *([number] if nodes and number != 1 else ())]
    for factor in rest:
        assert isinstance(product, Node)
        value = factor.meta["val"] if isinstance(factor, Node) else factor
        with graph.inserting_before(before):
            longer = graph.call_function(operator.mul, (product, factor))
        longer.meta["val"] = product.meta["val"] * value
        product = longer
    return product


def _homes(graph: Graph) -> _Homes:
    """Sizes of inputs, and the input and axis that have each."""
    homes: _Homes = {}
    for holder in _placeholders(graph):
        value = holder.meta.get("val")
        shape = value.shape if isinstance(value, torch.Tensor) else ()
        for axis, size in enumerate(shape):
            homes.setdefault(str(size), (holder, axis))
    return homes


def _size_node(graph: Graph, holder: Node, axis: int, before: Node) -> Node:
    """The node that holds a size. Those of inputs stand before all others, each once."""
    size = holder.meta["val"].shape[axis]
    if holder.op != "placeholder":
        with graph.inserting_before(before):
            own = graph.call_function(aten.sym_size.int, (holder, axis))
        own.meta["val"] = size
        return own
    last = _placeholders(graph)[-1]
    node = last.next
    while node.target is aten.sym_size.int:
        if str(node.meta["val"]) == str(size):
            return node
        node = node.next
    with graph.inserting_after(last):
        size_node = graph.call_function(aten.sym_size.int, (holder, axis))
    size_node.meta["val"] = size
    return size_node


def _placeholders(graph: Graph) -> list[Node]:
    return list(itertools.takewhile(lambda node: node.op == "placeholder", graph.nodes))
