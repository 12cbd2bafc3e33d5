"""Norms, activations and rotary embedding out of their arithmetic."""

from __future__ import annotations

import math
from typing import Any

import torch

from .pattern import Match, Op, PatternBuilder
from .rule import Build, Rule
from .view import Operand, Value


class RaiseRsqrt(Rule):
    """reciprocal(sqrt(x)) => rsqrt(x)"""

    name = "raise-rsqrt"

    def pattern(self, p: PatternBuilder, x: Any) -> Op:  # type: ignore[override]
        return p.reciprocal(p.sqrt(x))

    def replace(self, build: Build, x: Operand) -> Value:  # type: ignore[override]
        return build.rsqrt(x)


class RaiseTransposes(Rule):
    """transpose(transpose(x, p), q) => transpose(x, p∘q)"""

    name = "raise-transposes"

    def pattern(self, p: PatternBuilder, x: Any) -> Op:  # type: ignore[override]
        return p.transpose(p.transpose(x))

    def replace(self, build: Build, x: Operand) -> Value:  # type: ignore[override]
        view, root = build.view, build.match.root
        inner = view.producer(view.operands(root)[0])
        first, second = view.attrs(inner)["perm"], view.attrs(root)["perm"]
        return build.transpose(x, perm=tuple(first[i] for i in second))


class RaiseRMSNorm(Rule):
    """mul(w, mul(x, rsqrt(add(mean(pow(x, 2), -1), eps)))) => rms_norm(x, w, eps)"""

    name = "raise-rms-norm"

    def pattern(self, p: PatternBuilder, x: Any, w: Any, eps: Any) -> Op:  # type: ignore[override]
        return p.mul(w, self.normed(p, x, eps))

    def normed(self, p: PatternBuilder, x: Any, eps: Any) -> Op:
        square = p.one_of(p.pow(x, 2.0), p.mul(x, x))
        power = p.add(p.mean(square, dims=(-1,), keepdim=True), eps)
        return p.one_of(p.mul(x, p.rsqrt(power)), p.div(x, p.sqrt(power)))  # type: ignore[return-value]

    def where(self, match: Match) -> None:
        match.scalar("eps")
        match.same_last_dim("x", "w")
        if len(match.weight("w").shape) != 1:
            match.refuse("w is no vector")

    def replace(  # type: ignore[override]
        self, build: Build, x: Operand, w: Operand, eps: Operand
    ) -> Value:
        return build.rms_norm(x, w, eps=build.match.scalar("eps"))


class RaiseCastRMSNorm(RaiseRMSNorm):
    """mul(w, cast(normed(cast(x, f32)), half)) => rms_norm(x, w, eps), x in half precision"""

    name = "raise-cast-rms-norm"

    def pattern(self, p: PatternBuilder, x: Any, w: Any, eps: Any) -> Op:  # type: ignore[override]
        wide = p.cast(x, dtype=torch.float32)
        return p.mul(w, p.cast(self.normed(p, wide, eps)))

    def where(self, match: Match) -> None:
        super().where(match)
        if match.type("x").dtype != match.view.type(match.view.results(match.root)[0]).dtype:
            match.refuse("the result is not in the dtype of x")


class RaiseLayerNorm(Rule):
    """add(mul(div(d, sqrt(add(mean(pow(d, 2)), eps))), w), b), d = x - mean(x) => layer_norm"""

    name = "raise-layer-norm"

    def pattern(  # type: ignore[override]
        self, p: PatternBuilder, x: Any, w: Any, b: Any, eps: Any
    ) -> Op:
        centred = p.sub(x, p.mean(x, dims=(-1,), keepdim=True))
        square = p.one_of(p.pow(centred, 2.0), p.mul(centred, centred))
        variance = p.add(p.mean(square, dims=(-1,), keepdim=True), eps)
        normed = p.one_of(p.div(centred, p.sqrt(variance)), p.mul(centred, p.rsqrt(variance)))
        return p.add(p.mul(normed, w), b)

    def where(self, match: Match) -> None:
        match.scalar("eps")
        match.same_last_dim("x", "w")
        match.same_last_dim("x", "b")
        if len(match.weight("w").shape) != 1 or len(match.weight("b").shape) != 1:
            match.refuse("w or b is no vector")

    def replace(  # type: ignore[override]
        self, build: Build, x: Operand, w: Operand, b: Operand, eps: Operand
    ) -> Value:
        return build.layer_norm(x, w, b, dims=1, eps=build.match.scalar("eps"))


