"""The type rule of linears whose weights are stored in a form of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core.types import Type


def stored_linear_type(
    op: str,
    x: Type,
    stored: Mapping[str, tuple[Type | None, Type | None]],
    bias: Type | None,
    attrs: Mapping[str, Any],
) -> tuple[Type]:
    """The type of ``x @ W.T + bias``, ``x`` [..., in_features].

    ``stored`` is what a form holds, and what it must be, by the operands' names; what is not known
    of either is not compared. Raises ``ValueError`` naming the operand that does not fit.
    """
    fan_in, fan_out = attrs["in_features"], attrs["out_features"]
    for name, (actual, expected) in stored.items():
        if actual is not None and expected is not None:
            _same(op, f"shape of {name}", actual.shape, expected.shape)
            _same(op, f"dtype of {name}", actual.dtype, expected.dtype)
    if bias is not None:
        _same(op, "shape of bias", bias.shape, (fan_out,))
    if x.shape is None:
        return (x,)
    if isinstance(x.shape[-1], int):
        _same(op, "last dimension of x", x.shape[-1], fan_in)
    return (x.with_shape((*x.shape[:-1], fan_out)),)


def _same(op: str, what: str, actual: Any, expected: Any) -> None:
    if actual is not None and actual != expected:
        raise ValueError(f"{op}: {what} is {actual}, expected {expected}")
