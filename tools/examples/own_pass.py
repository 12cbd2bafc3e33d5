"""A pass of one's own: it cuts weights off that lie far from the mean, and rounds what it made.

``python -m graphwright.tools.examples.own_pass``. ``StoringPass`` chooses the linears, reads their
weights one at a time, puts the result into the graph (by ``View.set_weight`` where it is the same
linear with other numbers) and stores it on disk (by ``Spool.store``): a method is one function
from a weight to a stored form. In a package of its own it is named in the entry point group
``graphwright.passes`` and a recipe may then write ``clip{sigmas=3}``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import graphwright as gw
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.weights import Weight
from graphwright.ir.run.statistics import Statistics
from graphwright.ir.structure.recognize import Linear
from graphwright.passes.base import CHANGED
from graphwright.passes.linear_pass import StoringPass
from graphwright.passes.stored import Stored, numbers
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Clip(StoringPass):
    """Cut weights off at ``sigmas`` standard deviations: ``w -> clamp(w, -s sigma, s sigma)``."""

    name: ClassVar[str] = "clip"
    provides: ClassVar[tuple[str, ...]] = (CHANGED,)
    keeps_form: ClassVar[bool] = True
    sigmas: float = 3.0
    """Standard deviations from which on a weight is cut off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigmas <= 0:
            raise BadInput(f"clip: sigmas={self.sigmas} must be above 0")

    def fit(self, weight: Tensor, statistics: Statistics, name: str) -> Stored:
        bound = self.sigmas * float(weight.float().std())
        return numbers(weight.clamp(-bound, bound), weight)

    def predicted_bytes(self, linear: Linear, weight: Weight) -> int:
        return weight.nbytes


def main() -> gw.Result:
    result = gw.optimize("zoo:tiny-vit", [Clip(sigmas=3.0), gw.passes.Quantize(bits=4)])
    print(result.report)
    return result


if __name__ == "__main__":
    main()
