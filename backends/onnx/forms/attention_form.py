"""How attention is written for a runtime that has no op for it: products, a softmax, a mask.

sdpa(q, repeat(k), repeat(v), mask)  => sdpa(q, k, v, mask, gqa)
sdpa(q, k, v, mask)                  => matmul(softmax(q kᵀ · scale + mask), v)

Query heads that share keys go into one product: ``q`` [batch, heads, queries, width] is taken as
[batch, kv heads, heads / kv heads · queries, width], which moves nothing, and neither keys nor
values are repeated. Measured with ONNX Runtime 1.31 on one AVX-512 core, a token of 14 heads that
share 2 of width 64, attention alone: 253 us at 1,024 keys and 1,159 us at 4,000 with ``Expand``,
81 us and 239 us without.

A row of which every key is masked gives 0. Rather than looking for NaN in all weights, such a row
is left unmasked and its result set to 0: which rows these are follows from the mask alone, once for
all layers. Half types keep the other guard, for in them a sum of logit and mask may overflow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ....ir.canonical.heads import causal, filled, name_after, size
from ....ir.core.errors import Refusal
from ....ir.core.types import UNKNOWN_DIM
from ....ir.core.view import Operand, Value, View, is_value
from ....ir.rewrite.pattern import Match
from ....ir.rewrite.rule import Build, Rule


class ShareKeys(Rule):
    """sdpa(q, repeat(k), repeat(v), mask) => sdpa(q, k, v, mask, gqa)"""

    name = "share-keys"

    def pattern(self, p: Any, q: Any, k: Any, v: Any) -> Any:
        return p.sdpa(q, k, v, rest=True)

    def where(self, match: Match) -> None:
        if match.view.attrs(match.root)["gqa"]:
            match.refuse("its keys are shared already")
        for name in "kv":
            _unrepeated(match.view, match.value(name))

    def replace(self, build: Build, **bound: Operand) -> Value:
        view, root = build.view, build.match.root
        k, v = (_unrepeated(view, build.match.value(name)) for name in "kv")
        attrs = {**view.attrs(root), "gqa": True}
        return build.sdpa(bound["q"], k, v, *view.operands(root)[3:], **attrs)


def _unrepeated(view: View, repeated: Value) -> Value:
    """The heads of which ``repeated`` has each several times in a row; ``Refusal`` where it is made
    otherwise. Others may use it too: layers that share one cache do."""
    wide = _maker_input(view, repeated, "reshape")
    apart = _maker_input(view, wide, "expand")
    x = _maker_input(view, apart, "unsqueeze")
    types = [view.type(value) for value in (x, apart, wide, repeated)]
    if [t.rank for t in types] != [4, 5, 5, 4]:
        raise Refusal(f"{types[0]}, {types[2]} and {types[3]} are not heads, apart and repeated")
    one, lone, many, flat = (t.shape or () for t in types)
    kept = one == (*lone[:2], *lone[3:]) == (*many[:2], *many[3:])
    joined = (many[0], _product(many[1], many[2]), *many[3:])
    if UNKNOWN_DIM in (*one, *flat) or not kept or joined != flat:
        raise Refusal(f"{types[0]} as {types[2]} and {types[3]} does more than repeat heads")
    return x


def _maker_input(view: View, value: Value, op: str) -> Value:
    node = view.producer(value)
    if node is None or view.op(node) != op:
        origin = "an input" if node is None else f"`{view.op(node)}`"
        raise Refusal(f"keys or values come from {origin}, not from `{op}`: no head is repeated")
    return view.tensor(node)


def _product(a: Any, b: Any) -> Any:
    return a * b if isinstance(a, int) and isinstance(b, int) else UNKNOWN_DIM


class SpellAttention(Rule):
    """sdpa(q, k, v, mask) => matmul(softmax(q kᵀ · scale + mask), v)"""

    name = "spell-attention"

    def pattern(self, p: Any, q: Any, k: Any, v: Any) -> Any:
        return p.sdpa(q, k, v, rest=True)

    def where(self, match: Match) -> None:
        types = [match.type(name) for name in "qkv"]
        masks = [match.view.type(o) for o in match.view.operands(match.root)[3:] if is_value(o)]
        if any(t.rank != 4 for t in types) or any(t.rank in (None, 0) for t in masks):
            match.refuse("only [batch, heads, tokens, width] is spelled out here")
        heads = [t.shape[1] for t in types if t.shape is not None]
        sizes = (*heads, match.last_dim("q"))
        if not all(isinstance(s, int) for s in sizes) or types[0].dtype is None:
            match.refuse(f"{types[0]} and {types[1]}: heads, width or dtype are not known")
        if not match.view.attrs(match.root)["gqa"] and len(set(heads)) > 1:
            match.refuse(f"the heads of {types[0]} and {types[1]} differ")

    def replace(self, build: Build, **bound: Operand) -> Value:
        view, root = build.view, build.match.root
        attrs, (_, _, _, *rest) = view.attrs(root), view.operands(root)
        q, k, v = (build.match.value(name) for name in "qkv")
        mask = rest[0] if rest and is_value(rest[0]) else None
        never_empty = mask is None
        if attrs["causal"]:
            mask = with_causal(build, q, k, mask)
        heads = _Heads(build, q, k, v)
        logits = heads.logits(attrs)
        if mask is None:
            return heads.weighted(build.softmax(logits, dim=3))
        if view.type(mask).dtype == torch.bool:
            mask = filled(build, mask, -math.inf, q)
        if never_empty:
            return heads.weighted(build.softmax(build.add(logits, mask), dim=3))
        if view.type(q).dtype not in _WIDE:
            weights = build.softmax(build.add(logits, mask), dim=3)
            return heads.weighted(build.where(build.isnan(weights), 0.0, weights))
        # Not by the greatest of the row: ONNX Runtime 1.31's reductions keep the shape of a tensor
        # without elements.
        last = len(view.type(mask).shape or ()) - 1
        empty = build.isnan(build.slice(build.softmax(mask, dim=last), 0, 1, dim=last))
        logits = build.add(logits, build.where(empty, 0.0, mask))
        return build.where(empty, 0.0, heads.weighted(build.softmax(logits, dim=3)))


_WIDE = (torch.float32, torch.float64)


def with_causal(b: Build, q: Value, k: Value, mask: Value | None) -> Value:
    """A query sees the keys up to its own position, counted from the first of each."""
    visible = causal(b, q, k, 0)
    if mask is None:
        return visible
    if b.view.type(mask).dtype == torch.bool:
        return b.logical_and(visible, mask)
    return b.where(visible, mask, -math.inf)


class _Heads:
    """The two products of attention; query heads that share keys are rows of one."""

    def __init__(self, build: Build, q: Value, k: Value, v: Value) -> None:
        self._b, self._q, self._k, self._v = build, q, k, v
        shapes = [build.view.type(x).shape or () for x in (q, k, v)]
        # ``where`` has seen to it that these are numbers.
        numbers = shapes[0][1], shapes[1][1], shapes[0][3]
        self._heads, self._shared, self._width = map(int, numbers)
        self._keys = size(build, k, 2)

    def logits(self, attrs: Mapping[str, Any]) -> Value:
        """c · tanh(q · (scale / c) kᵀ), or q · scale kᵀ: [batch, heads, queries, keys]"""
        b = self._b
        scale = 1 / math.sqrt(self._width) if attrs["scale"] is None else attrs["scale"]
        cap = attrs["softcap"]
        q = b.mul(self._together(self._q, self._width), scale if cap is None else scale / cap)
        product = b.matmul(q, b.transpose(self._k, perm=(0, 1, 3, 2)))
        if cap is not None:
            product = b.mul(b.tanh(product), cap)
        apart = self._apart(product, self._keys)
        if apart is not product:
            name_after(b, apart, 3, self._k, 2)
        return apart

    def weighted(self, weights: Value) -> Value:
        """weights · v: [batch, heads, queries, width of v]"""
        b = self._b
        product = b.matmul(self._together(weights, self._keys), self._v)
        return self._apart(product, size(b, self._v, 3))

    def _together(self, x: Value, last: Any) -> Value:
        """[batch, heads, queries, n] => [batch, kv heads, heads / kv heads · queries, n]"""
        if self._heads == self._shared:
            return x
        b = self._b
        rows = b.mul(size(b, self._q, 2), self._heads // self._shared)
        return b.reshape(x, size(b, self._q, 0), self._shared, rows, last)

    def _apart(self, x: Value, last: Any) -> Value:
        """The reverse."""
        if self._heads == self._shared:
            return x
        b = self._b
        apart = b.reshape(x, size(b, self._q, 0), self._heads, size(b, self._q, 2), last)
        for axis in (0, 2):
            name_after(b, apart, axis, self._q, axis)
        return apart
