"""Our own ops: each is declared once, in the file of its name, and listed here."""

from __future__ import annotations

import torch

from ..core.errors import near_misses
from ..vocab import VOCABULARY, declared, register
from .base import OwnOp, Sample, StockDecoder, own_op
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
for _op in OWN_OPS.values():
    register(_op)


def torch_op(name: str) -> torch._ops.OpOverload:
    """The torch op ``graphwright::NAME``, registered on first use; ``KeyError`` if unknown."""
    op = declared(name)
    if not isinstance(op, OwnOp):
        own = [name for name, op in VOCABULARY.items() if isinstance(op, OwnOp)]
        raise KeyError(f"no op of ours is called {name!r}; {near_misses(name, own)}")
    return op.overload


__all__ = ["OWN_OPS", "OwnOp", "Sample", "StockDecoder", "own_op", "torch_op"]
