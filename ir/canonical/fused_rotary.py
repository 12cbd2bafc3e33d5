"""``RotaryEmbedding``, Microsoft's and that of opset 23, becomes ``rope`` of table rows.

RotaryEmbedding(x, positions, cos, sin)   => rope(x, cos[positions] twice, sin[positions] twice)
"""

from __future__ import annotations

from collections.abc import Sequence

from ..core.view import Value
from ..rewrite.rule import Build
from .fused import MICROSOFT, Fused, Inputs
from .heads import INTEGER, join_heads, places, rotate, rows_of, split_heads


class _Rotary(Fused):
    """A stream [batch, tokens, heads · width], or heads [batch, heads, tokens, width]."""

    def turned(self, b: Build, node: Inputs, x: Value, cos: Value, sin: Value) -> Value:
        """``x`` turned by tables [batch, tokens, r / 2]."""
        interleaved = bool(node.attr("interleaved", 0))
        rotary = int(node.attr("rotary_embedding_dim", 0)) or 2 * node.width(cos)
        if rotary != 2 * node.width(cos):
            raise node.refuse(f"it turns {rotary} features, its tables {2 * node.width(cos)}")
        if node.rank(x) == 4:
            return rotate(b, node, x, cos, sin, interleaved=interleaved)
        count = int(node.attr("num_heads", 0)) or node.width(x) // rotary
        apart = split_heads(b, node, x, count)
        return join_heads(b, node, rotate(b, node, apart, cos, sin, interleaved=interleaved))


class ExpandRotaryEmbedding(_Rotary):
    """RotaryEmbedding(x, positions, cos, sin) => rope(x, cos[positions], sin[positions])"""

    name, op = "expand-rotary-embedding", MICROSOFT + "RotaryEmbedding"

    def check(self, node: Inputs) -> None:
        node.refuse_attrs(is_packed_batching=0, scale=1.0)

    def expand(self, b: Build, node: Inputs) -> Sequence[Value]:
        x, where = node.need(0), node.need(1)
        if node.rank(where) == 1:  # the place of the first token
            counted = b.unsqueeze(places(b, x, 2 if node.rank(x) == 4 else 1), dims=(0,))
            where = b.add(counted, b.cast(where, dtype=INTEGER))
        return [self.turned(b, node, x, *(rows_of(b, node.need(i), where) for i in (2, 3)))]


class ExpandStandardRotaryEmbedding(_Rotary):
    """RotaryEmbedding(x, cos, sin, positions) => rope(x, cos[positions], sin[positions])"""

    name, op = "expand-standard-rotary-embedding", "RotaryEmbedding"

    def expand(self, b: Build, node: Inputs) -> Sequence[Value]:
        cos, sin, where = node.need(1), node.need(2), node[3]
        if where is not None:
            cos, sin = rows_of(b, cos, where), rows_of(b, sin, where)
        return [self.turned(b, node, node.need(0), cos, sin)]


RULES: tuple[type[Fused], ...] = (ExpandRotaryEmbedding, ExpandStandardRotaryEmbedding)
