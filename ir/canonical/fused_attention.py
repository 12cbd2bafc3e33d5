"""Fused attention becomes ``sdpa`` between the linears, heads and caches that are spelled out.

Attention(x, w, b, mask, past)         => join(sdpa(q, k, v, mask)), [q, k, v] = heads(x w + b)
MultiHeadAttention(q, k, v, b, mask)   => join(sdpa(heads(q + b₁), heads(k + b₂), ...))
Attention(Q, K, V, mask, past)         => sdpa(Q, concat(past, K), concat(past, V), mask)

The packed weight of q, k and v stays one linear, whose result is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..core.view import Value, View
from ..rewrite.rule import Build
from . import heads as parts
from .attention import condition_of
from .fused import MICROSOFT, Fused, Inputs
from .heads import (
    added,
    causal,
    cut,
    default_scale,
    filled,
    join_heads,
    padding,
    size,
    split_heads,
    without_lift,
)  # fmt: skip

QKV = tuple[Value, Value, Value]


class _Contrib(Fused):
    """What both of Microsoft's ops share: masks that are filled with a number, and causality."""

    def masks(
        self, b: Build, node: Inputs, qkv: QKV, past: Any, padded: Value | None, bias: Value | None
    ) -> tuple[Value | None, bool]:
        """What is added to the logits, and whether attention is causal beside it.

        ``past`` is the number of keys before those of this call, 0 where there is no cache.
        """
        q, k, _ = qkv
        mask, one_way = None, bool(node.attr("unidirectional", 0))
        if padded is not None:
            visible = padding(b, node, padded, k, node.need(0))
            mask = filled(b, visible, float(node.attr("mask_filter_value", -10000.0)), q)
        if not one_way or (isinstance(past, int) and past == 0):
            return added(b, mask, bias), one_way
        ahead = filled(b, causal(b, q, k, past), parts.lowest(node, q), q)
        return added(b, ahead, mask, bias), False

    def attend(
        self, b: Build, node: Inputs, qkv: QKV, mask: Value | None, one_way: bool
    ) -> Value:
        q, k, v = qkv
        scale = default_scale(node, node.width(q))
        rest = () if mask is None else (mask,)
        return join_heads(b, node, b.sdpa(q, k, v, *rest, scale=scale, causal=one_way))


class ExpandAttention(_Contrib):
    """Attention(x, w, b) => join(sdpa(q, k, v)), [q, k, v] = heads(x w + b)"""

    name, op = "expand-attention", MICROSOFT + "Attention"

    def check(self, node: Inputs) -> None:
        node.refuse_attrs(do_rotary=0, past_present_share_buffer=0)
        node.refuse_inputs((6, "past_sequence_length"))

    def expand(self, b: Build, node: Inputs) -> Sequence[Value | None]:
        count = int(node.attr("num_heads", 0))
        qkv = self._projected(b, node, count)
        fresh, before, past = qkv, 0, node[4]
        if past is not None:
            before = size(b, past, 3)
            halves = [b.squeeze(b.slice(past, i, i + 1, dim=0), dims=(0,)) for i in (0, 1)]
            k, v = (b.concat(old, new, dim=2) for old, new in zip(halves, fresh[1:], strict=True))
            qkv = (fresh[0], k, v)
        mask, one_way = self.masks(b, node, qkv, before, node[3], node[5])
        out = self.attend(b, node, qkv, mask, one_way)
        present = None
        if node.used(1):
            present = b.concat(*(b.unsqueeze(x, dims=(0,)) for x in qkv[1:]), dim=0)
        return [out, present]

    def _projected(self, b: Build, node: Inputs, count: int) -> QKV:
        weight, bias = node.need(1), node[2]
        total = b.matmul(node.need(0), weight)
        total = total if bias is None else b.add(total, bias)
        third = node.width(weight) // 3
        widths = tuple(int(w) for w in node.attr("qkv_hidden_sizes", (third,) * 3))
        q, k, v = (split_heads(b, node, part, count) for part in cut(b, node, total, widths))
        return q, k, v


