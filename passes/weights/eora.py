"""``eora``: a low-rank path that undoes most of what compression did to a linear's output."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal
from weakref import WeakKeyDictionary

from torch import Tensor

from ...ir.run.statistics import Gram, Stat, Statistics
from ..base import Needs
from .compensate import Compensate
from .low_rank import Spectrum, Whitening, spectrum


@dataclass(frozen=True, kw_only=True)
class EoRA(Compensate):
    """Fit ``B A`` to the compression gap in the eigenspace of the inputs, in closed form.

    EoRA (Liu et al. 2024, arXiv 2410.21271): with ``S = X X^T = Q L Q^T`` of the calibration
    inputs and ``P = Q L^(1/2)``, the best rank-r correction of the layer's output is the truncated
    SVD of ``(W - W^) P``, multiplied by ``P^-1``. ``propagate=compensated`` takes the inputs of a
    linear from the graph in which the linears before it are compensated already;
    ``propagate=dense`` takes them from the graph before its weights were changed. Needs calibration
    data.
    """

    name: ClassVar[str] = "eora"
    needs: ClassVar[Needs] = Needs(stats=(Stat("gram", at="linear"),))
    propagate: Literal["compensated", "dense"] = "compensated"
    """The graph whose inputs it is fitted to."""

    def requires(self) -> Needs:
        return replace(self.needs, propagate=self.propagate)

    def spectrum(
        self, source: Tensor, gap: Tensor, statistics: Statistics, rank: int | None
    ) -> Spectrum:
        gram = statistics[Gram]
        return spectrum(source, gap, whitening(gram), rank, gram.count)


_WHITENINGS: WeakKeyDictionary[Gram, Whitening] = WeakKeyDictionary()


def whitening(gram: Gram) -> Whitening:
    """Of a Gram matrix, the same for all linears with one input: what it computes, it does once."""
    if gram not in _WHITENINGS:
        _WHITENINGS[gram] = Whitening(gram.matrix)
    return _WHITENINGS[gram]
