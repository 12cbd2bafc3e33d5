"""What a value is made of, and letting all others read something else in its place."""

from __future__ import annotations

from ..core.view import Node, Value, View


def upstream(view: View, *values: Value) -> set[Node]:
    """The nodes that the values are made by, those before them among these."""
    makers: set[Node] = set()
    stack = [view.producer(value) for value in values]
    while stack:
        node = stack.pop()
        if node is not None and node not in makers:
            makers.add(node)
            stack += [view.producer(value) for value in view.arguments(node)]
    return makers


def redirect(view: View, old: Value, new: Value) -> None:
    """Let every reader of ``old`` read ``new``, but for what ``new`` itself is made of."""
    makers = upstream(view, new)
    for user in view.users(old):
        if user not in makers:
            view.rewire(user, old, new)
