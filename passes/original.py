"""The model that a source was compressed from, in the source's units: what a gap is a gap to.

A source that somebody else has quantized is held against its original's weights: linears of the
same name. Two things that quantizers do to a model without changing it are done to the original
too: the units of a linear's input (AWQ divides norms and rows, and multiplies columns), and the
order of its columns (GPTQ's act-order).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..ir.canonical.families import canonicalize
from ..ir.core.errors import BadInput
from ..ir.core.view import Value, View
from ..ir.core.weights import CastWeight, ComputedWeight, Weight
from ..ir.moves import Inlet, find_inlets, rescale
from ..ir.structure.recognize import Linear, Structure, recognize
from ..ir.structure.weights import readers
from ..ir.vocab import dense_weight
from ..ir.vocab.builder import Builder
from .base import Site

SAME_UNITS = 2.0**-7
"""Relative difference of a norm's weights that rounding them to a half type leaves."""
EXPLAINED = 0.5
"""Share of a gap that other units of its rows must account for, if they are taken to be others:
rounding to 2 bits is accounted for by far less, and AWQ's factors by nearly all."""
_ROWS = 4096
"""Rows compared at a time."""


@dataclass(frozen=True)
class PreparedOriginal:
    """An original, ready to be compared with."""

    view: View
    original_keys: Mapping[str, Hashable]
    """Keys of the source's weights that are the original's own, by linear."""


def prepare(original: View, source: View, structure: Structure) -> PreparedOriginal:
    """The original in the vocabulary's words, and its linears as those of ``source``.

    ``source`` is canonical; both graphs stay as they are. Raises ``BadInput``, naming the tensor,
    where a linear of the source has no counterpart of its size.
    """
    view = original.copy()
    canonicalize(view)
    original_structure = recognize(view)
    theirs = {linear.name: linear for linear in original_structure.linears}
    for linear in structure.linears:
        _check(linear, theirs.get(linear.name), original.source.name)
    _check_words(structure, original_structure, original.source.name)
    _take_units(view, original_structure, source, structure)
    theirs = {linear.name: linear for linear in recognize(view).linears}
    original_keys = {}
    for linear in structure.linears:
        other = theirs[linear.name]
        order = _order(source, linear)
        if order is not None:
            _sort_columns(view, other, order)
        elif not linear.quantized and _equal(source, linear, view, other):
            weight = source.weight(linear.weight)
            assert weight is not None
            original_keys[linear.name] = weight.key
    return PreparedOriginal(view, original_keys)


def _check(linear: Linear, other: Linear | None, name: str) -> None:
    if other is None:
        raise BadInput(
            f"--original {name}: it has no linear {linear.name}, which the source has: give the "
            "model that the source was quantized from"
        )
    sizes = [(x.out_features, x.in_features) for x in (linear, other)]
    if sizes[0] != sizes[1]:
        raise BadInput(
            f"--original {name}: {linear.name} is {list(sizes[1])}, and {list(sizes[0])} in the "
            "source"
        )
    if other.quantized:
        raise BadInput(
            f"--original {name}: {linear.name} is quantized there too: give the model as it was "
            "before"
        )


def _check_words(ours: Structure, theirs: Structure, name: str) -> None:
    rows = {table.name: (table.rows, table.width) for table in theirs.embeddings}
    for table in ours.embeddings:
        shape = rows.get(table.name, (table.rows, table.width))
        if shape != (table.rows, table.width):
            raise BadInput(
                f"--original {name}: {table.name} is {list(shape)}, and "
                f"{[table.rows, table.width]} in the source"
            )


# --- columns -------------------------------------------------------------------------------------


def _order(source: View, linear: Linear) -> Weight | None:
    """The constant by which a quantized linear takes its input's features, where it does."""
    node = source.producer(linear.x)
    if not linear.quantized or node is None or source.op(node) != "index_select":
        return None
    if source.attrs(node).get("dim") not in (-1, len(source.type(linear.x).shape or ()) - 1):
        return None
    return source.weight(source.tensor(node, 1))


def _sort_columns(view: View, linear: Linear, order: Weight) -> None:
    """``linear(x, w) => linear(x[..., order], w[:, order])``"""
    weight = view.weight(linear.weight)
    assert weight is not None

    def sorted_() -> Tensor:
        return weight.read()[:, order.read()]

    handle = ComputedWeight(sorted_, weight.shape, weight.dtype, (weight.key, order.key))
    build = Builder(view, linear.node)
    x = build.index_select(linear.x, view.add_weight(f"{linear.name}.order", order), dim=-1)
    view.set_operand(linear.node, 0, x)
    if readers(view, linear.weight) == [linear.node]:
        view.set_weight(linear.weight, handle)
    else:
        view.set_operand(linear.node, 1, view.add_weight(f"{linear.name}.weight", handle))


