"""``finequant``: groups as fine as each matrix needs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.ops.pack import GROUPS
from ...ir.run.statistics import Gram, Statistics
from ...ir.structure.recognize import Linear
from ..base import Context, PassResult
from ..foreseen import Foreseen
from ..linear_pass import StoringPass
from ..stored import Stored
from .expected import energies, rounding_loss
from .quantizers import rtn
from .table_pass import TablePass


@dataclass(frozen=True, kw_only=True)
class FineQuant(TablePass, StoringPass, Foreseen):
    """Round to nearest in groups whose size is chosen for each matrix, without data.

    After FineQuant (Kim et al. 2023, arXiv 2308.09723), of which no code is public and whose exact
    rule could not be read: groups start as whole rows and are halved (whole rows to 256 inputs at
    once) as long as that shrinks the mean of their greatest magnitudes, a halving, by more than
    ``alpha``; ``group`` is the smallest size that is tried, 64 as in the paper. Even Gaussian
    weights shrink it by 6 to 10 % a halving at these sizes, so a larger ``alpha`` keeps groups only
    where single weights stand out. ``symmetric`` and errors as in ``quantize``. The forecast is
    that of the smallest groups, which is the most that it takes; sites say what was chosen.
    """

    name: ClassVar[str] = "finequant"
    weights_per_second: ClassVar[float] = 1e8
    group: int = 64
    symmetric: bool = True
    """Fix the zero point at the middle; else one a group."""
    alpha: float = 0.08
    """What halving must take off the ranges."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0:
            raise BadInput(f"finequant: alpha={self.alpha} must not be negative")

    def fit(self, weight: Tensor, statistics: Statistics, name: str) -> Stored:
        chosen = replace(self, group=self.chosen_group(weight.float()))
        quantized = rtn(
            weight, self.bits, chosen.group, self.symmetric, scale_dtype=self.scale_dtype, name=name
        )
        note = f"groups of {chosen.group}" if chosen.group else "one group a row"
        return chosen.stored(quantized, note)

    def expected_loss(self, linear: Linear, weight: Tensor, statistics: Statistics) -> float:
        costs, group = energies(statistics[Gram]), self.chosen_group(weight)
        return rounding_loss(weight, costs, self.bits, group, middle=self.symmetric)

    def chosen_group(self, weight: Tensor) -> int:
        """Inputs that share a scale, 0 for the whole row."""
        columns = weight.shape[1]
        size, before = columns, _mean_range(weight, columns)
        chosen = 0
        for group in reversed(GROUPS[1:]):
            if group >= columns or group < self.group or self.group == 0:
                continue
            if columns % group and group != self.group:
                continue  # the codes that pad its last group may take more than smaller groups do
            after = _mean_range(weight, group)
            halvings = math.log2(size / group)
            if not after or (before / after) ** (1 / halvings) <= 1 + self.alpha:
                break
            size, before, chosen = group, after, group
        return chosen

    def plan(self, context: Context) -> PassResult:
        result = super().plan(context)
        result.notes.append(
            f"groups of {self.group} inputs everywhere are the most that it takes: larger ones are "
            "chosen when the weights are read"
        )
        return result

    def zero_points(self) -> Literal["none", "integer", "real"]:
        return "none" if self.symmetric else "integer"


def _mean_range(weight: Tensor, group: int) -> float:
    """The mean over weights of the greatest magnitude in their group; the last may be shorter."""
    columns = weight.shape[1]
    padded = torch.nn.functional.pad(weight, (0, -columns % group)).reshape(len(weight), -1, group)
    most = padded.abs().amax(-1).mean(0)
    sizes = torch.full_like(most, group)
    sizes[-1] = columns - group * (len(most) - 1)
    return float((most * sizes).sum() / columns)
