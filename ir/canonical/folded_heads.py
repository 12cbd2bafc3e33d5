"""Attention whose products join batch and heads into one dimension, as ``baddbmm`` and ``bmm`` ask.

reshape(matmul(softmax(logits), reshape(v))) => sdpa(q, k, v, mask), of logits with reshape(q) and
reshape(k): [batch, heads, tokens, width] as [batch · heads, tokens, width] and back

BLOOM, XGLM, DeBERTa-v2 and Table Transformer are written so. What is added to joined logits is
parted by heads; masks that are added between two reshapes stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..core.errors import Refusal
from ..core.types import UNKNOWN_DIM
from ..core.view import Node, Operand, Value, View
from ..rewrite.pattern import Match
from ..rewrite.rule import Build, Rule
from .attention import check_shapes, last_two_swapped, mask_of, weighed
from .heads import shaped
from .logits import Logits, read_logits


@dataclass(frozen=True, slots=True)
class _Parts:
    """What the products were joined from, each [batch, heads, tokens, width]."""

    logits: Logits
    q: Value
    k: Value
    v: Value
    swapped: bool
    """Whether ``k`` is [batch, heads, width, tokens]."""


class FuseFoldedHeads(Rule):
    """reshape(matmul(softmax(logits), reshape(v))) => sdpa(q, k, v, mask)"""

    name = "fuse-folded-heads"

    def pattern(self, p: Any, weights: Any, v: Any) -> Any:
        return p.reshape(p.matmul(weights, p.reshape(v, rest=True)), rest=True)

    def where(self, match: Match) -> None:
        _read(match.view, match.value("weights"), match.value("v"), match.root)

    def replace(self, build: Build, **bound: Operand) -> Value:
        match = build.match
        parts = _read(build.view, match.value("weights"), match.value("v"), match.root)
        logits = parts.logits
        key = last_two_swapped(build, parts.k) if parts.swapped else parts.k
        added = [_parted(build, step.value, step.at, parts.q) for step in logits.steps]
        mask = mask_of(build, logits, added)
        return weighed(build, logits, (parts.q, key, parts.v), mask)


def _read(view: View, weights: Value, v: Value, root: Node) -> _Parts:
    """The parts of folded attention. ``Refusal`` where a reshape does more than join heads."""
    softmax = view.producer(weights)
    forms: list[Value] = []
    while softmax is not None and view.op(softmax) == "reshape":
        if len(view.users(weights)) > 1:
            raise Refusal(f"the weights {view.name(weights)} are also used elsewhere", root)
        forms.append(weights)
        weights = view.tensor(softmax)
        softmax = view.producer(weights)
    if softmax is None or view.op(softmax) != "softmax" or len(view.users(weights)) > 1:
        raise Refusal("what is multiplied are not the weights of one softmax", root)
    if view.is_output(weights) or any(map(view.is_output, forms)):
        raise Refusal("the weights are an output of the graph", root)
    if view.attrs(softmax)["dim"] != (view.type(weights).rank or 0) - 1:
        raise Refusal("the softmax is not along the keys", root)
    logits = read_logits(view, view.tensor(softmax), root)
    product = view.maker(view.tensor(root))
    check_shapes(view, logits, view.tensor(product, 1), root)
    k, swapped = _keys(view, logits.kt, root)
    parts = _Parts(logits, _joined_from(view, logits.q, root), k, v, swapped)
    _check_forms(view, parts, (weights, *forms), root)
    return parts


def _keys(view: View, kt: Value, root: Node) -> tuple[Value, bool]:
    """Keys before heads were joined, and whether their last two dimensions were swapped there."""
    node = view.producer(kt)
    if node is None or view.op(node) != "transpose":
        return _joined_from(view, kt, root), True
    if tuple(view.attrs(node)["perm"]) != (0, 2, 1):
        raise Refusal("the keys are transposed in another way than a product asks", root)
    return _joined_from(view, view.tensor(node), root), False


def _joined_from(view: View, value: Value, root: Node) -> Value:
    node = view.producer(value)
    if node is None or view.op(node) != "reshape":
        raise Refusal(f"{view.name(value)} is not joined of heads", root)
    return view.tensor(node)


def _check_forms(view: View, parts: _Parts, weights: tuple[Value, ...], root: Node) -> None:
    """Refuse unless every reshape joins batch and heads, or parts them again."""
    shapes = [view.type(x).shape or () for x in (parts.q, parts.k, parts.v)]
    if any(len(shape) != 4 for shape in shapes):
        raise Refusal("its parts are not all [batch, heads, tokens, width]", root)
    (batch, heads, rows, width), _, (*_, count, out) = shapes
    if not isinstance(heads, int) or UNKNOWN_DIM in (batch, rows, count):
        raise Refusal(f"{view.type(parts.q)}: sizes are not known", root)
    logits = parts.logits
    last = (width, count) if parts.swapped else (count, width)
    held = {parts.k: last, parts.v: (count, out), view.results(root)[0]: (rows, out)}
    if any((view.type(x).shape or ()) != (batch, heads, *ends) for x, ends in held.items()):
        raise Refusal(f"{view.type(parts.q)}: more than heads are joined", root)
    held = {logits.q: (rows, width), logits.kt: (width, count)}
    met = (*logits.forms, *weights, *(step.at for step in logits.steps))
    held |= dict.fromkeys(met, (rows, count))
    for value, ends in held.items():
        shape = view.type(value).shape or ()
        if shape[-2:] != ends or (len(shape) != 3 and shape[:2] != (batch, heads)):
            raise Refusal(f"{view.name(value)} {view.type(value)} is of another shape", root)


def _parted(build: Build, mask: Value | None, at: Value, q: Value) -> Value | None:
    """A mask of logits ``at``, parted by heads where those are joined."""
    view = build.view
    if mask is None or view.type(at).rank == 4:
        return mask
    shape, heads = view.type(mask).shape, (view.type(q).shape or ())[1]
    if shape is None or len(shape) != 3 or shape[0] == 1:
        return mask  # one for all heads: it is repeated, as it was
    assert isinstance(heads, int)
    return shaped(build, mask, (q, 0), heads, (mask, 1), (mask, 2))


RULES: tuple[type[Rule], ...] = (FuseFoldedHeads,)
