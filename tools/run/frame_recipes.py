"""Recipes of the passes over frames for about so many of a video's tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ...ir.structure.vision import ImageTokens

REGION = 0.8
"""The share of a frame that ``free-video`` lets on where nobody says another."""


def has_frames(images: ImageTokens) -> bool:
    """Whether the pictures of an image are frames rather than a thumbnail and a square of crops.

    A graph says it of crops that are put together as one raster. Of others it does not: 1 + n²
    pictures (5, 10) are taken for crops.
    """
    if images.layout:
        return False
    crops = images.pictures - 1
    return crops == 1 or (crops > 1 and math.isqrt(crops) ** 2 != crops)


def frame_recipes(images: ImageTokens, count: int) -> Iterator[str]:
    """Recipes by which at most ``count`` tokens are left, and not many fewer."""
    if images.grid is None:
        return
    frames, (rows, columns) = images.pictures, images.grid
    each = count // frames
    if each:
        high = min(rows, math.isqrt(each))
        yield f"pool-frames{{to={high}x{min(columns, each // high)}}}"
    if count >= images.patches:
        yield f"pool-frames{{to={min(frames, count // images.patches)}x{rows}x{columns}}}"
    if count > images.patches and frames >= 4 and rows % 2 == columns % 2 == 0:
        yield f"ts-llava{{frames={count - images.patches} thumbnail=4}}"
    else:
        yield f"ts-llava{{frames={count} thumbnail=0}}"
    yield from _slow_and_fast(images, count)


def _slow_and_fast(images: ImageTokens, count: int) -> Iterator[str]:
    """``free-video`` with half of the tokens, or fewer, on all frames; of those in detail three of
    eight are chosen by what changes, as in its paper."""
    assert images.grid is not None
    frames, (rows, columns) = images.pictures, images.grid
    fast = min(rows, columns, math.isqrt(count // (2 * frames)))
    halve = columns % 2 == 0
    region = REGION if images.cls_token else 1.0
    sides = rows, columns // 2 if halve else columns
    box = math.prod(max(1, round(side * math.sqrt(region))) for side in sides)
    detailed = min(2 * frames, (count - frames * fast**2) // box)
    if not detailed:
        return
    slow = min(frames, math.ceil(3 * detailed / 8))
    options = f"frames={slow} region={region:g} middle={min(frames, detailed - slow)} fast={fast}"
    yield f"free-video{{{options}}}" if halve else f"free-video{{{options} halve=false}}"
