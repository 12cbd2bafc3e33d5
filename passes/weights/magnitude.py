"""``magnitude``: zeros where weights are smallest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...ir.run.statistics import Statistics
from .mask_pass import MaskPass, highest_in_groups, highest_of_all


@dataclass(frozen=True, kw_only=True)
class Magnitude(MaskPass):
    """Set the weights of least magnitude to zero, without data (Han et al. 2015, arXiv 1506.02626).

    ``sparsity`` is a share of each matrix, or ``pattern`` ``N:M``: N weights stay of each M inputs
    in a row (``2:4``, the default, is what GPUs have kernels for; Mishra et al. 2021, arXiv
    2104.08378). The result is a dense weight with zeros: put ``quantize`` behind it, whose codes
    keep them (``hqq`` moves them), and ``eora`` behind that. Of equal magnitudes the first ones in
    a row stay. Weights that are not finite are refused.
    """

    name: ClassVar[str] = "magnitude"

    def stays(self, weight: Tensor, statistics: Statistics) -> Tensor:
        if self.ratio is not None:
            return highest_in_groups(weight.abs(), self.ratio)
        return highest_of_all(weight.abs(), self.sparsity)
