"""``smooth``: outliers of activations moved into weights, exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.moves import Inlet
from ...ir.run.statistics import AbsMax, Stat, Statistics
from ...ir.structure.recognize import Linear
from ..base import Context, Needs, PassResult, Site
from ..linear_pass import LinearPass, linear_site, weight_of
from .inlets import allowed, fold, inlets_of


@dataclass(frozen=True, kw_only=True)
class Smooth(LinearPass):
    """Divide the inputs of linears, feature by feature, so that their ranges come closer.

    SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): ``s_j = max|x_j|^alpha / max|W_j|^(1-alpha)``,
    W_j the column of all linears that read x; columns are multiplied by s, and x is divided where
    it is made: in a norm's weight and bias (the paper's sites), or in the rows of a linear before
    it (v before o, up before down, one before a relu). The outputs stay. It changes nothing for
    weights in groups with activations in floats; put ``w8a8`` behind it.

    A linear whose input is not proportional to constants of its own (a gelu before it, a norm that
    the residual stream reads too, a tied head) is refused; with ``divide`` one more node multiplies
    its input by ``1 / s``, where its weight is its own. Inputs that one constant makes, such as
    those of shared value heads, get one factor; constants of 16 bits take powers of two, which
    round none. A feature that is 0 in the data or in the weights keeps its units.
    """

    name: ClassVar[str] = "smooth"
    exact: ClassVar[bool] = True
    rebases: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs(stats=(Stat("absmax", at="linear"),))
    alpha: float = 0.5
    """0: all left in activations, 1: all into weights."""
    divide: bool = False
    """Divide by a node where no constant can be."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise BadInput(f"smooth: alpha={self.alpha} must be between 0 and 1")

    def reason_against(self, context: Context, linear: Linear) -> str | None:
        """``choose`` asks for all at once."""
        chosen = self.select(context.structure)
        return inlets_of(context, chosen, divide=self.divide)[1].get(linear.name)

    def choose(self, context: Context, result: PassResult) -> list[Linear]:
        return [linear for inlet in self._inlets(context, result) for linear in inlet.linears]

    def _inlets(self, context: Context, result: PassResult) -> list[Inlet]:
        chosen = self.select(context.structure)
        inlets, reasons = inlets_of(context, chosen, divide=self.divide)
        result.refused += [*reasons.items(), *self._unread(context)]
        return inlets

    def run(self, context: Context) -> PassResult:
        result, view = PassResult(), context.view
        inlets = self._inlets(context, result)
        by_first = {inlet.names[0]: inlet for inlet in inlets}

        def fit(linear: Linear, statistics: Statistics) -> Tensor:
            inlet = by_first[linear.name]

            def factors() -> Tensor:
                most = [weight_of(view, x).read().abs().amax(0).double() for x in inlet.linears]
                ideal = self.factors(statistics[AbsMax].most.double(), torch.stack(most).amax(0))
                return allowed(view, inlet, ideal)

            return context.once(f"site {linear.name}", factors)

        firsts = [inlet.linears[0] for inlet in inlets]
        fits = self.fit_all(context, firsts, fit)
        sites = [self.planned_site(context, linear) for x in inlets for linear in x.linears]
        factors = {inlet.names: fits[inlet.names[0]] for inlet in inlets}
        fold(context, factors, divide=self.divide)
        result.sites += sites
        return result

    def factors(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """s of the greatest magnitudes of inputs and of weight columns, ``[K]`` f64 each."""
        if not bool(torch.isfinite(weights).all()):
            raise BadInput("smooth: weights are NaN or infinite; repair the checkpoint")
        ratio = inputs.pow(self.alpha) / weights.pow(1 - self.alpha)
        return torch.where((inputs > 0) & (weights > 0), ratio, 1.0)

    def planned_site(self, context: Context, linear: Linear) -> Site:
        weight = weight_of(context.view, linear)
        return linear_site(linear, weight.stored_bytes, weight.nbytes)
