"""The residual spine: the additions that every path from the embedding to the output passes."""

from __future__ import annotations

import networkx as nx

from .view import Node, Value, View

_ROOT, _EXIT = "root", "exit"


def root_value(view: View) -> Value | None:
    """Where the residual stream begins: the widest embedding, or else the first convolution."""
    best: tuple[int, Value] | None = None
    for node in view.nodes():
        if view.op(node) != "embedding":
            continue
        table = view.weight(view.operands(node)[0])
        if table is not None and (best is None or table.numel > best[0]):
            best = (table.numel, view.results(node)[0])
    convolution = next((n for n in view.nodes() if view.op(n) == "conv"), None)
    if convolution is not None:
        return view.results(convolution)[0]
    return None if best is None else best[1]


def spine(view: View) -> list[Node]:
    """The residual additions in order; empty where there is no embedding or patch convolution.

    An addition belongs to it when every path from the root to the outputs passes it (it is on the
    chain of dominators) and both its operands depend on the root: a bias or position is no branch.
    """
    root = root_value(view)
    start = None if root is None else view.producer(root)
    if start is None:
        return []
    graph = _reached_from(view, start)
    if _EXIT not in graph:
        return []
    dominators = nx.immediate_dominators(graph, start)
    chain: list[Node] = []
    current = _EXIT
    while current != start:
        current = dominators[current]
        chain.append(current)
    return [n for n in reversed(chain) if _is_residual(view, n, graph)]


def _reached_from(view: View, start: Node) -> nx.MultiDiGraph:
    """The nodes that depend on ``start``; ``_EXIT`` follows whatever makes an output."""
    graph = nx.MultiDiGraph()
    graph.add_node(start)
    stack, seen = [start], {start}
    while stack:
        node = stack.pop()
        for value in view.results(node):
            if view.is_output(value):
                graph.add_edge(node, _EXIT)
            for user in view.users(value):
                graph.add_edge(node, user)
                if user not in seen:
                    seen.add(user)
                    stack.append(user)
    return graph


def _is_residual(view: View, node: Node, graph: nx.MultiDiGraph) -> bool:
    if view.op(node) != "add":
        return False
    return all(
        operand is not None
        and not isinstance(operand, int | float)
        and view.producer(operand) in graph
        for operand in view.operands(node)
    )
