"""A quantized matrix: what a quantizer gives, and what it takes to store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...ir.core.types import Type
from ...ir.ops.linear_nbit import operand_types
from ...ir.ops.pack import dequantize
from ...ir.ops.sparse_linear import index_dtype

ZeroKind = Literal["none", "integer", "real"]


@dataclass(frozen=True)
class Outliers:
    """Entries kept as they are: operands of ``sparse_linear``, sorted by row, then column."""

    rows: Tensor
    """[nnz], uint16 where the matrix has up to 65536 rows, else int32; ``cols`` likewise."""
    cols: Tensor
    values: Tensor
    """[nnz] in the dtype of the matrix."""


@dataclass(frozen=True)
class Quantized:
    """A matrix [N, K] as ``linear_nbit`` stores it: ``(code - zero) * scale`` of each group."""

    codes: Tensor
    """uint8 [N, blocks, bytes] (``pack``)."""
    scales: Tensor
    """float16 or float32 [N, groups]; negative where the group's extreme is positive."""
    zeros: Tensor | None
    """``None`` (all are 2^(bits-1)), integers as ``pack_zeros`` stores them, or real
    [N, groups] in the scales' dtype."""
    outliers: Outliers | None
    bits: int
    group: int
    """Columns a scale; 0 is the whole row."""
    in_features: int
    rel_l2: float
    """Relative Frobenius error, outliers restored."""

    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes, scales and zeros."""
        return self.codes, self.scales, self.zeros

    def dequantized(self) -> Tensor:
        """The matrix that codes and outliers together stand for, float32 [N, K]."""
        weight = dequantize(
            *self.operands(), bits=self.bits, group=self.group, in_features=self.in_features
        )
        if self.outliers is not None:
            at = (self.outliers.rows.to(torch.int64), self.outliers.cols.to(torch.int64))
            weight[at] += self.outliers.values.float()
        return weight

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored."""
        parts: list[Tensor | None] = [*self.operands()]
        if self.outliers is not None:
            parts += [self.outliers.rows, self.outliers.cols, self.outliers.values]
        return sum(t.numel() * t.element_size() for t in parts if t is not None)


def bits_per_weight(
    in_features: int,
    out_features: int,
    *,
    bits: int,
    group: int,
    zeros: ZeroKind = "none",
    outliers: int = 0,
    scale_dtype: torch.dtype = torch.float16,
    value_dtype: torch.dtype = torch.float32,
) -> float:
    """Stored bits per weight of a matrix [N, K] in a format, by formula.

    Where ``group`` divides K this is ``bits + (16 + z) / group + rho (b + i)``: z is 0, the width
    of an integer zero point (4 bits for codes of up to 4, else 8) or 16; rho the share of outliers,
    b their width, i the 32 bits (64 for matrices beyond 65536) of their place.
    Raises ``BadInput`` where the format has no storage form.
    """
    form: list[Type | None] = [
        *operand_types(
            in_features, out_features, bits=bits, group=group, zeros=zeros, scale_dtype=scale_dtype
        )
    ]
    dtypes = (index_dtype(out_features), index_dtype(in_features), value_dtype)
    form += [Type(dtype, (outliers,)) for dtype in dtypes]
    stored = sum((t.numel or 0) * t.dtype.itemsize for t in form if t is not None and t.dtype)
    return 8 * stored / (in_features * out_features)
