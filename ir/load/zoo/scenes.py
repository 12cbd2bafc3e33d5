"""Scenes of real handwritten digits on a noisy canvas, with questions about them.

The digits are scikit-learn's copy of the UCI set "Optical Recognition of Handwritten Digits"
(E. Alpaydin, C. Kaynak; CC BY 4.0): 1797 images of 8 x 8 pixels, kept here in ``digits.npz``. Each
digit belongs to one split by the hash of its pixels; a scene of a split holds digits of that split
only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from .drawing import Pixels, background, corner, noisy, paste, stroke, warped

Split = Literal["train", "calibration", "validation", "test"]
SHARES: dict[Split, float] = {"calibration": 0.05, "validation": 0.05, "test": 0.2}
IMAGE, PATCH, CELL = 96, 8, 32
TOKENS = (IMAGE // PATCH) ** 2
"""Visual tokens of a picture."""
LARGE, CROPS = 2 * IMAGE, 5
"""Size of scenes that a model sees as ``crops``, and how many these are."""
RIM = 4
"""Pixels of the frame round a large canvas."""
CELLS = (
    "top left", "top", "top right", "left", "center", "right", "bottom left", "bottom",
    "bottom right",
)  # fmt: skip
TYPES = ("where", "count", "largest", "contains")
COUNTS = (1, 4)
"""The fewest and the most digits in a scene that questions are asked about."""
VIT_IMAGE = 48
MEAN, STD = 0.5, 0.25
"""Of pixels in 0 to 1: what a model sees is ``(pixel - MEAN) / STD``."""


@dataclass(frozen=True)
class Digit:
    """One digit in a scene; ``box`` is (top, left, size) in pixels."""

    value: int
    cell: int
    box: tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """``image`` is ``[3, height, width]`` f32 in 0 to 1; of a video ``[frames, 3, height, width]``,
    with the frames as ``parts``."""

    image: Pixels
    digits: tuple[Digit, ...]
    parts: tuple[Scene, ...] = ()


@dataclass(frozen=True)
class Question:
    """A question about a scene, and the one word that answers it."""

    scene: Scene
    type: str
    text: str
    answer: str


@cache
def digits(split: Split) -> tuple[Pixels, NDArray[np.int64]]:
    """Images ``[n, 8, 8]`` f32 in 0 to 1, and labels ``[n]``, of one split."""
    with np.load(Path(__file__).parent / "digits.npz") as file:
        images, labels = file["images"], file["labels"].astype(np.int64)
    chosen = np.array([_split_of(image) == split for image in images])
    return images[chosen].astype(np.float32) / 16, labels[chosen]


def _split_of(image: NDArray[np.uint8]) -> Split:
    digest = hashlib.sha256(image.tobytes()).digest()
    point = int.from_bytes(digest[:8], "big") / 2**64
    for split, share in SHARES.items():
        if point < share:
            return split
        point -= share
    return "train"


# --- drawing ------------------------------------------------------------------------------------


def draw_scene(
    split: Split,
    rng: np.random.Generator,
    size: int = IMAGE,
    counts: tuple[int, int] = COUNTS,
) -> Scene:
    """Digits in cells of their own, among strokes that are no digits.

    A canvas of ``size`` pixels, 96 or 192, has 3 x 3 named cells. The digits, ``counts[0]`` to
    ``counts[1]`` of them, are 16 to 24 pixels high on both; on the larger one none crosses the
    edge between two of its ``crops``, and a frame round the canvas tells a crop where it was cut.
    """
    canvas = background(rng, size)
    cell_size = size // 3
    cells = rng.permutation(len(CELLS))
    count = int(rng.integers(counts[0], counts[1] + 1))
    for cell in cells[count : count + int(rng.integers(2, 6))]:
        stroke(canvas, rng, *corner(int(cell), cell_size), CELL)
    if size > IMAGE:
        _frame(canvas, rng)
    images, labels = digits(split)
    placed = []
    for cell in cells[:count]:
        index = int(rng.integers(len(labels)))
        high = int(rng.integers(16, 25))
        top, left = (int(c + rng.integers(0, cell_size - high + 1))
                     for c in corner(int(cell), cell_size))  # fmt: skip
        if size > IMAGE:
            top, left = _uncut(top, high), _uncut(left, high)
        paste(canvas, rng, warped(images[index], high, rng), top, left)
        placed.append(Digit(int(labels[index]), int(cell), (top, left, high)))
    return Scene(noisy(canvas, rng), tuple(placed))


def _uncut(start: int, length: int) -> int:
    """The start nearest to this one at which a digit lies inside the frame, on one side of the
    crops' edge."""
    if start < IMAGE < start + length:
        return IMAGE - length if start + length / 2 < IMAGE else IMAGE
    return min(max(start, RIM), LARGE - RIM - length)


