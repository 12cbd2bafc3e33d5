"""Where our reading leaves the source: the first node whose value is another than the source's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..core.errors import BadInput, InvalidGraph, Missing
from ..core.view import Node, Original, Value, View
from .sweep import sweep
from .verify import Difference, difference

POINTS = 24
"""Values that are compared at a time: a large model's do not all fit in memory."""


def first_wrong(
    read: View, graph: View, original: Original, inputs: Mapping[str, torch.Tensor], bound: float
) -> str:
    """The first node that is wrong, in a sentence; of ``graph``, where ``read`` is right.

    Empty where no value can be compared.
    """
    for view in (read, graph):
        try:
            first = _first_wrong(view, original, inputs, bound)
        except (BadInput, Missing):
            continue
        if first is not None:
            return _sentence(view, *first)
    return ""


def _sentence(view: View, value: Value, gap: str) -> str:
    node = view.producer(value)
    assert node is not None
    scope = view.scope(node)
    where = f" in {scope}" if scope else ""
    return (
        f"The first value that differs is that of the node {view.name(node)} "
        f"({view.native_op(node)}{where}), by {gap}. "
    )


def _first_wrong(
    view: View, original: Original, inputs: Mapping[str, torch.Tensor], bound: float
) -> tuple[Value, str] | None:
    """Bisection with ``POINTS`` values at a time.

    A value that differs leaves as suspects what it is computed from; one that agrees clears what
    *it* is computed from, for an error there would show in it. What is left at the end differs
    while nothing before it does.
    """
    names = original.visible(view)
    order = [v for node in view.nodes() for v in view.results(node) if v in names]
    wrong: tuple[Value, str] | None = None
    suspects = order
    while suspects:
        points = _spread(suspects, POINTS)
        gaps = _gaps(view, original, inputs, {v: names[v] for v in points}, bound)
        first = next((v for v in points if gaps.get(v)), None)
        if first is not None:
            wrong = first, gaps[first]
        above = set(order) if wrong is None else _above(view, [wrong[0]])
        cleared = [v for v in points if v in gaps and not gaps[v]]
        gone = {*_above(view, cleared), *points}
        suspects = [v for v in suspects if v in above and v not in gone]
    return wrong


def _spread(values: Sequence[Value], count: int) -> list[Value]:
    """Up to ``count`` of the values, evenly apart, the last among them."""
    step = -(-len(values) // count)
    return list(values[::-1][::step][::-1])


def _above(view: View, values: Sequence[Value]) -> set[Value]:
    """The values and all that they are computed from."""
    above: set[Value] = set(values)
    queue = list(values)
    while queue:
        node: Node | None = view.producer(queue.pop())
        new = [v for v in (view.arguments(node) if node is not None else ()) if v not in above]
        above.update(new)
        queue += new
    return above


def _gaps(
    view: View, original: Original, inputs: Mapping[str, torch.Tensor], names: Mapping[Value, str],
    bound: float,
) -> dict[Value, str]:  # fmt: skip
    """How far each value is from the source's, in words; empty where it agrees. What the source
    has in another shape is not a value of its own and left out."""
    ours: dict[Value, torch.Tensor] = {}

    def note(node: Node, _: Sequence[object], results: tuple[object, ...]) -> None:
        for value, result in zip(view.results(node), results, strict=False):
            if value in names and isinstance(result, torch.Tensor):
                ours[value] = result

    sweep(view, inputs, observe=note)
    theirs = original.start(tuple(names.values()))(inputs)
    gaps: dict[Value, str] = {}
    for value, name in names.items():
        if value not in ours or name not in theirs:
            continue
        try:
            gap = difference(theirs[name], ours[value])
        except InvalidGraph:
            continue
        gaps[value] = "" if gap.within(bound) else _words(gap)
    return gaps


def _words(gap: Difference) -> str:
    return f"{gap.rel_l2:.3g} (relative L2)"
