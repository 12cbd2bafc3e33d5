"""Codes as checkpoints pack them: dense, the earliest code in the lowest bits of 32-bit words."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 20
"""Codes that are unpacked at a time: each is a byte a bit for a moment."""


def unpack_rows(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 ``[rows, words]`` to uint8 codes ``[rows, count]``; a code may straddle two words."""
    data = words.contiguous().numpy().view(np.uint8)
    codes = np.empty((len(data), count), np.uint8)
    step = max(1, CHUNK // max(count, 1))
    for start in range(0, len(data), step):
        codes[start : start + step] = _unpacked(data[start : start + step], bits, count)
    return torch.from_numpy(codes)


def _unpacked(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    flags = np.unpackbits(data, axis=1, count=bits * count, bitorder="little")
    padded = np.zeros((len(data), count, 8), np.uint8)
    padded[..., :bits] = flags.reshape(len(data), count, bits)
    return np.packbits(padded, axis=-1, bitorder="little")[..., 0]


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """The inverse: uint8 ``[rows, count]`` to int32 ``[rows, ceil(count * bits / 32)]``; what is
    left of the last word is 0."""
    rows, count = codes.shape
    width = -(-count * bits // 32)
    words = np.zeros((rows, 4 * width), np.uint8)
    step = max(1, CHUNK // max(count, 1))
    for start in range(0, rows, step):
        flags = np.unpackbits(codes[start : start + step].contiguous().numpy()[..., None], axis=-1,
                              bitorder="little")[..., :bits]  # fmt: skip
        packed = np.packbits(flags.reshape(len(flags), -1), axis=1, bitorder="little")
        words[start : start + step, : packed.shape[1]] = packed
    return torch.from_numpy(words.view(np.int32))
