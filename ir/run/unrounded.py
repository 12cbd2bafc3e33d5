"""A graph whose linears take their activations as they are: what rounding hides shows there."""

from __future__ import annotations

import re

from ..core.view import NATIVE, Node, View


def unrounded(view: View) -> View:
    """The graph with ``accuracy_level=0`` at every linear, where it is 4 at one; else itself.

    ``accuracy_level=4`` rounds a linear's inputs to 8 bits. A runtime that is 1 % off is then
    within what two sound runs of a deep model differ by, and nowhere near it without the rounding.
    A graph with such a linear that is not decoded is left as it is.
    """
    unread = any(
        view.op(node) == NATIVE and view.native_op(node).endswith("MatMulNBits")
        for node in view.nodes()
    )
    if unread or not any(_rounds(view, node) for node in view.nodes()):
        return view
    plain = view.copy()
    for node in [node for node in plain.nodes() if _rounds(plain, node)]:
        old, attrs = plain.result(node), {**plain.attrs(node), "accuracy_level": 0}
        new = plain.build(plain.op(node), plain.operands(node), attrs, before=node, like=old)
        plain.replace(old, new)
        plain.erase(node)
    return plain


_CHOICE = re.compile(r"topk|arg_?(max|min|sort)|\bsort|NonMaxSuppression", re.IGNORECASE)
"""In the names of native ops that choose by comparing numbers."""


def chooses(view: View) -> bool:
    """Whether something is chosen by comparing what is computed, as tokens and experts are: a
    rounding then changes which, and by that outputs by more than itself."""
    return any(_CHOICE.search(view.native_op(node)) for node in view.nodes())


def _rounds(view: View, node: Node) -> bool:
    return view.op(node) != NATIVE and view.attrs(node).get("accuracy_level") == 4
