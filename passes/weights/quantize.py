"""``quantize``: round to nearest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import torch

from ...ir.structure.recognize import Linear
from ..base import Context, PassResult
from .nbit_pass import NBitPass
from .quantized import Quantized
from .quantizers import rtn
from .tables import Table, TableForm, tables

MSE_TIMES = 35
"""How much longer a search takes than rounding."""


@dataclass(frozen=True, kw_only=True)
class Quantize(NBitPass):
    """Store the weights of linears in few bits by rounding to nearest, without data.

    ``w ≈ (code - zero) * scale`` in groups of ``group`` inputs. ``symmetric`` fixes the zero point
    at the middle code; otherwise it is an integer for each group. ``mse`` searches, for each group,
    the shrinkage of its range with the least ``sum |error|^2.4`` (the search of GPTQ's quantizer,
    arXiv 2210.17323). Weights that are not finite are refused. ``embeddings`` stores tables of
    embeddings in 4 or 8 bits as well; a head that is tied to its table then reads the same bytes.
    Otherwise such a pair is kept, since to quantize the head alone would save nothing; so it is
    where ``exclude`` names one of the two.
    """

    name: ClassVar[str] = "quantize"
    weights_per_second: ClassVar[float] = 1.5e8
    symmetric: bool = True
    """Fix the zero point at the middle; else one a group."""
    mse: bool = False
    """Search the range of each group for the least error."""
    embeddings: Literal["keep", 4, 8] = "keep"
    """Bits of tables, and of heads that are tied to them."""

    def quantize(self, weight: torch.Tensor, name: str) -> Quantized:
        return rtn(
            weight, self.bits, self.group, self.symmetric, self.mse,
            scale_dtype=self.scale_dtype, name=name,
        )  # fmt: skip

    def choose(self, context: Context, result: PassResult) -> list[Linear]:
        chosen = super().choose(context, result)
        tied = {head.name for table in self._tables(context) for head in table.heads}
        result.refused[:] = [(site, why) for site, why in result.refused if site not in tied]
        return chosen

    def run(self, context: Context) -> PassResult:
        chosen = self._tables(context)
        result = super().run(context)
        self._each(chosen, result, lambda table, form: form.store(context, table, result))
        return result

    def plan(self, context: Context) -> PassResult:
        result = super().plan(context)

        def planned(table: Table, form: TableForm) -> None:
            weight = context.view.weight(table.embedding.weight)
            assert weight is not None
            result.sites.append(form.site(table, weight.nbytes))

        self._each(self._tables(context), result, planned)
        return result

    def _tables(self, context: Context) -> list[Table]:
        return [] if self.embeddings == "keep" else tables(context.view, context.structure)

    def _each(
        self, chosen: list[Table], result: PassResult, do: Callable[[Table, TableForm], None]
    ) -> None:
        if self.embeddings == "keep":
            return
        level = 4 if self.embeddings == 8 else self.level
        form = TableForm(replace(self, bits=self.embeddings), level)
        for table in chosen:
            names = (table.embedding.name, *(head.name for head in table.heads))
            kept = [n for n in names if any(fnmatchcase(n, glob) for glob in self.exclude)]
            reason = f"exclude keeps {kept[0]}" if kept else form.refusal(table)
            if reason is None:
                do(table, form)
            else:
                result.refused += [(name, reason) for name in names]

    def seconds(self, planned: PassResult) -> float:
        return super().seconds(planned) * (MSE_TIMES if self.mse else 1)

    def zero_points(self) -> Literal["none", "integer", "real"]:
        return "none" if self.symmetric else "integer"