class ExpandMultiHeadAttention(_Contrib):
    """MultiHeadAttention(q, k, v, b) => join(sdpa(heads(q + b₁), heads(k + b₂), heads(v + b₃)))"""

    name, op = "expand-multi-head-attention", MICROSOFT + "MultiHeadAttention"

    def check(self, node: Inputs) -> None:
        node.refuse_inputs((8, "past_sequence_length"), (9, "cache_indirection"))
        node.refuse_results((3, "qk"))

    def expand(self, b: Build, node: Inputs) -> Sequence[Value | None]:
        q, k, v = self._heads(b, node, int(node.attr("num_heads", 0)))
        before: Any = 0
        old_key, old_value = node[6], node[7]
        if old_key is not None and old_value is not None:
            before = size(b, old_key, 2)
            k, v = b.concat(old_key, k, dim=2), b.concat(old_value, v, dim=2)
        mask, one_way = self.masks(b, node, (q, k, v), before, node[4], node[5])
        return [self.attend(b, node, (q, k, v), mask, one_way), k, v]

    def _heads(self, b: Build, node: Inputs, count: int) -> QKV:
        query, key, value = node.need(0), node[1], node[2]
        if key is None or value is None or node.rank(query) != 3 or node.rank(key) == 5:
            raise node.refuse("queries, keys and values in one tensor are not read")
        q = split_heads(b, node, query, count)
        if node.rank(key) == 4:  # keys and values that another call left: no bias is for them
            bias = node[3]
            if bias is not None:
                raise node.refuse("a bias beside keys that are split into heads is not read")
            return q, key, value
        return self._biased(
            b, node, q, split_heads(b, node, key, count), split_heads(b, node, value, count)
        )

    def _biased(self, b: Build, node: Inputs, q: Value, k: Value, v: Value) -> QKV:
        bias = node[3]
        if bias is None:
            return q, k, v
        shapes = [(node.width(x, 1), node.width(x)) for x in (q, k, v)]
        rows = cut(b, node, bias, tuple(heads * width for heads, width in shapes))
        q, k, v = (
            b.add(x, b.reshape(row, heads, 1, width))
            for x, row, (heads, width) in zip((q, k, v), rows, shapes, strict=True)
        )
        return q, k, v


class ExpandStandardAttention(Fused):
    """Attention(Q, K, V, mask, past) => sdpa(Q, concat(past, K), concat(past, V), mask)"""

    name, op = "expand-standard-attention", "Attention"

    def check(self, node: Inputs) -> None:
        node.refuse_inputs((6, "nonpad_kv_seqlen"))
        node.refuse_results((3, "qk_matmul_output"))
        if node.attr("softmax_precision", 1) != 1:
            raise node.refuse("a softmax in another precision than float32 is not read")
        if node.attr("is_causal", 0) and node[4] is not None:
            raise node.refuse("is_causal beside a cache is not read: runtimes differ on it")

    def expand(self, b: Build, node: Inputs) -> Sequence[Value | None]:
        q, k, v = (node.need(i) for i in range(3))
        flat = node.rank(q) == 3
        if flat:
            counts = [int(node.attr(name, 0)) for name in ("q_num_heads", "kv_num_heads")]
            q = split_heads(b, node, q, counts[0])
            k, v = (split_heads(b, node, x, counts[1]) for x in (k, v))
        old_key, old_value = node[4], node[5]
        if old_key is not None and old_value is not None:
            k, v = b.concat(old_key, k, dim=2), b.concat(old_value, v, dim=2)
        mask = None if node[3] is None else _narrow(node.view, node[3])
        cap = float(node.attr("softcap", 0.0))
        out = b.sdpa(
            q, k, v, *(() if mask is None else (mask,)), scale=default_scale(node, node.width(q)),
            causal=bool(node.attr("is_causal", 0)), gqa=node.width(q, 1) != node.width(k, 1),
            softcap=cap or None,
        )  # fmt: skip
        return [join_heads(b, node, out) if flat else out, k, v]


def _narrow(view: View, mask: Value) -> Value:
    """A mask as it was before it was made as large as the logits, which runtimes want; of one of 0
    and minus infinity the condition behind it."""
    maker = view.producer(mask)
    while maker is not None and view.op(maker) == "expand":
        source = view.tensor(maker)
        if view.type(source).rank != view.type(mask).rank:
            break
        mask, maker = source, view.producer(source)
    return condition_of(view, without_lift(view, mask))


RULES: tuple[type[Fused], ...] = (
    ExpandAttention, ExpandMultiHeadAttention, ExpandStandardAttention,
)  # fmt: skip
