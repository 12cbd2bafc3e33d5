"""The move *pick rows*: a head that gives some of its results, a table of some of its rows."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from ..core.errors import InvalidGraph, Refusal
from ..core.view import Node, Value, View
from ..core.weights import Spool, Weight
from ..structure.recognize import Embedding, Linear
from ..vocab import traits
from ..vocab.builder import Builder


class Rows:
    """Rows of tables and heads, ``ids`` i64 ``[count]``; what two share stays shared."""

    def __init__(self, ids: torch.Tensor, spool: Spool) -> None:
        self.ids = ids
        self._spool = spool
        self._picked: dict[Hashable, Weight] = {}

    def of(self, weight: Weight) -> Weight:
        """The rows of a matrix."""
        if weight.key not in self._picked:
            self._picked[weight.key] = self._spool.store(weight.read()[self.ids])
        return self._picked[weight.key]

    def of_last(self, weight: Weight) -> Weight:
        """The entries of a constant along its last dimension."""
        return self._spool.store(weight.read()[..., self.ids])


_POINTWISE = frozenset({"add", "sub", "mul", "div", "tanh", "cast", "identity"})
"""What may lie between a head and the output: a cap, a scale, a bias of its own."""


def pick_head_rows(view: View, head: Linear, rows: Rows, *, rule: str, step: int = 0) -> None:
    """Let a head compute these of its results alone, in this order.

    Its weight may be tied to a table, which stays as it is. What is added to its results, or
    multiplied by, follows. Raises ``Refusal`` where the head is stored in another form than a
    matrix, and where something between it and an output needs all of its results.
    """
    weight = view.weight(head.weight)
    if head.quantized or weight is None or view.op(head.node) != "linear":
        raise Refusal(f"{head.name} is stored in another form already: put this first", head.node)
    constants = _beside(view, head)
    operand = view.tensor(head.node, 1)
    with view.made_by(rule, step):
        b = Builder(view, head.node)
        picked = view.add_weight(f"{head.name}.rows", rows.of(weight))
        dtype = view.type(operand).dtype
        if dtype is not None and dtype != weight.dtype:
            picked = b.cast(picked, dtype=dtype)
        bias = () if head.bias is None else (_picked(view, head.bias, rows),)
        out = b.linear(head.x, picked, *bias)
        for node, index, constant in constants:
            view.set_operand(node, index, _picked(view, constant, rows))
        _put(view, head.out, out, f"{head.name}: its results have another size")
        view.erase_dead(head.node)
    view.drop_unused_weights()


def pick_table_rows(view: View, table: Embedding, rows: Rows, *, rule: str, step: int = 0) -> None:
    """Let a table hold these of its rows alone: the ids that pick from it are then places in
    ``rows``.

    Raises ``Refusal`` where the table is stored in another form than a matrix.
    """
    operand = view.tensor(table.node)
    weight = view.weight(operand)
    if weight is None or view.op(table.node) != "embedding":
        raise Refusal(f"{table.name} is stored in another form already: put this first", table.node)
    with view.made_by(rule, step):
        picked = view.add_weight(f"{table.name}.rows", rows.of(weight))
        view.set_operand(table.node, 0, picked)
    view.drop_unused_weights()


def _beside(view: View, head: Linear) -> list[tuple[Node, int, Value]]:
    """Constants with a number for each result of the head, that meet the results behind it: the
    node, which operand, the constant."""
    constants = []
    queue, reached = [head.out], {head.out}
    while queue:
        value = queue.pop()
        for node in view.users(value):
            if view.op(node) not in _POINTWISE and not traits(view.op(node)).activation:
                raise Refusal(
                    f"{view.name(node)} ({view.native_op(node)}) reads the results of {head.name}, "
                    "and may need all of them",
                    node,
                )
            for index, operand in enumerate(view.operands(node)):
                if operand is None or isinstance(operand, int | float) or operand in reached:
                    continue
                shape = view.type(operand).shape
                if view.weight(operand) is None or shape is None:
                    raise Refusal(
                        f"{view.name(node)} joins {head.name} with what is computed", node
                    )
                if shape[-1:] == (head.out_features,):
                    constants.append((node, index, operand))
            result = view.results(node)[0]
            reached.add(result)
            queue.append(result)
    return constants


def _picked(view: View, constant: Value, rows: Rows) -> Value:
    weight = view.weight(constant)
    if weight is None:
        raise Refusal(f"{view.name(constant)}, the head's bias, is computed")
    return view.add_weight(f"{view.name(constant)}.rows", rows.of_last(weight))


def _put(view: View, old: Value, new: Value, what: str) -> None:
    try:
        view.replace(old, new)
    except InvalidGraph as error:
        raise Refusal(f"{what}, and what follows does not take that: {error}") from None
