"""Chosen tokens of a value, wherever its axis of tokens is."""

from __future__ import annotations

from ..core.errors import Refusal
from ..core.view import Value
from ..vocab.builder import Builder


def select_tokens(b: Builder, value: Value, kept: Value, axis: int, *, by_row: bool) -> Value:
    """The tokens ``kept`` i64 ``[rows, count]`` of a value along its ``axis`` of them.

    ``by_row``: its first axis is that of rows; else all rows share it, and get a copy each. Raises
    ``Refusal`` where it has other axes than these before the tokens.
    """
    view = b.view
    shape = view.type(value).shape or ()
    if by_row and axis == 1:
        return b.token_select(value, kept)
    if by_row and axis > 1:
        perm = (0, axis, *(i for i in range(1, len(shape)) if i != axis))
        back = tuple(perm.index(i) for i in range(len(shape)))
        return b.transpose(b.token_select(b.transpose(value, perm=perm), kept), perm=back)
    if any(d != 1 for d in shape[:axis]):
        raise Refusal(f"{view.name(value)}: {view.type(value)} has no axis of rows")
    return _select_shared(b, value, kept, axis)


def _select_shared(b: Builder, value: Value, kept: Value, axis: int) -> Value:
    """Of ``[1, .., tokens]`` or ``[1, .., tokens, width]``, the same for all rows, each row's own
    tokens: ``[rows, .., count, width]``. Axes of 1 may stand before the width, as those of heads do
    in Gemma 4's tables of turns."""
    view = b.view
    shape = view.type(value).shape or ()
    heads = [i for i in range(axis + 1, len(shape) - 1) if shape[i] == 1]
    behind = len(shape) - axis - 1 - len(heads)
    if behind > 1:
        raise Refusal(f"{view.name(value)}: {view.type(value)} cannot follow")
    table = value
    if axis or heads:
        table = b.squeeze(table, dims=(*range(axis), *heads))
    if not behind:
        table = b.unsqueeze(table, dims=(1,))
    taken = b.embedding(table, kept)
    if not behind:
        taken = b.squeeze(taken, dims=(2,))
    if heads:
        taken = b.unsqueeze(taken, dims=tuple(2 + i for i in range(len(heads))))
    return taken if axis < 2 else b.unsqueeze(taken, dims=tuple(range(1, axis)))
