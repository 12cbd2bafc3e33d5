"""What joins a stream from beside: features of images for early layers of a text.

DeepStack (Meng et al. 2024, arXiv 2406.04334; Qwen3-VL): the result of a layer plus
``where(shown, features[turn], 0)``. Such a value is a part of no stream, and the sum with it is no
end of a branch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..core.view import NATIVE, Operand, Value, View, is_value
from ..vocab import traits

PICKING = frozenset({
    "aten.index.Tensor", "aten._unsafe_index.Tensor", "aten.index_put.default", "Gather",
    "GatherElements", "GatherND",
})  # fmt: skip
"""Native ops that pick by an index, or put what was picked in its place."""


def is_aside(view: View, value: Operand) -> bool:
    """Whether a value is picked features in some places and 0 in all others, tokens of it selected
    or not."""
    if not is_value(value):
        return False
    node = view.producer(value)
    while node is not None and view.op(node) == "token_select":
        node = view.producer(view.tensor(node))
    if node is None or view.op(node) != "where":
        return False
    _, picked, other = view.operands(node)
    return view.number(other) == 0 and _is_picked(view, picked)


def _is_picked(view: View, value: Operand) -> bool:
    maker = view.producer(value) if is_value(value) else None
    if maker is None:
        return False
    native = view.op(maker) == NATIVE and view.native_op(maker) in PICKING
    return native or traits(view.op(maker)).picks


def without_aside(view: View, value: Value) -> Value:
    """The stream before something joined it from beside."""
    node = view.producer(value)
    if node is None or view.op(node) != "add":
        return value
    streams = [operand for operand in view.operands(node) if not is_aside(view, operand)]
    return streams[0] if len(streams) == 1 and is_value(streams[0]) else value


def has_asides(view: View) -> bool:
    """Whether anything joins a stream from beside."""
    return any(True for _ in asides(view))


def asides(view: View) -> Iterator[Value]:
    """What joins a stream from beside, in order."""
    for node in view.nodes():
        if view.op(node) == "add":
            yield from (value for value in view.arguments(node) if is_aside(view, value))


def why_elsewhere(view: View, others: Sequence[Value]) -> str:
    """Why images do not enter the text that is written, before its first block; ``others`` are
    the streams with which blocks of other stacks start."""
    entered = False
    for node in view.nodes():
        if entered and any(value in others for value in view.results(node)):
            return (
                "images enter the text of an encoder, at which what is written looks: tokens are "
                "cut out of the prompt of a decoder alone"
            )
        entered |= view.op(node) == "where" and _is_picked(view, view.operands(node)[1])
    if entered:
        return (
            "layers that are no blocks, such as convolutions, stand between the place where images "
            "enter the text and its first block"
        )
    return "no place is recognised at which image features replace words' embeddings"
