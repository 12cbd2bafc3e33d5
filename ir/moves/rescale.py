"""The move *rescale*: features of a linear's input in other units, exactly.

``x W^T = (x / s) (W diag(s))^T``. The columns of every linear that reads x are multiplied by s, and
x is divided by s where it is made: in the constants that its features are proportional to, one by
one. Those are a norm's weight and bias, or the rows of a linear (``v`` before ``o``, ``up`` before
``down``, one before a relu). No node is added, unless one is asked for where no constant makes x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core.errors import Refusal
from ..core.view import Node, Value, View
from ..core.weights import MemoryWeight, Weight
from ..structure.recognize import Linear, Structure
from .makers import Makers, check_own, keeps_features


@dataclass(frozen=True)
class Inlet:
    """What some linears read, and what it is made by."""

    linears: tuple[Linear, ...]
    """Every linear that reads it."""
    makers: tuple[Value, ...]
    """The constants that its features are proportional to, along their first dimension; none where
    a node divides them."""
    rows: Tensor
    """i64 ``[K]``: the entry of the makers that makes each feature. Features of one entry (the
    value heads that several query heads share) can only be rescaled alike."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(linear.name for linear in self.linears)

    def shared(self, factors: Tensor) -> Tensor:
        """``factors`` ``[K]`` f64, above 0, with the geometric mean of those of one entry."""
        size = int(self.rows.max()) + 1
        count = torch.bincount(self.rows, minlength=size)
        total = torch.zeros(size, dtype=torch.float64).index_add_(0, self.rows, factors.log())
        return (total / count.clamp_min(1)).exp()[self.rows]


def find_inlets(
    view: View, structure: Structure, *, divide: bool = False
) -> tuple[list[Inlet], list[tuple[str, str]]]:
    """The inputs of linears that can be rescaled, and for the others each linear and the reason.
    With ``divide`` a node may do it, where weights are the linears' own."""
    groups: dict[Value, list[Linear]] = {}
    for linear in structure.linears:
        groups.setdefault(feature_root(view, view.tensor(linear.node)), []).append(linear)
    inlets: list[Inlet] = []
    refused: list[tuple[str, str]] = []
    for root, linears in groups.items():
        try:
            inlets.append(_inlet(view, structure, root, linears, divide))
        except Refusal as refusal:
            refused += [(linear.name, str(refusal)) for linear in linears]
    return inlets, refused


Stored = Callable[[Weight, Literal["columns", "rows"], Callable[[Tensor], Tensor]], Weight]
"""From a constant, which of its dimensions change, and what becomes of its numbers to where those
are kept."""


def rescale(view: View, inlet: Inlet, factors: Tensor, stored: Stored) -> None:
    """Divide an input by ``factors`` ``[K]`` f64, which ``Inlet.shared`` gave, and make up for it.

    Numbers are rounded to the dtype that they had; powers of two round none.
    """
    divisors = torch.ones(int(inlet.rows.max()) + 1, dtype=torch.float64)
    divisors[inlet.rows] = factors

    def columns(weight: Tensor) -> Tensor:
        return (weight.double() * factors).to(weight.dtype)

    def rows(weight: Tensor) -> Tensor:
        each = torch.ones(len(weight), dtype=torch.float64)
        each[: len(divisors)] = divisors
        return (weight.double() / each.reshape(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)

    for linear in inlet.linears:
        view.set_weight(linear.weight, stored(_constant(view, linear.weight), "columns", columns))
    for maker in inlet.makers:
        view.set_weight(maker, stored(_constant(view, maker), "rows", rows))
    if not inlet.makers:
        _divide(view, inlet, factors)


def _divide(view: View, inlet: Inlet, factors: Tensor) -> None:
    """x / s by a node before the first linear that reads x, for all that do."""
    readers: dict[Value, list[Linear]] = {}
    for linear in inlet.linears:
        readers.setdefault(view.tensor(linear.node), []).append(linear)
    for x, linears in readers.items():
        first = linears[0]
        inverse = MemoryWeight((1 / factors).to(view.type(x).dtype or torch.float32))
        by = view.add_weight(f"{first.name}.divided_by", inverse)
        divided = view.build("mul", [x, by], {}, before=first.node)
        for linear in linears:
            view.set_operand(linear.node, 0, divided)


def is_narrow(view: View, inlet: Inlet) -> bool:
    """Whether a constant of it would be rounded by factors that are no powers of two."""
    values = (*(linear.weight for linear in inlet.linears), *inlet.makers)
    return any(_constant(view, value).dtype.itemsize < 4 for value in values)


def _constant(view: View, value: Value) -> Weight:
    weight = view.weight(value)
    assert weight is not None
    return weight


# --- who reads it --------------------------------------------------------------------------------


def feature_root(view: View, value: Value) -> Value:
    """The value behind reshapes and casts that leave features as they are."""
    while True:
        node = view.producer(value)
        if node is None or not keeps_features(view, node):
            return value
        value = view.tensor(node)


def feature_readers(view: View, root: Value) -> Iterator[Node]:
    """The nodes that read a value, through what leaves its features as they are."""
    stack = [root]
    while stack:
        value = stack.pop()
        if view.is_output(value):
            raise Refusal(f"{view.name(value)}, which it reads, is an output")
        for user in view.users(value):
            if keeps_features(view, user):
                stack.append(view.results(user)[0])
            else:
                yield user


def _inlet(
    view: View, structure: Structure, root: Value, linears: Sequence[Linear], divide: bool
) -> Inlet:
    size = linears[0].in_features
    try:
        _check_readers(view, root, linears)
        _check_weights(view, linears)
        makers, rows = Makers(view, structure).of(root, size)
    except Refusal:
        if not divide:
            raise
        _check_weights(view, linears)
        makers, rows = (), torch.arange(size)
    return Inlet(tuple(linears), makers, rows)


def _check_weights(view: View, linears: Sequence[Linear]) -> None:
    for linear in linears:
        check_own(view, linear.weight, linear.node, linear.name)


def _check_readers(view: View, root: Value, linears: Sequence[Linear]) -> None:
    nodes = {linear.node for linear in linears}
    for user in feature_readers(view, root):
        if user not in nodes:
            raise Refusal(f"{view.op(user)} ({view.name(user)}) reads its input too")
