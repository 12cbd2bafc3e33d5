"""Codes, scales and zero points of a linear as other tools store them, by their documents."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

Tensors = dict[str, torch.Tensor]
Array = np.ndarray[Any, Any]
NIBBLES = [0, 2, 4, 6, 1, 3, 5, 7]
"""Of AWQ: nibble i of a word holds column NIBBLES[i]."""


def straight(codes: Array, bits: int) -> torch.Tensor:
    """int32 words along the last axis, one bit after the other."""
    rows, count = codes.shape
    words = np.zeros((rows, -(-count * bits // 32)), np.uint32)
    for place in range(count * bits):
        code, bit = divmod(place, bits)
        words[:, place // 32] |= ((codes[:, code] >> bit) & 1).astype(np.uint32) << (place % 32)
    return torch.from_numpy(words.view(np.int32))


def gptq(codes: Array, scales: Array, zeros: Array, index: Array, bits: int, less: int) -> Tensors:
    """``less`` is what the format's version takes off a zero point."""
    return {
        "qweight": straight(codes, bits).T,
        "qzeros": straight(((zeros - less) % (1 << bits)).T, bits),
        "scales": torch.from_numpy(scales.T.copy()), "g_idx": torch.from_numpy(index).int(),
    }  # fmt: skip


def awq(codes: Array, scales: Array, zeros: Array) -> Tensors:
    def words(columns: Array) -> torch.Tensor:
        return straight(columns.reshape(len(columns), -1, 8)[..., NIBBLES].reshape(columns.shape),
                        4)  # fmt: skip

    return {"qweight": words(codes.T), "qzeros": words(zeros.T),
            "scales": torch.from_numpy(scales.T.copy())}  # fmt: skip


def packed(codes: Array, scales: Array, zeros: Array | None, bits: int) -> Tensors:
    """compressed-tensors' ``pack-quantized``."""
    parts = {"weight_packed": straight(codes, bits), "weight_scale": torch.from_numpy(scales),
             "weight_shape": torch.tensor(codes.shape)}  # fmt: skip
    if zeros is not None:
        parts["weight_zero_point"] = straight(zeros.T, bits).T
    return parts


def expected(codes: Array, scales: Array, zeros: Array, index: Array) -> torch.Tensor:
    """The numbers, float32 ``[N, K]``; ``index`` is the group of each column."""
    wide = scales.astype(np.float32)
    return torch.from_numpy((codes - zeros[:, index]) * wide[:, index]).float()
