"""A residual stream that is several: AltUp's (Baykal et al. 2023, arXiv 2301.13310; Gemma 3n).

``[streams, batch, tokens, width]``: a layer first mixes all into a guess of each, works on one of
them, and corrects the others by what came of it; what it makes of its own inputs is then written
into some.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..core.view import NATIVE, Value, View

_RANK = 4
_WRITING = frozenset({"aten.slice_scatter.default", "ScatterND"})


def is_stack(view: View, value: Value) -> bool:
    """Whether a value is a fixed number of streams, before a batch of any size."""
    shape = view.type(value).shape or ()
    return len(shape) == _RANK and isinstance(shape[0], int) and not isinstance(shape[1], int)


def written(view: View, value: Value) -> Value:
    """A sum with all that is written into parts of it."""
    while True:
        into = [view.results(user)[0] for user in view.users(value)
                if view.op(user) == NATIVE and view.native_op(user) in _WRITING
                and view.operands(user)[0] is value]  # fmt: skip
        if len(into) != 1 or view.type(into[0]) != view.type(value):
            return value
        value = into[0]


def guesses(view: View, entries: Sequence[Value], attends: Sequence[bool]) -> list[bool]:
    """Which branches start a layer of such streams: those that mix them, ahead of attention."""
    following = [*attends[1:], False][: len(attends)]
    return [
        is_stack(view, entry) and not mine and after
        for entry, mine, after in zip(entries, attends, following, strict=True)
    ]
