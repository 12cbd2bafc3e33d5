"""Orthogonal matrices whose entries are all alike in size, for any order."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def hadamard(order: int, seed: int) -> Tensor:
    """An orthogonal matrix ``[order, order]`` f64: ``diag(signs) (H x C)``.

    H is Sylvester's Hadamard matrix of the largest power of two that divides ``order``, C the
    cosine transform (DCT-II) of what is left; with a power of two every entry is
    ``±1 / sqrt(order)``, else none is above ``sqrt(2)`` times that. The signs, one a row, are drawn
    by ``seed``: without them a stream of one sign would go into one feature.
    """
    two = order & -order
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < two:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    matrix = torch.kron(matrix / math.sqrt(two), _cosines(order // two))
    signs = torch.randint(0, 2, (order, 1), generator=torch.Generator().manual_seed(seed))
    return matrix * (2 * signs - 1)


def _cosines(order: int) -> Tensor:
    """The orthonormal DCT-II ``[order, order]``."""
    place = torch.arange(order, dtype=torch.float64)
    matrix = torch.cos(math.pi / order * torch.outer(place, place + 0.5)) * math.sqrt(2 / order)
    matrix[0] /= math.sqrt(2)
    return matrix
