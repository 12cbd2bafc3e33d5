"""The constant that a linear multiplies by: its operand, or what that widens.

A matrix may be stored in a narrower dtype than it is multiplied by; the cast stays in the graph.
"""

from __future__ import annotations

from ..core.view import Node, Value, View


def stored_weight(view: View, node: Node) -> Value | None:
    """The constant behind the weight of a linear; ``None`` where there is none, and for a factor of
    a low-rank path that is stored narrow: two such linears in a row."""
    weight = weight_behind(view, node)
    if view.weight(weight) is None:
        return None
    if weight is view.tensor(node, 1) or not _is_factor(view, node):
        return weight
    return None


def weight_behind(view: View, node: Node) -> Value:
    """The weight operand of a linear, or what a cast makes it of."""
    weight = view.tensor(node, 1)
    maker = view.producer(weight)
    return view.tensor(maker) if maker is not None and view.op(maker) == "cast" else weight


def readers(view: View, weight: Value) -> list[Node]:
    """The nodes that read a constant, those behind a cast of it in the cast's place."""
    nodes: list[Node] = []
    for user in view.users(weight):
        nodes += view.users(view.result(user)) if view.op(user) == "cast" else (user,)
    return nodes


def _is_factor(view: View, node: Node) -> bool:
    inner = view.producer(view.tensor(node))
    if inner is not None and view.op(inner) == "slice":
        inner = view.producer(view.tensor(inner))
    if inner is not None and _is_narrow(view, inner):
        return True
    users = list(view.users(view.result(node)))
    cuts = [u for u in users if view.op(u) == "slice"]
    users += [user for cut in cuts for user in view.users(view.result(cut))]
    return any(_is_narrow(view, user) for user in users)


def _is_narrow(view: View, node: Node) -> bool:
    """Whether a node is a linear whose weight is stored in another dtype."""
    if view.op(node) != "linear":
        return False
    weight = weight_behind(view, node)
    return weight is not view.tensor(node, 1) and view.weight(weight) is not None
