"""``eora``: a low-rank path that undoes most of what compression did to a linear's output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from ...ir.core.view import Node, Value, View
from ...ir.run.statistics import Moments, moments, token_masks
from ...ir.run.sweep import sweep_together
from ..base import Context, Needs
from .compensate import Compensate, Target
from .low_rank import Spectrum, spectrum


@dataclass(frozen=True, kw_only=True)
class EoRA(Compensate):
    """Fit ``B A`` to the compression gap in the eigenspace of the inputs, in closed form.

    EoRA (Liu et al. 2024, arXiv 2410.21271): with ``S = X X^T = Q L Q^T`` of the calibration
    inputs and ``P = Q L^(1/2)``, the best rank-r correction of the layer's output is the truncated
    SVD of ``(W - W^) P``, multiplied by ``P^-1``. ``propagate=compensated`` takes the inputs of a
    linear from the graph in which the linears before it are compensated already;
    ``propagate=dense`` takes them from the source model. Needs calibration data.
    """

    name: ClassVar[str] = "eora"
    needs: ClassVar[Needs] = Needs(calibration=True)
    propagate: Literal["compensated", "dense"] = "compensated"

    def fit(
        self, context: Context, targets: Sequence[Target]
    ) -> tuple[dict[str, Spectrum], dict[str, int]]:
        if self.propagate == "dense" and context.original is not None:
            known = context.original_linears
            source = [replace(t, linear=known[t.linear.name]) for t in targets]
            found = self._swept(context, context.original, source, {})
            return found, self.ranks(targets, found)
        # With a budget the ranks depend on all spectra, and what a later linear sees on the ranks:
        # a first sweep without compensation chooses them.
        if self.budget is None:
            ranks = dict.fromkeys([t.linear.name for t in targets], self.top_rank)
        else:
            ranks = self.ranks(targets, self._swept(context, context.view, targets, {}))
        found = self._swept(context, context.view, targets, ranks)
        return found, {name: min(rank, len(found[name].sigma)) for name, rank in ranks.items()}

    def _swept(
        self, context: Context, view: View, targets: Sequence[Target], ranks: dict[str, int]
    ) -> dict[str, Spectrum]:
        """Spectra taken in one sweep; each site's result is corrected at once by ``ranks``."""
        by_node = {t.linear.node: t for t in targets}
        masks = token_masks(context.calibration)
        shared: dict[Value, Moments] = {}
        found: dict[str, Spectrum] = {}

        def visit(node: Node, given: list[list[Any]], results: list[tuple[Any, ...]]) -> Any:
            target = by_node[node]
            name = target.linear.name
            context.progress(f"{self.name}: {name}", len(found), len(targets))
            x = view.operands(node)[0]
            index = view.arguments(node).index(x)
            inputs = [row[index] for row in given]

            def fit() -> Spectrum:
                if x not in shared:
                    shared.clear()
                    shared[x] = moments(inputs, masks, ("gram",))
                seen = shared[x]
                return spectrum(*target.read(), seen.gram, seen.count)

            if not ranks:  # the rank that will be used is not known, and whole spectra are large
                found[name] = fit()
                return None
            fields = context.once(f"site {name}", lambda: fit().cut(ranks[name]))
            found[name] = Spectrum(**fields)
            rank = min(ranks[name], len(found[name].sigma))
            if not rank:
                return None
            down, up = found[name].factors(rank)
            return [
                (row[0] + ((x.float() @ down.T) @ up.T).to(row[0].dtype),)
                for x, row in zip(inputs, results, strict=True)
            ]

        with torch.no_grad():
            sweep_together(view, context.calibration, visit, frozenset(by_node), outputs=False)
        return found
