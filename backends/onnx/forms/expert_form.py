"""How experts are written for a runtime: each runs on the rows that its router picked it for.

add(acc, mul(expert(x), share)) => scatter_add(acc, rows, mul(expert(x[rows]), share[rows]))

``share`` [tokens, 1] is a column of what the router's weights were scattered into, 0 where it did
not pick the expert, and ``rows`` are those where it is not. An expert that nothing picked runs on
no row at all: ONNX Runtime's products of 0 rows read no weight (``tools.bench.experts``: 0.85 ms a
token for 2 of 8 experts of 4 bits, 1.60 ms for all 8, on one busy core).
"""

from __future__ import annotations

from typing import Any, cast

import torch

from ....ir.core.errors import Refusal
from ....ir.core.types import UNKNOWN_DIM, Type
from ....ir.core.view import NATIVE, Node, Operand, Value, View, is_value
from ....ir.onnx.parts import set_type
from ....ir.onnx.view import OnnxView
from ....ir.rewrite.pattern import Match
from ....ir.rewrite.rule import Build, Rule
from ....ir.vocab import spec, traits

_BY_ROW = frozenset({
    "add", "sub", "mul", "div", "neg", "exp", "sigmoid", "tanh", "clamp", "minimum", "maximum",
    "cast", "slice", "split", "index_select",
})  # fmt: skip
"""What works on each row of a matrix by itself; linears and activations do too."""
_CUTS = ("slice", "split", "index_select")
"""Of these, what takes columns alone; stored in few bits a weight may have its own in an order."""
_COLUMN = frozenset({"index_select", "slice", "reshape", "squeeze", "unsqueeze", "cast", "gather"})
"""What takes one column out of the router's shares."""
_MOST = 64
"""Nodes of one expert, at most."""


class RouteExperts(Rule):
    """add(acc, mul(expert(x), share)) => scatter_add(acc, rows, mul(expert(x[rows]), share))"""

    name = "route-experts"

    def pattern(self, p: Any, acc: Any, output: Any, share: Any) -> Any:
        return p.add(acc, p.mul(output, share))

    def where(self, match: Match) -> None:
        view = match.view
        shapes = [view.type(match.value(name)).shape or () for name in ("acc", "output", "share")]
        if any(len(shape) != 2 for shape in shapes) or shapes[2][1] != 1:
            match.refuse("it is no sum of rows times a share of each")
        acc, output, share = shapes
        if acc != output or share[0] != output[0] or UNKNOWN_DIM in output:
            match.refuse(f"{acc} and {output} are not known to be the same rows")
        _check_shares(view, match.value("share"), match.root)
        _expert(view, match.value("output"), match.root)

    def replace(self, build: Build, **bound: Operand) -> Value:
        view, match = build.view, build.match
        assert isinstance(view, OnnxView)
        graph: View = build.view
        share, acc = match.value("share"), match.value("acc")
        nodes, x = _expert(view, match.value("output"), match.root)
        flat = build.reshape(share, -1)
        places = view.emit("NonZero", [flat]).outputs[0]
        columns: Any = view.emit("Transpose", [places], {"perm": [1, 0]}).outputs[0]
        set_type(places, Type(torch.int64, (1, UNKNOWN_DIM)))
        set_type(columns, Type(torch.int64, (UNKNOWN_DIM, 1)))
        rows = build.reshape(columns, -1)
        copies = {x: build.index_select(x, rows, dim=0)}
        for node in nodes:
            results = graph.clone(node, copies, before=match.root)
            graph.refresh_type(graph.maker(results[0]))
            copies |= dict(zip(graph.results(node), results, strict=True))
        part = build.mul(copies[match.value("output")], build.index_select(share, rows, dim=0))
        kind, terms = graph.type(acc), [acc, part]
        half = kind.dtype == torch.float16
        if half:
            # The CPU's provider adds none; a sum in float32 is rounded to the same number.
            terms = [build.cast(value, dtype=torch.float32) for value in terms]
        into, added = cast(list[Any], terms)
        total: Any = view.emit("ScatterND", [into, columns, added], {"reduction": "add"}).outputs[0]
        set_type(total, Type(torch.float32 if half else kind.dtype, kind.shape))
        return build.cast(total, dtype=torch.float16) if half else cast(Value, total)


def _check_shares(view: View, share: Value, root: Node) -> None:
    """Refuse a share that is no column of weights scattered into zeros."""
    node = view.maker(share)
    while view.op(node) in _COLUMN:
        node = view.maker(view.tensor(node))
    if view.op(node) != NATIVE or view.native_op(node) != "ScatterElements":
        raise Refusal("what it is multiplied by is no share that a router scattered", root)
    data: Operand = view.arguments(node)[0]
    maker = view.producer(data) if is_value(data) else None
    if maker is not None and view.op(maker) == "expand":
        data = view.tensor(maker)
    if view.number(data) != 0:
        raise Refusal("the router's shares are not scattered into zeros", root)


def _expert(view: View, output: Value, root: Node) -> tuple[list[Node], Value]:
    """The nodes that make an expert's result and nothing else, in order, and what they are made of.
    ``Refusal`` where that is more than one value."""
    last = view.maker(output)
    inside = {last}
    queue = [last]
    for node in queue:
        if not _by_row(view, node):
            raise Refusal(f"`{view.op(node)}` is no part of an expert", root)
        producers = [view.producer(o) for o in view.operands(node) if is_value(o)]
        fresh = [n for n in producers if n is not None and n not in inside and _by_row(view, n)]
        for maker in dict.fromkeys(fresh):
            users = [user for value in view.results(maker) for user in view.users(value)]
            if all(user in inside for user in users):
                inside.add(maker)
                queue.append(maker)
        if len(queue) > _MOST:
            raise Refusal("it is too large for an expert", root)
    values = [o for node in inside for o in view.operands(node) if is_value(o)]
    taken = {o for o in values if view.weight(o) is None and view.producer(o) not in inside}
    if len(taken) != 1 or not any(_is_linear(view, node) for node in inside):
        raise Refusal(f"the sum is of no expert: it is made of {len(taken)} values", root)
    return queue[::-1], taken.pop()


def _by_row(view: View, node: Node) -> bool:
    op = view.op(node)
    if op == NATIVE or any(view.type(value).rank != 2 for value in view.results(node)):
        return False
    if op in _CUTS and view.attrs(node)["dim"] not in (1, -1):
        return False
    return op in _BY_ROW or traits(op).activation or _is_linear(view, node)


def _is_linear(view: View, node: Node) -> bool:
    """Whether a node multiplies rows by a weight, which a graph may have as a product."""
    if view.op(node) != "matmul":
        return spec(view.op(node)).is_linear
    weight = view.operands(node)[1]
    return is_value(weight) and view.weight(weight) is not None
