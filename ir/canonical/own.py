"""Ops of ours whose declaration says how their ONNX form is read back become these ops again."""

from __future__ import annotations

from typing import Any

from ..core.view import Operand, Value
from ..ops import OwnOp, StockDecoder
from ..rewrite.pattern import Match
from ..rewrite.rule import Build, Rule
from ..vocab import VOCABULARY, is_known, load_dialects


def own_rules() -> tuple[type[Rule], ...]:
    """A rule for each decoder that an op declares, those of other packages among them."""
    load_dialects()
    own = [op for op in VOCABULARY.values() if isinstance(op, OwnOp)]
    return tuple(_rule(op, decoder) for op in own for decoder in op.decoders)


def _rule(op: OwnOp, decoder: StockDecoder) -> type[Rule]:
    class FuseOwn(Rule):
        __doc__ = f"{decoder.root}(...), as {op.name} is written for ONNX => {op.name}(...)"
        name = f"fuse-{op.name.replace('_', '-')}"

        def pattern(self, p: Any) -> Any:
            if is_known(decoder.root):
                return getattr(p, decoder.root)(rest=True)
            return p.native(decoder.root, rest=True)

        def where(self, match: Match) -> None:
            decoder.decode(match.view, match.root)

        def replace(self, build: Build, **bound: Operand) -> Value:
            operands, attrs = decoder.decode(build.view, build.match.root)
            return build.build(op.name, *operands, **attrs)

    return FuseOwn
