"""GGUF's blocks as the parts of ``linear_nbit``: codes, scales and zero points.

Types whose code has a fixed middle are exact: ``W = scale (q - middle)``. Those with a minimum,
``W = scale q + low``, have real zero points, and agree to rounding in float32; a group whose scale
is 0 is a constant, which is stored as code 0, zero point 1 and the scale ``-low``. Codes of 5 and 6
bits, and codebooks of whole numbers, take 8 bits. Read from gguf 0.19 (``quants.py``) and held
against it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.weights import Weight
from ..checkpoints.int8 import TWICE
from ..checkpoints.stored_linear import Parts

CHUNK = 1 << 22
"""Elements that are decoded at a time."""
Array = np.ndarray[Any, Any]
_NL = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]) + 128
"""IQ4_NL's codebook, as codes of 8 bits."""
_E2M1 = TWICE.numpy() + 128
"""Twice the values of FP4, likewise."""


@dataclass(frozen=True)
class Kind:
    """A block type. The functions take bytes uint8 ``[blocks, bytes]``."""

    bits: int
    group: int
    """Elements that share a scale."""
    codes: Callable[[Array], Array]
    """uint8 ``[blocks, elements]``."""
    scales: Callable[[Array], Array]
    """``[blocks, groups]``."""
    lows: Callable[[Array], Array] | None = None
    """f32 ``[blocks, groups]``; ``None`` where the middle is fixed."""
    middle: int = 0
    wide: bool = True
    """Whether scales need float32; else they are the file's float16."""


