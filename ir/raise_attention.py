"""Softmax attention out of its matrix products: ``sdpa(q, k, v, mask)``."""

from __future__ import annotations

from typing import Any

import torch

from .errors import Refusal
from .pattern import Match, Op, PatternBuilder
from .rule import Build, Rule
from .view import Node, Operand, Value, View


class RaiseShapedTranspose(Rule):
    """reshape(transpose(reshape(k, [-1, m, n]), (0, 2, 1)), [..., n, m]) => transpose(k, last two)

    With dynamic shapes torch's exporter spells kᵀ so, its targets computed from the shape of k.
    """

    name = "raise-shaped-transpose"

    def pattern(self, p: PatternBuilder, k: Any) -> Op:  # type: ignore[override]
        return p.reshape(p.transpose(p.reshape(k, rest=True), perm=(0, 2, 1)), rest=True)

    def where(self, match: Match) -> None:
        rank = match.type("k").rank
        if rank is None or rank < 3:
            match.refuse("the rank of k is not known to be 3 or more")
            return
        middle = match.view.producer(match.view.operands(match.root)[0])
        inner = match.view.producer(match.view.operands(middle)[0])
        for probe in ((2, 3, 5, 7, 11)[:rank], (3, 2, 7, 5, 2)[:rank]):
            flat = target_shape(match.view, inner, match["k"], probe)
            final = target_shape(match.view, match.root, match["k"], probe)
            if flat[-2:] != probe[-2:] or final != (*probe[:-2], probe[-1], probe[-2]):
                match.refuse(f"the shapes {flat} and {final} do not transpose {probe}")

    def replace(self, build: Build, k: Operand) -> Value:  # type: ignore[override]
        rank = build.view.type(k).rank or 0
        return build.transpose(k, perm=(*range(rank - 2), rank - 1, rank - 2))


def target_shape(view: View, reshape: Node, source: Value, probe: tuple[int, ...]) -> tuple[int, ...]:
    """What a reshape's target comes to when ``source`` has the shape ``probe``.

    The target must be computed from constants and the shape of ``source`` alone; refuses otherwise.
    """
    stand_in = torch.empty(()).expand(probe)
    known: dict[Any, Any] = {source: stand_in}

    def value(item: Operand, depth: int = 0) -> Any:
        if item is None or isinstance(item, int | float):
            return item
        if item in known:
            return known[item]
        weight, node = view.weight(item), view.producer(item)
        if weight is not None:
            return weight.read()
        if node is None or depth > 24:
            raise Refusal("a shape depends on more than the value that is reshaped", reshape)
        given = [value(argument, depth + 1) for argument in view.arguments(node)]
        known.update(zip(view.results(node), view.execute(node, given), strict=True))
        return known[item]

    sizes: list[int] = []
    for operand in view.operands(reshape)[1:]:
        found = value(operand)
        sizes += [int(s) for s in found.reshape(-1)] if isinstance(found, torch.Tensor) else [int(found)]
    return tuple(sizes)


class RaiseAttention(Rule):
    """matmul(softmax(scale · matmul(q, kᵀ) + mask), v) => sdpa(q, k, v, mask, scale)

    The scale may stand on q, on k, on both or on the product; a mask is added, or chooses between
    the logits and -inf; rows of NaN (fully masked) may be replaced by 0, as sdpa has it.
    """

    name = "raise-attention"

    def pattern(  # type: ignore[override]
        self, p: PatternBuilder, q: Any, kt: Any, v: Any, mask: Any, sq: Any, sk: Any, s: Any,
        low: Any, zero: Any,
    ) -> Op:  # fmt: skip
        both = p.matmul(p.mul(q, sq), p.mul(kt, sk))
        left = p.matmul(p.mul(q, sq), kt)
        plain = p.matmul(q, kt)
        # A scale is looked for before the plain product, which any of them contains.
        products = (both, left, p.mul(plain, s), p.div(plain, low), plain)
        logits = [*(p.add(x, mask) for x in products), *products]
        logits += [p.where(mask, x, zero) for x in products]
        return self.attention(p, p.softmax(p.one_of(*logits), dim=-1), v)

    def attention(self, p: PatternBuilder, weights: Op, v: Any) -> Op:
        return p.matmul(weights, v)

    def where(self, match: Match) -> None:
        for name in ("sq", "sk", "s", "low"):
            if name in match.bindings:
                match.scalar(name)
        if "zero" in match.bindings and not match.scalar("zero") < -1e4:
            match.refuse("masked logits are not set to -inf or the like")
        for name in ("q", "kt", "v"):
            rank = match.type(name).rank
            if rank is None or rank < 3:
                match.refuse(f"{name} is no batch of matrices")
        if match.view.weight(match["kt"]) is not None or match.view.weight(match["v"]) is not None:
            match.refuse("the keys or values are constants")

    def replace(self, build: Build, **bound: Operand) -> Value:
        match, rank = build.match, build.view.type(bound["kt"]).rank or 0
        scale = 1.0
        for name in ("sq", "sk", "s"):
            scale *= match.scalar(name) if name in bound else 1.0
        scale /= match.scalar("low") if "low" in bound else 1.0
        k = build.transpose(bound["kt"], perm=(*range(rank - 2), rank - 1, rank - 2))
        mask = () if bound.get("mask") is None else (bound["mask"],)
        return build.sdpa(bound["q"], k, bound["v"], *mask, scale=scale)


class RaiseGuardedAttention(RaiseAttention):
    """matmul(where(isnan(w), 0, w), v), w = softmax(logits) => sdpa(q, k, v, mask, scale)"""

    name = "raise-guarded-attention"

    def attention(self, p: PatternBuilder, weights: Op, v: Any) -> Op:
        return p.matmul(p.where(p.isnan(weights), 0.0, weights), v)


RULES: tuple[type[Rule], ...] = (
    RaiseShapedTranspose, RaiseGuardedAttention, RaiseAttention,
)  # fmt: skip
