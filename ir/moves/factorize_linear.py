"""The move *factorize*: one linear becomes two, by way of fewer features."""

from __future__ import annotations

from ..core.errors import Refusal
from ..core.view import Value, View
from ..core.weights import Weight
from ..structure.low_rank import FIRST, SECOND
from ..structure.recognize import Linear
from ..vocab.builder import Builder


def factorize(
    view: View, linear: Linear, down: Weight, up: Weight, *, rule: str, step: int = 0
) -> Value:
    """``linear(x, W, bias) => linear(linear(x, down), up, bias)``; the new result.

    ``down`` is ``[r, in]`` and ``up`` ``[out, r]``, of the dtype of ``x``. The old weight goes when
    nothing else uses it. Raises ``Refusal`` where the factors do not fit the linear.
    """
    shapes = (linear.out_features, down.shape[0]), (up.shape[1], linear.in_features)
    if (up.shape, down.shape) != shapes:
        raise Refusal(
            f"factors {list(up.shape)} and {list(down.shape)} do not make a matrix "
            f"[{linear.out_features}, {linear.in_features}]", linear.node,
        )  # fmt: skip
    x = view.tensor(linear.node)  # what feeds it may have been replaced since it was recognised
    with view.made_by(rule, step):
        first = view.add_weight(linear.name + FIRST, down)
        second = view.add_weight(linear.name + SECOND, up)
        b = Builder(view, linear.node)
        bias = [] if linear.bias is None else [linear.bias]
        out = b.build("linear", b.linear(x, first), second, *bias, like=linear.out)
    view.replace(linear.out, out)
    view.erase_dead(linear.node)
    return out
