"""Stacks of blocks, as an artifact of any size writes them, become ``linear_bitstack`` again.

matmul(x, transpose(sum(mul(plane, magnitudes)))) => linear_bitstack(x, signs, factors)
"""

from __future__ import annotations

from typing import Any

from ..core.joined_weights import StackedWeight
from ..core.view import Operand, Value, View, is_value
from ..ops.bitstack_blocks import place_of
from ..rewrite.pattern import Match
from ..rewrite.rule import Build, Rule


class FuseBitStack(Rule):
    """matmul(x, transpose(sum(mul(plane, magnitudes)))) => linear_bitstack(x, signs, factors)"""

    name = "fuse-bitstack"

    def pattern(self, p: Any, x: Any, turned: Any) -> Any:
        # Tied linears have what is behind it in common: only the root may be replaced.
        return p.matmul(x, turned)

    def where(self, match: Match) -> None:
        if _stack(match.view, match["turned"]) is None:
            match.refuse("the second operand is not made from blocks")

    def replace(self, build: Build, **bound: Operand) -> Value:
        view = build.view
        stack = _stack(view, bound["turned"])
        assert stack is not None
        signs, factors, (rows, columns) = stack
        root = build.match.root
        name = view.scope(root) or view.name(root)
        return build.linear_bitstack(
            bound["x"], view.add_weight(f"{name}.signs", signs),
            view.add_weight(f"{name}.factors", factors), in_features=columns, out_features=rows,
            # The name before it was written out: else names would grow from artifact to artifact.
            name=view.name(root).rpartition("/")[0] or None,
        )  # fmt: skip


_Stack = tuple[StackedWeight, StackedWeight, tuple[int, int]]


def _stack(view: View, turned: Operand) -> _Stack | None:
    """Signs, factors and shape of the weight behind ``transpose(sum(mul(plane, magnitudes)))``."""
    value = turned
    for op, key, setting in (("transpose", "perm", (1, 0)), ("sum", "dims", (0,)), ("mul", "", ())):
        node = view.producer(value) if is_value(value) else None
        if node is None or view.op(node) != op or (key and view.attrs(node)[key] != setting):
            return None
        value, *other = view.operands(node)
    if not is_value(value) or not is_value(other[0]):
        return None
    for plane, magnitudes in ((value, other[0]), (other[0], value)):
        signs, factors = _signs(view, plane), _factors(view, magnitudes)
        if signs is not None and factors is not None:
            return signs, *factors
    return None


def _signs(view: View, plane: Value) -> StackedWeight | None:
    """The signs behind ``reshape(embedding(table, cast(blocks)))``, cut to size or not."""
    value = _behind(view, plane, "reshape", "slice")
    node = view.producer(value)
    if node is None or view.op(node) != "embedding":
        return None
    table, ids = view.tensor(node, 0), view.tensor(node, 1)
    return _blocks(view, _behind(view, ids, "cast")) if view.weight(table) is not None else None


def _factors(view: View, magnitudes: Value) -> tuple[StackedWeight, tuple[int, int]] | None:
    """The factors behind ``matmul(transpose(u), v)``, where ``u, v = split(cast(blocks))``, and how
    many of their columns are u's and v's."""
    node = view.producer(magnitudes)
    if node is None or view.op(node) != "matmul":
        return None
    turned, right = view.tensor(node, 0), view.tensor(node, 1)
    split = view.producer(right)
    if split is None or view.op(split) != "split" or view.attrs(split)["dim"] != 2:
        return None
    if tuple(view.results(split)) != (_behind(view, turned, "transpose"), right):
        return None
    blocks = _blocks(view, _behind(view, view.tensor(split), "cast"))
    rows, columns = view.attrs(split)["sizes"]
    return None if blocks is None else (blocks, (rows, columns))


def _behind(view: View, value: Value, *ops: str) -> Value:
    node = view.producer(value)
    while node is not None and view.op(node) in ops:
        value = view.tensor(node)
        node = view.producer(value)
    return value


def _blocks(view: View, value: Value) -> StackedWeight | None:
    """The blocks that a ``concat`` joins, under the names that they are stored by."""
    node = view.producer(value)
    if node is None or view.op(node) != "concat" or view.attrs(node)["dim"] != 0:
        return None
    parts = [part for part in view.operands(node) if is_value(part)]
    names = [view.name(part) for part in parts]
    handles = [view.weight(part) for part in parts]
    if any(place_of(name) is None for name in names):
        return None
    return StackedWeight([h for h in handles if h is not None], names)


RULES: tuple[type[Rule], ...] = (FuseBitStack,)
