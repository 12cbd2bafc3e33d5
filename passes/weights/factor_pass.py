"""Base of the passes that make two linears of one, by way of fewer features."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...ir.core.errors import BadInput
from ...ir.core.view import View
from ...ir.core.weights import AbsentWeight, Weight
from ...ir.moves import factorize
from ...ir.run.statistics import Statistics
from ...ir.structure.low_rank import is_factor
from ...ir.structure.recognize import Linear
from ..base import CHANGED, STORED, Context, PassResult, Site
from ..linear_pass import LinearPass, linear_site, weight_of
from ..stored import reason_against_storing, relative_error
from .low_rank import Spectrum

FACTORED = "linears of low rank"


@dataclass(frozen=True)
class Factors:
    """``W ≈ up @ down`` as two handles: those of a whole model need not be in memory."""

    down: Weight
    """``[rank, in]`` in the dtype of the weight."""
    up: Weight
    """``[out, rank]`` likewise."""
    rel_l2: float
    note: str

    @property
    def nbytes(self) -> int:
        return self.down.nbytes + self.up.nbytes


@dataclass(frozen=True, kw_only=True)
class FactorPass(LinearPass):
    """Base: ``y = W x + b`` becomes ``y = B (A x) + b`` with A ``[r, in]`` and B ``[out, r]``.

    ``r (out + in)`` numbers are stored and multiplied by, so a rank pays below ``out * in / (out +
    in)``. The factors are linears of their own: ``quantize`` behind this stores them in few bits,
    and ``eora`` compensates them as the one that they were.
    """

    provides: ClassVar[tuple[str, ...]] = (FACTORED, CHANGED)
    excludes: ClassVar[tuple[str, ...]] = (FACTORED, STORED)

    @abstractmethod
    def ranks(self, context: Context, linears: Sequence[Linear]) -> Mapping[str, int]:
        """The rank of each linear by name; those that are left out stay as they are."""

    @abstractmethod
    def spectrum(self, weight: Tensor, statistics: Statistics, rank: int) -> Spectrum:
        """The best approximations of a weight ``[out, in]`` f32, up to ``rank``."""

    @abstractmethod
    def planned_ranks(self, linears: Sequence[Linear]) -> Mapping[str, int]:
        """As ``ranks``, from shapes alone."""

    def reason_against(self, context: Context, linear: Linear) -> str | None:
        if is_factor(linear):
            return "it is a factor of a linear of low rank already"
        return reason_against_storing(context.view, linear)

    def run(self, context: Context) -> PassResult:
        result = PassResult()
        view, chosen = context.view, self.choose(context, result)
        ranks = self.ranks(context, chosen) if chosen else {}
        linears = self._with_rank(chosen, ranks, result)

        def fit(linear: Linear, statistics: Statistics) -> Factors:
            def fields() -> dict[str, Any]:
                weight = weight_of(view, linear).read()
                return self._fitted(weight, statistics, ranks[linear.name], linear.name)

            parts = context.once(f"site {linear.name}", fields)
            down, up = (context.spool.store(parts[name]) for name in ("down", "up"))
            return Factors(down, up, parts["rel_l2"], parts["note"])

        def outputs(linear: Linear, factors: Factors, x: Tensor, y: Tensor) -> Tensor:
            bias = None if linear.bias is None else view.weight(linear.bias)
            narrow = torch.nn.functional.linear(x, factors.down.read())
            return torch.nn.functional.linear(
                narrow, factors.up.read(), None if bias is None else bias.read()
            )

        on_the_way = self.requires().propagate in ("sequential", "compensated")
        by_linear = self.fit_all(context, linears, fit, outputs if on_the_way else None)
        for linear in linears:
            factors = by_linear[linear.name]
            result.sites.append(self._site(view, linear, factors.nbytes, factors))
            factorize(view, linear, factors.down, factors.up, rule=self.name, step=context.step)
        context.edited()
        return result

    def _fitted(
        self, weight: Tensor, statistics: Statistics, rank: int, name: str
    ) -> dict[str, Any]:
        wide = weight.float()
        if not torch.isfinite(wide).all():
            raise BadInput(f"{name}: its weight is not finite; exclude it or repair the checkpoint")
        spectrum = self.spectrum(wide, statistics, rank)
        down, up = (factor.to(weight.dtype) for factor in spectrum.factors(rank))
        missing = rank - len(down)  # of a matrix that has no more; what was planned is stored
        down, up = pad(down, (0, 0, 0, missing)), pad(up, (0, missing))
        note = f"rank {rank}"
        if spectrum.short:
            note += "; fewer calibration tokens than inputs"
        error = relative_error(weight, up.float() @ down.float())
        return {"down": down, "up": up, "rel_l2": error, "note": note}

    def plan(self, context: Context) -> PassResult:
        """The graph of the forecast is factorized too, by weights that cannot be read: passes
        behind this one plan on the factors."""
        result = PassResult()
        view, chosen = context.view, self.choose(context, result)
        ranks = self.planned_ranks(chosen)
        for linear in self._with_rank(chosen, ranks, result):
            dtype, rank = weight_of(view, linear).dtype, ranks[linear.name]
            sizes = {"in": (rank, linear.in_features), "out": (linear.out_features, rank)}
            down, up = (
                AbsentWeight(f"{linear.name}.{end}", size, dtype, "it is not made in a forecast")
                for end, size in sizes.items()
            )
            result.sites.append(self._site(view, linear, down.nbytes + up.nbytes))
            factorize(view, linear, down, up, rule=self.name)
        context.edited()
        return result

    def planned_site(self, context: Context, linear: Linear) -> Site:
        rank = self.planned_ranks([linear])[linear.name]
        width = weight_of(context.view, linear).dtype.itemsize
        size = rank * (linear.out_features + linear.in_features) * width
        return self._site(context.view, linear, size)

    def _with_rank(
        self, linears: Sequence[Linear], ranks: Mapping[str, int], result: PassResult
    ) -> list[Linear]:
        stays = [linear for linear in linears if linear.name not in ranks]
        result.refused += [(linear.name, STAYS_WHOLE) for linear in stays]
        return [linear for linear in linears if linear.name in ranks]

    @staticmethod
    def _site(view: View, linear: Linear, size: int, factors: Factors | None = None) -> Site:
        before = weight_of(view, linear).stored_bytes
        if factors is None:
            return linear_site(linear, before, size)
        return linear_site(linear, before, size, factors.rel_l2, note=factors.note)


STAYS_WHOLE = "two factors of its rank would take no fewer numbers than its matrix"


def break_even(linear: Linear) -> float:
    """The rank at which two factors hold as many numbers as the matrix."""
    m, n = linear.out_features, linear.in_features
    return m * n / (m + n)
