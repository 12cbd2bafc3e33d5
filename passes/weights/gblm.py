"""``gblm``: zeros where weights matter least to the outputs and to the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.run.gradients import gradient_energies, loss_graph
from ...ir.run.statistics import Square, Stat, Statistics
from ...ir.structure.recognize import Linear
from ..base import Context, Needs, PassResult
from ..linear_pass import weight_of
from ..stored import Stored
from .mask_pass import ComparedMask, MaskingPass, finite, masked
from .wanda import wanda_scores


@dataclass(frozen=True, kw_only=True)
class GBLM(ComparedMask, MaskingPass):
    """Set the weights to zero that are small for the inputs that they meet and for the loss.

    GBLM-Pruner (Das et al. 2023, arXiv 2311.04902): ``score_ij = |W_ij| (||x_j|| + alpha G_ij)``
    with ``G_ij`` the root of the sum of squared gradients of each text's loss over the next token;
    what goes is as with ``wanda``. The paper's alpha of 100 balances two units and means nothing
    for another model: here both terms are divided by their means over the matrix, ``gradient`` is
    what the second then weighs, and 0 is ``wanda``.

    Gradients are those of the graph before this pass, a forward and a backward run for each text of
    the calibration data, which it needs: about three times the time of ``wanda``'s data, and 8
    bytes for each weight that is chosen beside the model's own. It need not be better: with 2:4 on
    the zoo's tiny-llama perplexity is 75.9, and 71.5 with ``wanda`` (source 34.7). Refused for a
    graph without logits over the next token, or with an op that computes outside of torch. Weights
    that are not finite are refused.
    """

    name: ClassVar[str] = "gblm"
    needs: ClassVar[Needs] = Needs(
        calibration=True, stats=(Stat("square", at="linear"),), propagate="sequential"
    )
    weights_per_second: ClassVar[float] = 2e5
    gradient: float = 1.0
    """What the gradients' term weighs beside the inputs'."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.gradient >= 0 and math.isfinite(self.gradient)):
            raise BadInput(f"gblm: gradient={self.gradient} must be a number of at least 0")

    def reason_against(self, context: Context, linear: Linear) -> str | None:
        return super().reason_against(context, linear) or self.reason_against_groups(linear)

    def choose(self, context: Context, result: PassResult) -> list[Linear]:
        loss_graph(context.view)
        return super().choose(context, result)

    def fitting(
        self, context: Context, chosen: Sequence[Linear]
    ) -> Callable[[Linear, Statistics], Stored]:
        energies = self._energies(context, chosen)

        def fit(linear: Linear, statistics: Statistics) -> Stored:
            weight = finite(weight_of(context.view, linear).read(), linear.name)
            scores = gblm_scores(weight, statistics[Square], energies(linear), self.gradient)
            return masked(weight, self.highest(scores))

        return fit

    def _energies(self, context: Context, chosen: Sequence[Linear]) -> Callable[[Linear], Tensor]:
        """What gives a linear's sums of squared gradients; they lie in the spool until then."""
        values = list(dict.fromkeys(linear.weight for linear in chosen))

        def fields() -> dict[str, Any]:
            energies = gradient_energies(
                loss_graph(context.view), context.calibration, values,
                lambda done, of: context.progress(f"{self.name}: gradients", done, of),
            )  # fmt: skip
            return {str(i): energy for i, energy in enumerate(energies)}

        energies = context.once("gradients", fields)
        held = {v: context.spool.store(energies[str(i)]) for i, v in enumerate(values)}
        return lambda linear: held[linear.weight].read()

    def peak_bytes(self, planned: PassResult) -> int:
        return 8 * sum(site.shape[0] * site.shape[1] for site in planned.sites)


def gblm_scores(weight: Tensor, square: Square, energy: Tensor, gradient: float) -> Tensor:
    """``|W_ij| (r_j / mean r + gradient G_ij / mean G)`` f32 ``[out, in]``, r the inputs' RMS and
    ``G^2`` the ``energy``. A term that is 0 everywhere counts as 0."""
    rms = (square.total / max(1, square.count)).sqrt().float()
    by_inputs = wanda_scores(weight, square) / rms.mean().clamp_min(1e-30)
    roots = energy.sqrt()
    return by_inputs + weight.abs().float() * roots * (gradient / roots.mean().clamp_min(1e-30))