def parts(name: str, kind: Kind, shape: tuple[int, int], data: Weight, block: int,
          order: Tensor | None = None) -> Parts:  # fmt: skip
    """A tensor ``[N, K]`` of blocks; ``order`` i64 ``[N]`` puts its rows in another order."""
    rows, columns = shape
    dtype = torch.float32 if kind.wide else torch.float16

    def each(make: Callable[[Array], Array]) -> Callable[[], Tensor]:
        return lambda: _decoded(data, make, block, columns, order)

    def zeros() -> Tensor:
        if kind.lows is None:
            return torch.full((rows, columns // kind.group), kind.middle, dtype=torch.uint8)
        return each(lambda raw: _affine(kind, raw)[1])()

    fixed = kind.lows is None and kind.middle == 1 << (kind.bits - 1)
    return Parts(
        name, rows, columns, kind.bits, kind.group,
        each(lambda raw: _codes(kind, raw)), each(lambda raw: _affine(kind, raw)[0]), dtype,
        None if fixed else zeros, None, (data.key, order is not None),
        real_zeros=kind.lows is not None,
    )  # fmt: skip


def _decoded(data: Weight, make: Callable[[Array], Array], block: int, columns: int,
             order: Tensor | None) -> Tensor:  # fmt: skip
    """What ``make`` finds in the blocks of each row, some rows at a time."""
    raw = data.read()
    rows, each = len(raw), columns // block
    step = max(1, CHUNK // max(columns, 1))
    pieces = []
    for start in range(0, rows, step):
        part = raw[start : start + step] if order is None else raw[order[start : start + step]]
        numbers = make(part.numpy().reshape(len(part) * each, -1))
        pieces.append(torch.from_numpy(np.ascontiguousarray(numbers.reshape(len(part), -1))))
    return torch.cat(pieces)


def _codes(kind: Kind, raw: Array) -> Array:
    codes = kind.codes(raw)
    if kind.lows is None:
        return codes
    alive = kind.scales(raw) != 0
    return codes * np.repeat(alive, kind.group, 1).astype(np.uint8)


def _affine(kind: Kind, raw: Array) -> tuple[Array, Array]:
    """Scales, and of types with a minimum the zero points."""
    scales = kind.scales(raw)
    if kind.lows is None:
        return scales, scales
    lows = kind.lows(raw)
    dead = scales == 0
    zeros = np.where(dead, np.float32(1), -lows / np.where(dead, np.float32(1), scales))
    return np.where(dead, -lows, scales), zeros


# --- pieces of blocks ----------------------------------------------------------------------------


def _half(raw: Array, place: int) -> Array:
    """float16 at a byte of each block, ``[blocks, 1]``."""
    return np.ascontiguousarray(raw[:, place : place + 2]).view(np.float16)


def _wide(raw: Array, place: int) -> Array:
    return _half(raw, place).astype(np.float32)


def _nibbles(raw: Array) -> Array:
    """Low nibbles, then high ones, ``[blocks, 2 bytes]``."""
    return np.concatenate([raw & 15, raw >> 4], 1)


def _bits(raw: Array) -> Array:
    """The bits of some bytes, the lowest of the first one first."""
    return np.unpackbits(raw, axis=1, bitorder="little")


def _pairs(raw: Array) -> Array:
    """Two bits of each of 64 bytes, 128 elements a half: shifts 0, 2, 4, 6 of 32 bytes each."""
    shifts: Array = np.array([0, 2, 4, 6], np.uint8)[None, None, :, None]
    pairs: Array = (raw.reshape(-1, 2, 1, 32) >> shifts) & 3
    return pairs.reshape(-1, 256)


def _fives(raw: Array, high: int, low: int) -> Array:
    codes: Array = _nibbles(raw[:, low : low + 16]) | (_bits(raw[:, high : high + 4]) << 4)
    return codes


def _sixes(raw: Array) -> tuple[Array, Array]:
    """Q4_K's eight scales and minima of six bits, in 12 bytes."""
    a, b, c = raw[:, :4], raw[:, 4:8], raw[:, 8:]
    scales = np.concatenate([a & 63, (c & 15) | ((a >> 6) << 4)], 1)
    lows = np.concatenate([b & 63, (c >> 4) | ((b >> 6) << 4)], 1)
    return scales.astype(np.float32), lows.astype(np.float32)


def _q3_scales(raw: Array) -> Array:
    low = _nibbles(raw[:, 96:104])
    shifts = np.array([0, 2, 4, 6], np.uint8)[None, :, None]
    high = ((raw[:, None, 104:108] >> shifts) & 3).reshape(-1, 16)
    scales: Array = _wide(raw, 108) * ((low | (high << 4)).astype(np.float32) - 32)
    return scales


def _q3_codes(raw: Array) -> Array:
    places = np.arange(8, dtype=np.uint8)[None, :, None]
    high = ((raw[:, None, :32] >> places) & 1).reshape(-1, 256)
    codes: Array = _pairs(raw[:, 32:96]) | (high << 2)
    return codes


def _k_nibbles(raw: Array) -> Array:
    """Of each 32 bytes the low nibbles, then the high ones."""
    each = raw.reshape(-1, 4, 1, 32)
    return np.concatenate([each & 15, each >> 4], 2).reshape(-1, 256)


def _q5_codes(raw: Array) -> Array:
    places = np.arange(8, dtype=np.uint8)[None, :, None]
    high = ((raw[:, None, 16:48] >> places) & 1).reshape(-1, 256)
    codes: Array = _k_nibbles(raw[:, 48:176]) | (high << 4)
    return codes


def _q6_codes(raw: Array) -> Array:
    each = raw[:, :128].reshape(-1, 2, 1, 64)
    low = np.concatenate([each & 15, each >> 4], 2).reshape(-1, 256)
    codes: Array = low | (_pairs(raw[:, 128:192]) << 4)
    return codes


def _exponent(raw: Array) -> Array:
    """``2^(e - 128)``."""
    return np.ldexp(np.float32(1), raw[:, :1].astype(np.int32) - 128)


KINDS: dict[str, Kind] = {
    "Q4_0": Kind(4, 32, lambda r: _nibbles(r[:, 2:]), lambda r: _half(r, 0), middle=8,
                 wide=False),
    "Q4_1": Kind(4, 32, lambda r: _nibbles(r[:, 4:]), lambda r: _wide(r, 0),
                 lambda r: _wide(r, 2)),
    "Q5_0": Kind(8, 32, lambda r: _fives(r, 2, 6), lambda r: _half(r, 0), middle=16, wide=False),
    "Q5_1": Kind(8, 32, lambda r: _fives(r, 4, 8), lambda r: _wide(r, 0), lambda r: _wide(r, 2)),
    "Q8_0": Kind(8, 32, lambda r: r[:, 2:] ^ 128, lambda r: _half(r, 0), middle=128, wide=False),
    "IQ4_NL": Kind(8, 32, lambda r: _NL[_nibbles(r[:, 2:])].astype(np.uint8),
                   lambda r: _half(r, 0), middle=128, wide=False),
    "MXFP4": Kind(8, 32, lambda r: _E2M1[_nibbles(r[:, 1:])].astype(np.uint8), _exponent,
                  middle=128),
    "Q2_K": Kind(2, 16, lambda r: _pairs(r[:, 16:80]),
                 lambda r: _wide(r, 80) * (r[:, :16] & 15).astype(np.float32),
                 lambda r: -_wide(r, 82) * (r[:, :16] >> 4).astype(np.float32)),
    "Q3_K": Kind(3, 16, _q3_codes, _q3_scales, middle=4),
    "Q4_K": Kind(4, 32, lambda r: _k_nibbles(r[:, 16:]),
                 lambda r: _wide(r, 0) * _sixes(r[:, 4:16])[0],
                 lambda r: -_wide(r, 2) * _sixes(r[:, 4:16])[1]),
    "Q5_K": Kind(8, 32, _q5_codes, lambda r: _wide(r, 0) * _sixes(r[:, 4:16])[0],
                 lambda r: -_wide(r, 2) * _sixes(r[:, 4:16])[1]),
    "Q6_K": Kind(8, 16, _q6_codes,
                 lambda r: _wide(r, 208) * np.ascontiguousarray(r[:, 192:208]).view(np.int8),
                 middle=32),
}  # fmt: skip
"""Types that a form of ours is equal to."""
