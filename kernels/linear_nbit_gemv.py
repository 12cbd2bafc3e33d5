"""``linear_nbit`` for few rows: a program makes four outputs of one row, without tensor cores.

``y[n] = sum_g s[n, g] (sum_{k in g} q[n, k] x[k] - z[n, g] sum_{k in g} x[k]) + bias[n]``, then
``+ sum_r up[n, r] narrow[r]``. Bytes moved: the codes once a row of ``x`` (from L2 after the first
row), ``N * groups`` scales and zero points; ``x`` stays in L1.

Instructions a weight in the loop (SASS for sm_90, 4 bits, group 32, fp16): 4.9, where reading the
codes at an H200's 4.8 TB/s leaves time for 3.0 and at an A100's 2.0 TB/s for 5.0. Of them one takes
a code out of its word, two make and add the product. One output a program: 6.2, two: 5.1. As a tile
[outputs, words]: 5.3 and sixteen barriers, as the lanes that load ``x`` do not need what they load.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

OUTPUTS = 4
"""Outputs a program."""
MAX_ROWS = 2
"""Above it the tensor cores' form is taken. Reckoned, not measured: that form takes 8.3
instructions a weight for up to 16 rows, and a second launch; this one 4.9 a row."""
REGISTERS = 128
"""Most registers a thread: 16 warps a processor, half of what an H100 holds at most."""
MAGIC = 0x4B000000
"""The bits of 2^23 as a float: or'ed with a code below 2^23 they are the float ``2^23 + code``.

Conversions run at an eighth of the rate. It is an argument of the kernel since a constant is loaded
anew for each use: 5.0 instead of 4.2 instructions a weight in an early form."""


@dataclass(frozen=True)
class Tile:
    """A program reads ``words`` of 32 bits of codes a row at once, by ``warps`` warps."""

    words: int
    warps: int


def tile_for(words: int, bits: int = 4) -> Tile:
    """The longest tile that leaves an eighth of its lanes idle at most; four words a thread.

    Long tiles have more bytes in flight: all of a row where it is a power of two up to 1024. Of 2
    and 3 bits a word is 16 columns of ``x``, and a thread holds one at a time.
    """
    if bits < 4:
        length = max(32, min(256, triton.next_power_of_2(words)))
        return Tile(length, length // 32)
    lengths = [t for t in (1024, 512, 256, 128) if triton.cdiv(words, t) * t * 8 <= words * 9]
    length = lengths[0] if lengths else max(32, min(128, triton.next_power_of_2(words)))
    return Tile(length, max(1, length // 128))


@triton.jit
def _eight(v, WORDS: tl.constexpr):
    """Eight numbers a word as eight vectors."""
    even, odd = tl.split(tl.reshape(v, (WORDS, 2, 2, 2)))
    even0, even1 = tl.split(even)
    odd0, odd1 = tl.split(odd)
    x0, x4 = tl.split(even0)
    x2, x6 = tl.split(even1)
    x1, x5 = tl.split(odd0)
    x3, x7 = tl.split(odd1)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _columns(x, start, K, WORDS: tl.constexpr, PER: tl.constexpr, EVEN: tl.constexpr):
    """``x`` at a tile's columns as ``PER`` vectors: the i-th holds column i of each word."""
    at = start * PER + tl.arange(0, WORDS * PER)
    if EVEN:
        v = tl.load(x + at).to(tl.float32)
    else:
        v = tl.load(x + at, mask=at < K, other=0).to(tl.float32)
    if PER == 4:
        even, odd = tl.split(tl.reshape(v, (WORDS, 2, 2)))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        return x0, x1, x2, x3
    elif PER == 16:  # noqa: RET505 - triton compiles what follows a return
        even, odd = tl.split(tl.reshape(v, (WORDS, 8, 2)))
        x0, x2, x4, x6, x8, x10, x12, x14 = _eight(even, WORDS)
        x1, x3, x5, x7, x9, x11, x13, x15 = _eight(odd, WORDS)
        return x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15
    else:
        return _eight(v, WORDS)


@triton.jit
def _code(q, magic, MASK: tl.constexpr, STEP: tl.constexpr, MIDDLE: tl.constexpr):
    """The code under ``MASK``, whose lowest bit is worth ``1 / STEP``, less ``MIDDLE``; exact."""
    return ((q & MASK) | magic).to(tl.float32, bitcast=True) * STEP - (8388608.0 * STEP + MIDDLE)


