"""How the factors of a low-rank path are stored: dense, or in few bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ir.core.weights import Spool
from ...ir.moves import Factor, graft_low_rank
from ...ir.ops.linear_nbit import operand_types
from ...ir.structure.recognize import Linear
from ..base import Context
from .quantizers import rtn


@dataclass(frozen=True)
class FactorForm:
    """``bits`` is 4 or 8, or ``None`` for numbers of ``dtype``; ``level`` is the ``accuracy_level``
    of products with few bits."""

    bits: int | None
    dtype: torch.dtype
    level: int = 0

    @property
    def width(self) -> float:
        """Bytes of one number of a factor with long rows."""
        return self.dtype.itemsize if self.bits is None else (self.bits + 16 / LONG) / 8

    def nbytes(self, rows: int, columns: int) -> int:
        """Stored bytes of a factor."""
        if self.bits is None:
            return rows * columns * self.dtype.itemsize
        types = operand_types(columns, rows, bits=self.bits, group=_group(columns))
        return sum((t.numel or 0) * t.dtype.itemsize for t in types if t and t.dtype)

    def even(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """The same product, moved by a power of two where one factor is so small that the float16
        scales of its codes would not hold it and the other is not: which changes no code."""
        if self.bits is None or not down.numel():
            return down, up
        a, b = (math.frexp(float(factor.abs().max()))[1] for factor in (down, up))
        step = max(0, min(LEAST - a, b - LEAST)) - max(0, min(LEAST - b, a - LEAST))
        return torch.ldexp(down, torch.tensor(step)), torch.ldexp(up, torch.tensor(-step))

    def rounded(self, factor: Tensor) -> Tensor:
        """The numbers f32 that few bits hold; what they hold they hold again."""
        if self.bits is None or not factor.numel():
            return factor
        return rtn(factor, self.bits, _group(factor.shape[1])).dequantized()

    def stored(self, name: str, factor: Tensor, spool: Spool) -> Factor:
        """The factor ``[rows, columns]`` by handles, for ``graft_low_rank``."""
        if self.bits is None:
            return Factor.dense(name, spool.store(factor.to(self.dtype)))
        rows, columns = factor.shape
        quantized = rtn(factor, self.bits, _group(columns), name=name)
        attrs = {
            "bits": self.bits, "group": _group(columns), "in_features": columns,
            "out_features": rows, "accuracy_level": self.level,
        }  # fmt: skip
        weights = ((f"{name}.codes", spool.store(quantized.codes)),
                   (f"{name}.scales", spool.store(quantized.scales)))  # fmt: skip
        return Factor(rows, columns, weights, "linear_nbit", attrs)


LEAST = -2
"""Exponent of a factor's greatest number, at least 2^-3, from which float16 scales hold it."""
LONG, SHORT = 32, 16
"""Groups of a row; a factor of rank 16 is not to be padded to 32."""


def _group(columns: int) -> int:
    return LONG if columns > SHORT else SHORT


def graft_group(
    context: Context, members: Sequence[Linear], factors: Sequence[tuple[Tensor, Tensor]],
    form: FactorForm, rule: str,
) -> list[int]:  # fmt: skip
    """Graft the paths ``(down, up)`` of linears of one input, which share one stacked A; the bytes
    of each, its own rows of A among them."""
    x = context.wholes[members[0].name].input(context.view)
    stem = f"{members[0].name}.{rule}"
    down = form.stored(f"{stem}.down", torch.cat([d for d, _ in factors]), context.spool)
    ups = [
        (linear.out, form.stored(f"{linear.name}.{rule}.up", up, context.spool))
        for linear, (_, up) in zip(members, factors, strict=True)
    ]
    graft_low_rank(context.view, x, down, ups, rule=rule, step=context.step)
    row = down.nbytes // down.rows
    return [row * up.columns + up.nbytes for _, up in ups]
