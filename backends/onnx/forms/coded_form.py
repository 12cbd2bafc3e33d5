"""Weights that a file held in codes, and no pass gave other numbers, are written in these codes."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ....ir.core.view import Operand, Value, View
from ....ir.ops import OwnOp
from ....ir.ops.coded_weight import CodedWeight, coded
from ....ir.ops.linear_bnb4 import BLOCKS, LINEAR_BNB4
from ....ir.rewrite.pattern import Match
from ....ir.rewrite.rule import Build, Rule
from ....ir.structure.weights import weight_behind
from ....ir.vocab import declared, spec
from ....ir.vocab.targets import Target

UNPACKED = (
    "a CPU unpacks codes of NF4 and FP4 at each call (2.5 ms for a row of 2048 x 2048): "
    "quantize{bits=4} is faster there (0.08 ms), and rounds once more, by some 9 % of each matrix"
)
"""As ``bench.format_codes`` has it: see ``linear_bnb4``, and FORMATS.md for the error."""


class KeepCodes(Rule):
    """linear(x, w, b) => linear_bnb4(x, codes, absmax, b), or what else w is stored for"""

    name = "keep-codes"

    def pattern(self, p: Any, x: Any, w: Any) -> Any:
        return p.linear(x, w, rest=True)

    def where(self, match: Match) -> None:
        if _stored(match) is None:
            match.refuse("its weight is numbers")

    def replace(self, build: Build, **bound: Operand) -> Value:
        view, match, weight = build.view, build.match, _stored(build.match)
        assert weight is not None
        name = view.name(weight_behind(view, match.root)).removesuffix(".T")
        site = name.removesuffix(".weight")
        named = {part: view.add_weight(f"{site}.{part}", w) for part, w in weight.parts.items()}
        names = (part.removesuffix("?") for part in spec(weight.op).operands[1:-1])
        operands: list[Operand] = [*map(named.get, names)]
        operands += view.operands(match.root)[2:]
        while operands[-1] is None:
            operands.pop()
        return build.build(weight.op, bound["x"], *operands, **weight.attrs)


def _stored(match: Match) -> CodedWeight | None:
    return coded(match.view.weight(weight_behind(match.view, match.root)))


def codes_kept(view: View) -> str:
    """How many linears of a graph have which codes, in words; empty where none has."""
    forms: Counter[str] = Counter()
    for node in view.nodes():
        op = declared(view.op(node))
        if isinstance(op, OwnOp) and op.as_numbers and op.stored_linear is not None:
            forms[op.stored_linear(view.attrs(node))] += 1
    return ", ".join(f"{count} of {form}" for form, count in forms.items())


def are_unpacked(view: View, target: Target) -> bool:
    """Whether linears of a graph become nodes that make their matrix anew at each call."""
    if "cuda" in target.providers or target.form(LINEAR_BNB4.name) is not None:
        return False
    return any(
        view.op(node) == LINEAR_BNB4.name and view.attrs(node)["block"] in BLOCKS
        for node in view.nodes()
    )
