"""What methods are expected to take from a linear's outputs: formulas that try nothing out.

With ``D`` the gap between a weight and what stands in for it, the loss is ``tr(D S D^T)``. A weight
that is rounded in steps ``s`` errs by uniform noise, ``s^2 / 12``, independent of all others; then
S counts by its diagonal. Where later inputs make up for an error (``feedback``), an error ``e_j``
costs ``(e_j / U_jj)^2`` instead of ``e_j^2 S_jj``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...ir.run.statistics import Gram
from .feedback import Feedback


def energies(gram: Gram) -> Tensor:
    """What the square of an error in each input's weights costs, f64 ``[K]``: ``S_jj``."""
    return gram.matrix.diagonal().double()


def energies_after_feedback(by: Feedback) -> Tensor:
    """The same where the inputs behind it make up for it: ``1 / U_jj^2``."""
    costs = torch.empty(len(by.order), dtype=torch.float64)
    costs[by.order] = by.diagonal.double().reciprocal().square()
    return costs


def rounding_loss(
    weight: Tensor, costs: Tensor, bits: int, group: int, *, middle: bool, holds_zero: bool = True
) -> float:
    """Of codes of ``bits`` bits in groups of ``group`` inputs (0: a row).

    The range is that of the greatest magnitude on both sides with ``middle``, a zero point that is
    fixed there; otherwise it runs from the least to the greatest weight, and to 0 if it
    ``holds_zero``.
    """
    size = group or weight.shape[1]
    missing = -weight.shape[1] % size
    groups = pad(weight, (0, missing)).reshape(len(weight), -1, size)
    if middle:
        steps = groups.abs().amax(2) / 2 ** (bits - 1)
    else:
        low, high = groups.amin(2), groups.amax(2)
        if holds_zero:
            low, high = low.clamp_max(0), high.clamp_min(0)
        steps = (high - low) / (2**bits - 1)
    by_group = pad(costs, (0, missing)).reshape(-1, size).sum(1)
    return float((steps.double().square() @ by_group).sum()) / 12


def mask_loss(weight: Tensor, stays: Tensor, costs: Tensor) -> float:
    """Of weights that become 0 where they do not stay."""
    gone = torch.where(stays, 0.0, weight).double()
    return float((gone.square() @ costs).sum())


def least_of(tries: int, x: Tensor, group: int) -> Tensor:
    """What the best of some independent roundings of a group errs by on tokens ``[T, K]``, as a
    share of the mean, f64 ``[K]``.

    A group's loss is a quadratic form of its noise, about chi-square with ``v = tr(S)^2 / tr(S^2)``
    degrees of freedom, S the group's block of the Gram matrix; its ``1 / (tries + 1)`` quantile is
    that of Wilson and Hilferty, ``(1 - 2 / 9v + z sqrt(2 / 9v))^3``.
    """
    size = group or x.shape[1]
    blocks = [part.T @ part for part in x.double().split(size, 1)]  # type: ignore[no-untyped-call]
    freedoms = torch.stack([b.trace() ** 2 / b.square().sum().clamp_min(1e-300) for b in blocks])
    spread = 2 / (9 * freedoms.clamp_min(1))
    z = math.sqrt(2) * float(torch.erfinv(torch.tensor(2 / (tries + 1) - 1)))
    shares = (1 - spread + z * spread.sqrt()).clamp_min(0.01) ** 3
    return shares.repeat_interleave(size)[: x.shape[1]]
