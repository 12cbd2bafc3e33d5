"""Up to which size a graph is right whose exporter could not decide what the code asks of sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.export import ExportedProgram

from ...core.size_bounds import said

_FARTHEST = 1 << 20
"""The greatest size for which an assertion is tried."""


@dataclass
class Limits:
    """What a graph is not for, by the name of a dimension."""

    words: dict[str, str] = field(default_factory=dict)
    """In words, where it is no bound."""
    sizes: dict[str, Mapping[str, int]] = field(default_factory=dict)
    """The least and the greatest size (``min``, ``max``)."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of them."""
        return *(said(name, of) for name, of in self.sizes.items()), *self.words.values()


def tell_limits(program: ExportedProgram, names: Mapping[str, str], limits: Limits) -> None:
    """Put in the limits, by the names of dimensions, up to which size the graph is right: as far as
    the assertions hold that the exporter left in it. Where they hold for all sizes that were tried,
    there is nothing to say. ``names`` are those of the exporter's symbols."""
    found: dict[str, tuple[int, int]] = {}
    conditions = [node.args[0] for node in program.graph.nodes
                  if node.target is torch.ops.aten._assert_scalar.default]  # fmt: skip
    for condition in conditions:
        value = condition.meta.get("val") if isinstance(condition, torch.fx.Node) else None
        if not isinstance(value, torch.SymBool) or len(value.node.expr.free_symbols) != 1:
            continue
        (symbol,) = value.node.expr.free_symbols
        least, most = _range(program, symbol)
        limit = _holds_to(value.node.expr, symbol, least, most)
        before = found.get(names.get(str(symbol), ""), (most, most))[0]
        found[names.get(str(symbol), "")] = min(limit, before), most
    for name, (limit, most) in found.items():
        if limit:
            limits.words.pop(name, None)
        if 0 < limit < most:
            limits.sizes[name] = {"max": limit}


def _range(program: ExportedProgram, symbol: Any) -> tuple[int, int]:
    bounds = program.range_constraints.get(symbol)
    if bounds is None:
        return 2, _FARTHEST
    most = _FARTHEST if bounds.upper > _FARTHEST else int(bounds.upper)
    return max(2, int(bounds.lower)), most


def _holds_to(condition: Any, symbol: Any, least: int, most: int) -> int:
    """The greatest size up to which a condition holds, of those that are tried between the two; 0
    where it does not hold for the least."""

    def holds(size: int) -> bool:
        return bool(condition.subs(symbol, size))

    if not holds(least):
        return 0
    low = least
    while low < most and holds(min(2 * low, most)):
        low = min(2 * low, most)
    high = min(2 * low, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
