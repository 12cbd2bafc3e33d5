"""A linear's stored parts as a reader of a checkpoint finds them, and the weight that they make."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.errors import BadInput
from ...core.weights import ComputedWeight, FileWeight, Weight
from ...ops.nbit_weight import NBitForm, NBitWeight
from ...ops.pack import BITS, GROUPS, block_of, n_blocks, n_groups, pack, pack_zeros, zero_bytes

Handle = Callable[[str, Callable[[], Tensor], tuple[int, ...], torch.dtype], Weight]
Spread = Callable[[Callable[[], Tensor]], Tensor]
SPLIT = GROUPS[-1]
"""Groups of a multiple of so many columns are cut into such, each with the same scale."""


def needed(name: str, own: Mapping[str, Weight], part: str) -> Weight:
    """A tensor of a linear. Raises ``BadInput`` where it is absent."""
    if part not in own:
        raise BadInput(f"{name}: {part} is not in the checkpoint, and others of it are")
    return own[part]


def finite(name: str, what: str, numbers: Tensor) -> Tensor:
    """The numbers. Raises ``BadInput`` where some are NaN or infinite."""
    if numbers.dtype.is_floating_point and not bool(numbers.isfinite().all()):
        raise BadInput(f"{name}: {what} are not all finite")
    return numbers


def powers_of_two(name: str, exponents: Tensor) -> Tensor:
    """f32 ``2^(e - 127)`` of e8m0, uint8. Raises ``BadInput`` where one is 255, which is NaN."""
    if bool((exponents == 255).any()):
        raise BadInput(f"{name}: an exponent of its scales is 255, which stands for NaN")
    bits = exponents.to(torch.int32) << 23
    return bits.masked_fill_(bits == 0, 1 << 22).view(torch.float32)  # 2^-127 is subnormal


@dataclass(frozen=True)
class Parts:
    """Codes, scales and zero points of one linear ``[N, K]``, each read when it is called."""

    name: str
    """Of the linear, for errors."""
    rows: int
    columns: int
    bits: int
    group: int
    """Columns of a group; 0 for one a row."""
    codes: Callable[[], Tensor]
    """uint8 ``[N, K]``, in the order of the groups."""
    scales: Callable[[], Tensor]
    """``[N, groups]`` in ``scale_dtype``."""
    scale_dtype: torch.dtype
    zeros: Callable[[], Tensor] | None
    """uint8 ``[N, groups]``; ``None`` where all are the middle code."""
    order: Callable[[], Tensor] | None = None
    """i64 ``[K]``: see ``NBitForm``."""
    key: object = None
    """Identity of the bytes."""
    real_zeros: bool = False
    """Whether ``zeros`` are real numbers, ``[N, groups]`` in ``scale_dtype``."""

    def weight(self) -> NBitWeight:
        """The weight. Raises ``BadInput`` where no form of ours is equal to it."""
        group = self._group()
        if self.bits not in BITS:
            raise BadInput(
                f"{self.name}: {self.bits} bits a weight; {', '.join(map(str, BITS))} are read"
            )
        groups, times = n_groups(group, self.columns), self.group // group if group else 1

        def handle(what: str, make: Callable[[], Tensor], shape: tuple[int, ...],
                   kind: torch.dtype) -> Weight:  # fmt: skip
            return ComputedWeight(make, shape, kind, (what, self.key, self.name))

        def spread(make: Callable[[], Tensor]) -> Tensor:
            return (
                finite(self.name, "scales or zero points", make())
                .repeat_interleave(times, 1)[:, :groups]
                .contiguous()
            )

        row = (n_blocks(group, self.columns), block_of(group, self.columns) * self.bits // 8)
        order = self.order
        form = NBitForm(
            self.bits, group,
            handle("codes", lambda: pack(self.codes(), self.bits, group), (self.rows, *row),
                   torch.uint8),
            handle("scales", lambda: spread(self.scales), (self.rows, groups), self.scale_dtype),
            self._zeros(handle, spread, groups),
            None if order is None else handle("order", order, (self.columns,), torch.int64),
        )  # fmt: skip
        return NBitWeight(form, (self.rows, self.columns))

    def _zeros(self, handle: Handle, spread: Spread, groups: int) -> Weight | None:
        zeros = self.zeros
        if zeros is None:
            return None
        if self.real_zeros:
            return handle("zeros", lambda: spread(zeros), (self.rows, groups), self.scale_dtype)
        size = zero_bytes(self.bits, groups)
        return handle("zeros", lambda: pack_zeros(spread(zeros), self.bits), (self.rows, size),
                      torch.uint8)  # fmt: skip

    def _group(self) -> int:
        if self.group in GROUPS:
            return self.group
        if self.group >= self.columns:
            return 0
        if self.group % SPLIT == 0:
            return SPLIT
        raise BadInput(
            f"{self.name}: groups of {self.group} columns; {', '.join(map(str, GROUPS[1:]))}, "
            f"multiples of {SPLIT} and one for a whole row are read"
        )


def cut_stack(stack: FileWeight) -> Iterator[FileWeight]:
    """Each of a stack, where it lies in the file."""
    count, *shape = stack.shape
    for index in range(count):
        yield stack.part(index * math.prod(shape), tuple(shape))
