"""``token_select``: ``y[b, k] = x[b, index[b, k]]``, whole rows copied.

Bytes moved: each kept row once in and once out, and 8 bytes of index a row. Importing this module
imports triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ir.core.errors import BadInput
from .launch import Launch
from .registry import Kernel

BLOCK = 1024
"""Numbers that a program copies: 16 bytes a thread of 4 warps where they have two bytes."""
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Numbers are copied as integers of their size, whatever they stand for."""


@triton.jit
def token_select_kernel(
    x, index, y, batch_stride, token_stride, index_stride, TOKENS, KEPT, WIDTH, rows,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(row, rows - 1)
    batch = row // KEPT
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    token = tl.load(index + batch * index_stride + row % KEPT).to(tl.int64)
    # An index out of range must not read foreign memory; its row is zeros.
    width = tl.where(token < 0, 0, tl.where(token < TOKENS, WIDTH, 0))
    source = x + (batch * batch_stride + token * token_stride)[:, None] + at
    copied = tl.load(source, mask=at < width[:, None], other=0)
    tl.store(y + row[:, None] * WIDTH + at, copied, mask=at < WIDTH)


def token_select(x: Tensor, index: Tensor) -> Tensor:
    """As the op's reference: ``x`` [batch, tokens, ...] by ``index`` i64 or i32 [batch, kept].

    An index outside of 0 to tokens - 1 gives a row of zeros, where the reference fails. Raises
    ``BadInput`` for other ranks, batches or dtypes.
    """
    if x.dim() < 2 or index.dim() != 2 or x.shape[0] != index.shape[0]:
        raise BadInput(
            f"token_select: x [batch, tokens, ...] and index [batch, kept] are needed, got "
            f"{list(x.shape)} and {list(index.shape)}"
        )
    if x.dtype.itemsize not in _WORDS or index.dtype not in (torch.int64, torch.int32):
        raise BadInput(f"token_select: x is {x.dtype} and index {index.dtype}")
    y = x.new_empty(*index.shape, *x.shape[2:])
    for launch in launches(y, x, index):
        launch.run()
    return y


def launches(y: Tensor, x: Tensor, index: Tensor) -> list[Launch]:
    """The launches that fill ``y``; none where it is empty. Tensors may be meta ones."""
    if not y.numel():
        return []
    words = _WORDS[x.dtype.itemsize]
    x = x.reshape(*x.shape[:2], -1)
    x = (x if x.stride(2) == 1 else x.contiguous()).view(words)
    index = index if index.stride(1) == 1 else index.contiguous()
    rows, width = index.numel(), x.shape[2]
    block = min(BLOCK, triton.next_power_of_2(width))
    arguments = (
        x, index, y.view(words), x.stride(0), x.stride(1), index.stride(0),
        x.shape[1], index.shape[1], width, rows,
    )  # fmt: skip
    constants = {"ROWS": BLOCK // block, "BLOCK": block}
    grid = (triton.cdiv(rows, BLOCK // block), triton.cdiv(width, block))
    return [Launch(token_select_kernel, grid, arguments, constants)]


def _typical() -> list[tuple[str, Launch]]:
    x = torch.empty(4, 576, 4096, dtype=torch.float16, device="meta")
    index = torch.empty(4, 144, dtype=torch.int64, device="meta")
    y = torch.empty(4, 144, 4096, dtype=torch.float16, device="meta")
    return [("4 x 144 of 576 tokens", launch) for launch in launches(y, x, index)]


KERNEL = Kernel(token_select, launches=_typical)
