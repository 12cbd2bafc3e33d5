"""What passes that add a low-rank path share: factors in closed form, ranks under a budget."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HALF_MAX = 6.0e4
"""Largest magnitude kept in float16, a little below its 65504."""


@dataclass(frozen=True)
class Spectrum:
    """The best approximations of a gap ``D = W - W^`` of every rank, under a weighting of inputs.

    ``left [m, k]`` and ``right [k, n]`` hold the singular vectors of ``D P`` in descending order,
    ``right`` already multiplied by the pseudo-inverse of ``P``; ``sigma [k]`` f64 their singular
    values. The error of rank r is ``sum(sigma[r:]^2)``, by Eckart and Young.
    """

    left: Tensor
    right: Tensor
    sigma: Tensor
    energy: float
    """``||W P||_F^2``: what the error is compared with."""
    tokens: int | None = None
    """Calibration tokens that the weighting is made of; ``None`` without a weighting."""

    @property
    def short(self) -> bool:
        """Whether fewer tokens were seen than the inputs have features: directions that none of
        them has are not corrected."""
        return self.tokens is not None and self.tokens < self.right.shape[1]

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """``A [rank, n]`` and ``B [m, rank]`` f32, the singular values shared between them."""
        root = self.sigma[:rank].sqrt().to(self.left.dtype)
        down = root[:, None] * self.right[:rank]
        up = self.left[:, :rank] * root
        return _balanced(down.float(), up.float())

    def cut(self, rank: int) -> dict[str, Any]:
        """Its fields with the first ``rank`` vectors alone: what factors of that rank need."""
        return {**vars(self), "left": self.left[:, :rank], "right": self.right[:rank]}

    def relative_error(self, rank: int) -> float:
        """``||(D - B A) P||_F / ||W P||_F``."""
        rest = float(self.sigma[rank:].square().sum())
        return math.sqrt(rest / max(self.energy, 1e-300))


def spectrum(
    weight: Tensor, gap: Tensor, gram: Tensor | None, tokens: int | None = None
) -> Spectrum:
    """The spectrum of ``gap`` ``[m, n]`` for inputs whose Gram matrix is ``gram`` ``[n, n]``.

    ``gram = Q L Q^T``, ``P = Q L^(1/2)``: any such factor gives the same ``B A``, and
    ``||D P||_F = ||D X||_F``. Eigenvalues below ``max(L) n eps`` (float32's) hold noise only and
    are left out, with a pseudo-inverse for what remains. Without ``gram``, ``P`` is the identity.
    ``tokens`` is how many inputs ``gram`` is the sum of.
    """
    if gram is None:
        left, sigma, right = torch.linalg.svd(gap.float(), full_matrices=False)
        return Spectrum(left, right, sigma.double(), float(weight.double().square().sum()))
    values, vectors = torch.linalg.eigh(gram.double())
    kept = values > values[-1] * len(values) * torch.finfo(torch.float32).eps
    root, vectors = values[kept].sqrt(), vectors[:, kept]
    forward = vectors * root
    left, sigma, right = torch.linalg.svd(gap.double() @ forward, full_matrices=False)
    energy = float((weight.double() @ forward).square().sum())
    return Spectrum(left, (right / root) @ vectors.T, sigma, energy, tokens)


def allocate(
    spectra: Mapping[str, Spectrum], sizes: Mapping[str, tuple[int, int]], entries: int,
    most: int | None = None,
) -> dict[str, int]:
    """Ranks by site, such that the factors hold at most ``entries`` numbers together.

    Greedy: the next rank goes where ``sigma[r]^2 / ((m + n) * energy)`` is largest, which is the
    relative error that it removes by the number that it costs. ``most`` bounds each rank.
    """
    ranks = dict.fromkeys(spectra, 0)
    queue = [(-_gain(spectra[name], 0, *sizes[name]), name) for name in sorted(spectra)]
    heapq.heapify(queue)
    while queue:
        gain, name = heapq.heappop(queue)
        cost = sum(sizes[name])
        limit = len(spectra[name].sigma) if most is None else min(most, len(spectra[name].sigma))
        if gain == 0 or cost > entries or ranks[name] >= limit:
            continue
        entries -= cost
        ranks[name] += 1
        if ranks[name] < limit:
            heapq.heappush(queue, (-_gain(spectra[name], ranks[name], *sizes[name]), name))
    return ranks


def _gain(found: Spectrum, rank: int, m: int, n: int) -> float:
    if rank >= len(found.sigma):
        return 0.0
    return float(found.sigma[rank] ** 2) / ((m + n) * max(found.energy, 1e-300))


def _balanced(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The same product, neither factor much larger than the other: A holds an inverse root, and
    channels that are nearly dead make it overflow float16."""
    if not down.numel():
        return down, up
    high, low = float(down.abs().max()), float(up.abs().max())
    if max(high, low) < HALF_MAX or min(high, low) == 0:
        return down, up
    ratio = math.sqrt(high / low)
    return down / ratio, up * ratio


def fits_half(*tensors: Tensor) -> bool:
    """Whether float16 can hold the numbers."""
    return all(float(t.abs().max()) < HALF_MAX for t in tensors if t.numel())


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """The factors ``A_i [r_i, n]`` of linears with one input as one ``[sum r_i, n]``."""
    return torch.cat(list(parts), 0)
