"""Tables of embeddings in few bits, and heads that are tied to them: one stored copy of both."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...ir.core.errors import Refusal
from ...ir.core.view import View
from ...ir.core.weights import Weight
from ...ir.moves import swap
from ...ir.ops.embedding_nbit import EMBEDDING_NBIT
from ...ir.structure.recognize import Embedding, Linear, Structure
from ...ir.vocab.builder import Builder
from ..base import Context, PassResult, Site
from .nbit_pass import NBitPass

LEAST_NUMBERS = 1 << 16
"""Tables of fewer numbers stay: a position table of 512 x 64 is not what makes a model large."""


@dataclass(frozen=True)
class Table:
    """A table and the linears that multiply by it."""

    embedding: Embedding
    heads: Sequence[Linear]


def tables(view: View, structure: Structure) -> list[Table]:
    """The tables of floats, each once."""
    by_key: dict[Hashable, Table] = {}
    for embedding in structure.embeddings:
        weight = view.weight(embedding.weight)
        if view.op(embedding.node) != "embedding" or weight is None:
            continue
        if not weight.dtype.is_floating_point:
            continue
        linears = (x for x in structure.linears if view.op(x.node) == "linear")
        heads = [x for x in linears if _holds(view, x, weight)]
        by_key.setdefault(weight.key, Table(embedding, heads))
    return list(by_key.values())


def _holds(view: View, site: Linear | Embedding, weight: Weight) -> bool:
    held = view.weight(site.weight)
    return held is not None and held.key == weight.key


@dataclass(frozen=True)
class TableForm:
    """How tables are stored."""

    by: NBitPass
    """What rounds them, at their bits."""
    rule: str
    """The pass that stores them."""

    def refusal(self, table: Table) -> str | None:
        """Why a table stays as it is; ``None`` where it does not."""
        rows, width = table.embedding.rows, table.embedding.width
        if rows * width < LEAST_NUMBERS:
            return f"a table of {rows * width} numbers stays: smaller than {LEAST_NUMBERS}"
        if not self.by.group or width % self.by.group:
            return (
                f"a row of {width} numbers is not a whole number of groups of {self.by.group}: "
                "GatherBlockQuantized takes only such tables"
            )
        return None

    def _storing(self, table: Table) -> NBitPass:
        """A head that rounds activations wants scales in float32, and shares them so."""
        shared = table.heads and self.by.level == 4
        return replace(self.by, scales="float32") if shared else self.by

    def site(self, table: Table, before: int, error: float | None = None) -> Site:
        rows, width = table.embedding.rows, table.embedding.width
        after = self._storing(table).coded_bytes(rows, width)
        heads = ", ".join(head.name for head in table.heads)
        return Site(
            name=table.embedding.name, kind="embedding", shape=(rows, width), bytes_before=before,
            bytes_after=after, bits_per_weight=8 * after / (rows * width), rel_l2=error,
            note=f"one stored copy with {heads}" if heads else "",
        )  # fmt: skip

    def store(self, context: Context, table: Table, result: PassResult) -> None:
        """Let the table's embeddings, and its heads, read its codes."""
        view, name, by = context.view, table.embedding.name, self._storing(table)
        weight = view.weight(table.embedding.weight)
        assert weight is not None

        def fields() -> dict[str, Any]:
            quantized = by.quantize(weight.read(), name)
            parts = dict(zip(("codes", "scales", "zeros"), quantized.operands(), strict=True))
            return {**parts, "rel_l2": quantized.rel_l2}

        stored = context.once(f"table {name}", fields)
        parts = {
            part: context.spool.store(stored[part])
            for part in ("codes", "scales", "zeros")
            if stored[part] is not None
        }
        site = self.site(table, weight.nbytes, stored["rel_l2"])
        with view.made_by(self.rule, context.step):
            for embedding in context.structure.embeddings:
                if _holds(view, embedding, weight):
                    self._swap(view, embedding, parts)
        for head in table.heads:
            # A table or a linear that feeds it directly may have been swapped since it was read.
            current = replace(head, x=view.tensor(head.node))
            self._swap_head(context, current, parts, result)
        context.edited()
        result.sites.append(site)

    def _swap(self, view: View, embedding: Embedding, parts: Mapping[str, Weight]) -> None:
        node, old = embedding.node, view.results(embedding.node)[0]
        build = Builder(view, node)
        codes, *rest = (
            view.add_weight(f"{embedding.name}.{name}", part) for name, part in parts.items()
        )
        ids = view.operands(node)[1]
        rows = build.build(
            EMBEDDING_NBIT.name, ids, codes, *rest,
            bits=self.by.bits, group=self.by.group, width=embedding.width,
        )  # fmt: skip
        dtype = view.type(old).dtype
        view.replace(old, rows if dtype == torch.float32 else build.cast(rows, dtype=dtype))
        view.erase_dead(node)

    def _swap_head(
        self, context: Context, head: Linear, parts: Mapping[str, Weight], result: PassResult
    ) -> None:
        operands = [*parts.items(), *[None] * (3 - len(parts))]
        attrs = {
            "bits": self.by.bits, "group": self.by.group, "in_features": head.in_features,
            "out_features": head.out_features, "accuracy_level": self.by.level,
        }  # fmt: skip
        try:
            swap(
                context.view, head, "linear_nbit", operands, attrs, rule=self.rule,
                step=context.step,
            )  # fmt: skip
        except Refusal as refusal:
            result.refused.append((head.name, str(refusal)))
