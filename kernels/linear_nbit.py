"""``linear_nbit`` on a CUDA device, alone or with a low-rank path: ``x W^T + bias + (x A^T) B^T``.

Codes in the layout of ``ir.ops.pack``, as they lie in memory: nothing is repacked.
Importing this module imports triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
from torch import Tensor

from ..ir.core.errors import BadInput
from ..ir.core.types import Type
from ..ir.ops.linear_nbit import operand_types
from ..ir.ops.pack import block_of
from . import linear_nbit_gemm as gemm
from . import linear_nbit_gemv as gemv
from .launch import Launch, processors
from .registry import HALF_AND_SINGLE, PRECISION, Kernel

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class _Operands:
    """What both forms need, checked and laid out: ``x`` [M, K], ``narrow`` [M, R] or ``None``."""

    x: Tensor
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None
    narrow: Tensor | None
    up: Tensor | None
    bits: int
    group: int
    columns: int
    outputs: int

    @property
    def groups(self) -> int:
        return self.scales.shape[1]

    @property
    def rank(self) -> int:
        return 0 if self.up is None else self.up.shape[1]

    @property
    def real_zeros(self) -> bool:
        return self.zeros is not None and self.zeros.is_floating_point()


def linear_nbit(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    group: int,
    in_features: int,
    out_features: int,
    accuracy_level: int = 0,
) -> Tensor:
    """As the op's reference (``ir.ops.linear_nbit``).

    ``accuracy_level`` 4 lets ``x`` be rounded to 8 bits, which pays on a CPU: here it never is, so
    that the result is nearer to ``x W^T`` than the reference's. Raises ``BadInput`` for another
    width or dtype.
    """
    _check(x, bits)
    y = x.new_empty(*x.shape[:-1], out_features)
    for launch in launches(y, x, codes, scales, zeros, bias, bits=bits, group=group):
        launch.run()
    return y


def linear_nbit_low_rank(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    narrow: Tensor,
    up: Tensor,
    *,
    bits: int,
    group: int,
    in_features: int,
    out_features: int,
    accuracy_level: int = 0,
) -> Tensor:
    """``linear_nbit(x, ...) + narrow @ up.T`` in one kernel, summed in float32.

    ``narrow`` [..., r] is ``x A^T`` in the dtype of ``x``, possibly a slice of what siblings share:
    A is applied once, outside, since every tile of outputs would read it whole. ``up`` is B
    [N, r] in any float dtype. Raises as ``linear_nbit``.
    """
    _check(x, bits)
    y = x.new_empty(*x.shape[:-1], out_features)
    for launch in launches(y, x, codes, scales, zeros, bias, narrow, up, bits=bits, group=group):
        launch.run()
    return y


def _check(x: Tensor, bits: int) -> None:
    if bits not in BITS:
        raise BadInput(f"linear_nbit: the kernel takes 2, 3, 4 and 8 bits, not {bits}")
    if x.dtype not in HALF_AND_SINGLE:
        raise BadInput(f"linear_nbit: the kernel takes {_names(HALF_AND_SINGLE)}, not {x.dtype}")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def launches(
    y: Tensor, x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None = None,
    bias: Tensor | None = None, narrow: Tensor | None = None, up: Tensor | None = None,
    *, bits: int, group: int,
) -> list[Launch]:  # fmt: skip
    """The launches that fill ``y`` [..., N]; none where it is empty. Tensors may be meta ones."""
    if not y.numel():
        return []
    operands = _Operands(
        _rows(x), codes.contiguous(), scales.contiguous(), zeros, bias,
        None if narrow is None else _rows(narrow), None if up is None else up.contiguous(),
        bits, group, x.shape[-1], y.shape[-1],
    )  # fmt: skip
    if operands.x.shape[0] <= gemv.MAX_ROWS:
        return [_gemv(operands, y)]
    return [*_gemm(operands, y)]


def _rows(x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _gemv(o: _Operands, y: Tensor) -> Launch:
    # Of 3 bits a word is 16 codes too, and its parts are aligned to two bytes alone.
    flat = o.codes.reshape(o.outputs, -1)
    words = flat.view(torch.int16 if o.bits == 3 else torch.int32)
    per = 16 if o.bits == 3 else 32 // o.bits
    width = words.shape[1] // 3 if o.bits == 3 else words.shape[1]
    tile = gemv.tile_for(width, o.bits)
    rows = o.x.shape[0]
    # One row has no stride: it is aligned whatever K is.
    stride = o.x.stride(0) if rows > 1 else 0
    arguments = (
        o.x, words, o.scales, o.zeros, o.bias, o.narrow, o.up, y,
        stride, 0 if o.narrow is None else o.narrow.stride(0),
        o.outputs, o.columns, width, o.groups, o.rank, gemv.MAGIC,
    )  # fmt: skip
    constants = {
        "WORDS": tile.words, "BITS": o.bits, "GROUP": o.group,
        "BLOCK": block_of(o.group, o.columns), "REAL_ZEROS": o.real_zeros,
        "EVEN": o.columns % (tile.words * per) == 0,
        "ALIGNED": o.columns % per == 0 and stride % per == 0,
        "RANKS": min(64, triton.next_power_of_2(o.rank)) if o.rank else 0,
    }  # fmt: skip
    grid = (triton.cdiv(o.outputs, gemv.OUTPUTS), rows)
    return Launch(
        gemv.gemv_kernel, grid, arguments, constants, tile.warps, registers=gemv.REGISTERS
    )


def _gemm(o: _Operands, y: Tensor) -> Iterator[Launch]:
    rows, row_bytes = o.x.shape[0], o.codes.shape[1] * o.codes.shape[2]
    tile = gemm.tile_for(rows, wide=o.x.dtype == torch.float32)
    splits = gemm.splits_for(rows, o.outputs, o.columns, tile, processors(o.x.device))
    into = y if splits == 1 else y.new_empty(splits, rows, o.outputs, dtype=torch.float32)
    arguments = (
        o.x, o.codes, o.scales, o.zeros, o.bias, o.narrow, o.up, into,
        o.x.stride(0), 0 if o.narrow is None else o.narrow.stride(0),
        rows, o.outputs, o.columns, row_bytes, o.groups, o.rank,
        triton.cdiv(triton.cdiv(o.columns, tile.columns), splits), gemv.MAGIC,
    )  # fmt: skip
    constants = {
        "ROWS": tile.rows, "OUTPUTS": tile.outputs, "COLUMNS": tile.columns, "BITS": o.bits,
        "GROUP": o.group, "BLOCK": block_of(o.group, o.columns), "REAL_ZEROS": o.real_zeros,
        "EVEN": o.columns % (tile.columns * splits) == 0,
        "RANKS": min(64, max(16, triton.next_power_of_2(o.rank))) if o.rank else 0,
        "PRECISION": PRECISION.get(o.x.dtype, "tf32"),
        "WIDEN": o.x.dtype == torch.bfloat16 and o.x.device.type == "cpu",
    }  # fmt: skip
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(o.outputs, tile.outputs)
    yield Launch(
        gemm.gemm_kernel, (tiles, splits), arguments, constants, tile.warps, tile.stages,
        gemm.REGISTERS[tile.warps],
    )  # fmt: skip
    if splits > 1:
        grid = (triton.cdiv(y.numel(), gemm.JOINED),)
        joined = (into, y, y.numel(), splits)
        yield Launch(gemm.join_kernel, grid, joined, {"BLOCK": gemm.JOINED})


# --- typical calls -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One call to compile: 5632 outputs of 2048 columns."""

    rows: int
    bits: int
    group: int
    zeros: Literal["none", "integer", "real"]
    dtype: torch.dtype
    rank: int = 0

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        low_rank = f" rank {self.rank}" if self.rank else ""
        zeros = {"none": "", "integer": " zeros", "real": " real zeros"}[self.zeros]
        group = f"group {self.group}" if self.group else "rows"
        return f"{self.rows} x {self.bits} bits {group}{zeros} {name}{low_rank}"


