"""What passes that add a low-rank path share: factors in closed form, ranks under a budget."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

HALF_MAX = 6.0e4
"""Largest magnitude kept in float16, a little below its 65504."""
WHOLE_UP_TO = 256
"""Shorter side up to which all singular values are computed, whatever rank is asked for."""
SPECTRUM_DOUBLE_UP_TO = 4096
"""Longer side up to which a truncated spectrum works on a gap in float64; above it two copies of it
would take more than 256 MiB: they stay float32, and only their products are in float64."""
OVERSAMPLED = 8
"""Vectors more than the rank in each block of a Krylov space."""
CONVERGED = 1e-4
"""Share that the last block may have added to an eigenvalue, in the mean: of their sum it would say
nothing of those behind one large channel's. What the sum lacks then was at most 0.6 of that, on
flat and decaying spectra of 768 to 896 rows, whitened or not, at rank 16 to 64."""
FEWEST_BLOCKS = 12
"""Blocks that fill the shorter side, at least: a flat spectrum wants nine of them."""


@dataclass(frozen=True)
class Spectrum:
    """The best approximations of a gap ``D = W - W^`` of every rank, under a weighting of inputs.

    ``left [m, k]`` and ``right [k, n]`` hold the singular vectors of ``D P`` in descending order,
    ``right`` already multiplied by the inverse of ``P``; ``sigma [k]`` f64 their singular values.
    The error of rank r is ``sum(sigma[r:]^2)``, by Eckart and Young, and what lies beyond the
    singular values that were computed.
    """

    left: Tensor
    right: Tensor
    sigma: Tensor
    energy: float
    """``||W P||_F^2``: what the error is compared with."""
    tokens: int | None = None
    """Calibration tokens that the weighting is made of; ``None`` without a weighting."""
    beyond: float = 0.0
    """``||D P||_F^2 - sum(sigma^2)``."""

    @property
    def short(self) -> bool:
        """Whether fewer tokens were seen than the inputs have features. What they do not span has
        no weight in the choice of ``left``."""
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
        return math.sqrt(self.tail(rank) / max(self.energy, 1e-300))

    def tail(self, rank: int) -> float:
        """``||(D - B A) P||_F^2``."""
        return float(self.sigma[rank:].square().sum()) + self.beyond


class Whitening:
    """Inputs ``X`` by their Gram matrix ``S = X X^T`` ``[n, n]``.

    ``S = Q L Q^T = P P^T``, ``P = Q L^(1/2)``, ``||D P||_F = ||D X||_F``. No eigenvalue is cut off:
    nothing is divided by one (``spectrum``), and a channel a thousand times as large as the others,
    which real models have, would push theirs below any bound that goes by the largest. They are
    computed when they are first asked for, and once: linears with one input share its
    ``Whitening``.
    """

    def __init__(self, gram: Tensor) -> None:
        self.gram = gram

    @cached_property
    def _root(self) -> Tensor:
        """``P`` f64 ``[n, n]``; what rounding has made of eigenvalues that are 0 may be below."""
        values, vectors = torch.linalg.eigh(self.gram.double())
        root: Tensor = vectors * values.clamp_min(0).sqrt()
        return root

    def apply(self, matrix: Tensor) -> Tensor:
        """``D P`` f64 ``[m, n]`` of ``D [m, n]``."""
        return matrix.double() @ self._root

    def correlate(self, matrix: Tensor) -> Tensor:
        """``D S`` ``[m, n]`` in the dtype of ``D``; no eigenvalues are needed."""
        columns = self.gram.split(_PART, 1)  # type: ignore[no-untyped-call]
        parts = [matrix @ part.to(matrix.dtype) for part in columns]
        return torch.cat(parts, 1)

    def energy(self, matrix: Tensor) -> float:
        """``||D X||_F^2``, summed in float64; no eigenvalues are needed."""
        parts = matrix.split(_PART)  # type: ignore[no-untyped-call]
        return sum(float((self.correlate(p) * p).sum(dtype=torch.float64)) for p in parts)


_PART = 1024
"""Rows or columns worked on at a time, where a copy of a whole matrix is not wanted."""


def spectrum(
    weight: Tensor,
    gap: Tensor,
    whitening: Whitening | None,
    rank: int | None = None,
    tokens: int | None = None,
) -> Spectrum:
    """The spectrum of ``gap`` ``[m, n]`` for inputs whitened by ``whitening``, or for any inputs.

    ``D P = U sigma V^T``, and ``V^T P^-1 = sigma^-1 U^T D``: so ``B A = U U^T D``, the gap
    projected on the outputs that hold most of its error, and no inverse of ``P`` is needed. Inputs
    without a calibration token are corrected in passing, and no input's error grows. Where ``rank``
    is given and low for the matrix, the spectrum ends behind it: see ``_truncated``. ``tokens`` is
    how many inputs ``whitening`` is made of.
    """
    short = min(gap.shape)
    if rank is not None and short > max(WHOLE_UP_TO, FEWEST_BLOCKS * (rank + OVERSAMPLED)):
        leading = _truncated(weight, gap, whitening, max(rank, 1), tokens)
        if leading is not None:
            return leading
    if whitening is None:
        left, sigma, right = torch.linalg.svd(gap.float(), full_matrices=False)
        return Spectrum(left, right, sigma.double(), float(weight.double().square().sum()))
    left, sigma, _ = torch.linalg.svd(whitening.apply(gap), full_matrices=False)
    energy = float(whitening.apply(weight).square().sum())
    count = _above_rounding(sigma.square())
    left, sigma = left[:, :count], sigma[:count]
    right = (left.T @ gap.double()) / sigma[:, None]
    return Spectrum(left, right, sigma, energy, tokens)


def _above_rounding(values: Tensor) -> int:
    """How many of descending eigenvalues are more than the rounding of the first."""
    return int((values > values[:1] * torch.finfo(values.dtype).eps).sum())


def _truncated(
    weight: Tensor, gap: Tensor, whitening: Whitening | None, rank: int, tokens: int | None
) -> Spectrum | None:
    """The first ``rank`` singular vectors alone; ``None`` where a whole SVD is cheaper.

    ``D P P^T D^T = D S D^T``, whose leading eigenvectors are ``U`` and whose eigenvalues are
    ``sigma^2``: the eigenvalues of ``S`` are not needed either.
    """
    wide = torch.float64 if max(gap.shape) <= SPECTRUM_DOUBLE_UP_TO else torch.float32
    gap = gap.to(wide)
    correlated = gap if whitening is None else whitening.correlate(gap)
    leading = _leading(lambda q: _times(correlated, _transposed_times(gap, q)), gap.shape, rank)
    if leading is None:
        return None
    left, values = leading
    count = _above_rounding(values)
    left, sigma = left[:, :count], values[:count].sqrt()
    right = _transposed_times(gap, left).T / sigma[:, None]
    total = float((correlated * gap).sum(dtype=torch.float64))
    plain = weight.float()
    energy = float(torch.linalg.vector_norm(plain, dtype=torch.float64)) ** 2
    if whitening is not None:
        energy = whitening.energy(plain)
    beyond = max(0.0, total - float(sigma.square().sum()))
    return Spectrum(left, right, sigma, energy, tokens, beyond)


def _times(matrix: Tensor, narrow: Tensor) -> Tensor:
    """``M Q`` f64 of ``M [m, n]`` of any dtype, widened part by part, and ``Q [n, k]`` f64."""
    parts = matrix.split(_PART)  # type: ignore[no-untyped-call]
    return torch.cat([part.double() @ narrow for part in parts])


def _transposed_times(matrix: Tensor, narrow: Tensor) -> Tensor:
    """``M^T Q`` f64 of ``M [m, n]`` of any dtype, widened part by part, and ``Q [m, k]`` f64."""
    pairs = zip(matrix.split(_PART), narrow.split(_PART), strict=True)  # type: ignore[no-untyped-call]
    return sum((part.T.double() @ q for part, q in pairs), torch.zeros(()))


def _leading(
    apply: Callable[[Tensor], Tensor], shape: Sequence[int], rank: int
) -> tuple[Tensor, Tensor] | None:
    """The ``rank`` leading eigenvectors [m, rank] and eigenvalues of a positive operator on R^m.

    A randomized block Krylov space (Musco and Musco 2015, arXiv 1504.05477), by Rayleigh and Ritz:
    it takes the products of the power iterations of Halko et al. 2009 (arXiv 0909.4061) and keeps
    all of them. It ends when a block adds next to nothing: on a Gaussian 768 x 768 at rank 16
    after 10 blocks, which lack 4e-5; as many power iterations lack 1.6e-2. ``None`` where half of
    the space has not been enough.
    """
    generator = torch.Generator().manual_seed(0)
    width = rank + OVERSAMPLED
    start = torch.randn(shape[0], width, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(apply(start)).Q
    images = apply(basis)
    before = torch.zeros(rank, dtype=torch.float64)
    while 2 * basis.shape[1] <= min(shape):
        small = basis.T @ images
        values, vectors = torch.linalg.eigh((small + small.T) / 2)
        values, vectors = values[-rank:].flip(0), vectors[:, -rank:].flip(1)
        real = _above_rounding(values)
        if not real or float((1 - before / values)[:real].mean()) <= CONVERGED:
            return basis @ vectors, values
        before = values
        block = images[:, -width:]
        for _ in range(2):  # the second time makes up for the rounding of the first
            block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
        basis = torch.cat((basis, block), 1)
        images = torch.cat((images, apply(block)), 1)
    return None


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


def _gain(spectrum: Spectrum, rank: int, m: int, n: int) -> float:
    if rank >= len(spectrum.sigma):
        return 0.0
    return float(spectrum.sigma[rank] ** 2) / ((m + n) * max(spectrum.energy, 1e-300))


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
