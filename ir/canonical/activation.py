"""Decomposed activations become ``silu`` and ``gelu``.

x · sigmoid(x)                                    => silu(x)
x/2 · (1 + erf(x/√2))                             => gelu(x)
x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))        => gelu(x, tanh)

The quick form, x · sigmoid(1.702 x), is another function and is left alone.
"""

from __future__ import annotations

import math
from typing import Any

from ..core.view import Operand, Value
from ..rewrite.rule import Build, Rule


class FuseSilu(Rule):
    """mul(x, sigmoid(x)) => silu(x)"""

    name = "fuse-silu"

    def pattern(self, p: Any, x: Any) -> Any:
        return p.mul(x, p.sigmoid(x))

    def replace(self, build: Build, **bound: Operand) -> Value:
        return build.silu(bound["x"])


def _half_of_product(p: Any, x: Any, gate: Any) -> Any:
    """x · gate / 2, wherever the half stands."""
    return p.one_of(
        p.mul(p.one_of(p.mul(x, 0.5), p.div(x, 2.0)), gate),
        p.mul(x, p.mul(gate, 0.5)),
        p.mul(p.mul(x, gate), 0.5),
    )


class _Gelu(Rule):
    """The pattern's root is a ``mul`` in each of its three forms: one rule for each."""

    form = 0
    approximate = "none"

    def gate(self, p: Any, x: Any) -> Any:
        """What x/2 is multiplied by."""
        raise TypeError(f"{type(self).__name__} declares no gate")

    def pattern(self, p: Any, x: Any) -> Any:
        return _half_of_product(p, x, self.gate(p, x)).choices[self.form]

    def replace(self, build: Build, **bound: Operand) -> Value:
        return build.gelu(bound["x"], approximate=self.approximate)


class FuseErfGelu(_Gelu):
    """mul(mul(x, 0.5), add(1, erf(div(x, √2)))) => gelu(x)"""

    name = "fuse-erf-gelu"

    def gate(self, p: Any, x: Any) -> Any:
        inner = p.one_of(p.div(x, math.sqrt(2)), p.mul(x, math.sqrt(0.5)))
        return p.add(p.erf(inner), 1.0)


class FuseErfGeluInner(FuseErfGelu):
    """mul(x, mul(add(1, erf(div(x, √2))), 0.5)) => gelu(x)"""

    name = "fuse-erf-gelu-inner"
    form = 1


class FuseErfGeluOuter(FuseErfGelu):
    """mul(mul(x, add(1, erf(div(x, √2)))), 0.5) => gelu(x)"""

    name = "fuse-erf-gelu-outer"
    form = 2


class FuseTanhGelu(_Gelu):
    """mul(mul(x, 0.5), add(1, tanh(√(2/π) (x + 0.044715 x³)))) => gelu(x, tanh)"""

    name = "fuse-tanh-gelu"
    approximate = "tanh"

    def gate(self, p: Any, x: Any) -> Any:
        cube = p.one_of(p.pow(x, 3.0), p.mul(x, p.mul(x, x)))
        inner = p.add(x, p.mul(cube, 0.044715))
        return p.add(p.tanh(p.mul(inner, math.sqrt(2 / math.pi))), 1.0)


class FuseTanhGeluInner(FuseTanhGelu):
    """mul(x, mul(add(1, tanh(√(2/π) (x + 0.044715 x³))), 0.5)) => gelu(x, tanh)"""

    name = "fuse-tanh-gelu-inner"
    form = 1


class FuseTanhGeluOuter(FuseTanhGelu):
    """mul(mul(x, add(1, tanh(√(2/π) (x + 0.044715 x³)))), 0.5) => gelu(x, tanh)"""

    name = "fuse-tanh-gelu-outer"
    form = 2


RULES: tuple[type[Rule], ...] = (
    FuseSilu, FuseErfGelu, FuseErfGeluInner, FuseErfGeluOuter,
    FuseTanhGelu, FuseTanhGeluInner, FuseTanhGeluOuter,
)  # fmt: skip
