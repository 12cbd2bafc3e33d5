"""What joins tokens in the place of attention: recurrences, and convolutions over a text.

A layer of Mamba (arXiv 2312.00752), of linear attention, or LFM2's with a short convolution starts
as one with attention does: it joins tokens first, feed-forward layers follow.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..core.view import Node, View

RECURRENCE, CONVOLUTION = "linear_attention", "conv"
MIXERS = (CONVOLUTION, RECURRENCE)
_TEXT_RANK = 3
"""Of ``[batch, channels, tokens]``."""


def mixes(view: View, node: Node) -> bool:
    """Whether it joins tokens channel by channel."""
    if view.op(node) == RECURRENCE:
        return True
    shape = view.type(view.tensor(node)).shape or ()
    channels = shape[1] if len(shape) == _TEXT_RANK else None
    return isinstance(channels, int) and 1 < channels == view.attrs(node)["groups"]


def mixing(
    attends: Collection[int | None], mixers: Mapping[int | None, Node], view: View
) -> set[int | None]:
    """The branches, by number, that start a layer though they have no attention: those with a
    recurrence, and those with a convolution behind one that joins no tokens. (Behind attention it
    is a part of the same layer, as a Conformer's, arXiv 2005.08100.)"""
    starts: set[int | None] = set()
    for place, node in mixers.items():
        if place is None:
            continue
        joined = place - 1 in attends or place - 1 in mixers
        if view.op(node) == RECURRENCE or not joined:
            starts.add(place)
    return starts
