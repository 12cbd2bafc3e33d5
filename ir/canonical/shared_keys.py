"""Attention as artifacts spell it out: see ``backends.onnx.forms.attention_form``.

reshape(matmul(reshape(softmax(logits)), v)) => sdpa(q, k, v, mask, gqa), query heads in one product
where(empty, 0, sdpa(q, k, v, safe))         => sdpa(q, k, v, mask), safe = where(empty, 0, mask)

In the second ``empty`` is isnan(softmax(mask)[..., :1]): the rows of which all keys are masked.
"""

from __future__ import annotations

import math
from typing import Any

from ..core.errors import Refusal
from ..core.types import UNKNOWN_DIM
from ..core.view import Node, Operand, Value, View, is_value
from ..rewrite.pattern import Match
from ..rewrite.rule import Build, Rule
from .attention import attend, check_shapes
from .logits import Logits, read_logits


class FuseSharedKeys(Rule):
    """reshape(matmul(reshape(softmax(logits)), v)) => sdpa(q, k, v, mask, gqa)"""

    name = "fuse-shared-keys"

    def pattern(self, p: Any, logits: Any, v: Any) -> Any:
        weights = p.softmax(logits, dim=-1)
        return p.reshape(p.matmul(p.reshape(weights, rest=True), v), rest=True)

    def where(self, match: Match) -> None:
        view, root = match.view, match.root
        logits = read_logits(view, match.value("logits"), root)
        check_shapes(view, logits, match.value("v"), root)
        _check_heads(view, logits, match.value("v"), root)

    def replace(self, build: Build, **bound: Operand) -> Value:
        view = build.view
        logits = read_logits(view, build.match.value("logits"), build.match.root)
        return attend(build, logits, _apart(view, logits), bound["v"], gqa=True)


class FuseGuardedSharedKeys(FuseSharedKeys):
    """reshape(matmul(reshape(where(isnan(p), 0, p)), v)) => sdpa(q, k, v, mask, gqa), p softmax"""

    name = "fuse-guarded-shared-keys"

    def pattern(self, p: Any, logits: Any, v: Any) -> Any:
        weights = p.softmax(logits, dim=-1)
        guarded = p.where(p.isnan(weights), 0.0, weights)
        return p.reshape(p.matmul(p.reshape(guarded, rest=True), v), rest=True)


def _apart(view: View, logits: Logits) -> Value:
    """The queries before heads that share keys were joined."""
    node = view.producer(logits.q)
    if node is None or view.op(node) != "reshape":
        raise Refusal("the queries are not reshaped, as their product is")
    return view.tensor(node)


def _check_heads(view: View, logits: Logits, v: Value, root: Node) -> None:
    """Refuse unless each reshape only joins or parts the heads that share keys and their rows."""
    if len(logits.forms) != 1:
        raise Refusal("the weights are reshaped, but not the product that they are made of", root)
    masked = (step.at for step in logits.steps)
    q, parts = _apart(view, logits), (*logits.forms, *masked, view.results(root)[0])
    shapes = [view.type(x).shape or () for x in (q, logits.q, v, *parts)]
    if any(len(shape) != 4 for shape in shapes):
        raise Refusal("its parts are not all [batch, heads, tokens, width]", root)
    (batch, heads, rows, width), joined, values, *both = shapes
    shared = joined[1]
    same = (joined[0], joined[3], values[1]) == (batch, width, shared)
    if not same or any(shape[:3] != (batch, heads, rows) for shape in both):
        raise Refusal(f"{view.type(q)} as {view.type(logits.q)}: more than heads are joined", root)
    known = isinstance(heads, int) and isinstance(shared, int) and shared > 0
    divides = known and int(heads) % int(shared) == 0
    if not divides or UNKNOWN_DIM in (batch, rows, width):
        raise Refusal(f"{view.type(q)} as {view.type(logits.q)}: sizes are not known", root)


class FuseEmptyRows(Rule):
    """where(empty, 0, sdpa(q, k, v, where(empty, 0, mask))) => sdpa(q, k, v, mask)"""

    name = "fuse-empty-rows"

    def pattern(self, p: Any, empty: Any, q: Any, k: Any, v: Any, safe: Any) -> Any:
        return p.where(empty, 0.0, p.sdpa(q, k, v, safe))

    def where(self, match: Match) -> None:
        _unguarded(match)

    def replace(self, build: Build, **bound: Operand) -> Value:
        view, match = build.view, build.match
        (attention,) = (node for node in match.nodes if view.op(node) == "sdpa")
        operands = (bound["q"], bound["k"], bound["v"], _unguarded(match))
        return build.sdpa(*operands, **view.attrs(attention))


def _unguarded(match: Match) -> Value:
    """The mask itself: true where it is 0 or minus infinity by one. ``Refusal`` where rows are left
    unmasked for another reason than that all of their keys are masked."""
    view, empty = match.view, match.value("empty")
    chosen = view.maker(match.value("safe"))
    if view.op(chosen) != "where":
        raise Refusal(f"the mask is made by `{view.op(chosen)}`, not chosen by row", match.root)
    condition, other, mask = view.operands(chosen)
    if condition is not empty or view.number(other) != 0 or not is_value(mask):
        raise Refusal("the mask is chosen by another condition than the result", match.root)
    if not _finds_empty_rows(view, empty, mask):
        raise Refusal("what is set to 0 is not the rows of which all keys are masked", match.root)
    return _boolean(view, mask)


def _finds_empty_rows(view: View, empty: Value, mask: Value) -> bool:
    """Whether a value is isnan of the first column of softmax(mask)."""
    isnan = view.producer(empty)
    if isnan is None or view.op(isnan) != "isnan":
        return False
    first = view.producer(view.tensor(isnan))
    if first is None or view.op(first) != "slice":
        return False
    column, start, end = view.operands(first)[:3]
    softmax = view.producer(column) if is_value(column) else None
    if softmax is None or view.op(softmax) != "softmax" or view.tensor(softmax) is not mask:
        return False
    rank = view.type(mask).rank
    dims = [view.attrs(node)["dim"] for node in (first, softmax)]
    whole = (view.number(start), view.number(end)) == (0, 1)
    return whole and rank is not None and dims == [rank - 1] * 2


def _boolean(view: View, mask: Value) -> Value:
    maker = view.producer(mask)
    if maker is None or view.op(maker) != "where":
        return mask
    condition, kept, fill = view.operands(maker)
    plain = view.number(kept) == 0 and view.number(fill) == -math.inf
    return condition if plain and is_value(condition) else mask


RULES: tuple[type[Rule], ...] = (FuseGuardedSharedKeys, FuseSharedKeys, FuseEmptyRows)
