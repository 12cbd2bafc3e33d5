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
    """The dtype that arithmetic on the operands has; ``None`` where one is not known."""
    typed = tensors(operands)
    if not typed or any(t.dtype is None for t in typed):
        return None
    ranked = [t for t in typed if t.rank != 0] or typed
    known = [t.dtype for t in ranked if t.dtype is not None]
    result = known[0]
    for dtype in known[1:]:
        result = torch.promote_types(result, dtype)
    if any(isinstance(o, float) for o in operands) and not result.is_floating_point:
        return torch.get_default_dtype()
    return result


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
