"""Sums of rows and of columns by constant weights: averages of neighbours, and enlargements."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.view import Value
from ..core.weights import MemoryWeight
from ..vocab.builder import Builder


def mixed_rows(b: Builder, x: Value, table: Tensor, name: str) -> Value:
    """``table @ x`` over the last two dimensions of ``x``, in its dtype."""
    rank = b.view.type(x).rank or 0
    swap = (*range(rank - 2), rank - 1, rank - 2)
    turned = mixed_columns(b, b.transpose(x, perm=swap), table.T, name)
    return b.transpose(turned, perm=swap)


def mixed_columns(b: Builder, x: Value, table: Tensor, name: str) -> Value:
    """``x @ table`` over the last two dimensions of ``x``, of which only the first is symbolic, in
    its dtype.

    All rows in one: ONNX Runtime 1.31 refuses products of no pictures at all that have dimensions
    before the last two. The table is of rank 3, so that it is no linear, whose weight other passes
    would round.
    """
    _, *middle, width = b.view.type(x).shape or ()
    weight = MemoryWeight(table[None].contiguous().to(b.view.type(x).dtype or torch.float32))
    product = b.matmul(b.reshape(x, -1, width), b.view.add_weight(name, weight))
    return b.reshape(product, -1, *middle, table.shape[1])
