"""Videos of moving digits for ``zoo:tiny-video``, and questions about what came when.

A video is eight frames of 48 pixels. The digits of a split come one after another, each for one to
three frames, and none of them twice: a question asks which came first, last, or after another one,
and how many came. A digit that is there for one frame alone is lost with that frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .drawing import Pixels, background, noisy, paste, stroke, warped
from .scenes import PATCH, Digit, Question, Scene, Split, digits

WORDS = ("came", "first", "last", "after")
"""What a model's tokenizer needs beside the words of ``scenes``."""
TYPES = ("first", "last", "after", "count")
FRAMES, FRAME = 8, 48
PATCHES = (FRAME // PATCH) ** 2
"""Visual tokens of a frame."""
COUNTS = (1, 4)
"""The fewest and the most digits in a video."""
HEIGHTS = (16, 24)
"""Pixels of a digit's height, least and most."""
LONGEST = 3
"""Frames of eight that a digit is there for, at most."""
CELL = FRAME // 3


def draw_video(split: Split, rng: np.random.Generator, frames: int = FRAMES) -> Scene:
    """A video, ``[frames, 3, 48, 48]``: its digits in the order in which they come, each where it
    is first, and its frames as ``parts``."""
    canvas = background(rng, FRAME)
    for _ in range(int(rng.integers(0, 3))):
        corner = rng.integers(0, FRAME - CELL, 2)
        stroke(canvas, rng, int(corner[0]), int(corner[1]), CELL)
    count = int(rng.integers(COUNTS[0], COUNTS[1] + 1))
    starts = np.sort(rng.choice(frames, count, replace=False))
    ends = [*starts[1:], frames]
    images, labels = digits(split)
    inks: list[Pixels] = [canvas.copy() for _ in range(frames)]
    shown: list[list[Digit]] = [[] for _ in range(frames)]
    for value, start, end in zip(rng.permutation(10)[:count], starts, ends, strict=True):
        longest = LONGEST * frames // FRAMES
        span = range(start, min(int(end), start + int(rng.integers(1, longest + 1))))
        indices = np.flatnonzero(labels == value)
        high = int(rng.integers(HEIGHTS[0], HEIGHTS[1] + 1))
        ink = warped(images[indices[int(rng.integers(len(indices)))]], high, rng)
        colour = int(rng.integers(2**31))
        for frame, (top, left) in zip(span, _moving(rng, high, len(span)), strict=True):
            paste(inks[frame], np.random.default_rng(colour), ink, top, left)
            cell = (top + high // 2) // CELL * 3 + (left + high // 2) // CELL
            shown[frame].append(Digit(int(value), cell, (top, left, high)))
    parts = tuple(
        Scene(noisy(image, rng), tuple(there)) for image, there in zip(inks, shown, strict=True)
    )
    first = {digit.value: digit for there in shown[::-1] for digit in there}
    order = dict.fromkeys(digit.value for there in shown for digit in there)
    return Scene(
        np.stack([part.image for part in parts]), tuple(first[v] for v in order), parts
    )


def _moving(rng: np.random.Generator, high: int, steps: int) -> Sequence[tuple[int, int]]:
    """Top and left of a digit in each frame: from one place to another in a straight line."""
    ends = rng.integers(0, FRAME - high + 1, (2, 2))
    return [(int(y), int(x)) for y, x in np.linspace(ends[0], ends[1], steps).round()]


def ask(video: Scene, kind: str, rng: np.random.Generator) -> Question:
    """A question of one of ``TYPES`` about the video."""
    if kind == "after":
        count = len(video.digits)
        # The last one, which none comes after, no more often than needed.
        last = count == 1 or rng.random() < 0.2
        return ask_after(video, count - 1 if last else int(rng.integers(count - 1)))
    values = [str(digit.value) for digit in video.digits]
    if kind == "count":
        return Question(video, kind, "how many digits came ?", str(len(values)))
    if kind not in ("first", "last"):
        raise ValueError(f"{kind} is not one of {TYPES}")
    answer = values[0 if kind == "first" else -1]
    return Question(video, kind, f"which digit came {kind} ?", answer)


def ask_after(video: Scene, place: int) -> Question:
    """Which digit came after the one at ``place`` of the order."""
    value, *later = [str(digit.value) for digit in video.digits[place:]]
    return Question(video, "after", f"which digit came after the {value} ?", (*later, "none")[0])


def questions(
    split: Split, count: int, seed: int = 0, frames: int = FRAMES
) -> list[Question]:
    """``count`` questions, the four types in turn, each about a video of its own.

    The same for the same arguments: question ``i`` does not depend on ``count``.
    """
    series = []
    for i in range(count):
        rng = np.random.default_rng([seed, i, len(split), 5, frames])
        series.append(ask(draw_video(split, rng, frames), TYPES[i % len(TYPES)], rng))
    return series
