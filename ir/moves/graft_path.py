"""The move *graft*: a second path is added to a value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import Refusal
from ..core.view import Value, View
from ..core.weights import Weight
from ..vocab.builder import Builder


def graft(
    view: View,
    onto: Value,
    x: Value,
    op: str,
    weights: Sequence[tuple[str, Weight]],
    attrs: Mapping[str, Any],
    *,
    rule: str,
    step: int = 0,
) -> Value:
    """``onto => add(onto, op(x, *weights, **attrs))``; every user of ``onto`` sees the sum.

    ``weights`` are (name, handle) pairs. ``x`` must be computed before ``onto``. Raises ``Refusal``
    where the path's result does not have the type of ``onto``.
    """
    place = view.maker(onto)
    with view.made_by(rule, step):
        constants = [view.add_weight(name, weight) for name, weight in weights]
        b = Builder(view, view.after(place))
        total = b.add(onto, b.build(op, x, *constants, like=onto, **attrs), like=onto)
    view.replace(onto, total)
    return total


@dataclass(frozen=True)
class Factor:
    """One factor of a low-rank path as it is stored: ``op(x, *weights, **attrs)``."""

    rows: int
    columns: int
    weights: Sequence[tuple[str, Weight] | None]
    """(name, handle) pairs, ``None`` for an absent operand."""
    op: str = "linear"
    attrs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def dense(cls, name: str, weight: Weight) -> Factor:
        rows, columns = weight.shape
        return cls(rows, columns, ((name, weight),))

    @property
    def nbytes(self) -> int:
        return sum(pair[1].nbytes for pair in self.weights if pair is not None)


def graft_low_rank(
    view: View,
    x: Value,
    down: Factor,
    members: Sequence[tuple[Value, Factor]],
    *,
    rule: str,
    step: int = 0,
) -> list[Value]:
    """``onto => add(onto, up(down(x)))`` for each member; the sums.

    ``down`` is A, ``[r, in]``; members are (onto, B) with B ``[out, r_i]``, the ``r_i`` adding up
    to ``r``, in the order of the graph: siblings that share ``x`` share one matmul, whose result is
    cut. Dense factors stored in a narrower dtype than ``x`` are cast when the model runs. Raises
    ``Refusal`` where the ranks do not add up, or a path's result does not have its member's type.
    """
    ranks = [up.columns for _, up in members]
    if sum(ranks) != down.rows:
        raise Refusal(f"ranks {ranks} do not add up to {down.rows}, the rows of A")
    first = view.maker(members[0][0])
    dtype = view.type(x).dtype
    with view.made_by(rule, step):
        narrow = _applied(Builder(view, first), down, x, dtype)
        sums, start = [], 0
        for (onto, up), rank in zip(members, ranks, strict=True):
            b = Builder(view, view.after(view.maker(onto)))
            part = narrow
            if len(members) > 1:
                last = (view.type(x).rank or 0) - 1
                part = b.slice(narrow, start, start + rank, dim=last)
            side = _applied(b, up, part, dtype, like=onto)
            total = b.add(onto, side, like=onto)
            view.replace(onto, total)
            sums.append(total)
            start += rank
    return sums


def _applied(
    b: Builder, factor: Factor, x: Value, dtype: Any, like: Value | None = None
) -> Value:
    operands = [None if pair is None else b.view.add_weight(*pair) for pair in factor.weights]
    while operands[-1] is None:
        operands.pop()
    first, handle = operands[0], factor.weights[0]
    if factor.op == "linear" and handle is not None and handle[1].dtype != dtype:
        assert first is not None
        operands[0] = b.cast(first, dtype=dtype)
    return b.build(factor.op, x, *operands, like=like, **factor.attrs)
