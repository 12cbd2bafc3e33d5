"""Attention that no rule reads as ``sdpa``: a softmax that weighs the rows of a product.

Logits that heads mix among them (arXiv 2003.02436), weights that the graph returns, and the rounded
products of QDQ files are such. Where they stand is where layers start, as at ``sdpa``.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..core.view import Node, View, is_value
from ..vocab import traits

_PASSING = frozenset({"cast", "where", "mul", "add", "slice", "reshape", "expand", "identity"})
"""What may stand between the softmax and its product: masks, heads, weights that are cut off."""
_ROUNDING = frozenset({"QuantizeLinear", "DequantizeLinear"})
"""The same in files that round each operand of a product to 8 bits."""
_REACH = 24


def unread_attention(view: View, softmaxes: Iterable[Node]) -> list[Node]:
    """Those of the softmaxes whose result multiplies values from the left. A router's, which picks
    experts, is none."""
    return [node for node in softmaxes if _weighs(view, node)]


def _passes(view: View, node: Node) -> bool:
    op = view.op(node)
    return op in _PASSING or traits(op).rearranges or view.native_op(node) in _ROUNDING


def _weighs(view: View, softmax: Node) -> bool:
    queue = [view.results(softmax)[0]]
    seen = set(queue)
    for value in queue:
        for user in view.users(value):
            op = view.op(user)
            if op == "matmul":
                left, right = view.operands(user)
                if left is value and is_value(right) and view.weight(right) is None:
                    return True
            elif _passes(view, user) and len(queue) < _REACH:
                fresh = [result for result in view.results(user) if result not in seen]
                seen.update(fresh)
                queue += fresh
    return False
