"""The matrix that a linear multiplies by, whatever form it is stored in."""

from __future__ import annotations

from torch import Tensor

from ..core.errors import Refusal
from ..core.view import Node, Operand, View, is_value
from .registry import declared


def dense_weight(view: View, node: Node) -> Tensor:
    """W f32 [out, in] of a node that computes ``x Wᵀ``, with a bias or without.

    ``node`` is of an op that declares ``dense``: a ``linear``, one of its stored forms, or the side
    path of outlier weights. A weight may stand behind a cast, as factors do that are stored in
    half precision. Raises ``Refusal`` for any other op, and where an operand is not a constant.
    """
    op = declared(view.op(node))
    if op is None or op.dense is None:
        raise Refusal(f"{view.name(node)} ({view.native_op(node)}) is not a linear", node)
    _, *operands = view.operands(node)
    read = [None if i == op.bias else _read(view, node, o) for i, o in enumerate(operands, 1)]
    missing = len(op.operands) - 1 - len(read)
    columns = (view.type(view.tensor(node)).shape or (0,))[-1]
    return op.dense(
        columns if isinstance(columns, int) else 0, [*read, *[None] * missing], view.attrs(node)
    )


def _read(view: View, node: Node, operand: Operand) -> Tensor | None:
    if not is_value(operand):
        return None
    weight = view.weight(operand)
    if weight is not None:
        return weight.read()
    maker = view.producer(operand)
    if maker is not None and view.op(maker) == "cast":
        source = view.weight(view.operands(maker)[0])
        if source is not None:
            return source.read().to(view.attrs(maker)["dtype"])
    raise Refusal(f"{view.name(operand)}, an operand of {view.name(node)}, is not a constant", node)
