"""A matrix that a file holds in few bits: dense for whoever reads it, and in parts for a graph."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch

from ..core.weights import Weight
from .pack import dequantize


@dataclass(frozen=True)
class NBitForm:
    """Operands of ``linear_nbit`` as handles, in the layout of ``pack``."""

    bits: int
    group: int
    codes: Weight
    scales: Weight
    zeros: Weight | None = None
    order: Weight | None = None
    """Where columns were sorted by their groups (act-order): i64 [K], the column of the matrix that
    each stored one is. A linear then takes its input in that order."""

    @property
    def parts(self) -> tuple[Weight | None, ...]:
        return self.codes, self.scales, self.zeros, self.order


class NBitWeight(Weight):
    """``(code - zero) * scale`` float32 ``[N, K]``, computed each time that it is read."""

    shape: tuple[int, int]

    def __init__(self, form: NBitForm, shape: tuple[int, int]) -> None:
        self.form, self.shape, self.dtype = form, shape, torch.float32

    def read(self) -> torch.Tensor:
        form = self.form
        zeros = None if form.zeros is None else form.zeros.read()
        dense = dequantize(
            form.codes.read(), form.scales.read(), zeros,
            bits=form.bits, group=form.group, in_features=self.shape[1],
        )  # fmt: skip
        if form.order is not None:
            dense[:, form.order.read()] = dense.clone()
        return dense

    @property
    def key(self) -> Hashable:
        parts = tuple(part and part.key for part in self.form.parts)
        return ("nbit", self.form.bits, self.form.group, parts)
