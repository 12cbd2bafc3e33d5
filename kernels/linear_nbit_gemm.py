"""``linear_nbit`` for many rows: tiles of ``x @ W.T`` on tensor cores, W made on the way.

``W[n, k] = (q[n, k] - z[n, g]) s[n, g]``, rounded to the dtype of ``x``; sums are float32. Bytes
moved: ``x`` once per column of tiles, the codes once per row of tiles, ``y`` once. Where the tiles
are fewer than the device's processors, K is split: each split writes float32 sums, which
``join_kernel`` adds in a fixed order (8 M N bytes a split, mostly from L2).
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

REGISTERS = {4: 168, 8: 255}
"""Most registers a thread, by warps: three programs of 4 warps a processor, one of 8."""
JOINED = 1024
"""Numbers that one program of ``join_kernel`` makes."""


@dataclass(frozen=True)
class Tile:
    """``rows`` of x by ``outputs``, in steps of ``columns`` of K."""

    rows: int
    outputs: int
    columns: int
    warps: int
    stages: int


def tile_for(rows: int, *, wide: bool) -> Tile:
    """The tile for so many rows of ``x``; ``wide`` for float32.

    Chosen so that nothing spills, and that two programs of the narrow tiles and their loads in
    flight fit the shared memory of one processor of sm_80 (``bench.kernels --offline``); not tuned
    on a device.
    """
    if wide:
        return Tile(16, 64, 32, 4, 4) if rows <= 16 else Tile(32, 64, 32, 4, 4)
    if rows <= 16:
        return Tile(16, 64, 128, 4, 5)
    if rows <= 32:
        return Tile(32, 64, 128, 4, 4)
    if rows <= 64:
        return Tile(64, 64, 64, 4, 4)
    return Tile(128, 128, 64, 8, 3)


def splits_for(rows: int, outputs: int, columns: int, tile: Tile, processors: int) -> int:
    """Pieces of K: so many that each processor has about two tiles, each of four steps or more."""
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.outputs)
    steps = triton.cdiv(columns, tile.columns)
    return int(max(1, min(2 * processors // tiles, steps // 4, 16)))


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    # Triton's interpreter multiplies the bits of bfloat16 (3.6 to 3.9): there it gets float32.
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _quarters(q):
    """The four codes of 2 bits of each byte, [..., 2, 2], the earliest first."""
    return tl.join(tl.join(q & 3, (q >> 4) & 3), tl.join((q >> 2) & 3, q >> 6))


@triton.jit
def _eighths(q):
    """The eight bits of each byte, [..., 2, 2, 2], the earliest first."""
    even = tl.join(tl.join(q & 1, (q >> 4) & 1), tl.join((q >> 2) & 1, (q >> 6) & 1))
    odd = tl.join(tl.join((q >> 1) & 1, (q >> 5) & 1), tl.join((q >> 3) & 1, q >> 7))
    return tl.join(even, odd)


@triton.jit
def gemm_kernel(
    x, codes, scales, zeros, bias, narrow, up, y, x_stride, narrow_stride,
    M, N, K, B, G, R, steps, magic,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, REAL_ZEROS: tl.constexpr, EVEN: tl.constexpr,
    RANKS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    PER: tl.constexpr = 4 if BITS == 3 else 8 // BITS
    # Groups that one step of K spans: at least one, and one where a row has one scale.
    SPAN: tl.constexpr = COLUMNS // GROUP if GROUP > 0 and GROUP < COLUMNS else 1
    MIDDLE: tl.constexpr = float(1 << (BITS - 1))
    tiles_n = tl.cdiv(N, OUTPUTS)
    split = tl.program_id(1)
    m = tl.program_id(0) // tiles_n * ROWS + tl.arange(0, ROWS)
    outputs = tl.program_id(0) % tiles_n * OUTPUTS + tl.arange(0, OUTPUTS)
    rows = tl.minimum(m, M - 1).to(tl.int64)
    n = tl.minimum(outputs, N - 1).to(tl.int64)
    x_rows = x + rows[:, None] * x_stride
    code_rows = codes + n[:, None] * B
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for step in range(split * steps, (split + 1) * steps):
        k = step * COLUMNS + tl.arange(0, COLUMNS)
        b = step * (COLUMNS // PER) + tl.arange(0, COLUMNS // PER)
        if BITS == 3:  # a block is its low bits, then its high ones
            low = b * 4 // BLOCK * (BLOCK * 3 // 8) + b * 4 % BLOCK // 4
            eighth = step * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
            high = eighth * 8 // BLOCK * (BLOCK * 3 // 8) + BLOCK // 4 + eighth * 8 % BLOCK // 8
        else:
            low = b
        if EVEN:
            a = tl.load(x_rows + k[None, :])
            q = tl.load(code_rows + low[None, :])
        else:
            a = tl.load(x_rows + k[None, :], mask=(k < K)[None, :], other=0)
            q = tl.load(code_rows + low[None, :], mask=(low < B)[None, :], other=0)
        if BITS == 4:
            q = tl.reshape(tl.join(q & 15, q >> 4), (OUTPUTS, COLUMNS))
        if BITS < 4:
            q = tl.reshape(_quarters(q), (OUTPUTS, COLUMNS))
        if BITS == 3:
            top = tl.load(code_rows + high[None, :], mask=(high < B)[None, :], other=0)
            q |= tl.reshape(_eighths(top), (OUTPUTS, COLUMNS)) << 2
        # Codes become floats by the bits of 2^23 + code: conversions run at an eighth of the rate.
        high = (q.to(tl.int32) | magic).to(tl.float32, bitcast=True)
        weight = tl.reshape(high, (OUTPUTS, SPAN, COLUMNS // SPAN))
        g = (step * COLUMNS // GROUP if GROUP != 0 else 0) + tl.arange(0, SPAN)
        at = n[:, None] * G + g[None, :]
        known = (g < G)[None, :]
        if zeros is None:
            weight -= 8388608 + MIDDLE
        else:
            if REAL_ZEROS or BITS == 8:
                z = tl.load(zeros + at, mask=known, other=0).to(tl.float32)
            else:
                pairs = zeros + n[:, None] * ((G + 1) // 2) + (g // 2)[None, :]
                z = tl.load(pairs, mask=known, other=0).to(tl.int32)
                z = ((z >> (4 * (g % 2))[None, :]) & 15).to(tl.float32)
            weight = weight - 8388608 - z[:, :, None]
        if GROUP != 0:
            weight *= tl.load(scales + at, mask=known, other=0).to(tl.float32)[:, :, None]
        weight = tl.reshape(weight, (OUTPUTS, COLUMNS)).to(a.dtype)
        total = _dot(a, tl.trans(weight), total, PRECISION, WIDEN)
    if GROUP == 0:
        total *= tl.load(scales + n).to(tl.float32)[None, :]
    if split == 0:
        if bias is not None:
            total += tl.load(bias + n).to(tl.float32)[None, :]
        if RANKS > 0:
            for start in range(0, R, RANKS):
                r = start + tl.arange(0, RANKS)
                inside = (r < R)[None, :]
                t = tl.load(narrow + rows[:, None] * narrow_stride + r[None, :], inside, other=0)
                u = tl.load(up + n[:, None] * R + r[None, :], inside, other=0).to(t.dtype)
                total = _dot(t, tl.trans(u), total, PRECISION, WIDEN)
    into = y + (split.to(tl.int64) * M + rows[:, None]) * N + n[None, :]
    kept = (m < M)[:, None] & (outputs < N)[None, :]
    tl.store(into, total.to(y.dtype.element_ty), mask=kept)


@triton.jit
def join_kernel(parts, y, size, splits, BLOCK: tl.constexpr):
    """``y = sum_s parts[s]`` over float32 parts ``[splits, size]``, in the dtype of ``y``."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(parts + split * size.to(tl.int64) + at, mask=at < size, other=0)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=at < size)
