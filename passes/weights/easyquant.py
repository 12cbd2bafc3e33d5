"""``easyquant``: few outliers stay exact, the range of the rest is fitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.run.statistics import Statistics
from ...ir.structure.recognize import Linear
from .nbit_pass import NBitPass
from .quantized import Quantized
from .quantizers import easyquant, inliers
from .table_pass import TablePass


@dataclass(frozen=True, kw_only=True)
class EasyQuant(TablePass, NBitPass):
    """Keep weights ``nsig`` standard deviations from the mean exact; fit the scale of the others.

    EasyQuant (arXiv 2403.02775), data-free: codes are symmetric, the scale minimises
    ``||Q(W) - W||²`` over the weights that are no outliers, and a sparse side path restores the
    outliers. ``per_row`` takes mean and deviation for each output row instead of the matrix;
    ``solver`` is ``als`` (a grid, then exact alternating steps) or the paper's ``adam``. The paper
    has one scale per output channel: ``group=0``, the default.
    """

    name: ClassVar[str] = "easyquant"
    weights_per_second: ClassVar[float] = 1.2e7
    group: int = 0
    """Inputs that share a scale: 16 to 256; 0: a row."""
    nsig: float = 3.0
    """Weights this many deviations from the mean stay exact."""
    per_row: bool = False
    """Take the deviation of each row, not of the matrix."""
    solver: Literal["als", "adam"] = "als"
    """How scales are fitted: exactly, or as there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.nsig > 0:
            raise BadInput(f"easyquant: nsig={self.nsig} must be above 0")

    def quantize(self, weight: torch.Tensor, name: str) -> Quantized:
        return easyquant(
            weight, self.bits, self.group, self.nsig, self.per_row, self.solver,
            scale_dtype=self.scale_dtype, name=name,
        )  # fmt: skip

    def expected_loss(self, linear: Linear, weight: Tensor, statistics: Statistics) -> float:
        rest = inliers(weight, self.nsig, self.per_row)
        return super().expected_loss(linear, rest, statistics)

    def zero_points(self) -> Literal["none", "integer", "real"]:
        return "none"

    def outlier_rate(self) -> float:
        """The share of a normal distribution beyond ``nsig`` deviations, on both sides."""
        return float(torch.erfc(torch.tensor(self.nsig / 2**0.5)))
