"""``token_scores``: what one query pays to each key, the mean of its heads.

``scores[b, n] = mean_h exp(l[b, h, n] - max_n l) / sum_n exp(...)``, ``l = q_h k_gᵀ scale``. Bytes
moved: the keys once, and ``4 heads keys`` of logits three times, which fit the second-level cache:
a program for each head and tile of keys makes them, one a head finds their maximum and sum, one a
tile of keys the mean. Importing this module imports triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ir.core.errors import BadInput
from .launch import Launch
from .registry import HALF_AND_SINGLE, Kernel

KEYS, BLOCK = 64, 512
"""Keys of a program that makes logits, and of one that sums them up."""
LOWEST = -3.4028234663852886e38
"""The logit of a key that is not seen: a row of such is of equal parts, as in the reference."""


@triton.jit
def logits_kernel(
    q, k, mask, logits, q_row, q_head, k_row, k_group, k_key, mask_row, mask_key,
    HEADS, SHARE, N, D, SCALE: tl.constexpr, LOW: tl.constexpr, TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """``logits[b, h, n] = q_h k_gᵀ · SCALE``, hidden keys the lowest number."""
    line = tl.program_id(0)
    row, head = (line // HEADS).to(tl.int64), (line % HEADS).to(tl.int64)
    n, d = tl.program_id(1) * TILE + tl.arange(0, TILE), tl.arange(0, WIDTH)
    inside = d < D
    a = tl.load(q + row * q_row + head * q_head + d, mask=inside, other=0).to(tl.float32)
    keys = k + row * k_row + head // SHARE * k_group + n[:, None].to(tl.int64) * k_key + d[None, :]
    b = tl.load(keys, mask=(n < N)[:, None] & inside[None, :], other=0).to(tl.float32)
    scores = tl.sum(a[None, :] * b, 1) * SCALE
    if mask is not None:
        visible = tl.load(mask + row * mask_row + n * mask_key, mask=n < N, other=0)
        scores = tl.where(visible != 0, scores, LOW)
    tl.store(logits + line.to(tl.int64) * N + n, scores, mask=n < N)


@triton.jit
def totals_kernel(logits, totals, N, TILE: tl.constexpr):
    """``totals[l] = max_n logits[l, n], sum_n exp(logits[l, n] - max)``"""
    line = tl.program_id(0)
    held = logits + line.to(tl.int64) * N
    highest = tl.full((TILE,), float("-inf"), tl.float32)
    for start in range(0, N, TILE):
        n = start + tl.arange(0, TILE)
        highest = tl.maximum(highest, tl.load(held + n, mask=n < N, other=float("-inf")))
    top = tl.max(highest, 0)
    total = tl.zeros((TILE,), tl.float32)
    for start in range(0, N, TILE):
        n = start + tl.arange(0, TILE)
        total += tl.exp(tl.load(held + n, mask=n < N, other=float("-inf")) - top)
    tl.store(totals + line * 2, top)
    tl.store(totals + line * 2 + 1, tl.sum(total, 0))


@triton.jit
def mean_kernel(logits, totals, y, HEADS, N, TILE: tl.constexpr):
    """``y[b, n] = mean_h exp(logits[b, h, n] - max) / sum``"""
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float32)
    for head in range(HEADS):
        line = row * HEADS + head
        top, whole = tl.load(totals + line * 2), tl.load(totals + line * 2 + 1)
        logit = tl.load(logits + line * N + n, mask=n < N, other=float("-inf"))
        total += tl.exp(logit - top) / whole
    tl.store(y + row * N + n, (total / HEADS).to(y.dtype.element_ty), mask=n < N)


def token_scores(q: Tensor, k: Tensor, mask: Tensor | None = None, *, scale: float) -> Tensor:
    """As the op's reference (``ir.ops.token_scores``). Raises ``BadInput`` for other dtypes."""
    if q.dtype not in HALF_AND_SINGLE or k.dtype != q.dtype:
        raise BadInput(f"token_scores: q is {q.dtype} and k {k.dtype}: one half or single float")
    y = q.new_empty(q.shape[0], k.shape[2])
    for launch in launches(y, q, k, mask, scale=scale):
        launch.run()
    return y


def launches(
    y: Tensor, q: Tensor, k: Tensor, mask: Tensor | None = None, *, scale: float
) -> list[Launch]:
    """The launches that fill ``y``; none where it is empty. Tensors may be meta ones."""
    if not y.numel():
        return []
    (rows, heads, _, width), (groups, keys) = q.shape, k.shape[1:3]
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    visible = None if mask is None else mask.expand(rows, 1, 1, keys).view(torch.uint8)
    logits = q.new_empty(rows, heads, keys, dtype=torch.float32)
    totals = q.new_empty(rows, heads, 2, dtype=torch.float32)
    strides = (0, 0) if visible is None else (visible.stride(0), visible.stride(3))
    arguments = (
        q, k, visible, logits, q.stride(0), q.stride(1), k.stride(0), k.stride(1), k.stride(2),
        *strides, heads, heads // groups, keys, width,
    )  # fmt: skip
    constants = {
        "SCALE": scale, "LOW": LOWEST, "TILE": KEYS, "WIDTH": triton.next_power_of_2(width)
    }  # fmt: skip
    tile, tiles = {"TILE": BLOCK}, (rows, triton.cdiv(keys, BLOCK))
    return [
        Launch(logits_kernel, (rows * heads, triton.cdiv(keys, KEYS)), arguments, constants),
        Launch(totals_kernel, (rows * heads,), (logits, totals, keys), tile),
        Launch(mean_kernel, tiles, (logits, totals, y, heads, keys), tile),
    ]


def _typical() -> list[tuple[str, Launch]]:
    q = torch.empty(1, 32, 1, 128, dtype=torch.float16, device="meta")
    k = torch.empty(1, 8, 2880, 128, dtype=torch.float16, device="meta")
    mask = torch.empty(1, 1, 1, 2880, dtype=torch.bool, device="meta")
    y = torch.empty(1, 2880, dtype=torch.float16, device="meta")
    return [("32 heads, 2880 keys", launch) for launch in launches(y, q, k, mask, scale=0.1)]


KERNEL = Kernel(token_scores, HALF_AND_SINGLE, launches=_typical)
