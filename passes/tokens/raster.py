"""An image's patches and its tokens, where these stand in another order, with newlines among them.

LLaVA-NeXT's raster is such an order. ``ImageTokens.layout`` says it; where it is empty each token
is a patch, in order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...ir.core.view import Value
from ...ir.core.weights import MemoryWeight
from ...ir.moves.selection import ascending
from ...ir.structure.token_layout import NO_PATCH
from ...ir.structure.vision import ImageTokens
from ...ir.vocab.builder import Builder


def tokens_of(b: Builder, images: ImageTokens, patches: Value, left: int) -> Value:
    """The places in the image of patches i64 ``[images, count]``, numbered through its pictures,
    and those of all newlines: ``left`` of them, ascending."""
    if not images.layout:
        return patches
    places = _places(images)
    table = MemoryWeight(places[images.newlines :, None].contiguous())
    line = b.view.add_weight("raster.layout", table)
    tokens = b.squeeze(b.embedding(line, patches), dims=(2,))
    if not images.newlines:
        return ascending(b, tokens, left)
    ends = MemoryWeight(places[None, : images.newlines].contiguous())
    newlines = b.view.add_weight("raster.newlines", ends)
    # Zeros of one column, as many as there are rows.
    rows = b.mul(b.slice(patches, 0, 1, dim=1), 0)
    return ascending(b, b.concat(tokens, b.add(rows, newlines), dim=1), left)


def fixed_tokens(images: ImageTokens, patches: Sequence[int]) -> list[int]:
    """The places in the image of patches that are counted in the text's order, and those of all
    newlines, ascending."""
    if not images.newlines:
        return list(patches)
    is_patch = torch.tensor(images.layout) != NO_PATCH
    stays = ~is_patch
    stays[is_patch.nonzero().squeeze(1)[list(patches)]] = True
    places: list[int] = stays.nonzero().squeeze(1).tolist()
    return places


def in_tower_order(b: Builder, images: ImageTokens) -> Value:
    """The projected features of the patches, without newlines: ``[images, patches, width]``."""
    if not images.layout:
        return images.features
    places = MemoryWeight(_places(images)[images.newlines :].contiguous())
    return b.index_select(images.features, b.view.add_weight("raster.patches", places), dim=1)


def in_text_order(b: Builder, images: ImageTokens, patches: Value) -> Value:
    """Features of all patches ``[images, patches, width]`` as the text reads them, with the
    newlines that it read before."""
    if not images.layout:
        return patches
    layout = torch.tensor(images.layout)
    own = torch.arange(len(layout)) + images.patches * images.pictures
    places = MemoryWeight(torch.where(layout == NO_PATCH, own, layout))
    both = b.concat(patches, images.features, dim=1)
    return b.index_select(both, b.view.add_weight("raster.text", places), dim=1)


def _places(images: ImageTokens) -> torch.Tensor:
    """The places of the newlines, then of each patch: i64 ``[tokens]``."""
    return torch.argsort(torch.tensor(images.layout), stable=True)