# --- units ---------------------------------------------------------------------------------------


def _take_units(
    view: View, original_structure: Structure, source: View, structure: Structure
) -> None:
    """Rescale the inputs of the original's linears as the source's are, known by what makes them:
    exactly by norms, and where some of these differ, by the rows of linears too, in the least
    squares."""
    values = {source.name(value): value for value in _constants(source)}
    linears = {linear.name: linear for linear in structure.linears}
    rescaled = False
    for inlet in find_inlets(view, original_structure)[0]:
        makers = {view.name(value): value for value in inlet.makers}
        norms = not any(name.removesuffix(".weight") in linears for name in makers)
        if not norms and not rescaled:
            continue
        mine = [_rows(view, value) for value in makers.values()]
        theirs = [_counterpart(source, name, values, linears) for name in makers]
        if any(t is None for t in theirs) or len(mine) != len(theirs):
            continue
        factors = _factors(mine, [t for t in theirs if t is not None], inlet, exact=norms)
        if factors is not None:
            rescaled = True
            rescale(view, inlet, factors, _lazily)


def _constants(view: View) -> set[Value]:
    return {
        value
        for node in view.nodes()
        for value in view.arguments(node)
        if view.weight(value) is not None
    }


def _rows(view: View, value: Value) -> Tensor:
    """A constant f64, a row for each of its entries along the first dimension."""
    weight = view.weight(value)
    assert weight is not None
    return weight.read().double().reshape(weight.shape[0], -1)


def _counterpart(
    source: View, name: str, values: Mapping[str, Value], linears: Mapping[str, Linear]
) -> Tensor | None:
    """The constant of the same name in the source, dequantized; ``None`` where there is none, or
    its columns are in another order."""
    linear = linears.get(name.removesuffix(".weight"))
    if linear is not None:
        if _order(source, linear) is not None:
            return None
        return dense_weight(source, linear.node).double()
    return _rows(source, values[name]) if name in values else None


def _factors(
    mine: list[Tensor], theirs: list[Tensor], inlet: Inlet, *, exact: bool
) -> Tensor | None:
    """What the source divided an input by ``[K]`` f64; ``None`` where it is as the original's."""
    if any(a.shape != b.shape for a, b in zip(mine, theirs, strict=True)):
        return None
    ours, others = torch.cat(mine, 1), torch.cat(theirs, 1)
    energy = ours.square().sum(1)
    ratio = torch.where(energy > 0, (ours * others).sum(1) / energy, 1.0)
    ratio = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, 1.0)
    if float((ratio - 1).abs().max()) <= SAME_UNITS:
        return None
    before, after = (float((others - ours * r[:, None]).square().sum())
                     for r in (torch.ones_like(ratio), ratio))  # fmt: skip
    if not exact and after > (1 - EXPLAINED) * before:
        return None
    return 1 / ratio[inlet.rows]


def _lazily(
    weight: Weight, which: Literal["columns", "rows"], rescaled: Callable[[Tensor], Tensor]
) -> Weight:
    """Computed when it is read: the original's weights stay in their files."""
    return ComputedWeight(
        lambda: rescaled(weight.read()), weight.shape, weight.dtype, (weight.key, which)
    )


# --- what is the same ----------------------------------------------------------------------------


def _equal(source: View, linear: Linear, view: View, other: Linear) -> bool:
    """Whether a linear that the source holds whole has the original's numbers, rounded to the dtype
    that it has."""
    ours, theirs = _stored(source, linear), _stored(view, other)
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return False
    a, b = ours.read(), theirs.read()
    return all(
        torch.equal(x, y.to(x.dtype)) for x, y in zip(a.split(_ROWS), b.split(_ROWS), strict=True)  # type: ignore[no-untyped-call]
    )


def _stored(view: View, linear: Linear) -> Weight | None:
    """The handle of a dense linear's weight, as it is in its file."""
    weight = view.weight(linear.weight)
    return weight.base if isinstance(weight, CastWeight) else weight


# --- forecast ------------------------------------------------------------------------------------


def compressed_sites(view: View, structure: Structure) -> dict[str, Site]:
    """The linears that a source holds in a stored form, as if a pass had made them, by name; all of
    them where none is."""
    stored = [linear for linear in structure.linears if linear.quantized]
    sites = {}
    for linear in stored or structure.linears:
        weight = view.weight(linear.weight)
        size = 0 if weight is None else weight.stored_bytes
        shape = linear.out_features, linear.in_features
        sites[linear.name] = Site(linear.name, linear.role or "linear", shape, size, size)
    return sites
