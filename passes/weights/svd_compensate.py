"""``svd-compensate``: the baseline of ``eora``, which looks at weights alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...ir.run.statistics import Statistics
from .compensate import Compensate
from .low_rank import Spectrum, spectrum


@dataclass(frozen=True, kw_only=True)
class SvdCompensate(Compensate):
    """The truncated SVD of ``W - W^``, as in ZeroQuant-V2 (Yao et al. 2023, arXiv 2303.08302).

    It is the best correction of the weights, not of the outputs; no calibration data is needed.
    """

    name: ClassVar[str] = "svd-compensate"

    def spectrum(
        self, source: Tensor, gap: Tensor, statistics: Statistics, rank: int | None
    ) -> Spectrum:
        return spectrum(source, gap, None, rank)