@triton.jit
def _nth(
    q, magic, AT: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, MIDDLE: tl.constexpr
):
    """The code of WIDTH bits before which AT others lie, times UNIT, less MIDDLE."""
    MASK: tl.constexpr = ((1 << WIDTH) - 1) << (WIDTH * AT)
    return _code(q, magic, MASK, UNIT / (1 << (WIDTH * AT)), MIDDLE)


@triton.jit
def _bits(
    q, magic, xs, AT: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, MIDDLE: tl.constexpr
):
    """``sum_i (code_i UNIT - MIDDLE) x_i`` over eight codes of WIDTH bits, from the lowest on; x
    counts from AT."""
    part = _nth(q, magic, 0, WIDTH, UNIT, MIDDLE) * xs[AT]
    for i in tl.static_range(1, 8):
        part += _nth(q, magic, i, WIDTH, UNIT, MIDDLE) * xs[AT + i]
    return part


@triton.jit
def _products(q, top, magic, xs, PER: tl.constexpr, BITS: tl.constexpr, MIDDLE: tl.constexpr):
    """``sum_i (code_i - MIDDLE) x_i`` of each word; ``top`` holds the third bits of 16 codes."""
    h = q >> 16
    if PER == 16:
        part = _bits(q, magic, xs, 0, 2, 1.0, MIDDLE) + _bits(h, magic, xs, 8, 2, 1.0, MIDDLE)
        if BITS == 3:
            part += _bits(top, magic, xs, 0, 1, 4.0, 0) + _bits(top >> 8, magic, xs, 8, 1, 4.0, 0)
    elif PER == 4:
        part = _code(q, magic, 0xFF, 1.0, MIDDLE) * xs[0]
        part += _code(q, magic, 0xFF00, 0.00390625, MIDDLE) * xs[1]
        part += _code(h, magic, 0xFF, 1.0, MIDDLE) * xs[2]
        part += _code(h, magic, 0xFF00, 0.00390625, MIDDLE) * xs[3]
    else:
        part = _code(q, magic, 0xF, 1.0, MIDDLE) * xs[0]
        part += _code(q, magic, 0xF0, 0.0625, MIDDLE) * xs[1]
        part += _code(q, magic, 0xF00, 0.00390625, MIDDLE) * xs[2]
        part += _code(q, magic, 0xF000, 0.000244140625, MIDDLE) * xs[3]
        part += _code(h, magic, 0xF, 1.0, MIDDLE) * xs[4]
        part += _code(h, magic, 0xF0, 0.0625, MIDDLE) * xs[5]
        part += _code(h, magic, 0xF00, 0.00390625, MIDDLE) * xs[6]
        part += _code(h, magic, 0xF000, 0.000244140625, MIDDLE) * xs[7]
    return part


