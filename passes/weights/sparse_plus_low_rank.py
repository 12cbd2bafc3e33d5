"""``sparse-plus-low-rank``: each matrix as one with zeros and a low-rank path, fitted together."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear as linear_of
from torch.nn.functional import pad

from ...ir.core.errors import BadInput
from ...ir.core.view import Value, View
from ...ir.run.statistics import Gram, Square, Stat, Statistics
from ...ir.structure.recognize import Linear
from ...ir.structure.weights import readers
from ..base import CHANGED, COMPENSATED, MASKED, STORED, Context, Needs, PassResult, Site
from ..linear_pass import linear_site, weight_of
from ..stored import reason_against_storing, relative_error
from .eora import whitening
from .factor_form import FactorForm, graft_group
from .low_rank import Whitening, fits_half, spectrum
from .mask_pass import MaskOptions, Ratio, finite, highest_of_rows, with_note
from .wanda import wanda_scores


@dataclass(frozen=True)
class Split:
    """``W ≈ S + B A``."""

    sparse: Tensor
    """``[out, in]`` f32."""
    down: Tensor
    up: Tensor
    left: float
    """Relative error of the outputs on the calibration data."""


@dataclass(frozen=True, kw_only=True)
class SparsePlusLowRank(MaskOptions):
    """``y = S x + B (A x)``, S with zeros, fitted in turns.

    The form of SLTrain (Han et al. 2024, arXiv 2406.02214) and of AST (Huang et al. 2024, arXiv
    2407.20584), which train it. Here, as robust PCA does: ``S`` is ``W - B A`` where Wanda's scores
    of that are highest, ``B A`` the best path of rank ``rank`` for the outputs of ``W - S`` (that
    of ``eora``); ``rounds`` times, and the round of least error is kept. The first round is
    ``wanda`` with ``eora`` behind it. ``sparsity`` and ``pattern`` are those of ``wanda``; factors
    are float16 where they fit. Needs calibration data.
    """

    name: ClassVar[str] = "sparse-plus-low-rank"
    provides: ClassVar[tuple[str, ...]] = (MASKED, CHANGED, COMPENSATED)
    excludes: ClassVar[tuple[str, ...]] = (MASKED, STORED, COMPENSATED)
    needs: ClassVar[Needs] = Needs(
        stats=(Stat("gram", at="linear"), Stat("square", at="linear")), propagate="compensated"
    )
    rank: int = 16
    """Of the path beside each mask."""
    rounds: int = 8
    """How often both are fitted in turn, at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("rank", "rounds"):
            if getattr(self, option) < 1:
                raise BadInput(f"{self.name}: {option}={getattr(self, option)} must be at least 1")

    def reason_against(self, context: Context, linear: Linear) -> str | None:
        reason = reason_against_storing(context.view, linear) or self.reason_against_groups(linear)
        if reason is None and len(readers(context.view, linear.weight)) > 1:
            return "its weight is shared, and the numbers that it gets would reach its other uses"
        return reason

    def key(self, view: View, linear: Linear) -> Hashable:
        return linear.name

    def run(self, context: Context) -> PassResult:
        result = PassResult()
        view, chosen = context.view, self.choose(context, result)

        def fit(linear: Linear, statistics: Statistics) -> dict[str, Any]:
            def fields() -> dict[str, Any]:
                weight = finite(weight_of(view, linear).read(), linear.name)
                gram, square = statistics[Gram], statistics[Square]
                rank = self._rank(linear)
                parts = split(
                    weight.float(), square, whitening(gram), rank, self.rounds, self.ratio,
                    self.sparsity,
                )  # fmt: skip
                rounded = parts.sparse.to(weight.dtype)
                error = relative_error(weight, rounded.float() + parts.up @ parts.down)
                return {**vars(parts), "sparse": rounded, "rel_l2": error}

            form = context.once(f"site {linear.name}", fields)
            share = float((form["sparse"] == 0).float().mean())
            return {**form, "sparse": context.spool.store(form["sparse"]), "share": share}

        def outputs(linear: Linear, form: dict[str, Any], x: Tensor, y: Tensor) -> Tensor:
            bias = None if linear.bias is None else view.weight(linear.bias)
            out = linear_of(x, form["sparse"].read(), None if bias is None else bias.read())
            path: Tensor = linear_of(linear_of(x.float(), form["down"]), form["up"])
            return out + path.to(out.dtype)

        by_linear = self.fit_all(context, chosen, fit, outputs)
        groups: dict[Value, list[Linear]] = {}
        for linear in chosen:
            groups.setdefault(view.tensor(linear.node), []).append(linear)
        for members in groups.values():
            factors = [(by_linear[x.name]["down"], by_linear[x.name]["up"]) for x in members]
            half = all(fits_half(*pair) for pair in factors)
            form = FactorForm(None, torch.float16 if half else torch.float32)
            for linear in members:
                result.sites.append(self._site(view, linear, form, by_linear[linear.name]))
                view.set_weight(linear.weight, by_linear[linear.name]["sparse"])
            graft_group(context, members, factors, form, self.name)
        context.edited()
        return with_note(result)

    def plan(self, context: Context) -> PassResult:
        return with_note(super().plan(context))

    def planned_site(self, context: Context, linear: Linear) -> Site:
        return self._site(context.view, linear, FactorForm(None, torch.float16), {})

    def _rank(self, linear: Linear) -> int:
        return min(self.rank, linear.out_features, linear.in_features)

    def _site(
        self, view: View, linear: Linear, form: FactorForm, parts: Mapping[str, Any]
    ) -> Site:
        weight, rank = weight_of(view, linear), self._rank(linear)
        extra = form.nbytes(rank, linear.in_features) + form.nbytes(linear.out_features, rank)
        note = f"relative error of its outputs {parts['left']:.3g}" if parts else ""
        return linear_site(
            linear, weight.stored_bytes, weight.nbytes + extra, parts.get("rel_l2"), note=note,
            sparsity=parts.get("share"),
        )  # fmt: skip


def split(
    weight: Tensor, square: Square, inputs: Whitening, rank: int, rounds: int,
    ratio: Ratio | None, sparsity: float | None,
) -> Split:  # fmt: skip
    """The best of ``rounds`` alternations for a weight f32 ``[out, in]``."""
    best: Split | None = None
    low = torch.zeros_like(weight)
    for _ in range(rounds):
        rest = weight - low
        stays = highest_of_rows(wanda_scores(rest, square), ratio, sparsity)
        sparse = torch.where(stays, rest, 0.0)
        whole = spectrum(weight, weight - sparse, inputs, rank)
        down, up = whole.factors(min(rank, len(whole.sigma)))
        missing = rank - len(down)
        down, up = pad(down, (0, 0, 0, missing)), pad(up, (0, missing))
        error = whole.relative_error(rank)
        if best is None or error < best.left:
            best = Split(sparse, down, up, error)
        low = up @ down
    assert best is not None
    return best
