"""``Builder``: new nodes in the words of the vocabulary, all at one place of a graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

from ..core.view import Attr, Node, Value, View
from .registry import check_known

PlaceT = TypeVar("PlaceT")
ValueT = TypeVar("ValueT")


class GraphBuilder(Generic[PlaceT, ValueT]):
    """``b.add(x, b.cast(y, dtype=dtype))`` inserts both nodes before ``b.before``; their results.

    Operands come by position, attributes by name, as the vocabulary declares them. ``like`` and
    ``name`` are those of ``View.build``, whose ``Refusal`` goes through. An op that the vocabulary
    has not is an ``AttributeError``.
    """

    view: Any

    def __init__(self, view: Any, before: PlaceT) -> None:
        self.view = view
        self.before = before

    def __getattr__(self, op: str) -> Callable[..., ValueT]:
        if op.startswith("__"):
            raise AttributeError(op)
        check_known(op)
        return partial(self.build, op)

    def build(
        self, op: str, *operands: Any, like: ValueT | None = None, name: str | None = None,
        **attrs: Attr,
    ) -> ValueT:  # fmt: skip
        """Insert an op whose name is data."""
        value: ValueT = self.view.build(
            op, operands, attrs, before=self.before, like=like, name=name
        )
        return value


class Builder(GraphBuilder[Node, Value]):
    """The builder on either kind of graph."""

    view: View
