"""``globalcom2``: crops keep as many tokens as the thumbnail gives them weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...ir.core.errors import BadInput, Refusal
from ...ir.core.view import Value, View
from ...ir.core.weights import MemoryWeight
from ...ir.moves.attention_scores import attention_row
from ...ir.moves.matching import lengths
from ...ir.moves.mixed_rows import mixed_columns, mixed_rows
from ...ir.moves.selection import ascending, best, ranks, top_places
from ...ir.moves.shrink_dim import Positions
from ...ir.structure.pictured import read_grid
from ...ir.structure.recognize import Structure
from ...ir.structure.vision import ImageTokens, find_image_tokens
from ...ir.vocab import END
from ...ir.vocab.builder import Builder
from .fastervlm import check_cls
from .raster import tokens_of
from .token_pass import Cut, TokenPass, shared

TEMPERATURE = 10.0
"""Of the softmax over the crops' weights, as in the authors' code."""
TIE = 1e-6
"""By how much later a crop's token comes than an equal one of a crop before it."""


@dataclass(frozen=True, kw_only=True)
class GlobalCom2(TokenPass):
    """Keep ``ratio`` of a thumbnail and of its crops, more of the crops that it looks at.

    GlobalCom² (Liu et al. 2025, arXiv 2501.05179). A patch's score is the logit of the CLS query
    for it, the mean of the heads, in the layer that makes the features. The thumbnail keeps its
    best. Crop j of n gets the share ``r_j = min(1, ratio (1 + s_j - 1/n))`` with ``s`` the softmax
    of the sums of the thumbnail's scores over the crops' regions, divided by 10; within a crop a
    patch counts the sum of its own score and of the thumbnail's at its place, enlarged bilinearly,
    each divided by its norm over the crop. The crops' total is fixed, n times the thumbnail's: of
    the keys ``(rank + .5) / (r_j patches)`` the smallest stay, which gives each crop its share to
    within one token. Tokens stay in raster order, and newlines among them (LLaVA-NeXT) all stay.

    Crops are rows of the picture from left to right; ``grid``, such as ``2x3`` (rows and columns),
    where they are no square and the graph does not say it. The authors take the tower's last layer,
    which no feature is made of and which graphs leave out, and write the thumbnail's tokens in
    order of their scores.
    """

    name: ClassVar[str] = "globalcom2"
    positions: ClassVar[Positions] = "renumbered"
    ratio: float = 0.25
    """Share of image tokens to keep."""
    grid: str = ""
    """Rows x columns of crops, as 2x3."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ratio <= 1:
            raise BadInput(f"globalcom2: ratio={self.ratio:g} must be above 0 and at most 1")
        rows, by, columns = self.grid.partition("x")
        if self.grid and not (by and rows.isdigit() and columns.isdigit()):
            raise BadInput(f"globalcom2: grid={self.grid} is not a grid of crops, as 2x3 is")

    def cuts(self, view: View, structure: Structure) -> Sequence[Cut]:
        images = find_image_tokens(view, structure)
        check_cls(images)
        if images.pictures < 2 or images.grid is None:
            raise Refusal(
                "an image is one picture here: there are no crops to share tokens out among; "
                "fastervlm and diverse need none"
            )
        self._crops(view, images)
        each = round(self.ratio * images.patches)
        if not each:
            raise Refusal(f"ratio={self.ratio:g} keeps none of {images.patches} patches")
        return [Cut(0, images.count, images.newlines + each * images.pictures)]

    def choose(
        self, view: View, structure: Structure, images: ImageTokens, left: int
    ) -> Value:
        assert images.grid is not None
        crops, patches, each = images.pictures - 1, images.patches, shared(images, left)
        row = attention_row(view, images.attention.node, "first", logits=True)
        b = Builder(view, view.after(view.maker(row)))
        row = b.cast(row, dtype=torch.float32)
        scores = b.reshape(b.slice(row, 1, END, dim=1), -1, images.pictures, patches)
        thumbnail = b.slice(scores, 0, 1, dim=1)
        own = b.slice(scores, 1, END, dim=1)
        first = best(b, b.squeeze(thumbnail, dims=(1,)), each)
        rows, columns = self._crops(view, images)
        tables = _tables(images.grid, (rows, columns))
        sums = mixed_columns(b, thumbnail, tables["regions"], "globalcom2.regions")
        weight = b.softmax(b.mul(sums, 1 / TEMPERATURE), dim=2)
        share = b.mul(b.add(weight, 1 - 1 / crops), self.ratio)
        share = b.transpose(b.clamp(share, max=1.0), perm=(0, 2, 1))
        height, width = images.grid
        picture = b.reshape(thumbnail, -1, height, width)
        large = mixed_rows(b, picture, tables["down"], "globalcom2.down")
        large = mixed_columns(b, large, tables["across"], "globalcom2.across")
        large = b.reshape(large, -1, rows, height, columns, width)
        large = b.reshape(b.transpose(large, perm=(0, 1, 3, 2, 4)), -1, crops, patches)
        both = b.add(_unit(b, own), _unit(b, large))
        rank = b.cast(ranks(b, both, patches), dtype=view.type(both).dtype)
        keys = b.div(b.add(rank, 0.5), b.mul(share, float(patches)))
        order = view.add_weight("globalcom2.order", MemoryWeight(tables["order"]))
        keys = b.reshape(b.mul(keys, order), -1, crops * patches)
        count = crops * each
        lowest = b.topk(keys, k=count, dim=1, largest=False, sorted=True)
        later = b.add(ascending(b, top_places(b, lowest), count), patches)
        return tokens_of(b, images, b.concat(first, later, dim=1), left)

    def _crops(self, view: View, images: ImageTokens) -> tuple[int, int]:
        """Rows and columns of crops: the graph's own, the option's, or as many of both."""
        crops = images.pictures - 1
        known = read_grid(view.metadata())
        rows, columns = known or (math.isqrt(crops),) * 2
        if self.grid:
            rows, columns = (int(number) for number in self.grid.split("x"))
        if known is not None and known != (rows, columns):
            raise Refusal(
                f"grid={self.grid}: this graph's images are cut into {known[0]}x{known[1]} crops"
            )
        if rows * columns != crops:
            raise Refusal(
                f"{crops} crops are no grid of {rows}x{columns}: give theirs, as grid=1x{crops}"
            )
        return rows, columns


def _unit(b: Builder, scores: Value) -> Value:
    return b.div(scores, lengths(b, scores))


def _tables(grid: tuple[int, int], crops: tuple[int, int]) -> dict[str, Tensor]:
    """Constants by which the thumbnail's grid of patches is added up by crop, and enlarged."""
    (height, width), (rows, columns) = grid, crops
    vertical = torch.clamp(torch.arange(height) // max(1, height // rows), max=rows - 1)
    across = torch.clamp(torch.arange(width) // max(1, width // columns), max=columns - 1)
    region = (vertical[:, None] * columns + across[None]).flatten()
    return {
        "regions": torch.nn.functional.one_hot(region, rows * columns).float(),
        "down": _enlarged(height, rows),
        "across": _enlarged(width, columns).T.contiguous(),
        "order": 1 + TIE * torch.arange(rows * columns).reshape(1, -1, 1),
    }


def _enlarged(size: int, times: int) -> Tensor:
    """Bilinear enlargement of a line, ``[times size, size]``; pixels' centres are what agrees."""
    lines = torch.eye(size)[None]
    large = torch.nn.functional.interpolate(lines, size * times, mode="linear")
    return large[0].T.contiguous()
