"""From what ``torch.export`` traces to a functional program, without tracing it a second time.

``run_decompositions({})`` runs the whole model through fake tensors again: on a decoder of 24
layers it takes as long as the export or three times that. Of what it does, a graph whose writes
nothing else sees needs two things: the composite ops that may return their argument itself
(``to``, ``reshape``, ``contiguous``) say which of the two they do, which the exporter's types tell,
and writes become the ops that make a new tensor (``writes``).
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

aten = torch.ops.aten

_Homes = dict[str, tuple[Node, int]]

_CASTS = frozenset({
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default,
    aten.detach_.default,
})  # fmt: skip
"""Ops that give back their argument, or a copy of it in another dtype."""
_SIZED = {
    aten.flatten.using_ints: aten.reshape.default, aten.view_as.default: aten.reshape.default,
    aten.expand_as.default: aten.expand.default,
}  # fmt: skip
"""Ops whose result has sizes of tensors or products of them, and the op that takes those."""
_VIEWS = frozenset({aten.chunk.default, aten.numpy_T.default, aten.broadcast_to.default})
"""Composite views that are another one for the vocabulary."""
_KEPT = frozenset({
    aten.reshape.default, aten.contiguous.default, aten.matmul.default, aten.dropout.default,
})  # fmt: skip
"""Composite ops that the vocabulary reads as they are; where nothing writes, whether a result is a
view makes no difference."""


def functional(program: ExportedProgram) -> ExportedProgram:
    """The program without writes and without ops that may or may not copy; meaning and types stay.

    Where a program writes to a tensor that something else sees, holds a graph within the graph or a
    composite op that has no form of its own here, the exporter decomposes it. Otherwise it is
    edited in place.
    """
    graph = program.graph
    writes = Writes(graph)
    if not _is_plain(program, writes):
        decomposed: ExportedProgram = program.run_decompositions({})
        return decomposed
    homes = _homes(graph)
    for node in list(graph.nodes):
        if writes.unseen(node):
            writes.settle(node)
        elif node.target in _VIEWS:
            _settle_view(node)
        elif node.target in _CASTS:
            _settle_cast(graph, node)
        elif node.target in _SIZED:
            _settle_size(graph, node, homes)
    return program


def _is_plain(program: ExportedProgram, writes: Writes) -> bool:
    outputs = program.graph_signature.output_specs
    if any(spec.kind != OutputKind.USER_OUTPUT for spec in outputs):
        return False
    return all(_is_plain_node(node) or writes.unseen(node) for node in program.graph.nodes)


def _is_plain_node(node: Node) -> bool:
    """Whether a node is functional as it is, or after it is settled."""
    target = node.target
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    if isinstance(target, torch._ops.HigherOrderOperator):
        return False
    if not isinstance(target, torch._ops.OpOverload):
        return True  # arithmetic on sizes
    if target in _CASTS:
        return _only_casts(node)
    if target in _VIEWS:
        return target is not aten.chunk.default or _chunk_size(node) is not None
    if target in _SIZED or target in _KEPT:
        return True
    schema = target._schema
    if schema.is_mutable or torch.Tag.maybe_aliasing_or_mutating in target.tags:
        return False
    aliases = any(argument.alias_info is not None for argument in schema.arguments)
    return not (aliases and is_composite(target))


def _only_casts(node: Node) -> bool:
    source = node.args[0]
    if not isinstance(source, Node):
        return False
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    return before.device == after.device and before.layout == after.layout


def _chunk_size(node: Node) -> int | None:
    """The size of a chunk where it is a number: that of all but the last one."""
    source, chunks, *axis = node.args
    assert isinstance(source, Node) and isinstance(chunks, int)
    size = source.meta["val"].shape[axis[0] if axis else 0]
    return -(-size // chunks) if isinstance(size, int) and size else None


def _settle_view(node: Node) -> None:
    """chunk(x, n) => split(x, size); x.T => permute(x, axes); broadcast_to(x, s) => expand(x, s)"""
    source, *rest = node.args
    assert isinstance(source, Node)
    if node.target is aten.chunk.default:
        node.target, node.args = aten.split.Tensor, (source, _chunk_size(node), *rest[1:])
    elif node.target is aten.numpy_T.default:
        axes = list(reversed(range(source.meta["val"].dim())))
        node.target, node.args = aten.permute.default, (source, axes)
    else:
        node.target = aten.expand.default


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
    """flatten(x), expand_as(x, y) => reshape(x, sizes), expand(x, sizes)"""
    sizes = [_size(node, factors, homes) for factors in _sizes(node)]
    with graph.inserting_before(node):
        new = graph.call_function(_SIZED[node.target], (node.args[0], sizes))  # type: ignore[index]
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _sizes(node: Node) -> list[list[tuple[Node, int]]]:
    """Of each axis of a node's result the axes whose sizes it is the product of."""
    like = node.args[0 if node.target is aten.flatten.using_ints else 1]
    assert isinstance(like, Node)
    axes = [(like, axis) for axis in range(like.meta["val"].dim())]
    if node.target is not aten.flatten.using_ints:
        return [[axis] for axis in axes]
    places: tuple[Any, ...] = node.args[1:]
    bounds = (*places, *(0, -1)[len(places) :])
    first, last = (place % max(len(axes), 1) for place in bounds)
    one, others = axes[first : last + 1], [[axis] for axis in axes]
    return [*others[:first], one, *others[last + 1 :]]


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
