"""What the zoo's scenes are drawn with: a smooth canvas, digits, strokes, noise.

All of it draws on arrays ``[3, height, width]`` f32 in 0 to 1, and takes its chance from ``rng``.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.float32]


def corner(cell: int, size: int) -> tuple[int, int]:
    """Top and left of one of nine cells, row by row, of ``size`` pixels each."""
    return cell // 3 * size, cell % 3 * size


def background(rng: np.random.Generator, size: int) -> Pixels:
    """A smooth field: nine random colours, interpolated."""
    coarse = rng.uniform(0.0, 0.35, (3, 3, 3))
    spread = _interpolation(3, size)
    return np.asarray(spread @ coarse @ spread.T, dtype=np.float32)


@cache
def _interpolation(source: int, target: int) -> NDArray[np.float64]:
    """``[target, source]``: rows that mix two neighbours of the source linearly."""
    at = np.linspace(0, source - 1, target)
    low = np.minimum(at.astype(int), source - 2)
    matrix = np.zeros((target, source))
    matrix[np.arange(target), low] = 1 - (at - low)
    matrix[np.arange(target), low + 1] = at - low
    return matrix


def warped(image: Pixels, high: int, rng: np.random.Generator) -> Pixels:
    """The digit at ``high`` pixels, turned by up to 10 degrees, sheared and scaled a little."""
    angle, shear = rng.uniform(-0.17, 0.17), rng.uniform(-0.15, 0.15)
    zoom_y, zoom_x = rng.uniform(0.88, 1.1, 2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    form = turn @ np.array([[1.0, 0.0], [shear, 1.0]]) / np.array([[zoom_y], [zoom_x]])
    axis = (np.arange(high) + 0.5) / high * 8 - 4
    places = form @ np.stack(np.meshgrid(axis, axis, indexing="ij")).reshape(2, -1)
    places = places + 4.5  # the 8 x 8 image lies inside a rim of zeros
    rim = np.pad(image, 1)
    y, x = np.clip(places, 0, 8.999)
    y0, x0 = y.astype(int), x.astype(int)
    y0, x0 = np.minimum(y0, 8), np.minimum(x0, 8)
    fy, fx = y - y0, x - x0
    mixed = (rim[y0, x0] * (1 - fy) * (1 - fx) + rim[y0 + 1, x0] * fy * (1 - fx)
             + rim[y0, x0 + 1] * (1 - fy) * fx + rim[y0 + 1, x0 + 1] * fy * fx)  # fmt: skip
    return np.asarray(mixed.reshape(high, high), dtype=np.float32)


def paste(canvas: Pixels, rng: np.random.Generator, ink: Pixels, top: int, left: int) -> None:
    """Ink, ``[height, width]`` in 0 to 1, in a bright colour of its own."""
    colour = rng.uniform(0.65, 1.0, 3).astype(np.float32)[:, None, None]
    height, width = ink.shape
    window = canvas[:, top : top + height, left : left + width]
    window += ink * (colour - window)


def stroke(canvas: Pixels, rng: np.random.Generator, top: int, left: int, size: int) -> int:
    """A straight line, or two that cross: no digit, but as bright as one. How many there are."""
    count = int(rng.integers(1, 3))
    for _ in range(count):
        start, end = rng.uniform(0.15, 0.85, (2, 2)) * size
        end = start + (end - start) * min(1.0, 0.4 * size / max(1.0, np.hypot(*(end - start))))
        ink = np.zeros((size, size), dtype=np.float32)
        along = start + (end - start) * np.linspace(0, 1, 24)[:, None]
        y, x = np.clip(along, 0, size - 2).astype(int).T
        for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
            ink[y + down, x + right] = 0.9
        paste(canvas, rng, ink, top, left)
    return count


def noisy(canvas: Pixels, rng: np.random.Generator) -> Pixels:
    """With grain on every pixel."""
    noise = rng.standard_normal(canvas.shape, dtype=np.float32)
    return np.clip(canvas + 0.04 * noise, 0, 1)
