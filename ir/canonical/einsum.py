"""``einsum`` of two factors that is a product of matrices becomes one.

einsum("bsd,dnh->bsnh", x, w)       => reshape(linear(x, w as [n h, d]), [b, s, n, h])
einsum("bqhd,bkhd->bhqk", q, k)     => matmul(transpose(q), transpose(k))

The labels of a product are of four kinds: those of both factors that the result has (``batch``) and
has not (``sum``), and those of one factor alone (``rows`` of the left one, ``columns`` of the right
one). A constant without batch labels is taken as the right factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import Refusal
from ..core.view import Node, Operand, Value, View, is_value
from ..core.weights import ComputedWeight, Weight
from ..rewrite.pattern import Match
from ..rewrite.rule import Build, Rule
from .linear import transposed_weight


@dataclass(frozen=True)
class _Product:
    """An equation as a product of matrices; each factor and the result as a text of labels."""

    factors: tuple[Value, Value]
    labels: tuple[str, str]
    out: str

    @property
    def batch(self) -> str:
        return "".join(c for c in self.out if c in self.labels[0] and c in self.labels[1])

    @property
    def sum(self) -> str:
        return "".join(c for c in self.labels[0] if c in self.labels[1] and c not in self.out)

    @property
    def swapped(self) -> _Product:
        """The same with its factors the other way round."""
        return _Product(self.factors[::-1], self.labels[::-1], self.out)

    def alone(self, which: int) -> str:
        """``rows`` (0) or ``columns`` (1), in the order of their factor."""
        return "".join(c for c in self.labels[which] if c not in self.labels[1 - which])


class FuseEinsum(Rule):
    """Einsum(a, b) => transpose(matmul(transpose(a), transpose(b))), or linear of a constant b"""

    name = "fuse-einsum"
    op, equation = "Einsum", "equation"

    def pattern(self, p: Any, a: Any, b: Any) -> Any:
        return p.native(self.op, a, b)

    def where(self, match: Match) -> None:
        self._read(match)

    def replace(self, build: Build, **bound: Operand) -> Value:
        product = self._read(build.match)
        if _constant(build.view, product) is not None:
            return _linear(build, product)
        return _matmul(build, product)

    def _read(self, match: Match) -> _Product:
        equation = match.view.attrs(match.root).get(self.equation)
        if not isinstance(equation, str):
            raise Refusal("the equation is not known", match.root)
        return _read(match.view, match.root, equation, (match.value("a"), match.value("b")))


class FuseAtenEinsum(FuseEinsum):
    """einsum(a, b) => transpose(matmul(transpose(a), transpose(b))), or linear of a constant b"""

    name = "fuse-aten-einsum"
    op, equation = "aten.einsum.default", "arg0"


def _read(view: View, root: Node, equation: str, factors: tuple[Value, Value]) -> _Product:
    ranks = [view.type(value).rank for value in factors]
    if None in ranks:
        raise Refusal("the rank of a factor is not known", root)
    labels, out = _labels(equation.replace(" ", ""), [int(rank or 0) for rank in ranks], root)
    product = _Product(factors, (labels[0], labels[1]), out)
    if any(len(set(part)) < len(part) for part in (*labels, out)):
        raise Refusal(f"{equation} names a dimension twice: it takes a diagonal", root)
    if set(product.alone(0) + product.alone(1)) - set(out):
        raise Refusal(f"{equation} sums over a dimension of one factor alone", root)
    if not (product.sum and product.alone(0) and product.alone(1)):
        raise Refusal(f"{equation} is not a product of matrices", root)
    for label in product.sum:
        sizes = {_size(view, product, which, label) for which in (0, 1)}
        if len({size for size in sizes if isinstance(size, int)}) > 1:
            raise Refusal(f"{equation}: sizes {sorted(map(str, sizes))} of {label} differ", root)
    return product.swapped if _is_swapped(view, product) else product


def _is_swapped(view: View, product: _Product) -> bool:
    """Whether the right factor is to be the left one: a constant is the right one, and without one
    rows come before columns in the result."""
    left, right = (view.weight(value) is not None for value in product.factors)
    if left != right and not product.batch:
        return left
    return product.out.index(product.alone(0)[0]) > product.out.index(product.alone(1)[0])


def _labels(equation: str, ranks: Sequence[int], root: Node) -> tuple[list[str], str]:
    """The labels of each factor and of the result, those of an ellipsis made up."""
    before, arrow, out = equation.partition("->")
    terms = before.split(",")
    if len(terms) != len(ranks):
        raise Refusal(f"{equation} is of {len(terms)} factors, {len(ranks)} are given", root)
    labels, widest = [], 0
    for term, rank in zip(terms, ranks, strict=True):
        named = term.replace("...", "")
        widest = max(widest, rank - len(named) if "..." in term else 0)
    made_up = "".join(chr(0x100 + i) for i in range(widest))
    for term, rank in zip(terms, ranks, strict=True):
        hidden = rank - len(term.replace("...", ""))
        if hidden < 0 or (hidden > 0 and "..." not in term):
            raise Refusal(f"{equation} does not fit a factor of {rank} dimensions", root)
        labels.append(term.replace("...", made_up[len(made_up) - hidden :]))
    if not arrow:
        once = sorted(c for c in set("".join(labels)) if "".join(labels).count(c) == 1)
        return labels, made_up + "".join(c for c in once if c not in made_up)
    return labels, out.replace("...", made_up)


def _size(view: View, product: _Product, which: int, label: str) -> int | str:
    shape = view.type(product.factors[which]).shape
    assert shape is not None
    return shape[product.labels[which].index(label)]


def _sizes(build: Build, product: _Product, which: int, labels: str) -> list[Operand]:
    """The sizes of dimensions of one factor, as ``reshape`` takes them."""
    sizes: list[Operand] = []
    for label in labels:
        size = _size(build.view, product, which, label)
        dim = product.labels[which].index(label)
        sizes.append(
            size if isinstance(size, int) else build.size(product.factors[which], dim=dim)
        )
    return sizes


def _constant(view: View, product: _Product) -> Weight | None:
    return None if product.batch else view.weight(product.factors[1])


def _linear(build: Build, product: _Product) -> Value:
    rows, columns = product.alone(0), product.alone(1)
    x = _arranged(build, product, 0, rows, product.sum)
    result = build.linear(x, _matrix(build.view, product))
    if len(columns) > 1:
        sizes = _sizes(build, product, 0, rows) + _sizes(build, product, 1, columns)
        result = build.reshape(result, *sizes)
    return _turned(build, result, rows + columns, product.out)


def _matrix(view: View, product: _Product) -> Value:
    """The constant factor as [columns, sum]."""
    value, labels = product.factors[1], product.labels[1]
    handle = view.weight(value)
    assert handle is not None
    order = product.alone(1) + product.sum
    if labels == order and len(labels) == 2:
        return value
    if len(labels) == 2:
        return transposed_weight(view, value)
    perm = tuple(labels.index(label) for label in order)
    count = len(product.sum)
    width = math.prod(handle.shape[d] for d in perm[-count:])
    shape = (handle.numel // width, width)
    matrix = ComputedWeight(
        lambda: handle.read().permute(perm).reshape(shape), shape, handle.dtype,
        ("permuted", perm, shape, handle.key),
    )  # fmt: skip
    return view.add_weight(view.name(value), matrix)


def _matmul(build: Build, product: _Product) -> Value:
    batch, rows, columns = product.batch, product.alone(0), product.alone(1)
    left = _arranged(build, product, 0, batch, rows, product.sum)
    right = _arranged(build, product, 1, batch, product.sum, columns)
    result = build.matmul(left, right)
    if len(rows) > 1 or len(columns) > 1:
        sizes = _sizes(build, product, 0, batch + rows) + _sizes(build, product, 1, columns)
        result = build.reshape(result, *sizes)
    return _turned(build, result, batch + rows + columns, product.out)


def _arranged(build: Build, product: _Product, which: int, lead: str, *groups: str) -> Value:
    """A factor with the dimensions ``lead`` and then one for each group of labels."""
    order = lead + "".join(groups)
    value = _turned(build, product.factors[which], product.labels[which], order)
    if all(len(group) == 1 for group in groups):
        return value
    sizes = _sizes(build, product, which, lead)
    for group in groups:
        parts = _sizes(build, product, which, group)
        joined: Operand = math.prod(part for part in parts if isinstance(part, int))
        for part in parts:
            if is_value(part):
                joined = part if joined == 1 else build.mul(part, joined)
        sizes.append(joined)
    return build.reshape(value, *sizes)


def _turned(build: Build, value: Value, labels: str, order: str) -> Value:
    if labels == order:
        return value
    return build.transpose(value, perm=tuple(labels.index(label) for label in order))


RULES: tuple[type[Rule], ...] = (FuseEinsum, FuseAtenEinsum)
