"""One more picture through a vision tower: its nodes once more, on the same weights."""

from __future__ import annotations

from ..core.errors import Refusal
from ..core.types import Dim
from ..core.view import Node, Value, View
from ..structure.vision import ImageTokens
from ..vocab.builder import Builder
from .upstream import upstream


def picture_input(view: View, images: ImageTokens) -> Value:
    """What the convolution reads that makes the patches: ``[pictures, channels, height, width]`` of
    fixed size. Raises ``Refusal`` where there is none."""
    for node in view.nodes():
        if view.op(node) != "conv" or images.grid is None:
            continue
        pixels, cells = (view.type(v).shape or () for v in (view.tensor(node), view.result(node)))
        if cells[2:] == images.grid and all(isinstance(size, int) for size in pixels[1:]):
            return view.tensor(node)
    raise Refusal("no convolution over pictures of one size makes the patches")


def another_picture(view: View, images: ImageTokens, pixels: Value) -> Value:
    """The projected features of other pictures: ``[rows, patches, width]`` of ``pixels``, ``[rows,
    channels, height, width]``, of which there are no more than pictures in the graph.

    Tower and projector are there twice then, on the same weights: what each image has of its own
    (a CLS token for each) is taken for as many rows. Raises ``Refusal`` where a node cannot be
    copied.
    """
    source = picture_input(view, images)
    old, new = (_first_dim(view, value) for value in (source, pixels))
    end = _by_picture(view, images, old)
    needed = upstream(view, end)
    place = view.after(view.maker(end))
    copies: dict[Value, Value] = {source: pixels}
    cloned: list[Node] = []
    rows = Builder(view, place).size(pixels, dim=0)
    for node in list(view.nodes()):
        operands = view.arguments(node)
        if node not in needed or not any(value in copies for value in operands):
            continue
        for value in operands:
            if value not in copies and _first_dim(view, value) == old:
                copies[value] = Builder(view, place).slice(value, 0, rows, dim=0)
        results = view.clone(node, copies, before=place)
        copies.update(zip(view.results(node), results, strict=True))
        cloned.append(view.maker(results[0]))
    view.renew_types(cloned, str(old), str(new))
    return copies[end]


def _by_picture(view: View, images: ImageTokens, pictures: Dim | None) -> Value:
    """The features before those of an image's pictures are joined: a row for each picture."""
    value = images.features
    while _first_dim(view, value) != pictures:
        node = view.producer(value)
        if node is None or view.op(node) != "reshape":
            raise Refusal("an image's pictures are joined by more than a change of shape", node)
        value = view.tensor(node)
    return value


def _first_dim(view: View, value: Value) -> Dim | None:
    shape = view.type(value).shape
    return shape[0] if shape else None
