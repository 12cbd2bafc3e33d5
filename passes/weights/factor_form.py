"""How the factors of a low-rank path are stored: dense, or in few bits."""

from __future__ import annotations

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
    """``bits`` is 4 or 8, or ``None`` for numbers of ``dtype``."""

    bits: int | None
    dtype: torch.dtype

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
        made = rtn(factor, self.bits, _group(columns), name=name)
        attrs = {
            "bits": self.bits, "group": _group(columns), "in_features": columns,
            "out_features": rows, "accuracy_level": 0,
        }  # fmt: skip
        weights = ((f"{name}.codes", spool.store(made.codes)),
                   (f"{name}.scales", spool.store(made.scales)))  # fmt: skip
        return Factor(rows, columns, weights, "linear_nbit", attrs)


LONG, SHORT = 32, 16
"""Groups of a row; a factor of rank 16 is not to be padded to 32."""


def _group(columns: int) -> int:
    return LONG if columns > SHORT else SHORT


def graft_group(
    context: Context, members: Sequence[Linear], factors: Sequence[tuple[Tensor, Tensor]],
    form: FactorForm, rule: str,
) -> None:  # fmt: skip
    """Graft the paths ``(down, up)`` of linears of one input, which share one stacked A."""
    x = context.wholes[members[0].name].input(context.view)
    stem = f"{members[0].name}.{rule}"
    down = form.stored(f"{stem}.down", torch.cat([d for d, _ in factors]), context.spool)
    ups = [
        (linear.out, form.stored(f"{linear.name}.{rule}.up", up, context.spool))
        for linear, (_, up) in zip(members, factors, strict=True)
    ]
    graft_low_rank(context.view, x, down, ups, rule=rule, step=context.step)
