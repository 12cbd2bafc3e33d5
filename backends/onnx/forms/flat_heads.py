"""Heads side by side, as nodes of attention take and give them: [batch, tokens, heads · width]."""

from __future__ import annotations

from ....ir.canonical.heads import size
from ....ir.core.view import Node, Value, View
from ....ir.rewrite.rule import Build

PERM = (0, 2, 1, 3)
"""Heads before tokens, and back."""


def is_parted(view: View, x: Value) -> bool:
    """Whether ``x`` [batch, heads, tokens, width] is what lay side by side, transposed."""
    maker = view.producer(x)
    return maker is not None and _is_turn(view, maker)


def flat(b: Build, x: Value) -> Value:
    """[batch, heads, tokens, width] => [batch, tokens, heads · width]; what it was parted of."""
    view = b.view
    _, heads, _, width = view.type(x).shape or ()
    features = int(heads) * int(width)
    turned = view.producer(x)
    if turned is None or not _is_turn(view, turned):
        return b.reshape(b.transpose(x, perm=PERM), size(b, x, 0), size(b, x, 2), features)
    tokens = view.tensor(turned)
    apart = view.producer(tokens)
    whole = view.tensor(apart) if apart is not None and view.op(apart) == "reshape" else None
    rows = (view.type(tokens).shape or ())[:2]
    if whole is not None and view.type(whole).shape == (*rows, features):
        return whole
    return b.reshape(tokens, size(b, x, 0), size(b, x, 2), features)


def joined(view: View, root: Node, features: int) -> Value | None:
    """Where the heads that ``root`` gives are put side by side again, which a node does itself."""
    value = view.result(root)
    for op in ("transpose", "reshape"):
        users = view.users(value)
        if len(users) != 1 or view.op(users[0]) != op or view.is_output(value):
            return None
        if op == "transpose" and not _is_turn(view, users[0]):
            return None
        value = view.result(users[0])
    shape = view.type(value).shape or ()
    return value if len(shape) == 3 and shape[2] == features else None


def _is_turn(view: View, node: Node) -> bool:
    return view.op(node) == "transpose" and dict(view.attrs(node)) == {"perm": PERM}
