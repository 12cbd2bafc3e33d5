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
    unseen: float | None
    """That of a map that was fitted to seven eighths of the data, on the rest: below 0 it is worse
    than nothing. ``None`` where there are too few tokens to tell."""

    @property
    def helps(self) -> bool:
        """Whether it may stand in: it is not known to be worse than nothing."""
        return self.unseen is None or self.unseen > 0


@dataclass(frozen=True)
class _Means:
    """What a map follows from, of some tokens: means of ``x``, ``d``, ``x x^T``, ``x d^T`` and
    ``|d|^2``."""

    x: Tensor
    d: Tensor
    xx: Tensor
    xd: Tensor
    dd: Tensor

    @classmethod
    def of(cls, fit: StreamFit, parts: slice) -> _Means:
        count = fit.counts[parts].sum().clamp_min(1)
        sums = (fit.x, fit.d, fit.xx, fit.xd, fit.dd)
        return cls(*(s[parts].sum(0) / count for s in sums))

    def explained(self, down: Tensor, up: Tensor, bias: Tensor) -> float:
        """``1 - mean |d - up down x - bias|^2 / mean |d|^2``; columns of ``up`` are orthonormal."""
        if not self.dd:
            return 1.0
        low, cross = down @ self.x, (down @ self.xd @ up).trace()
        square = ((down @ self.xx) * down).sum() + 2 * bias @ up @ low + bias @ bias
        return float((2 * (cross + bias @ self.d) - square) / self.dd)


def fit_map(fit: StreamFit, rank: int) -> StreamMap:
    """The map of this rank that comes closest to what blocks added to the stream.

    Reduced-rank regression with a ridge: of the least-squares map ``B = (S + l I)^-1 C`` of the
    centred stream, with ``S`` its covariance and ``C`` that of stream and addition, the part in the
    ``rank`` directions of the output in which ``B`` predicts most, the eigenvectors of ``B^T S B``.
    Rank 0 is the mean alone.
    """
    means, most, apart = (_Means.of(fit, slice(*part)) for part in ((0, 2), (0, 1), (1, 2)))
    fitted = _fitted(means, rank)
    unseen = apart.explained(*_fitted(most, rank)) if fit.counts.all() else None
    down, up, bias = (tensor.float().contiguous() for tensor in fitted)
    return StreamMap(down, up, bias, means.explained(*fitted), unseen)


def _fitted(means: _Means, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """``down``, ``up`` and ``bias``, f64."""
    if not rank:
        none = means.x.new_zeros(0, len(means.x))
        return none, none.T, means.d
    cov = means.xx - torch.outer(means.x, means.x)
    if cov.diagonal().mean() <= RIDGE * RIDGE * means.xx.diagonal().mean():
        return _fitted(means, 0)  # all tokens are alike
    cross = means.xd - torch.outer(means.x, means.d)
    ridge = RIDGE * cov.diagonal().mean()
    solved = torch.linalg.solve(cov + ridge * torch.eye(len(cov), dtype=cov.dtype), cross)
    _, vectors = torch.linalg.eigh(solved.T @ cov @ solved)
    up = vectors[:, -rank:]
    down = (solved @ up).T
    return down, up, means.d - up @ (down @ means.x)
