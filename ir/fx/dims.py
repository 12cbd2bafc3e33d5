"""Symbolic dimensions of FX graphs: torch's symbols under the names that people gave them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch


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
