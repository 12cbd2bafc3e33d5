"""``welore``: ranks by how soon each matrix's singular values fall off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.run.statistics import Statistics
from ...ir.structure.recognize import Linear
from ..base import Context
from ..linear_pass import weight_of
from .factor_pass import FactorPass, break_even
from .low_rank import Spectrum, spectrum

ROUNDING = 1e-4
"""Spread of singular values, as a share of the largest, that is rounding's."""


@dataclass(frozen=True, kw_only=True)
class WeLore(FactorPass):
    """Give each matrix the rank that one threshold on its normalised singular values leaves it.

    WeLore (Jaiswal et al. 2024, arXiv 2407.11239): ``t_i = (sigma_i - sigma_min) / (sigma_max -
    sigma_min)`` in each matrix, and those with ``t_i < kappa`` go. The published code has a table
    of kappas for two models; here kappa is found by bisection, the least at which a share
    ``target`` of all numbers of the chosen matrices is gone. (The paper's own target counts ranks,
    of which half can go from a square matrix without saving a byte.) A matrix whose factors would
    hold no fewer numbers stays whole. Weights alone are looked at.
    """

    name: ClassVar[str] = "welore"
    weights_per_second: ClassVar[float] = 2e6
    target: float = 0.2
    """Share of the numbers of all matrices that goes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.target < 1:
            raise BadInput(f"welore: target={self.target} must be above 0 and below 1")

    def ranks(self, context: Context, linears: Sequence[Linear]) -> Mapping[str, int]:
        heights = {}
        for i, linear in enumerate(linears):
            context.progress(f"welore: {linear.name}", i, len(linears))

            def values(linear: Linear = linear) -> Tensor:
                return normalised(weight_of(context.view, linear).read(), linear.name)

            heights[linear.name] = context.once(f"values {linear.name}", values)
        return ranks_for(heights, linears, self.target)

    def planned_ranks(self, linears: Sequence[Linear]) -> Mapping[str, int]:
        """As if all fell off alike."""
        ranks = {linear.name: int((1 - self.target) * break_even(linear)) for linear in linears}
        return {name: rank for name, rank in ranks.items() if rank}

    def spectrum(self, weight: Tensor, statistics: Statistics, rank: int) -> Spectrum:
        return spectrum(weight, weight, None, rank)


def normalised(weight: Tensor, name: str) -> Tensor:
    """``t`` f64, from 1 down to 0. Raises ``BadInput`` for weights that are not finite."""
    if not torch.isfinite(weight).all():
        raise BadInput(f"{name}: its weight is not finite; exclude it or repair the checkpoint")
    sigma = torch.linalg.svdvals(weight.float()).double()
    spread = sigma[0] - sigma[-1]
    if spread <= ROUNDING * sigma[0]:  # all are alike: none goes before another
        return torch.ones_like(sigma)
    t: Tensor = (sigma - sigma[-1]) / spread
    return t


def ranks_for(
    heights: Mapping[str, Tensor], linears: Sequence[Linear], target: float
) -> dict[str, int]:
    """Ranks by one threshold, such that at least a share ``target`` of all numbers is gone.

    ``heights`` are normalised singular values, in descending order. Matrices that stay whole are
    left out. Raises ``BadInput`` where not even rank 1 everywhere is enough.
    """
    whole = sum(x.out_features * x.in_features for x in linears)

    def at(kappa: float) -> dict[str, int]:
        counts = {x.name: int((heights[x.name] >= kappa).sum()) for x in linears}
        return {x.name: counts[x.name] for x in linears if counts[x.name] < break_even(x)}

    def gone(ranks: Mapping[str, int]) -> float:
        saved = (
            x.out_features * x.in_features - ranks[x.name] * (x.out_features + x.in_features)
            for x in linears
            if x.name in ranks
        )
        return sum(saved) / whole

    steps = sorted({height for x in linears for height in heights[x.name].tolist()})
    low, high = 0, len(steps) - 1
    if gone(at(steps[high])) < target:
        raise BadInput(
            f"welore: target={target} cannot be reached: rank 1 everywhere leaves "
            f"{1 - gone(at(steps[high])):.3g} of the numbers"
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if gone(at(steps[middle])) >= target else (middle + 1, high)
    return at(steps[low])
