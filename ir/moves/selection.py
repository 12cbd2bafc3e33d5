"""Choosing tokens in a graph: the best by a score, and where they lie in the sequence.

Static shapes throughout: ``TopK`` of a constant count, then positions in ascending order.
"""

from __future__ import annotations

import torch

from ..core.errors import Refusal
from ..core.types import same_dim
from ..core.view import Value
from ..core.weights import MemoryWeight
from ..structure.vision import ImageTokens
from ..vocab import END
from ..vocab.builder import Builder


def best(b: Builder, scores: Value, count: int, *, skipped: int = 0) -> Value:
    """Places of the ``count`` highest scores of each row, ascending: i64 ``[rows, count]``.

    The ``skipped`` highest are left out. Which of equal scores is taken is up to the runtime.
    """
    highest = b.topk(scores, k=count + skipped, dim=1, largest=True, sorted=True)
    places = top_places(b, highest)
    if skipped:
        places = b.slice(places, skipped, END, dim=1)
    return ascending(b, places, count)


def ascending(b: Builder, places: Value, count: int) -> Value:
    """The ``count`` numbers of each row in order."""
    return b.topk(places, k=count, dim=1, largest=False, sorted=True)


def top_places(b: Builder, top: Value) -> Value:
    """The places that a ``topk`` gives beside its values."""
    return b.view.results(b.view.maker(top))[1]


def ranks(b: Builder, scores: Value, count: int) -> Value:
    """The rank of each of ``count`` scores along the last dimension, 0 the highest: i64."""
    dim = (b.view.type(scores).rank or 2) - 1
    order = top_places(b, b.topk(scores, k=count, dim=dim, largest=True, sorted=True))
    # Sorting a permutation says at which place of it each number stands.
    return top_places(b, b.topk(order, k=count, dim=dim, largest=False, sorted=True))


def kept_positions(
    b: Builder, images: ImageTokens, marked: Value, chosen: Value | None, count: int
) -> Value:
    """The positions of a sequence that stay: all but the image tokens that were not chosen.

    ``marked`` bool ``[rows, seq]`` marks one run of ``images.count`` image tokens in each row,
    ``chosen`` i64 ``[rows, count]``, or ``[images, count]``, says, ascending, which of them stay;
    it is ``None`` where none does.
    The result is i64 ``[rows, seq - images.count + count]``, ascending. Where a graph may run
    without any image (a step with a cache), all positions stay then.
    """
    view = b.view
    known = view.type(marked).shape
    if known is None:
        raise Refusal(f"{view.name(marked)} has no shape")
    rows, seq = known
    dropped: Value | int = images.count - count
    length: Value | int = dropped
    name = str(dropped)
    if not same_dim(rows, images.images):
        name = f"({dropped}*{images.images}//{rows})"
        length, dropped = _dropped(b, images.features, images.count - count, name)
    short = b.slice(marked, length, END, dim=1)
    view.name_dim(short, 1, f"{seq} - {name}")
    # Counted, not made by ``arange``, so that the type says the length by name.
    every = b.sub(b.cumsum(_ones(b, short), dim=1), 1)
    start = image_start(b, marked)
    turn, later = b.sub(every, start), b.add(every, dropped)
    if chosen is None:
        return b.where(b.lt(turn, 0), every, later)
    inside = b.clamp(turn, min=0, max=count - 1)
    shape = view.type(chosen).shape
    if shape is not None and same_dim(shape[0], rows):
        picked = b.token_select(chosen, inside)
    else:
        picked = _picked(b, marked, chosen, inside, count)
    picked = b.add(picked, start)
    is_before, is_image = b.lt(turn, 0), b.lt(turn, count)
    kept = b.where(is_image, picked, later)
    return b.where(is_before, every, kept)


def _ones(b: Builder, x: Value) -> Value:
    """Ones i64 in the shape of ``x``."""
    return b.cast(b.eq(x, x), dtype=torch.int64)


def _dropped(b: Builder, features: Value, count: int, name: str) -> tuple[Value, Value]:
    """``count``, and 0 where there are no images (``features`` of no rows): as a size, and as a
    tensor i64 ``[1]``. ``name`` is what types call it."""
    one = b.slice(b.slice(features, 0, 1, dim=1), 0, 1, dim=2)
    one = b.slice(one, 0, 1, dim=0)
    line = b.reshape(b.expand(b.reshape(one, -1, 1), -1, count), -1)
    b.view.name_dim(line, 0, name)
    total = b.sum(_ones(b, line), dims=(0,), keepdim=True)
    return b.size(line, dim=0), total


def _picked(b: Builder, marked: Value, chosen: Value, inside: Value, count: int) -> Value:
    """``chosen[image of the row, inside]`` where images may be fewer than rows: none at all."""
    spare = b.view.add_weight("token_pass.none", MemoryWeight(torch.zeros(1, dtype=torch.int64)))
    line = b.concat(spare, b.reshape(chosen, -1), dim=0)
    line = b.unsqueeze(line, dims=(1,))
    counted = b.sum(b.cast(marked, dtype=torch.int64), dims=(1,), keepdim=True)
    row = b.cumsum(_ones(b, counted), dim=0)
    first = b.sub(b.mul(row, count), count - 1)
    place = b.add(inside, first)
    place = b.where(b.gt(counted, 0), place, 0)
    return b.squeeze(b.embedding(line, place), dims=(2,))


def image_start(b: Builder, image: Value) -> Value:
    """Where each row's image starts, i64 ``[rows, 1]``; the row's length where it has none."""
    counted = b.cumsum(b.cast(image, dtype=torch.int64), dim=1)
    early = b.cast(b.eq(counted, 0), dtype=torch.int64)
    return b.sum(early, dims=(1,), keepdim=True)


def image_scores(b: Builder, scores: Value, image: Value, count: int) -> Value:
    """Of scores ``[rows, seq]`` those of the image's ``count`` tokens: ``[rows, count]``."""
    start = image_start(b, image)
    positions = b.arange(0, b.size(image, dim=1), 1, dtype=torch.int64)
    end = b.amax(positions, dims=(0,), keepdim=True)
    steps = b.unsqueeze(b.arange(0, count, 1, dtype=torch.int64), dims=(0,))
    places = b.minimum(b.add(start, steps), end)
    return b.token_select(scores, places)
