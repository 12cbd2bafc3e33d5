"""What stands in for blocks that are left out: a map of the stream, by least squares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...ir.run.statistics import StreamFit

RIDGE = 1e-4
"""Of the mean variance of the stream's channels: what is added to each one's."""


@dataclass(frozen=True)
class StreamMap:
    """``d(x) = up down x + bias``, with ``down [r, K]``, ``up [K, r]`` and ``bias [K]``, f32."""

    down: Tensor
    up: Tensor
    bias: Tensor
    explained: float
    """Share of ``sum |d|^2`` on the calibration data that the map accounts for."""


def fit_map(fit: StreamFit, rank: int) -> StreamMap:
    """The map of this rank that comes closest to what blocks added to the stream.

    Reduced-rank regression with a ridge: of the least-squares map ``B = (S + l I)^-1 C`` of the
    centred stream, with ``S`` its covariance and ``C`` that of stream and addition, the part in the
    ``rank`` directions of the output in which ``B`` predicts most, the eigenvectors of ``B^T S B``.
    Rank 0 is the mean alone.
    """
    count = max(1, fit.count)
    mean, added = fit.x / count, fit.d / count
    cov = fit.xx / count - torch.outer(mean, mean)
    cross = fit.xd / count - torch.outer(mean, added)
    energy = fit.dd / count
    if not rank:
        none = torch.zeros(0, len(mean))
        return StreamMap(none, none.T, added.float(), _share(added.square().sum(), energy))
    ridge = RIDGE * cov.diagonal().mean()
    solved = torch.linalg.solve(cov + ridge * torch.eye(len(cov), dtype=cov.dtype), cross)
    _, vectors = torch.linalg.eigh(solved.T @ cov @ solved)
    up = vectors[:, -rank:]
    down = (solved @ up).T
    # What is left of the variance of d: tr(Cov d) - 2 tr(P^T C) + tr(P^T S P), P = (up down)^T.
    gained = 2 * (down * (cross @ up).T).sum() - ((down @ cov) * down).sum()
    bias = added - up @ (down @ mean)
    explained = _share(added.square().sum() + gained, energy)
    return StreamMap(down.float(), up.float().contiguous(), bias.float(), explained)


def _share(part: Tensor, energy: float) -> float:
    return float(part) / energy if energy else 1.0
