"""The tower of a model of images as onnxruntime-genai runs it: of pixels as they lie, or of rows of
patches, which say the size that they are of."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ...ir.core.view import Value, View
from ...ir.core.weights import MemoryWeight
from ...ir.load.hf.gemma4 import patch_places
from ...ir.vocab.builder import Builder
from .pictured_ends import inputs_of, only
from .pictures import (
    CORNERS,
    FEATURES,
    FILLED,
    GRID,
    PIXELS,
    SIZE_CHECK,
    SIZES,
    Pictures,
)  # fmt: skip


def tower_part(view: View, features: Value, pictures: Pictures) -> View:
    """From a picture as the runtime gives it to its ``features``; it fails for another size where
    rows of patches say one."""
    pixels = inputs_of(view)[PIXELS]
    if pictures.placed:
        return _placed_vision(view, features, pictures)
    if pictures.crop:
        return _sized_vision(view, features, pictures)
    if not pictures.frames:
        return only(view, {PIXELS: pixels}, {FEATURES: features})
    p, channels = pictures, (view.type(pixels).shape or ())[1]
    assert isinstance(channels, int)
    b = Builder(view, next(iter(view.nodes())))
    corners = b.slice(b.slice(pixels, 0, 1, dim=2), 0, 1, dim=3)
    likes = (
        b.reshape(
            b.concat(*[pixels] * p.frames, dim=1), -1, channels * p.frames * p.side * p.side
        ),
        b.cast(b.reshape(corners, -1, channels), dtype=torch.int64),
    )
    given, grid = _taken(view, dict(zip((PIXELS, GRID), likes, strict=True)))
    b = Builder(view, next(iter(view.nodes())))
    checked = _checked(view, b, given, grid, torch.tensor([[1, p.rows, p.columns]]))
    squares = p.rows // p.merge, p.columns // p.merge, p.merge, p.merge
    split = b.reshape(checked, -1, *squares, channels, p.frames, p.side * p.side)
    first = b.slice(split, 0, 1, dim=6)
    corner = b.reshape(first, -1, *squares, channels, p.side, p.side)
    turned = b.transpose(corner, perm=(0, 5, 1, 3, 6, 2, 4, 7))
    view.replace(pixels, b.reshape(turned, -1, channels, p.height, p.width))
    return only(view, {PIXELS: given, GRID: grid}, {FEATURES: features})


def _placed_vision(view: View, features: Value, pictures: Pictures) -> View:
    """A tower of ``pixel_values`` ``[images, patches, numbers]``, channels last, and of the places
    of patches, i64 ``[images, patches, 2]``."""
    pixels, p = inputs_of(view)[PIXELS], pictures
    channels = (view.type(pixels).shape or ())[1]
    assert isinstance(channels, int)
    b, patches = Builder(view, next(iter(view.nodes()))), p.rows * p.columns
    corners = b.slice(b.slice(pixels, 0, 1, dim=2), 0, 2, dim=3)
    one = b.cast(b.slice(b.reshape(corners, -1, channels, 2), 0, 1, dim=1), dtype=torch.int64)
    likes = (
        b.reshape(pixels, -1, patches, channels * p.side * p.side),
        b.expand(one, -1, patches, 2),
    )
    given, places = _taken(view, dict(zip((PIXELS, CORNERS), likes, strict=True)))
    b = Builder(view, next(iter(view.nodes())))
    checked = _checked(view, b, given, places, patch_places(p.rows, p.columns))
    split = b.reshape(checked, -1, p.rows, p.columns, p.side, p.side, channels)
    turned = b.transpose(split, perm=(0, 5, 1, 3, 2, 4))
    view.replace(pixels, b.reshape(turned, -1, channels, p.height, p.width))
    return only(view, {PIXELS: given, CORNERS: places}, {FEATURES: features})


def _sized_vision(view: View, features: Value, pictures: Pictures) -> View:
    """A tower of crops as they lie, of which patches are filled, ``[images, 1 + crops, rows,
    columns]``, and of the heights and widths of images, i64 ``[images, 2]``."""
    pixels, p = inputs_of(view)[PIXELS], pictures
    crops, *sides = map(int, (view.type(pixels).shape or ())[1:])
    numbers, count = crops * math.prod(sides), p.crop // p.side
    b = Builder(view, next(iter(view.nodes())))
    flat = b.reshape(pixels, -1, numbers)
    likes = (
        b.reshape(b.slice(flat, 0, crops * count * count, dim=1), -1, crops, count, count),
        b.cast(b.slice(flat, 0, 2, dim=1), dtype=torch.int64),
    )
    filled, sizes = _taken(view, dict(zip((FILLED, SIZES), likes, strict=True)))
    b, users = Builder(view, next(iter(view.nodes()))), view.users(pixels)
    flat = b.reshape(pixels, -1, numbers)
    checked = _checked(view, b, flat, sizes, torch.tensor([[p.height, p.width]]))
    every = torch.ones(1, 1, 1, 1, dtype=torch.int64)
    checked = _checked(view, b, checked, b.cast(filled, dtype=torch.int64), every)
    whole = b.reshape(checked, -1, crops, *sides)
    for user in users:
        view.rewire(user, pixels, whole)
    return only(view, {PIXELS: pixels, FILLED: filled, SIZES: sizes}, {FEATURES: features})


def _taken(view: View, likes: Mapping[str, Value]) -> list[Value]:
    """New inputs of the types of values that were built to show them, and that go again."""
    for like in likes.values():
        view.type(like)
    inputs = [view.add_input(f"{name}.rows", like) for name, like in likes.items()]
    for like in likes.values():
        view.erase_dead(view.maker(like))
    return inputs


def _checked(
    view: View, b: Builder, given: Value, said: Value, expected: torch.Tensor
) -> Value:
    """``given``, of rows, if what is ``said`` of its size is what is ``expected``; it fails in any
    other case."""
    off = b.sub(said, view.add_weight(f"{SIZE_CHECK}.grid", MemoryWeight(expected)))
    every = tuple(range(expected.dim()))
    other = b.clamp(b.sum(b.mul(off, off), dims=every, keepdim=False), max=1)
    nothing = MemoryWeight(torch.zeros(1, 1, dtype=view.type(given).dtype))
    zero = view.add_weight(SIZE_CHECK, nothing)
    return b.add(given, b.embedding(zero, b.reshape(other, 1)))
