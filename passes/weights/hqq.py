"""``hqq``: zero points fitted by a half-quadratic split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.run.statistics import Gram, Statistics
from ...ir.structure.recognize import Linear
from .expected import energies, rounding_loss
from .nbit_pass import NBitPass
from .quantized import Quantized
from .quantizers import hqq
from .table_pass import TablePass


@dataclass(frozen=True, kw_only=True)
class HQQ(TablePass, NBitPass):
    """Fit real zero points under a sparse error model (``l_p``, p < 1), without data.

    HQQ (Badri and Shaji 2023, mobiusml.github.io/hqq_blog): ``iters`` rounds of
    ``E = shrink(W - W_r, beta, p)``, ``zero = mean(codes - (W - E) / scale)``; the best round is
    kept. Zero points are stored in the dtype of the scales; ``round_zero`` rounds them to integers,
    which costs part of the gain and saves their bytes.
    """

    name: ClassVar[str] = "hqq"
    weights_per_second: ClassVar[float] = 8e6
    group: int = 64
    """Inputs that share a scale: 16 to 256; 0: a row."""
    iters: int = 20
    """Rounds of fitting."""
    beta: float = 10.0
    """How strongly the error is pulled to its sparse part."""
    p: float = 0.7
    """Of the error's norm l_p: below 1, outliers count less."""
    round_zero: bool = False
    """Integer zero points: fewer bytes, more error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iters < 1 or not self.beta > 0 or not 0 < self.p <= 1:
            raise BadInput(
                f"hqq: iters={self.iters} must be at least 1, beta={self.beta} above 0, "
                f"p={self.p} in (0, 1]"
            )

    def quantize(self, weight: torch.Tensor, name: str) -> Quantized:
        return hqq(
            weight, self.bits, self.group, iters=self.iters, beta=self.beta, p=self.p,
            round_zero=self.round_zero, scale_dtype=self.scale_dtype, name=name,
        )  # fmt: skip

    def expected_loss(self, linear: Linear, weight: Tensor, statistics: Statistics) -> float:
        return rounding_loss(
            weight, energies(statistics[Gram]), self.bits, self.group, middle=False,
            holds_zero=self.round_zero,
        )  # fmt: skip

    def zero_points(self) -> Literal["none", "integer", "real"]:
        return "integer" if self.round_zero else "real"
