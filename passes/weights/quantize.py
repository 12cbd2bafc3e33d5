"""``quantize``: round to nearest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..base import PassResult
from .nbit_pass import NBitPass
from .quantized import Quantized
from .quantizers import rtn

MSE_TIMES = 35
"""How much longer a search takes than rounding."""


@dataclass(frozen=True, kw_only=True)
class Quantize(NBitPass):
    """Store the weights of linears in few bits by rounding to nearest, without data.

    ``w ≈ (code - zero) * scale`` in groups of ``group`` inputs. ``symmetric`` fixes the zero point
    at the middle code; otherwise it is an integer for each group. ``mse`` searches, for each group,
    the shrinkage of its range with the least ``sum |error|^2.4`` (the search of GPTQ's quantizer,
    arXiv 2210.17323). Weights that are not finite are refused.
    """

    name: ClassVar[str] = "quantize"
    weights_per_second: ClassVar[float] = 1.5e8
    symmetric: bool = True
    mse: bool = False

    def quantize(self, weight: torch.Tensor, name: str) -> Quantized:
        return rtn(
            weight, self.bits, self.group, self.symmetric, self.mse,
            scale_dtype=self.scale_dtype, name=name,
        )  # fmt: skip

    def seconds(self, planned: PassResult) -> float:
        return super().seconds(planned) * (MSE_TIMES if self.mse else 1)

    def zero_points(self) -> Literal["none", "integer", "real"]:
        return "none" if self.symmetric else "integer"
