"""Our own ops: each is declared once, in the file of its name, and listed here."""

from __future__ import annotations

import torch

from ..core.errors import near_misses
from .base import OwnOp, Sample, kernel_for, register_kernel
from .linear_bitstack import LINEAR_BITSTACK
from .linear_nbit import LINEAR_NBIT
from .rope import ROPE
from .sdpa import SDPA
from .sparse_linear import SPARSE_LINEAR
from .token_select import TOKEN_SELECT

OWN_OPS: dict[str, OwnOp] = {
    op.name: op
    for op in (LINEAR_NBIT, LINEAR_BITSTACK, SPARSE_LINEAR, ROPE, SDPA, TOKEN_SELECT)
}


def torch_op(name: str) -> torch._ops.OpOverload:
    """The torch op ``graphwright::NAME``, registered on first use; ``KeyError`` if unknown."""
    if name not in OWN_OPS:
        raise KeyError(f"no op of ours is called {name!r}; {near_misses(name, OWN_OPS)}")
    return OWN_OPS[name].overload


__all__ = ["OWN_OPS", "OwnOp", "Sample", "kernel_for", "register_kernel", "torch_op"]
