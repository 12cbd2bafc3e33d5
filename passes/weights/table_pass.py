"""What the passes share that may store tables of embeddings, and heads tied to them, as well."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from ...ir.structure.recognize import Linear
from ..base import Context, PassResult
from ..stored import TIED
from .nbit_pass import CodedPass
from .rounding import Rounding
from .tables import Table, TableForm, tables

TABLE_BITS = 8
"""Of tables that a head is tied to, where nothing else is asked for."""


@dataclass(frozen=True, kw_only=True)
class TablePass(CodedPass):
    """Base of the passes that store linears in few bits, and tables of embeddings if asked.

    A table is rounded to nearest whatever the pass does to linears, in its groups; where the pass
    has integer zero points, with such. ``embeddings=4`` or ``8`` stores all tables in so many
    bits; a head that is tied to its table then reads the same bytes. ``auto`` stores those alone
    that a chosen head is tied to, in 8 bits; ``keep`` leaves table and head as they are, since to
    quantize the head alone would save nothing.
    """

    embeddings: Literal["auto", "keep", 4, 8] = "keep"
    """Bits of tables; auto: 8 where a head is tied."""

    def reason_against(self, context: Context, linear: Linear) -> str | None:
        reason = super().reason_against(context, linear)
        tied = reason is not None and reason.startswith(TIED)
        return f"{TIED}; embeddings=8 stores both" if tied else reason

    def choose(self, context: Context, result: PassResult) -> list[Linear]:
        chosen = super().choose(context, result)
        tied = {head.name for table in self._tables(context) for head in table.heads}
        result.refused[:] = [(site, why) for site, why in result.refused if site not in tied]
        return chosen

    def run(self, context: Context) -> PassResult:
        chosen = self._tables(context)
        result = self.run_linears(context)
        self._each(chosen, result, lambda table, form: form.store(context, table, result))
        return result

    def run_linears(self, context: Context) -> PassResult:
        """What the pass does to linears; of its own, or of the base that comes behind this one."""
        return super().run(context)  # type: ignore[safe-super]

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
        form = TableForm(self._rounding(), self.name)
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

    def _rounding(self) -> Rounding:
        """How a table is rounded."""
        bits = self.embeddings if isinstance(self.embeddings, int) else TABLE_BITS
        return Rounding(
            bits=bits, group=self.group, scales=self.scales, accuracy_level=self.accuracy_level,
            symmetric=self.zero_points() != "integer", mse=bool(getattr(self, "mse", False)),
        )  # fmt: skip
