"""Our own ops: each is declared once, in the file of its name (``rope.py`` holds ``ROPE``)."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import torch

from ..core.errors import near_misses
from ..vocab import VOCABULARY, declared, register
from .base import OwnOp, Sample, StockDecoder, own_op


def _declarations() -> Iterator[OwnOp]:
    for module in pkgutil.iter_modules(__path__):
        source = importlib.import_module(f".{module.name}", __name__)
        op = getattr(source, module.name.upper(), None)
        if isinstance(op, OwnOp):
            yield op


OWN_OPS: dict[str, OwnOp] = {op.name: op for op in _declarations()}
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
