"""MXFP4 in a GGUF file: an exponent and 32 codes of e2m1 a block, ``W = code 2^(e - 128)``.

Codes stand for twice their number, so that all are whole: the four bits are a sign and the place in
``NUMBERS``; the first half of a block lies in the low nibbles (``ggml-quants.c``). A linear of 8
bits whose codes and scales are such numbers is equal to it in half the bytes of Q8_0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .model_state import PackedLinear

BLOCK = 32
NUMBERS = (0, 1, 2, 3, 4, 6, 8, 12)
BYTES = 17
"""Of a block."""
_BIAS = 128
_MIDDLE = 128


def fits(linear: PackedLinear) -> bool:
    """Whether every number of the linear is one of MXFP4. Codes are read where scales allow it."""
    group = linear.group or linear.columns
    if linear.bits != 8 or group != BLOCK or linear.columns % BLOCK or not linear.symmetric:
        return False
    return exponents(linear.scales()) is not None and nibbles(linear.codes()) is not None


def exponents(scales: Tensor) -> Tensor | None:
    """uint8 ``e`` of ``2^(e - 128)``; ``None`` where one is another number."""
    fraction, power = torch.frexp(scales.double())
    stored = power.long() - 1 + _BIAS
    right = (fraction == 0.5) & (stored >= 0) & (stored <= 254)
    return stored.to(torch.uint8) if bool(right.all()) else None


def nibbles(codes: Tensor) -> Tensor | None:
    """uint8 of 4 bits each for codes of 8 bits around 128; ``None`` where one is another number."""
    table = torch.full((256,), 255, dtype=torch.uint8)
    for place, number in enumerate(NUMBERS):
        table[_MIDDLE - number], table[_MIDDLE + number] = place + 8, place
    table[_MIDDLE] = 0
    found = table[codes.long()]
    return None if bool((found == 255).any()) else found


def blocks(linear: PackedLinear) -> Tensor:
    """uint8 ``[rows, columns / 32 * 17]`` of a linear that ``fits``."""
    powers, codes = exponents(linear.scales()), nibbles(linear.codes())
    assert powers is not None and codes is not None
    halves = codes.view(linear.rows, linear.columns // BLOCK, 2, BLOCK // 2)
    data = halves[:, :, 0] | (halves[:, :, 1] << 4)
    return torch.cat([powers.unsqueeze(-1), data], -1).flatten(1)
