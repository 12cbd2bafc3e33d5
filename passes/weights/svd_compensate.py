"""``svd-compensate``: the baseline of ``eora``, which looks at weights alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..base import Context
from ..checkpoint_store import settled
from .compensate import Compensate, Target
from .low_rank import Spectrum, spectrum


@dataclass(frozen=True, kw_only=True)
class SvdCompensate(Compensate):
    """The truncated SVD of ``W - W^``, as in ZeroQuant-V2 (Yao et al. 2023, arXiv 2303.08302).

    It is the best correction of the weights, not of the outputs; no calibration data is needed.
    """

    name: ClassVar[str] = "svd-compensate"

    def fit(
        self, context: Context, targets: Sequence[Target]
    ) -> tuple[dict[str, Spectrum], dict[str, int]]:
        found = {}
        for target in targets:
            whole = spectrum(*target.read(), None)
            if self.budget is None:
                whole = Spectrum(**settled(whole.cut(self.top_rank)))
            found[target.linear.name] = whole
        return found, self.ranks(targets, found)
