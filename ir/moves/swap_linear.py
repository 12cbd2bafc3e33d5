"""The move *swap*: one linear becomes another form that computes (nearly) the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..core.errors import Refusal
from ..core.view import Value, View
from ..core.weights import Weight
from ..vocab.builder import Builder

if TYPE_CHECKING:
    from ..structure.recognize import Linear


def swap(
    view: View,
    linear: Linear,
    op: str,
    weights: Sequence[tuple[str, Weight] | None],
    attrs: Mapping[str, Any],
    *,
    rule: str,
    step: int = 0,
) -> Linear:
    """Replace ``linear`` by ``op(x, *weights, bias, **attrs)``; the linear as it now stands.

    ``weights`` are (name suffix, handle) pairs, ``None`` for an absent operand; handles of equal
    key are shared, so that tied linears stay tied. The bias is kept. The old weight goes when
    nothing else (an embedding tied to it, say) uses it. Raises ``Refusal`` where the result would
    have another type; the graph is then as it was.
    """
    with view.made_by(rule, step):
        constants: list[Value | None] = [
            None if pair is None else view.add_weight(f"{linear.name}.{pair[0]}", pair[1])
            for pair in weights
        ]
        operands = [linear.x, *constants, linear.bias]
        while operands[-1] is None:
            operands.pop()
        out = Builder(view, linear.node).build(op, *operands, like=linear.out, **attrs)
    if view.type(out).shape != view.type(linear.out).shape:
        view.erase_dead(view.maker(out))
        raise Refusal(f"{op} would change the type of {linear.name}", linear.node)
    view.replace(linear.out, out)
    view.erase_dead(linear.node)
    weight = constants[0]
    assert weight is not None
    return replace(linear, node=view.maker(out), out=out, weight=weight)
