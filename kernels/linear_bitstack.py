"""``linear_bitstack`` on a CUDA device: ``y = x W^T + bias``, ``W = sum_i G_i * (U_i V_i)``.

W is made on the way, a tile at a time, in float32: of each block the signs (one bit a weight, as
they lie) times the product of its factors; it is rounded to the dtype of ``x`` for the tensor
cores. Bytes moved: the signs once a tile of rows, ``blocks (N K / 8)``; the factors once a tile of
W, mostly from L2; ``x`` once a column of tiles. The dense matrix is never in memory. Importing this
module imports triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ir.core.errors import BadInput
from ..ir.ops.linear_bitstack import operand_types
from .launch import Launch
from .registry import HALF_AND_SINGLE, PRECISION, Kernel


@dataclass(frozen=True)
class Tile:
    """``rows`` of x by ``outputs``, in steps of ``columns`` of K."""

    rows: int
    outputs: int
    columns: int
    warps: int


def tile_for(rows: int) -> Tile:
    """Narrow tiles for few rows: 4,096 outputs are then 128 programs, about one a processor."""
    if rows <= 16:
        return Tile(16, 32, 64, 4)
    return Tile(64, 64, 64, 4)


@triton.jit
def _signs(signs, n, k, K, step, ALIGNED: tl.constexpr, EVEN: tl.constexpr,
           OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """1 for plus and 0 for minus, [OUTPUTS, COLUMNS]; the earliest is the highest of its byte."""
    if ALIGNED:
        b = step * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
        at = signs + n[:, None] * (K // 8) + b[None, :]
        q = tl.load(at) if EVEN else tl.load(at, mask=(b < K // 8)[None, :], other=0)
        even = tl.join(tl.join(q >> 7, (q >> 3) & 1), tl.join((q >> 5) & 1, (q >> 1) & 1))
        odd = tl.join(tl.join((q >> 6) & 1, (q >> 2) & 1), tl.join((q >> 4) & 1, q & 1))
        return tl.reshape(tl.join(even, odd), (OUTPUTS, COLUMNS))
    else:  # noqa: RET505 - triton compiles what follows a return
        flat = n[:, None] * K + k[None, :]
        q = tl.load(signs + flat // 8, mask=(k < K)[None, :], other=0)
        return (q >> (7 - flat % 8).to(tl.uint8)) & 1


@triton.jit
def bitstack_kernel(
    x, signs, factors, bias, y, x_stride, M, N, K, BLOCKS, RANK, plane,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, OUTPUTS)
    m = tl.program_id(0) // tiles_n * ROWS + tl.arange(0, ROWS)
    outputs = tl.program_id(0) % tiles_n * OUTPUTS + tl.arange(0, OUTPUTS)
    rows = tl.minimum(m, M - 1).to(tl.int64)
    n = tl.minimum(outputs, N - 1).to(tl.int64)
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for step in range(tl.cdiv(K, COLUMNS)):
        k = step * COLUMNS + tl.arange(0, COLUMNS)
        known = (k < K)[None, :]
        a = tl.load(x + rows[:, None] * x_stride + k[None, :], mask=known, other=0)
        weight = tl.zeros((OUTPUTS, COLUMNS), tl.float32)
        row, stored = factors, signs
        for _ in range(BLOCKS):
            size = tl.zeros((OUTPUTS, COLUMNS), tl.float32)
            for _ in range(RANK):
                u = tl.load(row + n).to(tl.float32)
                v = tl.load(row + N + k, mask=k < K, other=0).to(tl.float32)
                size += u[:, None] * v[None, :]
                row += N + K
            positive = _signs(stored, n, k, K, step, ALIGNED, EVEN, OUTPUTS, COLUMNS)
            weight += tl.where(positive != 0, size, -size)
            stored += plane
        weight = weight.to(a.dtype)
        # Triton's interpreter multiplies the bits of bfloat16: there it gets float32.
        if WIDEN:
            a, weight = a.to(tl.float32), weight.to(tl.float32)
        total = tl.dot(a, tl.trans(weight), total, input_precision=PRECISION)
    if bias is not None:
        total += tl.load(bias + n).to(tl.float32)[None, :]
    kept = (m < M)[:, None] & (outputs < N)[None, :]
    tl.store(y + rows[:, None] * N + n[None, :], total.to(y.dtype.element_ty), mask=kept)


def linear_bitstack(
    x: Tensor,
    signs: Tensor,
    factors: Tensor,
    bias: Tensor | None = None,
    *,
    in_features: int,
    out_features: int,
) -> Tensor:
    """As the op's reference (``ir.ops.linear_bitstack``). Raises ``BadInput`` for another dtype."""
    if x.dtype not in HALF_AND_SINGLE:
        raise BadInput(f"linear_bitstack: the kernel takes half and single floats, not {x.dtype}")
    y = x.new_empty(*x.shape[:-1], out_features)
    for launch in launches(y, x, signs, factors, bias):
        launch.run()
    return y


def launches(
    y: Tensor, x: Tensor, signs: Tensor, factors: Tensor, bias: Tensor | None = None
) -> list[Launch]:
    """The launches that fill ``y`` [..., N]; none where it is empty. Tensors may be meta ones."""
    if not y.numel():
        return []
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    (rows, columns), outputs = flat.shape, y.shape[-1]
    tile = tile_for(rows)
    signs, factors = signs.contiguous(), factors.contiguous()
    arguments = (
        flat, signs, factors, bias, y, flat.stride(0), rows, outputs, columns, signs.shape[0],
        factors.shape[1], signs.shape[1],
    )  # fmt: skip
    constants = {
        "ROWS": tile.rows, "OUTPUTS": tile.outputs, "COLUMNS": tile.columns,
        "ALIGNED": columns % 8 == 0, "EVEN": columns % tile.columns == 0,
        "PRECISION": PRECISION.get(x.dtype, "tf32"),
        "WIDEN": x.dtype == torch.bfloat16 and x.device.type == "cpu",
    }  # fmt: skip
    grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.outputs),)
    return [Launch(bitstack_kernel, grid, arguments, constants, tile.warps)]


# --- typical calls -------------------------------------------------------------------------------

CASES = (
    (1, 4, 16, torch.float16), (128, 4, 16, torch.bfloat16),
)  # fmt: skip
"""Rows, blocks, rank and dtype: 5632 outputs of 2048 columns."""


def _typical() -> list[tuple[str, Launch]]:
    typical = []
    for rows, blocks, rank, dtype in CASES:
        stored = operand_types(2048, 5632, blocks=blocks, rank=rank)
        shapes: list[tuple[tuple[int, ...], torch.dtype]] = [
            ((rows, 5632), dtype), ((rows, 2048), dtype)
        ]  # fmt: skip
        shapes += [(tuple(int(d) for d in t.shape or ()), t.dtype or dtype) for t in stored]
        operands = [torch.empty(shape, dtype=kind, device="meta") for shape, kind in shapes]
        name = str(dtype).removeprefix("torch.")
        label = f"{rows} x {blocks} blocks of rank {rank} {name}"
        typical += [(label, launch) for launch in launches(*operands)]
    return typical


KERNEL = Kernel(linear_bitstack, HALF_AND_SINGLE, launches=_typical)
