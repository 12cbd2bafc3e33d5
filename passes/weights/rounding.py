"""Rounding to nearest, as passes do it that do nothing else to a matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..base import PassResult
from .nbit_pass import NBitPass
from .quantized import Quantized
from .quantizers import rtn

MSE_TIMES = 35
"""How much longer a search takes than rounding."""


@dataclass(frozen=True, kw_only=True)
class Rounding(NBitPass):
    """Base of the passes that round to nearest, and how others round what they do not fit."""

    name: ClassVar[str] = "rounding"
    weights_per_second: ClassVar[float] = 1.5e8
    symmetric: bool = True
    """Fix the zero point at the middle; else one a group."""
    mse: bool = False
    """Search the range of each group for the least error."""

    def quantize(self, weight: Tensor, name: str) -> Quantized:
        return rtn(
            weight, self.bits, self.group, self.symmetric, self.mse,
            scale_dtype=self.scale_dtype, name=name,
        )  # fmt: skip

    def seconds(self, planned: PassResult) -> float:
        return super().seconds(planned) * (MSE_TIMES if self.mse else 1)

    def peak_bytes(self, planned: PassResult) -> int:
        """The largest weight's numbers, at most in float32, and its codes: it rounds in blocks."""
        return max((math.prod(site.shape) for site in planned.sites), default=0) * 5

    def zero_points(self) -> Literal["none", "integer", "real"]:
        return "none" if self.symmetric else "integer"
