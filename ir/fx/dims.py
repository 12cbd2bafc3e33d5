"""Symbolic dimensions of FX graphs: torch's symbols under the names that people gave them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

Sizes: TypeAlias = Sequence[int | torch.SymInt]
SIZE = (int, torch.SymInt)


class FxDims:
    """Names of a graph's symbolic dimensions; ``symbols`` maps torch's (``s43``) to them."""

    def __init__(self, symbols: Mapping[str, str]) -> None:
        self.symbols = dict(symbols)
        self._texts: dict[Any, str] = {}
        self._sizes: dict[str, torch.SymInt] = {}

    def text(self, dim: int | torch.SymInt) -> int | str:
        """A dimension in the words of ``types``: a number, or an expression of names."""
        if isinstance(dim, int):
            return dim
        expr = dim.node.expr
        text = self._texts.get(expr)
        if text is None:
            text = re.sub(r"[a-z]+\d+", lambda m: self.symbols.get(m[0], m[0]), str(expr))
            self._texts[expr] = text
            self._sizes[text] = dim
        return int(text) if text.isdigit() else text

    def size(self, dim: int | str) -> int | torch.SymInt | None:
        """The dimension as torch has it; ``None`` for one that ``text`` has not seen."""
        return dim if isinstance(dim, int) else self._sizes.get(dim)

    def symbol(self, number: int, name: str, shape_env: Any, at: str) -> torch.SymInt:
        """A new symbol called ``name`` for a dimension that the example inputs made a number.

        A trace keeps symbols for the dimensions that were declared dynamic and no others, and
        ``torch.export`` has no public way to make one afterwards: this asks the tracer's own
        environment of shapes, in the words that the exporter uses for its inputs. ``at`` tells the
        sources of symbols apart.
        """
        # Here, as they load half of the compiler.
        from torch._dynamo.source import ConstantSource
        from torch.fx.experimental.symbolic_shapes import DimDynamic

        source = ConstantSource(f"dim_{len(self.symbols)}_{at}")
        symbol = shape_env.create_symbol(
            number, source, DimDynamic.DYNAMIC, None, do_not_specialize_zero_one=True
        )
        self.symbols[str(symbol)] = name
        size: torch.SymInt = shape_env.create_symintnode(symbol, hint=number, source=source)
        return size


# --- sizes that are written out -------------------------------------------------------------------


def reshaped(old: Sizes, wanted: Sizes) -> Sizes | None:
    """The sizes of a reshape, of which one may be -1; ``None`` where ``old`` does not plainly have
    as many elements."""
    left = [i for i, size in enumerate(wanted) if isinstance(size, int) and size == -1]
    sizes, total = list(wanted), math.prod(old)
    kept = [size for i, size in enumerate(wanted) if i not in left]
    if len(left) > 1 or any(isinstance(size, int) and size < 1 for size in (*old, *kept)):
        return None
    for i in left:
        sizes[i] = total // math.prod(kept)
    return sizes if same(math.prod(sizes), total) else None


def expanded(old: Sizes, wanted: Sizes) -> Sizes | None:
    """The sizes of an expansion, -1 for those that stay; ``None`` where they do not plainly fit."""
    new = len(wanted) - len(old)
    if new < 0 or any(isinstance(size, int) and size < 0 for size in wanted[:new]):
        return None  # a dimension that is new has no size to keep
    sizes = [own if isinstance(size, int) and size == -1 else size
             for own, size in zip((*wanted[:new], *old), wanted, strict=True)]  # fmt: skip
    fit = all(same(own, 1) or same(own, size) for own, size in zip(old, sizes[new:], strict=True))
    return sizes if fit else None


RESIZED: Mapping[str, Callable[[Sizes, Sizes], Sizes | None]] = {
    "reshape": reshaped, "expand": expanded,
}  # fmt: skip
"""By op, the rule for sizes that are operands of their own: a fake run takes 7 ms for each."""


def same(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are one number or one expression, which asks nothing of any symbol."""
    return bool(_expression(a) == _expression(b))


def _expression(size: int | torch.SymInt) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size
