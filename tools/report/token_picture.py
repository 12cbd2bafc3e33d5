"""The picture that a prompt is about, with the image tokens marked that go on behind each cut."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ir.core.errors import BadInput, Missing, Refusal
from ...ir.core.view import Node, Value, View
from ...ir.run.sweep import sweep_together
from ...ir.structure.cuts import cutting_pass, is_remade
from ...ir.structure.recognize import recognize
from ...ir.structure.vision import ImageTokens, find_image_tokens
from .manifest import CutEntry, ImageTokensEntry

SIDE, GAP, LINE = 192, 10, 18
"""Pixels of a picture's edge, between pictures, and of a line of text."""
GONE = 0.72
"""How opaque the white over a patch is whose token has left."""


@dataclass(frozen=True)
class Kept:
    """Which image tokens of one prompt are left behind a cut: bool ``[tokens]``."""

    label: str
    tokens: Tensor
    block: int = 0
    """The block before which the cut is."""
    method: str = ""
    """The pass that made it."""


def kept_tokens(view: View, prompt: Mapping[str, Tensor], label: str) -> list[Kept]:
    """The image tokens of the first row of ``prompt`` that go on behind each cut of a graph.

    One entry for each cut, in order, labelled with the block before which it is; of a graph without
    cuts one entry with all tokens. Behind a pass that makes new tokens of all frames there are
    none: no patch has a token of its own. Raises ``BadInput`` for a graph that has no image tokens.
    """
    try:
        images = _last(view)
    except Refusal as refusal:
        raise BadInput(f"there is no picture to draw: {refusal}") from None
    masks = _observed(view, prompt, [images.placeholders, *images.kept])
    placeholders, *cuts = (masks[value][0] for value in (images.placeholders, *images.kept))
    start = int(placeholders.long().argmax())
    count = int(placeholders.sum())
    if not cuts:
        return [Kept(label, torch.ones(count, dtype=torch.bool))]
    blocks = _blocks(view, images)
    places = torch.arange(len(placeholders))
    entries = []
    for block, value, kept in zip(blocks, images.kept, cuts, strict=True):
        if is_remade(view, value):
            break
        places = places[kept]
        mask = torch.zeros(len(placeholders), dtype=torch.bool)
        mask[places] = True
        name = f"{label}, from block {block}"
        tokens = _by_patch(images, mask[start : start + count])
        entries.append(Kept(name, tokens, block, cutting_pass(view, value)))
    return entries


def _by_patch(images: ImageTokens, tokens: Tensor) -> Tensor:
    """The tokens in the order of the tower's patches, without newlines among them."""
    if not images.layout:
        return tokens
    places = torch.tensor(images.layout)
    patches = torch.zeros(images.patches * images.pictures, dtype=torch.bool)
    patches[places[places >= 0]] = tokens[places >= 0]
    return patches


def kept_entry(view: View, prompt: Mapping[str, Tensor]) -> ImageTokensEntry | None:
    """What the manifest says of the first row of ``prompt``: its pictures, and which tokens go on
    behind each cut. ``None`` for a graph without cuts or whose grid of patches is not seen, and
    without pillow."""
    pixels = prompt.get("pixel_values")
    try:
        images = _last(view)
    except Refusal:
        return None
    if pixels is None or images.grid is None or not images.kept:
        return None
    rows, columns = images.grid
    kept = kept_tokens(view, prompt, "")
    if not kept:
        return None
    try:
        pictures = [_encoded(p, "JPEG") for p in (pixels[0] if pixels.dim() == 5 else pixels[:1])]
    except Missing:
        return None
    return ImageTokensEntry(
        rows=rows, columns=columns, pictures=pictures,
        cuts=[
            CutEntry(name=entry.method, block=entry.block,
                     kept=entry.tokens.nonzero().squeeze(1).tolist())
            for entry in kept
        ],
    )  # fmt: skip