CASES = (
    Case(1, 4, 32, "none", torch.float16, 32),
    Case(1, 8, 64, "integer", torch.bfloat16),
    Case(16, 4, 32, "none", torch.bfloat16, 32),
    Case(32, 4, 32, "real", torch.float32, 8),
    Case(64, 4, 128, "integer", torch.float16),
    Case(128, 4, 32, "none", torch.float16, 32),
    Case(128, 8, 0, "real", torch.bfloat16),
    Case(1, 3, 32, "integer", torch.bfloat16),
    Case(1, 2, 64, "none", torch.float16),
    Case(128, 3, 64, "none", torch.bfloat16),
)
"""Every tile, both widths, each kind of zero points and both forms of the low-rank path."""


def _typical() -> list[tuple[str, Launch]]:
    return [
        (str(case), launch)
        for case in CASES
        for launch in launches(*_operands(case), bits=case.bits, group=case.group)
    ]


def _operands(case: Case) -> list[Any]:
    """``y``, then what ``linear_nbit`` and its low-rank form take, without data."""
    columns, outputs = 2048, 5632
    stored = operand_types(columns, outputs, bits=case.bits, group=case.group, zeros=case.zeros)
    shapes = [(case.rows, outputs), (case.rows, columns)]
    path = [(case.rows, case.rank), (outputs, case.rank)] if case.rank else []
    y, x, *factors = [torch.empty(s, dtype=case.dtype, device="meta") for s in shapes + path]
    return [y, x, *map(_empty, stored), None, *factors]


def _empty(stored: Type | None) -> Tensor | None:
    if stored is None or stored.shape is None:
        return None
    return torch.empty([int(d) for d in stored.shape], dtype=stored.dtype, device="meta")


KERNEL = Kernel(
    linear_nbit, HALF_AND_SINGLE, {"bits": BITS}, low_rank=linear_nbit_low_rank, launches=_typical
)
