"""``rope``: ``y = [x1 c1 - x2 s1, x2 c2 + x1 s2]``, halves along the last dimension, in one pass.

Bytes moved: ``x`` and ``y`` once, the tables once a head. Products and sums round to the dtype of
``x`` once, where the reference rounds each. Importing this module imports triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ir.core.errors import BadInput
from .launch import Launch
from .registry import HALF_AND_SINGLE, Kernel


@triton.jit
def rope_kernel(
    x, cos, sin, y, x0, x1, x2, c0, c1, c2, s0, s1, s2, HEADS, TOKENS, rows, half,
    ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    batch, head, token = row // TOKENS // HEADS, row // TOKENS % HEADS, row % TOKENS
    d = tl.arange(0, HALF)[None, :]
    inside = (row < rows)[:, None] & (d < half)
    at_x = (batch * x0 + head * x1 + token * x2)[:, None] + d
    at_c = (batch * c0 + head * c1 + token * c2)[:, None] + d
    at_s = (batch * s0 + head * s1 + token * s2)[:, None] + d
    low = tl.load(x + at_x, mask=inside, other=0).to(tl.float32)
    high = tl.load(x + at_x + half, mask=inside, other=0).to(tl.float32)
    out_low = low * tl.load(cos + at_c, mask=inside, other=0).to(tl.float32)
    out_low -= high * tl.load(sin + at_s, mask=inside, other=0).to(tl.float32)
    out_high = high * tl.load(cos + at_c + half, mask=inside, other=0).to(tl.float32)
    out_high += low * tl.load(sin + at_s + half, mask=inside, other=0).to(tl.float32)
    at_y = row[:, None] * (2 * half) + d
    tl.store(y + at_y, out_low.to(y.dtype.element_ty), mask=inside)
    tl.store(y + at_y + half, out_high.to(y.dtype.element_ty), mask=inside)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As the op's reference (``ir.ops.rope``): x [..., D] of rank up to 4, cos and sin broadcast.

    Raises ``BadInput`` for another rank or dtype, an odd D, or tables of another dtype than ``x``.
    """
    if not 1 <= x.dim() <= 4 or x.shape[-1] % 2:
        raise BadInput(f"rope: the kernel takes up to 4 dimensions, the last even: {list(x.shape)}")
    if x.dtype not in HALF_AND_SINGLE or {cos.dtype, sin.dtype} != {x.dtype}:
        raise BadInput(f"rope: x is {x.dtype}, cos {cos.dtype}, sin {sin.dtype}: one is needed")
    y = x.new_empty(x.shape)
    for launch in launches(y, x, cos, sin):
        launch.run()
    return y


def launches(y: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> list[Launch]:
    """The launches that fill ``y``; none where it is empty. Tensors may be meta ones."""
    if not y.numel():
        return []
    x = x if x.stride(-1) == 1 else x.contiguous()
    wide = (*cos.shape[:-1], x.shape[-1]), (*sin.shape[:-1], x.shape[-1])
    tables = [
        t.expand(shape).contiguous().expand(x.shape)
        for t, shape in zip((cos, sin), wide, strict=True)
    ]
    full = [t[(None,) * (4 - t.dim())] for t in (x, *tables)]
    _, heads, tokens, width = full[0].shape
    rows, half = y.numel() // width, width // 2
    block = max(1, min(32, 2048 // triton.next_power_of_2(half)))
    arguments = (
        x, *tables, y, *(stride for t in full for stride in t.stride()[:3]),
        heads, tokens, rows, half,
    )  # fmt: skip
    constants = {"ROWS": block, "HALF": triton.next_power_of_2(half)}
    return [Launch(rope_kernel, (triton.cdiv(rows, block),), arguments, constants)]


def _typical() -> list[tuple[str, Launch]]:
    x = torch.empty(4, 32, 576, 128, dtype=torch.bfloat16, device="meta")
    table = torch.empty(4, 1, 576, 128, dtype=torch.bfloat16, device="meta")
    return [("4 x 32 x 576 x 128", launch) for launch in launches(x, x, table, table)]


KERNEL = Kernel(rope, HALF_AND_SINGLE, ranks=(1, 2, 3, 4), one_dtype=True, launches=_typical)
