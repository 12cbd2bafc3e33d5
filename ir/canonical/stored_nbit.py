"""Linears whose weight a checkpoint holds in few bits.

linear(x, w, b) => linear_nbit(x, codes, scales, zeros, b)          w stored in few bits
linear(x, w, b) => linear_nbit(x[..., order], codes, scales, ...)   its columns in another order
"""

from __future__ import annotations

from typing import Any

from ..core.view import Operand, Value, View
from ..core.weights import CastWeight, Weight
from ..ops.nbit_weight import NBitWeight
from ..rewrite.pattern import Match
from ..rewrite.rule import Build, Rule


class UseStoredBits(Rule):
    """linear(x, w, b) => linear_nbit(x, codes, scales, zeros, b)"""

    name = "use-stored-bits"

    def pattern(self, p: Any, x: Any, w: Any) -> Any:
        return p.linear(x, w, rest=True)

    def where(self, match: Match) -> None:
        value = match.value("w")
        if stored_bits(match.view.weight(value)) is None:
            match.refuse("its weight is not stored in few bits")
        if any(match.view.op(user) != "linear" for user in match.view.users(value)):
            match.refuse("its weight is tied to what is not a linear")

    def replace(self, build: Build, **bound: Operand) -> Value:
        view, match = build.view, build.match
        weight = stored_bits(view.weight(match.value("w")))
        assert weight is not None
        form, (rows, columns) = weight.form, weight.shape
        site = view.name(match.value("w")).removesuffix(".T").removesuffix(".weight")
        x = bound["x"]
        if form.order is not None:
            x = build.index_select(x, view.add_weight(f"{site}.order", form.order), dim=-1)
        bias = [*view.operands(match.root)[2:3], None][0]
        operands = [x, *_constants(view, site, form.parts[:3]), bias]
        while operands[-1] is None:
            operands.pop()
        return build.linear_nbit(
            *operands, bits=form.bits, group=form.group, in_features=columns, out_features=rows,
            accuracy_level=0,
        )  # fmt: skip


def _constants(view: View, site: str, parts: tuple[Weight | None, ...]) -> list[Value | None]:
    named = zip(("codes", "scales", "zeros"), parts, strict=True)
    return [None if part is None else view.add_weight(f"{site}.{name}", part)
            for name, part in named]  # fmt: skip


def stored_bits(handle: Weight | None) -> NBitWeight | None:
    """The weight that is stored in few bits, behind a cast or not."""
    base = handle.base if isinstance(handle, CastWeight) else handle
    return base if isinstance(base, NBitWeight) else None


RULES: tuple[type[Rule], ...] = (UseStoredBits,)
"""What takes weights as their checkpoint stores them."""
