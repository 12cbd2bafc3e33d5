"""Which structures of a matrix to remove, one after another, and what is left of the outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ir.core.errors import BadInput

DAMPING = 1e-4
"""Share of the mean of the diagonal that is added to it."""
STEPS = 512
"""Structures are removed one by one up to so many; of more, several at a time."""


@dataclass(frozen=True)
class Removal:
    """The order in which the structures of a matrix go, all but the last."""

    order: Sequence[int]
    errors: Sequence[float]
    """``||D X||^2 / ||W X||^2`` with the first 0, 1, 2, ... of them gone."""
    count: int

    def error(self, remaining: int) -> float:
        return self.errors[self.count - remaining]

    def stays(self, remaining: int) -> list[int]:
        """The structures that are left, ascending."""
        gone = set(self.order[: self.count - remaining])
        return [i for i in range(self.count) if i not in gone]


def removal(weight: Tensor, gram: Tensor, each: int) -> Removal:
    """Optimal brain surgery on structures of ``each`` columns of ``W [out, in]`` f64.

    With ``H = X X^T`` (``gram``, damped) removing T costs ``tr(W_T ((H^-1)_TT)^-1 W_T^T)``; then
    ``W -= W_T ((H^-1)_TT)^-1 (H^-1)_T:`` and ``H^-1 -= (H^-1)_:T ((H^-1)_TT)^-1 (H^-1)_T:``
    (Kurtic et al. 2023, arXiv 2302.04089). Raises ``BadInput`` where H has no inverse.
    """
    count = weight.shape[1] // each
    damped = _damped(gram)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise BadInput("the inputs' Gram matrix has no inverse: check the calibration data")
    inverse, current = torch.cholesky_inverse(lower), weight.clone()
    energy = float(((weight @ damped) * weight).sum())
    alive = torch.ones(count, dtype=torch.bool)
    order: list[int] = []
    errors = [0.0]
    batch = max(1, count // STEPS)
    while len(order) < count - 1:
        costs = _costs(current, inverse, each)
        costs[~alive] = torch.inf
        several = min(batch, count - 1 - len(order))
        chosen = costs.topk(several, largest=False).indices.sort().values
        columns = (chosen[:, None] * each + torch.arange(each)).flatten()
        loss = _remove(current, inverse, columns)
        before = errors[-1]
        for i in range(several):
            errors.append(before + loss / max(energy, 1e-300) * (i + 1) / several)
        order += chosen.tolist()
        alive[chosen] = False
    return Removal(order, errors, count)


def _damped(gram: Tensor) -> Tensor:
    damped = gram.clone()
    diagonal = damped.diagonal()
    diagonal += DAMPING * diagonal.mean().clamp_min(1e-30)
    return damped


def _costs(weight: Tensor, inverse: Tensor, each: int) -> Tensor:
    """Of each structure, what its removal adds to the error; those removed before are not asked."""
    if each == 1:
        return weight.square().sum(0) / inverse.diagonal().clamp_min(1e-300)
    count = weight.shape[1] // each
    costs = torch.empty(count, dtype=weight.dtype)
    for i in range(count):
        part = slice(i * each, (i + 1) * each)
        own = weight[:, part]
        costs[i] = (torch.linalg.pinv(inverse[part, part]) * (own.T @ own)).sum()
    return costs


def _remove(weight: Tensor, inverse: Tensor, columns: Tensor) -> float:
    """Take columns out of both, in place; what that adds to the error."""
    rows = inverse[columns]
    pull = torch.linalg.solve(rows[:, columns], rows)
    gone = weight[:, columns].clone()
    loss = float((torch.linalg.solve(rows[:, columns], gone.T) * gone.T).sum())
    weight -= gone @ pull
    inverse -= inverse[:, columns] @ pull
    weight[:, columns] = 0
    inverse[columns] = 0
    inverse[:, columns] = 0
    return loss


def refitted(weight: Tensor, gram: Tensor, stays: Tensor) -> Tensor:
    """``W H_:K (H_KK)^-1``: the columns that stay, by least squares; what the removals lead to."""
    damped = _damped(gram)
    inner = damped[stays][:, stays]
    columns: Tensor = torch.linalg.solve(inner, damped[stays] @ weight.T).T
    return columns.contiguous()
