"""``magnitude``: zeros where weights are smallest."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.core.weights import Weight
from ...ir.run.statistics import Statistics
from ...ir.structure.recognize import Linear
from ..base import CHANGED, MASKED, STORED, Context
from ..linear_pass import StoringPass
from ..stored import Stored, numbers
from .quantizers import not_finite


@dataclass(frozen=True, kw_only=True)
class Magnitude(StoringPass):
    """Set the weights of least magnitude to zero, without data (Han et al. 2015, arXiv 1506.02626).

    ``pattern`` is a share of each matrix (``50%``), or ``N:M``: N weights stay of each M inputs in
    a row (``2:4`` is what GPUs have kernels for; Mishra et al. 2021, arXiv 2104.08378). The result
    is a dense weight with zeros: put ``quantize`` behind it, whose codes keep them (``hqq`` moves
    them), and ``eora`` behind that. Of equal magnitudes the first ones in a row stay. Weights that
    are not finite are refused.
    """

    name: ClassVar[str] = "magnitude"
    provides: ClassVar[tuple[str, ...]] = (MASKED, CHANGED)
    excludes: ClassVar[tuple[str, ...]] = (MASKED, STORED)
    keeps_form: ClassVar[bool] = True
    pattern: str = "2:4"
    """N:M, of which N stay of M in a row; or a share, as 50%."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._parsed()

    def reason_against(self, context: Context, linear: Linear) -> str | None:
        reason, (_, group) = super().reason_against(context, linear), self._parsed()
        if reason is None and group and linear.in_features % group:
            return f"its {linear.in_features} inputs are no multiple of {group}"
        return reason

    def fit(self, weight: Tensor, statistics: Statistics, name: str) -> Stored:
        number, group = self._parsed()
        if not torch.isfinite(weight).all():
            raise not_finite(weight, name)
        rows = weight.abs().reshape(-1, group or weight.numel())
        count = int(number) if group else weight.numel() - round(number * weight.numel() / 100)
        order = rows.argsort(dim=1, descending=True, stable=True)
        mask = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order[:, :count], True)
        masked = torch.where(mask.reshape(weight.shape), weight, 0.0)
        return numbers(masked, weight, sparsity=float((masked == 0).float().mean()))

    def predicted_bytes(self, linear: Linear, weight: Weight) -> int:
        return weight.nbytes

    def _parsed(self) -> tuple[float, int]:
        """How many weights stay of each group, and its size; or the percentage of zeros, and 0."""
        share = re.fullmatch(r"(\d+(?:\.\d+)?)%", self.pattern)
        ratio = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        if share and 0 < float(share[1]) < 100:
            return float(share[1]), 0
        if ratio and 0 < int(ratio[1]) < int(ratio[2]):
            return int(ratio[1]), int(ratio[2])
        raise BadInput(
            f"magnitude: pattern={self.pattern} is neither N:M with N below M, as 2:4, nor a share "
            "of zeros between 0% and 100%, as 50%"
        )
