"""``gptq``: rounding whose errors later inputs make up for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.run.statistics import Gram, Stat, Statistics
from ...ir.structure.recognize import Linear
from ..base import Needs, PassResult
from ..foreseen import Foreseen
from ..linear_pass import StoringPass
from ..stored import Stored
from .expected import energies_after_feedback, rounding_loss
from .feedback import MOST_DAMPING, Feedback, rounded_with_feedback
from .quantizers import rtn
from .table_pass import TablePass


@dataclass(frozen=True, kw_only=True)
class GPTQ(TablePass, StoringPass, Foreseen):
    """Round one input after another; those behind it make up for what that does to the outputs.

    GPTQ (Frantar et al. 2022, arXiv 2210.17323): with ``H^-1 = U^T U`` of the Gram matrix of the
    linear's inputs plus ``damp`` times the mean of its diagonal, ``e = w_j - q(w_j)`` and
    ``w_k -= e U_jk / U_jj``. Ranges are those that ``quantize`` finds (``symmetric``, ``mse``),
    before any weight moves ("static groups"). So ``act_order``, which takes the inputs of most
    energy first, is an order of work alone: the stored form is that of ``quantize``, and nothing is
    permuted when the model runs.

    ``propagate=sequential`` shows a linear what those before it, already rounded, make of the data;
    ``dense`` what the source's do. Needs calibration data; with fewer tokens than a linear has
    inputs it leans on the damping, and the site says so. An input that is 0 on all of the data is
    rounded to nearest (the paper's code sets its weights to 0, which other data would miss).
    Damping is raised, and the site says so, where the matrix has no Cholesky factor. Weights that
    are not finite are refused.
    """

    name: ClassVar[str] = "gptq"
    needs: ClassVar[Needs] = Needs(stats=(Stat("gram", at="linear"),))
    symmetric: bool = True
    """Fix the zero point at the middle; else one a group."""
    mse: bool = False
    """Search the range of each group for the least error."""
    act_order: bool = True
    """Take the inputs of most energy first."""
    damp: float = 0.01
    """Damping, as a share of the mean of the diagonal."""
    propagate: Literal["sequential", "dense"] = "sequential"
    """The graph whose inputs it is fitted to."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.damp <= MOST_DAMPING:
            raise BadInput(
                f"gptq: damp={self.damp} is a share of the mean of the Gram matrix's diagonal, "
                f"between 0 and {MOST_DAMPING:g}"
            )

    def requires(self) -> Needs:
        return replace(self.needs, propagate=self.propagate)

    def fit(self, weight: Tensor, statistics: Statistics, name: str) -> Stored:
        start = rtn(
            weight, self.bits, self.group, self.symmetric, self.mse,
            scale_dtype=self.scale_dtype, name=name,
        )  # fmt: skip
        gram = statistics[Gram]
        by = Feedback.at(gram, self.damp, self.act_order)
        notes = []
        if gram.count < len(gram.matrix):
            notes.append(f"{gram.count} calibration tokens for {len(gram.matrix)} inputs")
        if by.damping > self.damp:
            notes.append(f"damping raised to {by.damping:g}")
        return self.stored(rounded_with_feedback(weight, start, by), "; ".join(notes))

    def expected_loss(self, linear: Linear, weight: Tensor, statistics: Statistics) -> float:
        by = Feedback.at(statistics[Gram], self.damp, self.act_order)
        costs = energies_after_feedback(by)
        return rounding_loss(weight, costs, self.bits, self.group, middle=self.symmetric)

    def zero_points(self) -> Literal["none", "integer", "real"]:
        return "none" if self.symmetric else "integer"

    def seconds(self, planned: PassResult) -> float:
        """The sweep over columns, and a factorization for each input, which a few sites share."""
        sizes = [site.shape for site in planned.sites]
        return sum(m * n * (n / _UPDATES + 1 / _ROUNDINGS) + n**3 / _FACTORS for m, n in sizes)

    def peak_bytes(self, planned: PassResult) -> int:
        return max((4 * 6 * m * n + 8 * 4 * n * n for m, n in (s.shape for s in planned.sites)),
                   default=0)  # fmt: skip


_UPDATES, _ROUNDINGS, _FACTORS = 4e10, 4e7, 2e10
"""Of one core of the reference CPU: multiply-adds of feedback and columns' entries rounded a
second; and cubed sizes of Gram matrices factorized a second."""
