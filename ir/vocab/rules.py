"""Type rules that ops of several families share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..core.types import Dim, Type, broadcast
from .spec import Attrs, Types


def tensors(operands: Sequence[Any]) -> list[Type]:
    """The operands that are no numbers."""
    return [o for o in operands if isinstance(o, Type)]


def promote(operands: Sequence[Any]) -> torch.dtype | None:
    """The dtype that arithmetic on the operands has; ``None`` where one is not known.

    As ``torch.result_type``: beside tensors with dimensions, those without, and beside both
    numbers, count only where they are of a higher kind (truth value, whole number, float).
    """
    typed = tensors(operands)
    if not typed or any(t.dtype is None for t in typed):
        return None
    wide = [t.dtype for t in typed if t.rank != 0]
    single = [t.dtype for t in typed if t.rank == 0]
    numbers = [_dtype_of(o) for o in operands if isinstance(o, bool | int | float)]
    result = torch.bool
    for dtypes in (wide, single, numbers):
        own = torch.bool
        for dtype in dtypes:
            own = own if dtype is None else _wider(own, dtype)
        if _kind(own) > _kind(result):
            result = own
    return result


def _wider(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """``torch.promote_types``, which knows uint16 to uint64 beside nothing, not even themselves."""
    if a == torch.bool or a == b:
        return b
    try:
        return a if b == torch.bool else torch.promote_types(a, b)
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def _dtype_of(number: bool | float) -> torch.dtype:
    if isinstance(number, bool):
        return torch.bool
    return torch.int64 if isinstance(number, int) else torch.get_default_dtype()


def _kind(dtype: torch.dtype) -> int:
    if dtype == torch.bool:
        return 0
    return 1 + dtype.is_floating_point + 2 * dtype.is_complex


def same(operands: Sequence[Any], attrs: Attrs) -> Types:
    return (operands[0],)


def elementwise(operands: Sequence[Any], attrs: Attrs) -> Types:
    return (Type(promote(operands), broadcast(*(t.shape for t in tensors(operands)))),)


def comparison(operands: Sequence[Any], attrs: Attrs) -> Types:
    return (Type(torch.bool, broadcast(*(t.shape for t in tensors(operands)))),)


def from_the_left(dims: Sequence[int], rank: int) -> set[int]:
    return {d % rank for d in dims} if rank else set()


def same_size(a: Dim, b: Dim, op: str, which: str = "inner") -> None:
    """Raise ``ValueError`` where two dimensions that must be equal are known not to be."""
    if isinstance(a, int) and isinstance(b, int) and a != b:
        raise ValueError(f"{op}: {which} dimensions {a} and {b} differ")
