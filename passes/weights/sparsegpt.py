"""``sparsegpt``: zeros whose error the weights behind them take over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...ir.run.statistics import Gram, Stat, Statistics
from ...ir.structure.recognize import Linear
from ..base import Needs, PassResult
from ..stored import Stored
from .expected import energies_after_feedback, mask_loss
from .feedback import BLOCK, Feedback
from .mask_pass import MaskPass, Ratio, finite, highest_in_groups, highest_of_all, with_zeros

DAMPING = 0.01
"""Share of the mean of the Gram matrix's diagonal that is added to it, as in the authors' code."""


@dataclass(frozen=True, kw_only=True)
class SparseGPT(MaskPass):
    """Prune input by input, and let the inputs behind make up for what each lost.

    SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774): with ``U^T U = (X X^T + damping)^-1``,
    ``score_ij = (w_ij / U_jj)^2`` of the weights as they are by then; a share ``sparsity`` of each
    block of 128 inputs goes, or with ``pattern=N:M`` all but N of each M in a row. What is pruned
    leaves ``e = w``, and the inputs behind it get ``-e U_jk / U_jj``. Inputs are those of the graph
    in which the linears before are pruned already. Needs calibration data: of fewer tokens than
    inputs the damping alone tells how to make up, which is noted. Weights that are not finite are
    refused.
    """

    name: ClassVar[str] = "sparsegpt"
    needs: ClassVar[Needs] = Needs(stats=(Stat("gram", at="linear"),), propagate="sequential")
    weights_per_second: ClassVar[float] = 1e7

    def fit(self, weight: Tensor, statistics: Statistics, name: str) -> Stored:
        gram = statistics[Gram]
        by = Feedback.at(gram, DAMPING, act_order=False)
        sparse = pruned(finite(weight, name), by, self.ratio, self.sparsity)
        short = gram.count < weight.shape[1]
        return with_zeros(sparse, weight, "fewer calibration tokens than inputs" if short else "")

    def stays(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """By the weights as they are, before any makes up for others."""
        by = Feedback.at(statistics[Gram], DAMPING, act_order=False)
        scores = (weight.float() / by.diagonal).square()
        if self.ratio is not None:
            return highest_in_groups(scores, self.ratio)
        blocks = scores.split(BLOCK, 1)  # type: ignore[no-untyped-call]
        return torch.cat([highest_of_all(block, self.sparsity) for block in blocks], 1)

    def expected_loss(self, linear: Linear, weight: Tensor, statistics: Statistics) -> float:
        by = Feedback.at(statistics[Gram], DAMPING, act_order=False)
        return mask_loss(weight, self.stays(weight, statistics), energies_after_feedback(by))

    def peak_bytes(self, planned: PassResult) -> int:
        sizes = [site.shape for site in planned.sites]
        return max((16 * m * n + 24 * n * n for m, n in sizes), default=0)


def pruned(weight: Tensor, by: Feedback, ratio: Ratio | None, sparsity: float | None) -> Tensor:
    """The pruned weight f32 ``[out, in]``, inputs in the order in which they stand."""
    rows = weight.to(torch.float32).T.contiguous()  # [in, out]: an input is a row in memory
    group = 1 if ratio is None else ratio.group
    width = max(group, BLOCK // group * group)
    for start in range(0, len(rows), width):
        part = slice(start, min(start + width, len(rows)))
        errors = _prune_block(rows[part], by.rows[part, part], by.diagonal[part], ratio, sparsity)
        rows[part.stop :] -= by.rows[part, part.stop :].T @ errors
    return rows.T.contiguous()


def _prune_block(
    block: Tensor, rows: Tensor, diagonal: Tensor, ratio: Ratio | None, sparsity: float | None
) -> Tensor:
    """Prune ``block [inputs, out]`` in place; the errors of each of its inputs."""
    stays = torch.empty_like(block, dtype=torch.bool)
    if ratio is None:
        stays = highest_of_all((block / diagonal[:, None]).square(), sparsity)
    errors = torch.empty_like(block)
    for i in range(len(block)):
        if ratio is not None and i % ratio.group == 0:
            part = slice(i, i + ratio.group)
            scores = (block[part] / diagonal[part, None]).square()
            stays[part] = highest_in_groups(scores.T, ratio).T
        errors[i] = torch.where(stays[i], 0.0, block[i])
        block[i].masked_fill_(~stays[i], 0)
        block[i + 1 :] -= rows[i, i + 1 :, None] * errors[i]
    return errors
