"""``GroupQueryAttention`` becomes ``sdpa`` beside a cache that is spelled out.

GroupQueryAttention(q, k, v, past, lengths) => join(sdpa(rope(q), [past; rope(k)], [past; v], mask))

A row's cache holds as many tokens as its length says; what lies behind them in ``past`` is not
looked at. Attention does not depend on the order of keys: here the new ones lie behind the whole of
``past``. In ``present`` they lie behind those that the row has, so its rows are picked from there;
behind them are zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..core.view import Value
from ..rewrite.rule import Build
from . import heads as parts
from .fused import MICROSOFT, Fused, Inputs
from .heads import (
    default_scale,
    join_heads,
    places,
    plus,
    positions,
    rotate,
    rows_of,
    shaped,
    size,
    split_heads,
)


@dataclass(frozen=True)
class _Lengths:
    """Numbers of tokens."""

    new: Any
    """Of this call."""
    room: Any
    """Of ``past``, whatever they hold; 0 where there is none."""
    last: Value
    """[batch, 1]: the place of a row's last token: its length less one."""
    kept: Value
    """[batch, 1]: those of ``past`` that a row has."""
    total: Value
    """Scalar: those that the longest row has, the new ones among them."""


class ExpandGroupQueryAttention(Fused):
    """GroupQueryAttention(q, k, v) => join(sdpa(rope(q), [past; rope(k)], [past; v], mask))"""

    name, op = "expand-group-query-attention", MICROSOFT + "GroupQueryAttention"

    def check(self, node: Inputs) -> None:
        node.refuse_attrs(
            sliding_window_cache=0, qk_output=0, k_quant_type="NONE", v_quant_type="NONE", causal=1,
        )  # fmt: skip
        if node.attr("smooth_softmax", 0) > 0:
            raise node.refuse("smooth_softmax is not read")
        node.refuse_inputs(
            (11, "head_sink"), (12, "k_scale"), (13, "v_scale"), (14, "q_norm_weight"),
        )  # fmt: skip
        if (node[3] is None) != (node[4] is None):
            raise node.refuse("one of past keys and values is absent")
        results = node.view.results(node.node)
        if node[3] is not None and not all(node.view.name(r) for r in results[1:3]):
            raise node.refuse("a cache that is not returned is not read")

    def expand(self, b: Build, node: Inputs) -> Sequence[Value | None]:
        q, k, v = self._heads(b, node)
        lengths = self._lengths(b, node, q)
        if node.attr("do_rotary", 0):
            q, k = self._turned(b, node, lengths, q, k)
        old_key, old_value = node[3], node[4]
        keys, values = k, v
        if old_key is not None and old_value is not None:
            keys, values = b.concat(old_key, k, dim=2), b.concat(old_value, v, dim=2)
        out = b.sdpa(
            q, keys, values, self._mask(b, node, lengths, q),
            scale=default_scale(node, node.width(q)), gqa=node.width(q, 1) != node.width(k, 1),
            softcap=float(node.attr("softcap", 0.0)) or None,
        )  # fmt: skip
        present = [keys, values]
        if old_key is not None and (node.used(1) or node.used(2)):
            rows = self._rows(b, lengths)
            tokens = plus(b, lengths.room, lengths.new)
            ends = b.add(lengths.kept, lengths.new)
            held = b.unsqueeze(b.lt(positions(b, size(b, rows, 1)), ends), dims=(1, 3))
            picked = (_picked(b, node, x, rows, tokens) for x in (keys, values))
            present = [b.mul(x, b.cast(held, dtype=b.view.type(x).dtype)) for x in picked]
        return [join_heads(b, node, out), *present]

    def _heads(self, b: Build, node: Inputs) -> tuple[Value, Value, Value]:
        count, shared = (int(node.attr(name, 0)) for name in ("num_heads", "kv_num_heads"))
        query, key, value = node.need(0), node[1], node[2]
        if min(count, shared) < 1:
            raise node.refuse("its numbers of heads are absent")
        if key is None or value is None:
            width = node.width(query) // (count + 2 * shared)
            widths = (count * width, shared * width, shared * width)
            if sum(widths) != node.width(query):
                raise node.refuse(f"{node.width(query)} features are not those of its heads")
            first = b.split(query, sizes=widths, dim=node.rank(query) - 1)
            query, key, value = b.view.results(b.view.maker(first))
        q = split_heads(b, node, query, count)
        return q, split_heads(b, node, key, shared), split_heads(b, node, value, shared)

    def _lengths(self, b: Build, node: Inputs, q: Value) -> _Lengths:
        past, new = node[3], size(b, q, 2)
        total = b.reshape(b.cast(node.need(6), dtype=parts.INTEGER))
        last = b.reshape(b.cast(node.need(5), dtype=parts.INTEGER), -1, 1)
        # A call that holds all tokens is the first one: nothing was kept, however long its rows.
        kept = b.where(b.eq(total, new), 0, b.add(b.sub(last, new), 1))
        return _Lengths(new, 0 if past is None else size(b, past, 2), last, kept, total)

    def _turned(
        self, b: Build, node: Inputs, lengths: _Lengths, q: Value, k: Value
    ) -> tuple[Value, Value]:
        where = node[9]
        if where is None:
            where = b.add(lengths.kept, places(b, q, 2))
        tables = [rows_of(b, node.need(i), where) for i in (7, 8)]
        interleaved = bool(node.attr("rotary_interleaved", 0))
        turned = (rotate(b, node, x, *tables, interleaved=interleaved) for x in (q, k))
        return next(turned), next(turned)

    def _mask(self, b: Build, node: Inputs, lengths: _Lengths, q: Value) -> Value:
        """Those of ``past`` that the row has, and the new ones up to the query's own place and to
        the end of the row, within a window where there is one; [batch, 1, queries, keys]."""
        new, window = places(b, q, 2), int(node.attr("local_window_size", -1))
        own = b.unsqueeze(new, dims=(1,))
        rest = b.unsqueeze(b.sub(lengths.last, lengths.kept), dims=(1,))
        visible = b.le(new, b.minimum(own, rest))
        if window > 0:
            visible = b.logical_and(visible, b.gt(new, b.sub(own, window)))
        if node[3] is not None:
            old = positions(b, lengths.room)
            visible_old = b.unsqueeze(b.lt(old, lengths.kept), dims=(1,))
            if window > 0:
                first = b.sub(b.add(lengths.kept, new), window)
                visible_old = b.logical_and(visible_old, b.gt(old, b.unsqueeze(first, dims=(2,))))
            wide = b.expand(visible_old, size(b, q, 0), lengths.new, lengths.room)
            visible = b.concat(wide, visible, dim=2)
        visible = b.unsqueeze(visible, dims=(1,))
        bias = node[10]
        if bias is None:
            return visible
        if node[3] is not None:
            raise node.refuse("attention_bias beside a cache is not read")
        return b.where(visible, bias, parts.lowest(node, q))

    def _rows(self, b: Build, lengths: _Lengths) -> Value:
        """[batch, keys]: where in [past; new] each token of ``present`` lies."""
        room = lengths.room
        count = b.maximum(lengths.total, room)
        place = b.unsqueeze(positions(b, count), dims=(0,))
        behind = b.add(b.sub(place, lengths.kept), room)
        end = plus(b, lengths.new, room)
        is_new = b.logical_and(b.ge(place, lengths.kept), b.lt(behind, end))
        return b.where(is_new, behind, b.minimum(place, plus(b, end, -1)))


def _picked(b: Build, node: Inputs, x: Value, rows: Value, tokens: Any) -> Value:
    """Tokens of [batch, heads, tokens, width] by the ``rows`` [batch, keys] of each sample."""
    heads, width = node.width(x, 1), node.width(x)
    batch = size(b, x, 0)
    rows_apart = batch * heads if isinstance(batch, int) else b.mul(batch, heads)
    lines = b.mul(positions(b, rows_apart), tokens)
    flat = b.add(shaped(b, lines, (x, 0), heads, 1), b.unsqueeze(rows, dims=(1,)))
    picked = b.index_select(b.reshape(x, -1, width), b.reshape(flat, -1), dim=0)
    return shaped(b, picked, (x, 0), heads, (rows, 1), width)


RULES: tuple[type[Fused], ...] = (ExpandGroupQueryAttention,)
