"""Ops of ours whose declaration says how their ONNX form is read back become these ops again.

One that passes see as numbers becomes ``linear`` with a weight that knows how it is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..core.view import Operand, Value, is_value
from ..core.weights import Weight
from ..ops import OwnOp, StockDecoder
from ..ops.coded_weight import CodedWeight
from ..rewrite.pattern import Match
from ..rewrite.rule import Build, Rule
from ..vocab import VOCABULARY, is_known, load_dialects
from ..vocab.spec import Attrs


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
            if op.as_numbers:
                return _numbers(build, op, operands, attrs)
            return build.build(op.name, *operands, **attrs)

    return FuseOwn


def _numbers(build: Build, op: OwnOp, operands: Sequence[Operand], attrs: Attrs) -> Value:
    """``linear(x, w)``, w what the constants behind ``x`` stand for."""
    view, (x, *constants) = build.view, operands
    parts: dict[str, Weight] = {}
    for name, constant in zip(op.operands[1:], constants, strict=False):
        handle = view.weight(constant)
        if handle is not None:
            parts[name.removesuffix("?")] = handle
    assert is_value(constants[0])
    name = view.name(constants[0])
    site = name.removesuffix(".codes").removesuffix(".weight")
    weight = CodedWeight(op.name, parts, attrs)
    return build.linear(x, view.add_weight(f"{site}.weight", weight))