class RaiseSilu(Rule):
    """mul(x, sigmoid(x)) => silu(x)"""

    name = "raise-silu"

    def pattern(self, p: PatternBuilder, x: Any) -> Op:  # type: ignore[override]
        return p.mul(x, p.sigmoid(x))

    def replace(self, build: Build, x: Operand) -> Value:  # type: ignore[override]
        return build.silu(x)




class RaiseGelu(Rule):
    """0.5 x (1 + erf(x / √2)) => gelu(x)"""

    name = "raise-gelu"

    def pattern(self, p: PatternBuilder, x: Any) -> Op:  # type: ignore[override]
        inner = p.one_of(p.div(x, math.sqrt(2)), p.mul(x, math.sqrt(0.5)))
        gate = p.add(p.erf(inner), 1.0)
        return p.mul(p.mul(x, gate), 0.5)

    def replace(self, build: Build, x: Operand) -> Value:  # type: ignore[override]
        return build.gelu(x)


class RaiseGeluHalfFirst(RaiseGelu):
    """(0.5 x) (1 + erf(x / √2)) => gelu(x)"""

    name = "raise-gelu-half-first"

    def pattern(self, p: PatternBuilder, x: Any) -> Op:  # type: ignore[override]
        inner = p.one_of(p.div(x, math.sqrt(2)), p.mul(x, math.sqrt(0.5)))
        return p.mul(p.mul(x, 0.5), p.add(p.erf(inner), 1.0))


class RaiseTanhGelu(Rule):
    """(0.5 x) (1 + tanh(√(2/π) (x + 0.044715 x³))) => gelu(x, tanh)"""

    name = "raise-tanh-gelu"

    def pattern(self, p: PatternBuilder, x: Any) -> Op:  # type: ignore[override]
        cube = p.one_of(p.pow(x, 3.0), p.mul(x, p.mul(x, x)))
        inner = p.mul(p.add(x, p.mul(cube, 0.044715)), math.sqrt(2 / math.pi))
        return p.mul(p.mul(x, 0.5), p.add(p.tanh(inner), 1.0))

    def replace(self, build: Build, x: Operand) -> Value:  # type: ignore[override]
        return build.gelu(x, approximate="tanh")


class RaiseRope(Rule):
    """add(mul(x, cos), mul(concat(neg(x₂), x₁), sin)) => rope(x, cos, sin)"""

    name = "raise-rope"

    def pattern(  # type: ignore[override]
        self, p: PatternBuilder, x: Any, cos: Any, sin: Any, start: Any, end: Any, zero: Any, half: Any
    ) -> Op:
        high, low = p.slice(x, start, end, dim=-1, step=1), p.slice(x, zero, half, dim=-1, step=1)
        return p.add(p.mul(x, cos), p.mul(p.concat(p.neg(high), low, dim=-1), sin))

    def where(self, match: Match) -> None:
        size = match.last_dim("x")
        start, end = match.scalar("start"), match.scalar("end")
        zero, half = match.scalar("zero"), match.scalar("half")
        if (start, zero, half) != (size // 2, 0, size // 2) or end < size or size % 2:
            match.refuse(f"the slices [{start:g}:{end:g}], [{zero:g}:{half:g}] are no halves of {size}")

    def replace(  # type: ignore[override]
        self, build: Build, x: Operand, cos: Operand, sin: Operand, **slices: Operand
    ) -> Value:
        return build.rope(x, cos, sin)


RULES: tuple[type[Rule], ...] = (
    RaiseRsqrt, RaiseTransposes, RaiseRMSNorm, RaiseCastRMSNorm, RaiseLayerNorm, RaiseSilu,
    RaiseGelu, RaiseGeluHalfFirst, RaiseTanhGelu, RaiseRope,
)  # fmt: skip
