"""From what ``torch.export`` traces to a functional program, without tracing it a second time.

``run_decompositions({})`` runs the whole model through fake tensors again: on a decoder of 24
layers it takes as long as the export or three times that. Of what it does, a graph that writes
nowhere needs one thing: the composite ops that may return their argument itself (``to``,
``reshape``, ``contiguous``) say which of the two they do. The exporter's types tell that.
"""

from __future__ import annotations

import itertools

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx import Graph, Node

aten = torch.ops.aten

_CASTS = frozenset({
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default,
    aten.detach_.default,
})  # fmt: skip
"""Ops that give back their argument, or a copy of it in another dtype."""
_SIZED = {
    aten.flatten.using_ints: aten.reshape.default, aten.view_as.default: aten.reshape.default,
    aten.expand_as.default: aten.expand.default,
}  # fmt: skip
"""Ops whose result has the size that its type tells, and the op that takes it in numbers."""
_KEPT = frozenset({
    aten.reshape.default, aten.contiguous.default, aten.matmul.default, aten.dropout.default,
})  # fmt: skip
"""Composite ops that the vocabulary reads as they are; where nothing writes, whether a result is a
view makes no difference."""
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


def functional(program: ExportedProgram) -> ExportedProgram:
    """The program without writes and without ops that may or may not copy; meaning and types stay.

    Where a program writes to a tensor, holds a graph within the graph or a composite op that has
    no form of its own here, the exporter decomposes it. Otherwise it is edited in place.
    """
    if not _is_plain(program):
        decomposed: ExportedProgram = program.run_decompositions({})
        return decomposed
    graph = program.graph
    for node in list(graph.nodes):
        if node.target in _CASTS:
            _settle_cast(graph, node)
        elif node.target in _SIZED:
            _settle_size(graph, node)
    return program


def _is_plain(program: ExportedProgram) -> bool:
    outputs = program.graph_signature.output_specs
    if any(spec.kind != OutputKind.USER_OUTPUT for spec in outputs):
        return False
    return all(_is_plain_node(node) for node in program.graph.nodes)


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
    if target in _SIZED:
        return _sizes(node) is not None
    if target in _KEPT:
        return True
    schema = target._schema
    if schema.is_mutable or torch.Tag.maybe_aliasing_or_mutating in target.tags:
        return False
    aliases = any(argument.alias_info is not None for argument in schema.arguments)
    return not (aliases and _is_composite(target))


def _is_composite(target: torch._ops.OpOverload) -> bool:
    name = target._schema.name, target._schema.overload_name
    return torch._C._dispatch_has_kernel_for_dispatch_key(".".join(filter(None, name)), _COMPOSITE)


def _only_casts(node: Node) -> bool:
    source = node.args[0]
    if not isinstance(source, Node):
        return False
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    return before.device == after.device and before.layout == after.layout


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


def _settle_size(graph: Graph, node: Node) -> None:
    """flatten(x), expand_as(x, y) => reshape(x, sizes), expand(x, sizes)"""
    homes = _sizes(node)
    assert homes is not None
    sizes = [home if isinstance(home, int) else _size_node(graph, *home) for home in homes]
    with graph.inserting_before(node):
        new = graph.call_function(_SIZED[node.target], (node.args[0], sizes))  # type: ignore[index]
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _sizes(node: Node) -> list[int | tuple[Node, int]] | None:
    """The sizes of a node's result: numbers, and the input and axis that have the same size;
    ``None`` where no input has."""
    homes: dict[str, tuple[Node, int]] = {}
    for holder in _placeholders(node.graph):
        value = holder.meta.get("val")
        shape = value.shape if isinstance(value, torch.Tensor) else ()
        for axis, size in enumerate(shape):
            homes.setdefault(str(size), (holder, axis))
    sizes: list[int | tuple[Node, int]] = []
    for size in node.meta["val"].shape:
        if not isinstance(size, int) and str(size) not in homes:
            return None
        sizes.append(size if isinstance(size, int) else homes[str(size)])
    return sizes


def _size_node(graph: Graph, holder: Node, axis: int) -> Node:
    """The node that holds a size of an input; one is made where none stands before all others."""
    size, last = holder.meta["val"].shape[axis], _placeholders(graph)[-1]
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
