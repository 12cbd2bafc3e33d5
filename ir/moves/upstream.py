"""What a value is made of, and letting all others read something else in its place."""

from __future__ import annotations

from ..core.view import Node, Value, View


def upstream(view: View, *values: Value) -> set[Node]:
    """The nodes that the values are made by, those before them among these."""
    found: set[Node] = set()
    stack = [view.producer(value) for value in values]
    while stack:
        node = stack.pop()
        if node is not None and node not in found:
            found.add(node)
            stack += [view.producer(value) for value in view.arguments(node)]
    return found


def redirect(view: View, old: Value, new: Value) -> None:
    """Let every reader of ``old`` read ``new``, but for what ``new`` itself is made of."""
    made = upstream(view, new)
    for user in view.users(old):
        if user not in made:
            view.rewire(user, old, new)
