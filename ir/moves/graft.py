"""The move *graft*: a second path is added to a value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..view import Origin, Value, View
from ..weights import Weight


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
    place = view.producer(onto)
    previous, view.origin = view.origin, Origin(rule, step)
    try:
        constants = [view.add_weight(name, weight) for name, weight in weights]
        after = view.after(place)
        side = view.build(op, [x, *constants], attrs, before=after, like=onto)
        total = view.build("add", [onto, side], before=after, like=onto)
    finally:
        view.origin = previous
    view.replace(onto, total)
    return total
