"""A part of a graph, run by itself: with other weights than it holds, and with gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.errors import Refusal
from ..core.view import NATIVE, Node, Value, View, is_value
from ..structure.layers import Block
from ..vocab import spec
from .sweep import Results, sweep_together


@dataclass(frozen=True)
class BlockGraph:
    """The nodes between the stream before a block and that behind it."""

    view: View
    entry: Value
    exit: Value
    nodes: tuple[Node, ...]
    """In the order of the graph."""
    outside: tuple[Value, ...]
    """Computed values that come from elsewhere: masks, rotary tables."""
    weights: tuple[Value, ...]

    def without_gradient(self) -> Node | None:
        """A node that computes outside of torch, through which no gradient comes."""
        natives = (n for n in self.nodes if self.view.op(n) == NATIVE)
        return next((n for n in natives if not self.view.native_op(n).startswith("aten.")), None)

    def constants(self) -> dict[Value, Tensor]:
        """The numbers of its weights."""
        numbers = {}
        for value in self.weights:
            weight = self.view.default(value)
            assert weight is not None
            numbers[value] = weight.read()
        return numbers

    def run(
        self, x: Tensor, outside: Mapping[Value, Any], weights: Mapping[Value, Tensor]
    ) -> Tensor:
        """The stream behind the block, of that before it. Gradients flow to ``x`` and ``weights``
        where they are asked for."""
        known: dict[Value, Any] = {**weights, **outside, self.entry: x}
        for node in self.nodes:
            known.update(zip(self.view.results(node), self._executed(node, known), strict=True))
        stream: Tensor = known[self.exit]
        return stream

    def _executed(self, node: Node, known: Mapping[Value, Any]) -> Results:
        view = self.view
        if not (torch.is_grad_enabled() and view.native_op(node).startswith("graphwright")):
            return view.execute(node, [known[value] for value in view.arguments(node)])
        # To torch an op of ours is a kernel without a derivative; its reference has one.
        operands = [known[o] if is_value(o) else o for o in view.operands(node)]
        results = spec(view.op(node)).reference(*operands, **view.attrs(node))
        return results if isinstance(results, tuple) else (results,)


def block_graphs(view: View, blocks: Sequence[Block]) -> list[BlockGraph]:
    """The graph of each block; linear in the size of the graph.

    Raises ``Refusal`` where a block's end is not computed from its beginning.
    """
    order = list(view.nodes())
    place = {node: i for i, node in enumerate(order)}
    return [
        _between(view, order, place, block.entry, block.exit, f"block {block.index}")
        for block in blocks
    ]


def graph_between(view: View, entry: Value, exit: Value) -> BlockGraph:
    """The graph from one value to another. Raises ``Refusal`` as ``block_graphs``."""
    order = list(view.nodes())
    place = {node: i for i, node in enumerate(order)}
    return _between(view, order, place, entry, exit, "the graph")


def _between(
    view: View, order: Sequence[Node], place: Mapping[Node, int], entry: Value, exit: Value,
    what: str,
) -> BlockGraph:  # fmt: skip
    first, last = view.producer(entry), view.producer(exit)
    if last is None:
        raise Refusal(f"{what} computes nothing")
    start = 0 if first is None else place[first] + 1
    behind = {entry}
    reached = []
    for node in order[start : place[last] + 1]:
        if any(value in behind for value in view.arguments(node)):
            reached.append(node)
            behind.update(view.results(node))
    needs, nodes = {exit}, []
    for node in reversed(reached):
        if any(value in needs for value in view.results(node)):
            nodes.append(node)
            needs.update(view.arguments(node))
    inside = {value for node in nodes for value in view.results(node)} | {entry}
    if exit not in inside:
        raise Refusal(f"the end of {what} is not computed from its beginning")
    others = dict.fromkeys(v for n in reversed(nodes) for v in view.arguments(n) if v not in inside)
    held = tuple(value for value in others if view.default(value) is not None)
    outside = tuple(value for value in others if value not in held)
    return BlockGraph(view, entry, exit, tuple(reversed(nodes)), outside, held)


def captured(
    view: View, batches: Sequence[Mapping[str, Tensor]], values: Sequence[Value]
) -> list[dict[Value, Any]]:
    """What the graph computes for some values, inputs of the graph among them, batch by batch."""
    names = dict(zip(view.inputs(), view.input_names(), strict=True))
    rows: list[dict[Value, Any]] = [
        {value: batch[names[value]] for value in values if value in names} for batch in batches
    ]
    targets = set(values)

    def visit(node: Node, arguments: list[list[Any]], results: list[Results]) -> None:
        for i, value in enumerate(view.results(node)):
            if value in targets:
                for row, result in zip(rows, results, strict=True):
                    row[value] = result[i]

    makers = (view.producer(value) for value in values)
    nodes = frozenset(node for node in makers if node is not None)
    with torch.no_grad():
        sweep_together(view, batches, visit, nodes, outputs=False)
    return rows
