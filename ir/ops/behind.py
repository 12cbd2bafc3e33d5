"""What stands behind a value, for decoders that walk from the end of a form to its start."""

from __future__ import annotations

from ..core.errors import Refusal
from ..core.view import Node, Operand, View, is_value


def behind(view: View, value: Operand, *ops: str) -> tuple[Operand, ...]:
    """The operands of what makes a value, which is one of ``ops``. Raises ``Refusal``."""
    node = view.producer(value) if is_value(value) else None
    if node is None or view.op(node) not in ops:
        raise Refusal(f"there is no {ops[0]} where the form has one", node)
    return view.operands(node)


def past(view: View, value: Operand, *ops: str) -> tuple[Operand, list[Node]]:
    """The first value that none of ``ops``, native ones by their names, makes, and the nodes from
    ``value`` back to it."""
    nodes: list[Node] = []
    node = view.producer(value) if is_value(value) else None
    while node is not None and (view.op(node) in ops or view.native_op(node) in ops):
        nodes.append(node)
        value = view.operands(node)[0]
        node = view.producer(value) if is_value(value) else None
    return value, nodes
