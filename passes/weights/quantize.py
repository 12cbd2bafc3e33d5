"""``quantize``: round to nearest."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import ClassVar, Literal, Self

import torch

from ...ir.structure.recognize import Linear
from ..base import Context, PassResult
from .nbit_pass import NBitPass
from .quantized import Quantized
from .quantizers import rtn
from .tables import Table, TableForm, tables

HEAD = "head"
TABLE_BITS = 8
"""Of tables that a head is tied to, where nothing else is asked for."""
MSE_TIMES = 35
"""How much longer a search takes than rounding."""


@dataclass(frozen=True, kw_only=True)
class Quantize(NBitPass):
    """Store the weights of linears in few bits by rounding to nearest, without data.

    ``w ≈ (code - zero) * scale`` in groups of ``group`` inputs. ``symmetric`` fixes the zero point
    at the middle code; otherwise it is an integer for each group. ``mse`` searches, for each group,
    the shrinkage of its range with the least ``sum |error|^2.4`` (the search of GPTQ's quantizer,
    arXiv 2210.17323). Weights that are not finite are refused.

    ``embeddings=4`` or ``8`` stores tables of embeddings in so many bits; a head that is tied to
    its table then reads the same bytes. ``auto`` stores those alone that a chosen head is tied to,
    in 8 bits, as llama.cpp does: such a head is read whole for each token, as an untied one is, and
    few bits hurt it most. ``keep`` leaves both as they are, since to quantize the head alone would
    save nothing; so it is where ``exclude`` names one of the two. ``head_bits`` are those of a head
    that is tied to no table, where it is to have others than the rest.
    """

    name: ClassVar[str] = "quantize"
    weights_per_second: ClassVar[float] = 1.5e8
    symmetric: bool = True
    """Fix the zero point at the middle; else one a group."""
    mse: bool = False
    """Search the range of each group for the least error."""
    embeddings: Literal["auto", "keep", 4, 8] = "auto"
    """Bits of tables; auto: 8 where a head is tied."""
    head_bits: Literal[4, 8] | None = None
    """Bits of a head that is tied to no table."""

    def at(self, linear: Linear) -> Self:
        if linear.role != HEAD or self.head_bits in (None, self.bits):
            return self
        return replace(self, bits=self.head_bits)

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
        if self.embeddings == "keep":
            return []
        candidates = [
            table for table in tables(context.view, context.structure)
            if table.embedding.name not in context.planned
        ]
        if self.embeddings != "auto":
            return candidates
        chosen = {linear.name for linear in self.select(context.structure)}
        return [
            t for t in candidates if t.heads and chosen.issuperset(head.name for head in t.heads)
        ]

    def _each(
        self, chosen: list[Table], result: PassResult, do: Callable[[Table, TableForm], None]
    ) -> None:
        asked = isinstance(self.embeddings, int)
        bits = self.embeddings if isinstance(self.embeddings, int) else TABLE_BITS
        form = TableForm(replace(self, bits=bits))
        for table in chosen:
            heads = [head.name for head in table.heads]
            names = (table.embedding.name, *heads)
            excluded = [n for n in names if any(fnmatchcase(n, glob) for glob in self.exclude)]
            reason = f"exclude keeps {excluded[0]}" if excluded else form.refusal(table)
            if reason is None:
                do(table, form)
            else:
                tied = f"its weight is tied to an embedding: {reason}"
                refused = names if asked else heads
                result.refused += [(name, reason if asked else tied) for name in refused]

    def seconds(self, planned: PassResult) -> float:
        return super().seconds(planned) * (MSE_TIMES if self.mse else 1)

    def peak_bytes(self, planned: PassResult) -> int:
        """The largest weight's numbers, at most in float32, and its codes: it rounds in blocks."""
        return max((math.prod(site.shape) for site in planned.sites), default=0) * 5

    def zero_points(self) -> Literal["none", "integer", "real"]:
        return "none" if self.symmetric else "integer"
