"""Attention with a sink: a logit of each head that takes a part of the weights and has no value.

matmul(softmax(concat(logits, sink))[..., :-1], v) => sdpa(q, concat(k, 0), concat(v, 0), mask)

mask = concat(mask, sink): the sink is one more key of zeros, whose logit is what the mask adds, and
whose value is 0. GPT-OSS is written so (arXiv 2508.10925); that a row's greatest logit is taken off
before the softmax changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..core.errors import Refusal
from ..core.view import NATIVE, Node, Operand, Value, View
from ..rewrite.pattern import Match
from ..rewrite.rule import Build, Rule
from .attention import check_shapes, last_two_swapped, mask_of, weighed, zero
from .heads import size
from .logits import Logits, read_logits


@dataclass(frozen=True, slots=True)
class _Sunk:
    logits: Logits
    sink: Value
    """[batch, heads, queries, 1]"""


class FuseSinkAttention(Rule):
    """matmul(softmax(concat(logits, sink))[:-1], v) => sdpa(q, concat(k, 0), concat(v, 0), mask)"""

    name = "fuse-sink-attention"

    def pattern(self, p: Any, logits: Any, start: Any, end: Any, v: Any) -> Any:
        weights = p.softmax(logits, dim=-1)
        return p.matmul(p.slice(weights, start, end, dim=-1, step=1), v)

    def where(self, match: Match) -> None:
        if match.scalar("start") != 0 or match.scalar("end") != -1:
            match.refuse("more or less than the last weight is cut off")
        sunk = _read(match.view, match.value("logits"), match.root)
        check_shapes(match.view, sunk.logits, match.value("v"), match.root)

    def replace(self, build: Build, **bound: Operand) -> Value:
        view = build.view
        sunk = _read(view, build.match.value("logits"), build.match.root)
        logits, values = sunk.logits, build.match.value("v")
        keys = last_two_swapped(build, logits.kt)
        mask = mask_of(build, logits, [step.value for step in logits.steps], boolean=False)
        q, bias = logits.q, zero(build, logits.q) if mask is None else mask
        sizes = (size(build, q, 0), size(build, q, 1), size(build, q, 2), size(build, keys, 2))
        wide = build.concat(build.expand(bias, *sizes), sunk.sink, dim=3)
        k, v = (_one_more(build, value, q) for value in (keys, values))
        return weighed(build, logits, (q, k, v), wide)


def _one_more(build: Build, value: Value, q: Value) -> Value:
    """``value`` [batch, heads, keys, width] with a row of zeros behind its last key."""
    sizes = (size(build, q, 0), size(build, value, 1), 1, size(build, value, 3))
    return build.concat(value, build.expand(zero(build, value), *sizes), dim=2)


def _read(view: View, value: Value, root: Node) -> _Sunk:
    """Logits and the sink that is joined to them. ``Refusal`` where there is none."""
    node = view.maker(value)
    if view.op(node) == "sub":
        value = _unshifted(view, node, root)
        node = view.maker(value)
    shape = view.type(value).shape or ()
    if view.op(node) != "concat" or len(view.operands(node)) != 2 or len(shape) != 4:
        raise Refusal("no logit is joined to those of a product", root)
    scores, sink = view.tensor(node, 0), view.tensor(node, 1)
    one = (*(view.type(scores).shape or ())[:3], 1)
    if view.attrs(node)["dim"] != 3 or view.type(sink).shape != one:
        raise Refusal(f"{view.name(sink)} {view.type(sink)} is not one logit a row", root)
    logits = read_logits(view, scores, root)
    if logits.forms:
        raise Refusal("the product is reshaped before the softmax, but its weights are not", root)
    return _Sunk(logits, sink)


def _unshifted(view: View, node: Node, root: Node) -> Value:
    """x, of x - max(x) along its rows."""
    value, shift = view.tensor(node), view.tensor(node, 1)
    maker = view.maker(shift)
    named = view.native_op(maker) if view.op(maker) == NATIVE else view.op(maker)
    shape = view.type(shift).shape or ()
    if "max" not in named or view.tensor(maker) is not value or shape[-1:] != (1,):
        raise Refusal("what is taken off the logits is not their greatest", root)
    users = set(view.users(value))
    if users != {node, maker} or view.is_output(value):
        raise Refusal(f"the logits {view.name(value)} are also used elsewhere", root)
    return value


RULES: tuple[type[Rule], ...] = (FuseSinkAttention,)
