"""Linears that were made two, by way of fewer features: found again, and seen as the one."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..core.view import Node, Value, View
from ..vocab import dense_weight
from .recognize import Linear, Structure

FIRST, SECOND = ".low_rank.in", ".low_rank.out"
"""What the names of the two factors end with, after the linear's own."""


@dataclass(frozen=True)
class Whole:
    """A linear as the source has it: one node, or two that make its matrix."""

    linear: Linear
    """Of two, the second, by the name, the input and the size of both."""
    nodes: tuple[Node, ...]
    """In order: the first one reads the input, the last one gives the result."""

    def input(self, view: View) -> Value:
        """What it reads, as the graph now is."""
        return view.tensor(self.nodes[0])

    def matrix(self, view: View) -> Tensor:
        """W f32 ``[out, in]``, whatever form it is stored in."""
        product = dense_weight(view, self.nodes[0])
        for node in self.nodes[1:]:
            product = dense_weight(view, node) @ product
        return product


def wholes(structure: Structure) -> dict[str, Whole]:
    """All linears by the names that they have in the source, factors together."""
    by_name = {linear.name: linear for linear in structure.linears}
    by_stem: dict[str, Whole] = {}
    for linear in structure.linears:
        if linear.name.endswith(FIRST) and _second(by_name, linear) is not None:
            continue
        stem = linear.name.removesuffix(SECOND)
        first = by_name.get(stem + FIRST) if stem != linear.name else None
        if first is None or first.out is not linear.x:
            by_stem[linear.name] = Whole(linear, (linear.node,))
            continue
        both = replace(linear, name=stem, x=first.x, in_features=first.in_features)
        by_stem[stem] = Whole(both, (first.node, linear.node))
    return by_stem


def _second(by_name: dict[str, Linear], first: Linear) -> Linear | None:
    second = by_name.get(first.name.removesuffix(FIRST) + SECOND)
    return second if second is not None and second.x is first.out else None


def is_factor(linear: Linear) -> bool:
    """Whether a linear is one of two that were made of one."""
    return linear.name.endswith((FIRST, SECOND))
