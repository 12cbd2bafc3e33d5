"""Prompts that hold images: which token stands for one, and that the images are given."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from ..core.errors import BadInput
from .cache_slots import PAST_AXIS, past_slot

PROMPT_KEY = "graphwright.image_prompt"
"""Metadata: the token that stands for a feature of an image, and how many an image has: 3 144."""
GRID_KEY = "graphwright.image_grid"
"""Metadata: rows and columns of the crops that an image comes as beside its thumbnail: 2 2."""

PLACES_KEY = "graphwright.image_places"
"""Metadata: rows and columns of the tokens of an image, in a graph whose tokens stand down and
across beside in time (Qwen2-VL's M-RoPE): 16 16. Where some leave, the others keep their places."""

SQUARES_KEY = "graphwright.image_squares"
"""Metadata: pixels along a patch of such an image, patches along the square that is one token, and
frames that a patch stands for: 14 2 2."""


def prompt_metadata(prompt: Sequence[int]) -> dict[str, str]:
    """The metadata of a graph of which every image is this ``prompt``; none for a graph of text."""
    return {PROMPT_KEY: f"{prompt[0]} {len(prompt)}"} if prompt else {}


def read_prompt(metadata: Mapping[str, str]) -> tuple[int, ...]:
    """What ``prompt_metadata`` says; empty where metadata say nothing that it could."""
    match = re.fullmatch(r"(\d{1,9}) (\d{1,5})", metadata.get(PROMPT_KEY, ""))
    return (int(match[1]),) * int(match[2]) if match else ()


def grid_metadata(grid: tuple[int, int] | None) -> dict[str, str]:
    """The metadata of a graph whose images come as a ``grid`` of crops; none for any other."""
    return {GRID_KEY: f"{grid[0]} {grid[1]}"} if grid is not None else {}


def read_grid(metadata: Mapping[str, str]) -> tuple[int, int] | None:
    """What ``grid_metadata`` says; ``None`` where metadata say nothing that it could."""
    match = re.fullmatch(r"(\d{1,3}) (\d{1,3})", metadata.get(GRID_KEY, ""))
    return (int(match[1]), int(match[2])) if match else None


def places_metadata(grid: tuple[int, int], squares: tuple[int, int, int]) -> dict[str, str]:
    """The metadata of a graph whose images are a ``grid`` of tokens, which stand as in it, each of
    ``squares`` as ``SQUARES_KEY`` says."""
    return {
        PLACES_KEY: f"{grid[0]} {grid[1]}", SQUARES_KEY: " ".join(map(str, squares)),
    }  # fmt: skip


def read_places(metadata: Mapping[str, str]) -> tuple[int, int] | None:
    """What ``places_metadata`` says; ``None`` where metadata say nothing that it could."""
    match = re.fullmatch(r"(\d{1,4}) (\d{1,4})", metadata.get(PLACES_KEY, ""))
    return (int(match[1]), int(match[2])) if match else None


def read_squares(metadata: Mapping[str, str]) -> tuple[int, int, int] | None:
    """What ``SQUARES_KEY`` says; ``None`` where metadata say nothing that it could."""
    match = re.fullmatch(r"(\d{1,4}) (\d{1,2}) (\d{1,2})", metadata.get(SQUARES_KEY, ""))
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


def check_pictured(
    prompt: Sequence[int], inputs: Mapping[str, torch.Tensor], *, cut: bool = False
) -> None:
    """Raise ``BadInput`` where ``input_ids`` names other images than ``pixel_values`` holds.

    Of more images named than there are, a graph would compute with the placeholders' own
    embeddings. Of fewer, one with a cache, which reads them one after another over all rows, would
    read another row's; nothing reads them where no image is named, nor, without a cache, those of
    rows that name none. Where image tokens were ``cut``, as many tokens leave every row, and of one
    without a whole image these are words. Nothing in the outputs tells.

    Steps are looked at for cuts alone: their images came with the prompt, a model may have written
    a placeholder, and a graph with a fixed number of images is given some that nothing reads.
    """
    ids, pixels = inputs.get("input_ids"), inputs.get("pixel_values")
    if not prompt or ids is None or pixels is None:
        return
    pasts = [tensor for name, tensor in inputs.items() if past_slot(name) is not None]
    if any(past.shape[PAST_AXIS] for past in pasts) and not (cut and len(pixels)):
        return
    rows, images = (ids == prompt[0]).sum(-1).flatten().tolist(), len(pixels)
    named, features = sum(rows), images * len(prompt)
    holds = (
        f"input_ids holds {named} times the token {prompt[0]}, which stands for a feature of "
        f"an image, and the {images} images of pixel_values have {features}: "
    )
    if named > features:
        raise BadInput(
            f"{holds}give one image for each {len(prompt)} of them, or leave them out of the text"
        )
    if cut and images:
        _check_rows(prompt, rows)
    elif pasts and 0 < named < features:
        raise BadInput(f"{holds}leave out the images that no text names")


def _check_rows(prompt: Sequence[int], rows: Sequence[int]) -> None:
    """Raise ``BadInput`` unless each row names one image; ``rows`` are its placeholders."""
    for number, count in enumerate(rows):
        if count != len(prompt):
            raise BadInput(
                f"row {number} of input_ids holds {count} times the token {prompt[0]}, and an "
                f"image is {len(prompt)} of them: image tokens were pruned of this model, and as "
                "many leave every row, words where there is no image. Give each row an image, or "
                "those without one apart, with pixel_values of none"
            )
