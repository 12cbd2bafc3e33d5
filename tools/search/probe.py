"""How much the loss minds errors at each linear: one is moved, and what follows runs again."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ir.core.view import Node, Value, View
from ...ir.run.masks import tokens_that_count
from ...ir.run.sweep import bound, run_part
from ...ir.structure.recognize import Linear
from .judge import Judge, needed, value_of

Progress = Callable[[str, int, int], None]
Minded = dict[str, dict[str, float]]
"""How much the loss minds a mean squared error of 1, by linear and method."""
Met = dict[str, dict[str, list[float]]]
"""The mean squared error that was made to ask for that, by linear and method, and how much of it
each direction of the gap takes back."""


@dataclass(frozen=True)
class Gap:
    """What a method takes from a linear's weight."""

    whole: Tensor
    """``[out, in]``."""
    directions: Tensor
    """What a low-rank path of each rank gives back: the first so many rows ``[k, in]``, by as many
    directions of the output, which are orthonormal."""


Gaps = Callable[[Linear], Mapping[str, Gap]]
"""Of a linear, by method."""


@dataclass(frozen=True)
class _Order:
    """The nodes that the judged output is computed by, and where each value is used last."""

    nodes: Sequence[Node]
    last: Mapping[Value, int]
    output: Value

    @classmethod
    def of(cls, view: View, name: str) -> _Order:
        output = value_of(view, name)
        nodes = needed(view, [output])
        last = {v: i for i, node in enumerate(nodes) for v in view.arguments(node)}
        return cls(nodes, {**last, output: len(nodes)}, output)

    def alive(self, place: int) -> set[Value]:
        """What is read behind the node at a place."""
        return {value for value, last in self.last.items() if last > place}


def sensitivities(
    view: View, judge: Judge, linears: Sequence[Linear], gaps: Gaps, progress: Progress
) -> tuple[Minded, Met]:
    """The judge's ``mean`` for a mean squared error of 1 at the output of each linear, and the
    errors that are made there on the judge's rows.

    Each linear's output is moved by what ``gaps`` take from its weight, as rounding would move it,
    and the nodes behind it run anew; those before it run once for all. Linears that the judged
    output does not depend on are left out. Needs memory for the values of one cut of the graph.
    """
    order = _Order.of(view, judge.output)
    places = {node: i for i, node in enumerate(order.nodes)}
    there = sorted(
        (linear for linear in linears if linear.node in places), key=lambda x: places[x.node]
    )
    known: dict[Value, list[Tensor]] = bound(view, judge.batches)
    minded: Minded = {}
    met: Met = {}
    start = 0
    for number, linear in enumerate(there):
        progress(f"probing {linear.name}", number, len(there))
        place = places[linear.node]
        x = view.tensor(linear.node)
        keep = order.alive(place) | {x}
        known = _run(view, order.nodes[start : place + 1], known, keep)
        start = place + 1
        minded[linear.name], met[linear.name] = {}, {}
        for method, gap in gaps(linear).items():
            loss, (error, *taken) = _moved(view, judge, order, place, linear, known, gap)
            minded[linear.name][method] = loss / error if error else 0.0
            met[linear.name][method] = [error, *taken]
    return minded, met


def _run(
    view: View, nodes: Sequence[Node], known: Mapping[Value, list[Tensor]], keep: Collection[Value]
) -> dict[Value, list[Tensor]]:
    return run_part(view, nodes, known, keep) if nodes else dict(known)


def _moved(
    view: View, judge: Judge, order: _Order, place: int, linear: Linear,
    known: Mapping[Value, list[Tensor]], gap: Gap,
) -> tuple[float, list[float]]:  # fmt: skip
    """The judge's ``mean`` where a gap moves a linear's output; how far, as a mean square, and how
    much of that is along each of its directions."""
    moved, tokens = [], 0
    whole, directions = gap.whole.float(), gap.directions.float()
    energies = torch.zeros(1 + len(directions), dtype=torch.float64)
    columns = zip(known[view.tensor(linear.node)], known[linear.out], judge.masks, strict=True)
    for x, out, masks in columns:
        change = x.float() @ whole.T
        rows = tokens_that_count(change, masks)
        energies[0] += rows.square().sum(dtype=torch.float64)
        along = tokens_that_count(x.float() @ directions.T, masks)
        energies[1:] += along.square().sum(0, dtype=torch.float64)
        tokens += len(rows)
        moved.append(out - change.to(out.dtype))
    if not energies[0]:
        return 0.0, energies.tolist()
    values = {**known, linear.out: moved}
    behind = order.nodes[place + 1 :]
    outputs = _run(view, behind, values, {order.output})[order.output]
    return judge.mean(outputs), (energies / tokens).tolist()


def spread_over_blocks(
    linears: Sequence[Linear], most: int
) -> tuple[list[Linear], Callable[[Minded], Minded]]:
    """Up to about ``most`` linears that stand for all: those outside of blocks, and those of blocks
    at even distances, and one block for each role that none of these has; and what fills in the
    others by the next blocks' linears of their role, their logarithms interpolated."""
    blocks = sorted({x.block for x in linears if x.block is not None})
    outside = [x for x in linears if x.block is None]
    each = max(1, (len(linears) - len(outside)) // max(1, len(blocks)))
    count = min(len(blocks), max(2, (most - len(outside)) // each))
    if count >= len(blocks):
        return list(linears), lambda by_name: by_name
    chosen = {blocks[round(i * (len(blocks) - 1) / (count - 1))] for i in range(count)}
    for role in dict.fromkeys(x.role for x in linears if x.block is not None):
        there = [x.block for x in linears if x.role == role and x.block is not None]
        if chosen.isdisjoint(there):  # of a model whose blocks are of several kinds
            chosen.add(there[len(there) // 2])
    probed = [x for x in linears if x.block is None or x.block in chosen]

    def filled(by_name: Minded) -> Minded:
        by_role: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for x in probed:
            for method, minded in by_name.get(x.name, {}).items():
                if x.block is not None and minded > 0:
                    by_role.setdefault((x.role, method), []).append((x.block, minded))
        methods = dict.fromkeys(method for minded in by_name.values() for method in minded)
        missing = [(x, x.block) for x in linears if x.name not in by_name and x.block is not None]
        return by_name | {
            x.name: {
                m: _between(by_role[x.role, m], block) for m in methods if (x.role, m) in by_role
            }
            for x, block in missing
        }

    return probed, filled


def _between(known: Sequence[tuple[int, float]], block: int) -> float:
    at = bisect.bisect([b for b, _ in known], block)
    (low, a), (high, b) = known[max(0, at - 1)], known[min(at, len(known) - 1)]
    share = 0.0 if low == high else (block - low) / (high - low)
    return float(a ** (1 - share) * b**share)
