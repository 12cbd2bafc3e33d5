"""The move *graft*: a second path is added to a value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def graft_low_rank(
    view: View,
    x: Value,
    down: tuple[str, Weight],
    members: Sequence[tuple[Value, str, Weight]],
    *,
    rule: str,
    step: int = 0,
) -> list[Value]:
    """``onto => add(onto, linear(linear(x, down), up))`` for each member; the sums.

    ``down`` is (name, handle) of A, ``[r, in]``; members are (onto, name, handle of B) with B
    ``[out, r_i]``, the ``r_i`` adding up to ``r``, in the order of the graph: siblings that share
    ``x`` share one matmul, whose result is cut. Factors stored in a narrower dtype than ``x`` are
    cast when the model runs. Raises ``Refusal`` where the ranks do not add up, or a path's result
    does not have its member's type.
    """
    ranks = [weight.shape[1] for _, _, weight in members]
    if sum(ranks) != down[1].shape[0]:
        raise Refusal(f"ranks {ranks} do not add up to {down[1].shape[0]}, the rows of A")
    first = view.maker(members[0][0])
    dtype = view.type(x).dtype
    with view.made_by(rule, step):
        b = Builder(view, first)
        narrow = b.linear(x, _factor(b, *down, dtype))
        sums, start = [], 0
        for (onto, name, weight), rank in zip(members, ranks, strict=True):
            b = Builder(view, view.after(view.maker(onto)))
            part = narrow
            if len(members) > 1:
                last = (view.type(x).rank or 0) - 1
                part = b.slice(narrow, start, start + rank, dim=last)
            side = b.linear(part, _factor(b, name, weight, dtype), like=onto)
            total = b.add(onto, side, like=onto)
            view.replace(onto, total)
            sums.append(total)
            start += rank
    return sums


def _factor(b: Builder, name: str, weight: Weight, dtype: Any) -> Value:
    constant = b.view.add_weight(name, weight)
    return constant if weight.dtype == dtype else b.cast(constant, dtype=dtype)
