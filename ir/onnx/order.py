"""Nodes in the order in which they can run."""

from __future__ import annotations

from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

import onnx_ir

from ..core.errors import BadInput
from .parts import captured, has_subgraph, subgraphs


def put_in_order(graph: onnx_ir.Graph, where: str) -> None:
    """Sort a graph's nodes, and those of its subgraphs, so that none reads what is made later.

    Graph editors append where they edit, and runtimes sort what they load. A graph in order keeps
    the order that it has. Raises ``BadInput`` for nodes that wait for each other, naming them.
    """
    graphs = [graph, *(inner for node in graph for inner in subgraphs(node))]
    if all(_is_in_order(g) for g in graphs):
        return
    try:
        graph.sort()
    except ValueError:
        nodes = " -> ".join(_label(n) for g in graphs for n in _circle(g))
        raise BadInput(f"{where}: these nodes wait for each other: {nodes}") from None


def _reads(node: onnx_ir.Node) -> Iterator[onnx_ir.Value]:
    yield from (value for value in node.inputs if value is not None)
    if has_subgraph(node):
        yield from captured(node)


def _is_in_order(graph: onnx_ir.Graph) -> bool:
    earlier: set[onnx_ir.Node] = set()
    for node in graph:
        for value in _reads(node):
            maker = value.producer()
            if maker is not None and maker.graph is graph and maker not in earlier:
                return False
        earlier.add(node)
    return True


def _circle(graph: onnx_ir.Graph) -> list[onnx_ir.Node]:
    """The nodes of one circle, the first of them again at the end; none where there is none."""
    sorter = TopologicalSorter({node: {v.producer() for v in _reads(node)} for node in graph})
    try:
        sorter.prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def _label(node: onnx_ir.Node) -> str:
    return f"{node.name or 'a node'} ({node.op_type})"
