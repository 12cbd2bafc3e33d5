"""Scenes for ``zoo:tiny-llava-details``, and questions on which a choice of image tokens can fail.

The pictures are those of ``scenes`` with more in them: large digits, one small one, and lines. Each
type of question asks for another part of the picture: for a large digit (``where``), for the small
one, which one to four patches show (``detail``), for lines, which are no digits (``background``),
and for all digits together (``count``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .drawing import background, corner, noisy, paste, stroke, warped
from .scenes import CELL, CELLS, IMAGE, Digit, Question, Scene, Split, digits

WORD = "lines"
"""What a model's tokenizer needs beside the words of ``scenes``."""
TYPES = ("where", "detail", "background", "count")
LARGE_DIGITS = (1, 5)
"""The fewest and the most large digits beside the small one."""
LARGE, SMALL = (16, 24), (8, 12)
"""Pixels of a digit's height, least and most: a small one is a 64th to a 144th of the picture."""
LINED = (2, 3)
"""The fewest and the most cells with lines."""


@dataclass(frozen=True)
class DetailScene(Scene):
    """``digits`` begins with the small one; ``lines`` is the number of lines in each cell."""

    lines: tuple[int, ...] = ()


def draw_scene(split: Split, rng: np.random.Generator) -> DetailScene:
    """A scene of 96 pixels; digits and lines stand in cells of their own."""
    canvas = background(rng, IMAGE)
    cells = [int(cell) for cell in rng.permutation(len(CELLS))]
    count = 1 + int(rng.integers(LARGE_DIGITS[0], LARGE_DIGITS[1] + 1))
    lines = [0] * len(CELLS)
    for cell in cells[count : count + int(rng.integers(LINED[0], LINED[1] + 1))]:
        lines[cell] = stroke(canvas, rng, *corner(cell, CELL), CELL)
    images, labels = digits(split)
    placed = []
    for i, cell in enumerate(cells[:count]):
        index = int(rng.integers(len(labels)))
        least, most = LARGE if i else SMALL
        high = int(rng.integers(least, most + 1))
        top, left = (start + int(rng.integers(0, CELL - high + 1)) for start in corner(cell, CELL))
        paste(canvas, rng, warped(images[index], high, rng), top, left)
        placed.append(Digit(int(labels[index]), cell, (top, left, high)))
    return DetailScene(noisy(canvas, rng), tuple(placed), lines=tuple(lines))


def ask(scene: DetailScene, kind: str, rng: np.random.Generator) -> Question:
    """A question of one of ``TYPES`` about the scene."""
    small, *large = scene.digits
    if kind == "where":
        return ask_digit(scene, kind, large[int(rng.integers(len(large)))].cell)
    if kind == "detail":
        return ask_digit(scene, kind, small.cell)
    if kind == "background":
        lined = [cell for cell, count in enumerate(scene.lines) if count]
        taken = {*lined, *(digit.cell for digit in scene.digits)}
        free = [cell for cell in range(len(CELLS)) if cell not in taken]
        # Three answers, of which none is much more frequent than the others.
        chosen = free if free and rng.random() < 0.3 else lined
        return ask_lines(scene, chosen[int(rng.integers(len(chosen)))])
    if kind != "count":
        raise ValueError(f"{kind} is not one of {TYPES}")
    return ask_count(scene)


def ask_digit(scene: DetailScene, kind: str, cell: int) -> Question:
    there = [str(digit.value) for digit in scene.digits if digit.cell == cell]
    return Question(scene, kind, f"which digit is at the {CELLS[cell]} ?", (*there, "none")[0])


def ask_lines(scene: DetailScene, cell: int) -> Question:
    answer = ("none", "1", "2")[scene.lines[cell]]
    return Question(scene, "background", f"how many lines are at the {CELLS[cell]} ?", answer)


def ask_count(scene: DetailScene) -> Question:
    return Question(scene, "count", "how many digits are there ?", str(len(scene.digits)))


def questions(split: Split, count: int, seed: int = 0) -> list[Question]:
    """``count`` questions, the four types in turn, each about a scene of its own.

    The same for the same arguments: question ``i`` does not depend on ``count``.
    """
    series = []
    for i in range(count):
        rng = np.random.default_rng([seed, i, len(split), 3])
        series.append(ask(draw_scene(split, rng), TYPES[i % len(TYPES)], rng))
    return series
