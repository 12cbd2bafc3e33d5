"""``low-rank``: each matrix as two factors of one share of its size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.run.statistics import Gram, Stat, Statistics
from ...ir.structure.recognize import Linear
from ..base import Context, Needs
from ..foreseen import Foreseen
from .eora import whitening
from .expected import energies
from .factor_pass import FactorPass, break_even
from .low_rank import Spectrum, spectrum

DEFAULT_RATIO = 0.3


@dataclass(frozen=True, kw_only=True)
class LowRank(FactorPass, Foreseen):
    """Cut the singular values of every matrix off behind one share of its numbers.

    ``ratio`` is the share of a matrix's numbers that goes: ``r = floor((1 - ratio) m n / (m + n))``
    (PELA's uniform rank, Guo et al. 2023, arXiv 2310.10700); ``rank`` is one number for all. It is
    ``ratio=0.3`` unless one is given. ``whiten=none`` takes the truncated SVD of W and no data.
    ``whiten=gram`` takes that of ``W P`` with ``P P^T = X X^T`` of the calibration inputs, times
    ``P^-1``, which leaves the least error of the outputs (SVD-LLM's truncation, Wang et al. 2024,
    arXiv 2403.07378); a linear sees what those before it make of the data by then. A site whose
    factors would take no fewer numbers than its matrix is left as it is.
    """

    name: ClassVar[str] = "low-rank"
    ratio: float | None = None
    """Share of the numbers of each matrix that goes (0.3)."""
    rank: int | None = None
    """One rank for all matrices instead."""
    whiten: Literal["none", "gram"] = "none"
    """Keep what matters to weights, or to outputs: needs data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio is not None and self.rank is not None:
            raise BadInput("low-rank: give ratio= or rank=, not both")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise BadInput(f"low-rank: ratio={self.ratio} must be above 0 and below 1")
        if self.rank is not None and self.rank < 1:
            raise BadInput(f"low-rank: rank={self.rank} must be at least 1")

    def requires(self) -> Needs:
        if self.whiten == "none":
            return self.needs
        return replace(
            self.needs, stats=(Stat("gram", at="linear"),), propagate="sequential"
        )

    def ranks(self, context: Context, linears: Sequence[Linear]) -> Mapping[str, int]:
        return self.planned_ranks(linears)

    def planned_ranks(self, linears: Sequence[Linear]) -> Mapping[str, int]:
        ranks = {linear.name: self._rank(linear) for linear in linears}
        return {x.name: ranks[x.name] for x in linears if 1 <= ranks[x.name] < break_even(x)}

    def _rank(self, linear: Linear) -> int:
        if self.rank is not None:
            return self.rank
        ratio = DEFAULT_RATIO if self.ratio is None else self.ratio
        return int((1 - ratio) * break_even(linear))

    def spectrum(self, weight: Tensor, statistics: Statistics, rank: int) -> Spectrum:
        if self.whiten == "none":
            return spectrum(weight, weight, None, rank)
        gram = statistics[Gram]
        return spectrum(weight, weight, whitening(gram), rank, gram.count)

    def expected_loss(self, linear: Linear, weight: Tensor, statistics: Statistics) -> float:
        """What the tail of the singular values holds; without whitening, as if no input differed
        from the others."""
        rank = self.planned_ranks([linear]).get(linear.name)
        if rank is None:
            return 0.0
        tail = self.spectrum(weight, statistics, rank).tail(rank)
        whitened = self.whiten == "gram"
        return tail if whitened else tail * float(energies(statistics[Gram]).mean())

    def stand_in(self, linear: Linear, weight: Tensor, statistics: Statistics) -> Tensor:
        rank = self.planned_ranks([linear]).get(linear.name)
        if rank is None:
            return weight
        factors = self.spectrum(weight, statistics, rank).factors(rank)
        return factors[1] @ factors[0]