def _frame(canvas: Pixels, rng: np.random.Generator) -> None:
    """A frame of one colour, brighter than the background and less bright than ink."""
    inside = canvas[:, RIM:-RIM, RIM:-RIM].copy()
    canvas[:] = rng.uniform(0.42, 0.58, (3, 1, 1))
    canvas[:, RIM:-RIM, RIM:-RIM] = inside


# --- questions ----------------------------------------------------------------------------------


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> Question:
    """A question of one of ``TYPES`` about the scene."""
    values = [digit.value for digit in scene.digits]
    if kind == "where":
        cell = int(rng.integers(len(CELLS)))
        if rng.random() < 0.75:
            cell = scene.digits[int(rng.integers(len(values)))].cell
        there = [str(d.value) for d in scene.digits if d.cell == cell]
        return Question(scene, kind, f"which digit is at the {CELLS[cell]} ?", (*there, "none")[0])
    if kind == "count":
        return Question(scene, kind, "how many digits are there ?", str(len(values)))
    if kind == "largest":
        return Question(scene, kind, "which digit is the largest ?", str(max(values)))
    if kind != "contains":
        raise ValueError(f"{kind} is not one of {TYPES}")
    present = rng.random() < 0.5
    choices = [v for v in range(10) if (v in values) == present]
    value = choices[int(rng.integers(len(choices)))]
    return Question(scene, kind, f"is there a {value} ?", "yes" if present else "no")


def questions(split: Split, count: int, seed: int = 0, size: int = IMAGE) -> list[Question]:
    """``count`` questions, the four types in turn, each about a scene of its own.

    The same for the same arguments: question ``i`` does not depend on ``count``.
    """
    series = []
    for i in range(count):
        rng = np.random.default_rng([seed, i, len(split), size])
        series.append(ask(draw_scene(split, rng, size), TYPES[i % len(TYPES)], rng))
    return series


def normalized(images: Sequence[Pixels]) -> torch.Tensor:
    """``pixel_values`` ``[n, ..., 3, height, width]`` f32 of images in 0 to 1."""
    return (torch.from_numpy(np.stack(images)) - MEAN) / STD


def crops(image: Pixels) -> Pixels:
    """An image of 192 pixels as a model of 96 sees it, ``[5, 3, 96, 96]``: the whole at half the
    resolution, then its four quarters, row by row."""
    small = image.reshape(3, IMAGE, 2, IMAGE, 2).mean((2, 4))
    quarters = [image[:, y : y + IMAGE, x : x + IMAGE] for y in (0, IMAGE) for x in (0, IMAGE)]
    return np.stack([small, *quarters])


def seen(scene: Scene) -> Pixels:
    """The image as a model takes it: ``[3, 96, 96]``, or the ``crops`` of a large one, or the
    frames of a video."""
    return crops(scene.image) if scene.image.shape[-1] > IMAGE else scene.image


