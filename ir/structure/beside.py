"""What layers read from beside their stream: inputs of their own, and keys of a layer before.

Gemma 3n and the small ones of Gemma 4 give each layer a vector of its own for every token,
``act(gate(x)) * inputs[:, :, layer]``, made of the tokens before the first layer; and their last
layers attend over the keys and values of an earlier one, as in cross-layer attention (Brandon et
al. 2024, arXiv 2405.12981). Neither is a part of the stream from layer to layer.
"""

from __future__ import annotations

from ..core.view import NATIVE, Node, Operand, Value, View, is_value
from ..vocab import traits
from .asides import PICKING

Edges = frozenset[tuple[Node, Value]]
"""A node and an operand of it."""
_SHAPING = frozenset({"expand", "identity", "cast"})
_PICKING = PICKING | {"aten.select.int"}


def beside_edges(view: View) -> Edges:
    """By what nodes read, from beside the stream that leads to them, what is no part of it."""
    return frozenset([*_keys_of_others(view), *_inputs_of_layers(view)])


def made_for(view: View, edges: Edges) -> frozenset[Node]:
    """The nodes by which nothing is made but what is read by these edges."""
    made: set[Node] = set()
    stack = [view.producer(value) for _, value in edges]
    while stack:
        node = stack.pop()
        if node is None or node in made:
            continue
        results = view.results(node)
        if any(view.is_output(value) for value in results) or not all(
            user in made or (user, value) in edges
            for value in results for user in view.users(value)
        ):
            continue
        made.add(node)
        stack += [view.producer(value) for value in view.arguments(node)]
    return frozenset(made)


def _keys_of_others(view: View) -> list[tuple[Node, Value]]:
    """Keys and values at which an attention looks, as one before it does."""
    found: list[tuple[Node, Value]] = []
    known: set[tuple[Value, Value]] = set()
    for node in view.nodes():
        if view.op(node) != "sdpa":
            continue
        keys, values = view.operands(node)[1:3]
        if not is_value(keys) or not is_value(values):
            continue
        pair = (_unshaped(view, keys), _unshaped(view, values))
        if pair in known:
            found += [(node, keys), (node, values)]
        known.add(pair)
    return found


def _unshaped(view: View, value: Value) -> Value:
    node = view.producer(value)
    while node is not None and (view.op(node) in _SHAPING or traits(view.op(node)).rearranges):
        if view.op(node) == "slice":
            break
        value = view.tensor(node)
        node = view.producer(value)
    return value


def _inputs_of_layers(view: View) -> list[tuple[Node, Value]]:
    """Products of a gate with one of several parts of a value, each of which is read so."""
    parts: dict[Value, list[tuple[Node, Value] | None]] = {}
    for node in view.nodes():
        if _picks(view, node):
            parts.setdefault(view.tensor(node), []).append(_gated(view, node))
    whole = [value for value, gated in parts.items()
             if len(gated) > 1 and len(gated) == len(view.users(value))]  # fmt: skip
    found = [parts[value] for value in whole if all(parts[value])]
    return [edge for edges in found for edge in edges if edge is not None]


def _picks(view: View, node: Node) -> bool:
    op = view.op(node)
    native = op == NATIVE and view.native_op(node) in _PICKING
    if not native and op != "slice" and not traits(op).picks:
        return False
    operands = view.operands(node)
    return bool(operands) and is_value(operands[0]) and view.weight(operands[0]) is None


def _gated(view: View, node: Node) -> tuple[Node, Value] | None:
    """The product that alone reads a part, and what it reads; ``None`` where it is none with an
    activation."""
    value = view.results(node)[0]
    users = view.users(value)
    while len(users) == 1 and traits(view.op(users[0])).rearranges:
        value = view.results(users[0])[0]
        users = view.users(value)
    if len(users) != 1 or view.op(users[0]) != "mul":
        return None
    others = [operand for operand in view.operands(users[0]) if operand is not value]
    return (users[0], value) if len(others) == 1 and _is_activated(view, others[0]) else None


def _is_activated(view: View, operand: Operand) -> bool:
    node = view.producer(operand) if is_value(operand) else None
    return node is not None and traits(view.op(node)).activation