@triton.jit
def _zeros(zeros, n, g, G, within, BITS: tl.constexpr, REAL_ZEROS: tl.constexpr):
    """Zero points of output ``n`` at groups ``g``, float32."""
    if REAL_ZEROS or BITS == 8:
        z = tl.load(zeros + n * G + g, mask=within, other=0)
    else:
        pair = tl.load(zeros + n * ((G + 1) // 2) + g // 2, mask=within, other=0).to(tl.int32)
        z = (pair >> (4 * (g % 2))) & 15
    return z.to(tl.float32)


@triton.jit
def _add_row(
    total, words, scales, zeros, n, w, xs, x_sum, W, G, magic,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, REAL_ZEROS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """``total`` plus what output ``n`` gets from the words ``w``."""
    PER: tl.constexpr = 16 if BITS == 3 else 32 // BITS
    within = w < W
    if BITS == 3:
        # A block is its low bits, 16 codes in two halves of a word, then its high ones.
        first = n * (W * 3) + w * 16 // BLOCK * (BLOCK * 3 // 16)
        inside = w * 16 % BLOCK
        low = words + first + inside // 8
        q = tl.load(low, mask=within, other=0).to(tl.int32) & 0xFFFF
        q |= tl.load(low + 1, mask=within, other=0).to(tl.int32) << 16
        high = words + first + BLOCK // 8 + inside // 16
        top = tl.load(high, mask=within, other=0).to(tl.int32) & 0xFFFF
    else:
        q = tl.load(words + n * W + w) if EVEN else tl.load(words + n * W + w, mask=within, other=0)
        top = q
    g = w * 0 if GROUP == 0 else w * PER // GROUP
    if zeros is None:
        # The middle goes into the constant that takes 2^23 away.
        part = _products(q, top, magic, xs, PER, BITS, 1 << (BITS - 1))
    else:
        part = _products(q, top, magic, xs, PER, BITS, 0)
        part -= _zeros(zeros, n, g, G, within, BITS, REAL_ZEROS) * x_sum
    if GROUP != 0:
        part *= tl.load(scales + n * G + g, mask=within, other=0).to(tl.float32)
    return total + part


@triton.jit
def _store(
    y, total, scales, bias, narrow, up, n, inside, R, GROUP: tl.constexpr, RANKS: tl.constexpr
):
    """Sum over the tile, add what does not depend on K, write one number."""
    out = tl.sum(total, 0)
    if GROUP == 0:
        out *= tl.load(scales + n).to(tl.float32)
    if bias is not None:
        out += tl.load(bias + n).to(tl.float32)
    if RANKS > 0:
        for start in range(0, R, RANKS):
            r = start + tl.arange(0, RANKS)
            t = tl.load(narrow + r, mask=r < R, other=0).to(tl.float32)
            u = tl.load(up + n * R + r, mask=r < R, other=0).to(t.dtype)
            out += tl.sum(t * u, 0)
    tl.store(y + n, out.to(y.dtype.element_ty), mask=inside)


# A lane reads one word of codes and that word's columns of x. Were more known of how rows are
# aligned, it would load four words or two words' columns at once, which others then had to get.
@triton.jit(do_not_specialize=["W", "x_stride"])
def gemv_kernel(
    x, words, scales, zeros, bias, narrow, up, y, x_stride, narrow_stride, N, K, W, G, R, magic,
    WORDS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    REAL_ZEROS: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    PER: tl.constexpr = 16 if BITS == 3 else 32 // BITS
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * 4
    n0 = tl.minimum(n, N - 1).to(tl.int64)
    n1 = tl.minimum(n + 1, N - 1).to(tl.int64)
    n2 = tl.minimum(n + 2, N - 1).to(tl.int64)
    n3 = tl.minimum(n + 3, N - 1).to(tl.int64)
    x += tl.multiple_of(row * x_stride, PER) if ALIGNED else row * x_stride
    total0 = tl.zeros((WORDS,), tl.float32)
    total1 = tl.zeros((WORDS,), tl.float32)
    total2 = tl.zeros((WORDS,), tl.float32)
    total3 = tl.zeros((WORDS,), tl.float32)
    for start in range(0, W, WORDS):
        w = start + tl.arange(0, WORDS)
        xs = _columns(x, start, K, WORDS, PER, EVEN)
        x_sum = xs[0] + xs[1] + xs[2] + xs[3]
        for i in tl.static_range(4, PER):
            x_sum += xs[i]
        total0 = _add_row(total0, words, scales, zeros, n0, w, xs, x_sum, W, G, magic,
                          BITS, GROUP, BLOCK, REAL_ZEROS, EVEN)  # fmt: skip
        total1 = _add_row(total1, words, scales, zeros, n1, w, xs, x_sum, W, G, magic,
                          BITS, GROUP, BLOCK, REAL_ZEROS, EVEN)  # fmt: skip
        total2 = _add_row(total2, words, scales, zeros, n2, w, xs, x_sum, W, G, magic,
                          BITS, GROUP, BLOCK, REAL_ZEROS, EVEN)  # fmt: skip
        total3 = _add_row(total3, words, scales, zeros, n3, w, xs, x_sum, W, G, magic,
                          BITS, GROUP, BLOCK, REAL_ZEROS, EVEN)  # fmt: skip
    y += row * N
    narrow_row = narrow
    if RANKS > 0:
        narrow_row += row * narrow_stride
    _store(y, total0, scales, bias, narrow_row, up, n0, n < N, R, GROUP, RANKS)
    _store(y, total1, scales, bias, narrow_row, up, n1, n + 1 < N, R, GROUP, RANKS)
    _store(y, total2, scales, bias, narrow_row, up, n2, n + 2 < N, R, GROUP, RANKS)
    _store(y, total3, scales, bias, narrow_row, up, n3, n + 3 < N, R, GROUP, RANKS)