def draw(view: View, pixels: Tensor, kept: Sequence[Kept]) -> str:
    """An SVG: a row of the image's pictures for each of ``kept``, patches that left under white.

    ``view`` says the grid of patches; ``pixels`` is one image as the model takes it, ``[3, height,
    width]``, or ``[pictures, 3, height, width]``. Raises ``BadInput`` where no grid is known, and
    ``Missing`` without pillow.
    """
    images = _last(view)
    if images.grid is None:
        raise BadInput("the grid of patches is not seen in this graph, so none can be marked")
    pictures = [_encoded(p, "PNG") for p in (pixels if pixels.dim() == 4 else pixels[None])]
    width = GAP + len(pictures) * (SIDE + GAP)
    height = GAP + len(kept) * (SIDE + LINE + GAP)
    font = 'font-family="sans-serif" font-size="12"'
    space = "http://www.w3.org/2000/svg"
    parts = [f'<svg xmlns="{space}" width="{width}" height="{height}" {font}>']
    for row, entry in enumerate(kept):
        top = GAP + row * (SIDE + LINE + GAP)
        caption = f"{entry.label}: {int(entry.tokens.sum())} of {len(entry.tokens)}"
        parts.append(f'<text x="{GAP}" y="{top + 12}">{html.escape(caption)}</text>')
        masks = entry.tokens.reshape(len(pictures), *images.grid)
        for column, (png, mask) in enumerate(zip(pictures, masks, strict=True)):
            left = GAP + column * (SIDE + GAP)
            parts.append(
                f'<image x="{left}" y="{top + LINE}" width="{SIDE}" height="{SIDE}" '
                f'preserveAspectRatio="none" href="data:image/png;base64,{png}"/>'
            )
            parts += _veils(mask, left, top + LINE)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _veils(mask: Tensor, left: int, top: int) -> list[str]:
    """White over each patch that left."""
    rows, columns = mask.shape
    high, wide = SIDE / rows, SIDE / columns
    return [
        f'<rect x="{left + column * wide:.2f}" y="{top + row * high:.2f}" width="{wide:.2f}" '
        f'height="{high:.2f}" fill="#fff" fill-opacity="{GONE}"/>'
        for row, column in (~mask).nonzero().tolist()
    ]


def _encoded(picture: Tensor, kind: str) -> str:
    """One picture, at most twice ``SIDE`` pixels wide, its numbers spread over the range of bytes,
    as base64."""
    try:
        from PIL import Image
    except ImportError:
        raise Missing("pictures are written by pillow: pip install 'graphwright[hf]'") from None
    low, high = picture.min(), picture.max()
    bytes_ = (255 * (picture - low) / (high - low).clamp(min=1e-6)).byte()
    image = Image.fromarray(bytes_.permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((2 * SIDE, 2 * SIDE))
    file = io.BytesIO()
    image.save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def _last(view: View) -> ImageTokens:
    """The image tokens at the entry of the last block."""
    structure = recognize(view)
    first = find_image_tokens(view, structure)
    return find_image_tokens(view, structure, len(first.language) - 1)


def _blocks(view: View, images: ImageTokens) -> list[int]:
    """The block before which each cut is."""
    structure = recognize(view)
    blocks: list[int] = []
    for block in range(len(images.language)):
        cuts = len(find_image_tokens(view, structure, block).kept)
        blocks += [block] * (cuts - len(blocks))
    return blocks


def _observed(
    view: View, prompt: Mapping[str, Tensor], values: Sequence[Value]
) -> dict[Value, Tensor]:
    outputs: dict[Value, Tensor] = {}

    def note(node: Node, operands: list[list[Any]], results: list[tuple[Any, ...]]) -> None:
        outputs.update(zip(view.results(node), results[0], strict=True))

    makers = frozenset(view.maker(value) for value in values)
    sweep_together(view, [prompt], note, makers, outputs=False)
    return outputs