def pictures(scene: Scene) -> list[Scene]:
    """What a model sees of a scene, as scenes of 96 pixels with the digits in them: the scene, or
    each of the ``crops`` of a large one; of a video its frames. A digit's ``cell`` stays that of
    the whole scene."""
    if scene.parts or scene.image.shape[-1] == IMAGE:
        return list(scene.parts) or [scene]
    boxes = [(d, d.box) for d in scene.digits]
    small = [replace(d, box=(top // 2, left // 2, (high + 1) // 2))
             for d, (top, left, high) in boxes]  # fmt: skip
    parts = [small]
    for y in (0, IMAGE):
        for x in (0, IMAGE):
            parts.append([
                replace(d, box=(top - y, left - x, high)) for d, (top, left, high) in boxes
                if y <= top < y + IMAGE and x <= left < x + IMAGE
            ])  # fmt: skip
    return [Scene(i, tuple(part)) for i, part in zip(crops(scene.image), parts, strict=True)]


def digit_tokens(scene: Scene) -> torch.Tensor:
    """Which of a scene's visual tokens stand for ``digit_patches``: ``[tokens]`` bool, picture by
    picture."""
    return torch.cat([digit_patches(picture) for picture in pictures(scene)])


def digit_patches(scene: Scene, least: float = 0.25) -> torch.Tensor:
    """Which patches a digit's box covers by ``least`` of their area: ``[patches]`` bool, row by
    row."""
    grid = scene.image.shape[-1] // PATCH
    edges = np.arange(grid) * PATCH
    share = np.zeros((grid, grid))
    for digit in scene.digits:  # in cells of their own, so that boxes never overlap
        top, left, high = digit.box
        rows, columns = (
            np.clip(np.minimum(start + high, edges + PATCH) - np.maximum(start, edges), 0, None)
            for start in (top, left)
        )
        share += np.outer(rows, columns) / PATCH**2
    return torch.from_numpy(share.reshape(-1) >= least)


# --- one digit an image -------------------------------------------------------------------------


def draw_digit(
    split: Split, rng: np.random.Generator, index: int | None = None
) -> tuple[Pixels, int]:
    """One digit of 24 to 36 pixels on a canvas of 48, with strokes, and its label."""
    images, labels = digits(split)
    chosen = int(rng.integers(len(labels))) if index is None else index
    canvas = background(rng, VIT_IMAGE)
    for _ in range(int(rng.integers(0, 3))):
        corner = rng.integers(0, VIT_IMAGE - 16, 2)
        stroke(canvas, rng, int(corner[0]), int(corner[1]), 16)
    high = int(rng.integers(24, 37))
    top, left = (int(p) for p in rng.integers(0, VIT_IMAGE - high + 1, 2))
    paste(canvas, rng, warped(images[chosen], high, rng), top, left)
    return noisy(canvas, rng), int(labels[chosen])


def classified(
    split: Split, count: int, seed: int = 0, batch: int = 64
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of ``pixel_values`` ``[n, 3, 48, 48]`` and labels ``[n]``; every digit of the split
    in turn."""
    total = len(digits(split)[1])
    for start in range(0, count, batch):
        drawn = [
            draw_digit(split, np.random.default_rng([seed, i, len(split)]), i % total)
            for i in range(start, min(count, start + batch))
        ]
        yield normalized([image for image, _ in drawn]), torch.tensor([label for _, label in drawn])


# --- prompts ------------------------------------------------------------------------------------


def prompt_batches(
    asked: Sequence[Question], tokenizer: Any, *, batch: int = 16
) -> list[dict[str, torch.Tensor]]:
    """Questions as inputs of a LLaVA model: ``input_ids``, ``attention_mask`` ``[n, seq]`` i64,
    padded on the left, and ``pixel_values`` ``[n, 3, 96, 96]`` f32, or ``[n, 5, 3, 96, 96]``, the
    ``crops``, of scenes of 192 pixels, or ``[n, frames, 3, 48, 48]`` of videos.

    A prompt is ``<s>``, a placeholder for each patch, the question; the next token is the answer.
    """
    image, pad = tokenizer.token_to_id("<image>"), tokenizer.token_to_id("<pad>")
    batches = []
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        encoded = [tokenizer.encode(question.text).ids for question in part]
        images = [seen(question.scene) for question in part]
        tokens = images[0].size // (3 * PATCH**2)  # of all crops
        rows = [[ids[0], *[image] * tokens, *ids[1:]] for ids in encoded]
        longest = max(map(len, rows))
        batches.append(
            {
                "input_ids": torch.tensor([[pad] * (longest - len(r)) + r for r in rows]),
                "attention_mask": torch.tensor(
                    [[0] * (longest - len(r)) + [1] * len(r) for r in rows]
                ),
                "pixel_values": normalized(images),
            }
        )
    return batches
