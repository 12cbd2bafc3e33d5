"""Roles of linears, from where they stand to ``sdpa``, to each other and to the spine."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from ..core.view import Node, Value, View
from ..vocab import traits

_SCALING = frozenset({"mul", "div"})
_REACH = 400
"""Nodes that are visited at most in search of a linear: an attention site has about ten between."""


@dataclass(frozen=True)
class TracedAttention:
    """An ``sdpa`` and the linears that feed it and that take its result."""

    node: Node
    q: Node | None
    k: Node | None
    v: Node | None
    o: Node | None

    def roles(self) -> dict[Node, str]:
        """The role of each linear of the site; one that is all of q, k and v is ``qkv``."""
        parts: dict[Node, str] = {}
        for role, node in (("q", self.q), ("k", self.k), ("v", self.v)):
            if node is not None:
                parts[node] = parts.get(node, "") + role
        if self.o is not None:
            parts.setdefault(self.o, "o")
        return parts

    def heads(
        self, view: View, widths: Mapping[Node, int]
    ) -> tuple[int | None, int | None, int | None]:
        """Query heads, key and value heads before they are repeated, and the size of a head."""
        shape = view.type(view.tensor(self.node)).shape or ()
        head_dim = shape[-1] if shape and isinstance(shape[-1], int) else None
        if head_dim is None:
            return None, None, None
        joined = self.q is not None and self.q is self.k is self.v
        counted = shape[-3] if len(shape) > 3 and isinstance(shape[-3], int) else None
        if self.q is not None and not joined:
            counted = widths[self.q] // head_dim
        if counted is None:
            counted = widths[self.q] // (3 * head_dim) if self.q is not None else None
        shared = counted
        if joined and self.q is not None and counted is not None:
            shared = (widths[self.q] // head_dim - counted) // 2
        elif self.k is not None and self.k is not self.q:
            shared = widths[self.k] // head_dim // (2 if self.k is self.v else 1)
        return counted, shared, head_dim


def trace_attention(view: View, node: Node, linears: Container[Node]) -> TracedAttention:
    """Find the linears around an ``sdpa``: the nearest above q, k and v and below the result."""
    q, k, v = (_above(view, view.tensor(node, i), linears) for i in range(3))
    return TracedAttention(node, q, k, v, _below(view, view.results(node), linears))


def _above(view: View, value: Value, linears: Container[Node]) -> Node | None:
    queue, seen = [value], {value}
    for current in queue:
        node = view.producer(current)
        if node is None or len(queue) > _REACH:
            continue
        if node in linears:
            return node
        for argument in view.operands(node):
            if isinstance(argument, int | float | None) or argument in seen:
                continue
            if view.weight(argument) is None:
                seen.add(argument)
                queue.append(argument)
    return None


def _below(view: View, values: Iterable[Value], linears: Container[Node]) -> Node | None:
    queue = [user for value in values for user in view.users(value)]
    seen = set(queue)
    for node in queue:
        if node in linears:
            return node
        if len(queue) > _REACH:
            return None
        for value in view.results(node):
            fresh = [u for u in view.users(value) if u not in seen]
            seen.update(fresh)
            queue.extend(fresh)
    return None


def mlp_roles(view: View, group: list[Node]) -> dict[Node, str]:
    """Roles within one branch of the spine, its attention linears left out.

    Two in a row are ``fc1`` and ``fc2``; of two that are multiplied before a third, ``gate`` is the
    one behind the activation. A first one of twice the width that the second takes is ``gate_up``.
    """
    if len(group) == 2:
        first, last = group
        if _above(view, view.tensor(last), group) is not first:
            return {}
        widths = [view.type(view.results(first)[0]).shape, view.type(view.tensor(last)).shape]
        out, taken = (shape[-1] if shape else None for shape in widths)
        if isinstance(out, int) and isinstance(taken, int) and out == 2 * taken:
            return {first: "gate_up", last: "down"}
        return {first: "fc1", last: "fc2"}
    if len(group) != 3:
        return {}
    a, b, last = group
    if view.operands(a)[0] is not view.operands(b)[0]:
        return {}
    gated = [_activated(view, node) for node in (a, b)]
    if gated == [True, False]:
        return {a: "gate", b: "up", last: "down"}
    if gated == [False, True]:
        return {a: "up", b: "gate", last: "down"}
    return {}


def _activated(view: View, node: Node) -> bool:
    """Whether a linear's result goes through an activation before it meets another one's."""
    stack = list(view.users(view.results(node)[0]))
    for _ in range(16):
        if not stack:
            return False
        user = stack.pop()
        op = view.op(user)
        if traits(op).activation:
            return True
        if op == "mul" and not any(view.number(o) is not None for o in view.operands(user)):
            continue
        stack.extend(view.users(view.results(user)[0]))
    return False


def tail_roles(view: View, tail: list[Node]) -> dict[Node, str]:
    """Of the linears after the last addition of the spine, those that make an output: ``head``."""
    return {node: "head" for node in tail if _is_returned(view, node)}


def _is_returned(view: View, node: Node) -> bool:
    """Whether a linear's result goes to an output, with no more than a side path added to it, or
    capped: ``c tanh(x / c)``. (A tanh alone is a pooler's.)"""
    queue = [view.results(node)[0]]
    for value in queue:
        if view.is_output(value):
            return True
        passing = (u for u in view.users(value) if _passes_on(view, u))
        queue.extend(r for user in passing for r in view.results(user))
    return False


def _passes_on(view: View, node: Node) -> bool:
    op = view.op(node)
    if op == "tanh":
        maker = view.producer(view.tensor(node))
        return maker is not None and view.op(maker) in _SCALING
    if op in _SCALING:
        return any(view.number(operand) is not None for operand in view.operands(node))
    return traits(op).rearranges or op == "add"
