"""``ts-llava``: a thumbnail of some frames, and tokens at even distances of all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...ir.core.errors import BadInput, Refusal
from ...ir.core.view import Value, View
from ...ir.core.weights import MemoryWeight
from ...ir.moves.another_picture import another_picture, picture_input
from ...ir.moves.mixed_rows import mixed_columns, mixed_rows
from ...ir.structure.vision import ImageTokens
from ...ir.vocab.builder import Builder
from .frame_pass import FramePass, by_video, checked_fewer, even, pooling
from .token_pass import counted, parsed


@dataclass(frozen=True, kw_only=True)
class TSLLaVA(FramePass):
    """Let the text read tokens at even distances of all frames, and a thumbnail of a few.

    TS-LLaVA (Qu et al. 2024, arXiv 2411.11066). Of the tokens of all frames, one after another,
    ``frames`` are taken, at ``round(linspace)``; behind them stand those of one more picture:
    ``thumbnail`` frames at even distances, averaged to the cells of a grid that has the shape of a
    picture, with no fewer rows than columns (6 frames: 3 x 2). Nothing depends on what is in the
    video. The paper takes 2880 of 50 frames' 28800 tokens and 6 frames (4 and 8 are its variants);
    ``thumbnail=0`` makes none.

    The vision tower runs on one picture more. A step between tokens that is no multiple of a row
    takes other columns in each frame, as in the authors' code.
    """

    name: ClassVar[str] = "ts-llava"
    frames: str = "10%"
    """Tokens to take of all frames, as 2880 or 10%."""
    thumbnail: int = 6
    """Frames in the thumbnail; 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parsed(self.name, self.frames, "frames")
        if self.thumbnail < 0 or self.thumbnail == 1:
            raise BadInput(
                f"ts-llava: thumbnail={self.thumbnail} must be 0, or at least 2: one frame has its "
                "tokens already"
            )

    def count(self, images: ImageTokens) -> int:
        sampled = counted(self.name, self.frames, images.count, "frames")
        if not self.thumbnail:
            return sampled
        if self.thumbnail > images.pictures:
            raise Refusal(
                f"thumbnail={self.thumbnail}: a video has {images.pictures} frames here"
            )
        return checked_fewer(
            images, sampled + images.patches, f"{images.patches} of them are the thumbnail's; take "
            "fewer of the frames, or thumbnail=0"
        )  # fmt: skip

    def remade(self, view: View, images: ImageTokens) -> Value:
        sampled = counted(self.name, self.frames, images.count, "frames")
        thumbnail = self._thumbnail(view, images) if self.thumbnail else None
        x = by_video(view, images)
        width = (view.type(x).shape or ())[-1]
        makers = [view.maker(v) for v in (x, thumbnail) if v is not None]
        b = Builder(view, view.after([node for node in view.nodes() if node in makers][-1]))
        flat = b.reshape(x, -1, images.count, width)
        places = MemoryWeight(torch.tensor(even(images.count, sampled)))
        taken = b.index_select(flat, view.add_weight("ts_llava.places", places), dim=1)
        return taken if thumbnail is None else b.concat(taken, thumbnail, dim=1)

    def _thumbnail(self, view: View, images: ImageTokens) -> Value:
        """The tokens of one more picture, ``[videos, patches, width]``."""
        pixels = picture_input(view, images)
        channels, high, wide = (view.type(pixels).shape or ())[1:]
        assert isinstance(channels, int) and isinstance(high, int) and isinstance(wide, int)
        rows, columns = cells(self.thumbnail)
        if high % rows or wide % columns:
            raise Refusal(
                f"thumbnail={self.thumbnail}: {high} x {wide} pixels cannot be cut into {rows} x "
                f"{columns} equal cells"
            )
        b = Builder(view, view.after(view.maker(pixels)))
        every = b.reshape(pixels, -1, images.pictures, channels, high, wide)
        chosen = MemoryWeight(torch.tensor(even(images.pictures, self.thumbnail)))
        few = b.index_select(every, view.add_weight("ts_llava.frames", chosen), dim=1)
        narrow = mixed_columns(b, few, pooling(wide, wide // columns).T, "ts_llava.across")
        small = mixed_rows(b, narrow, pooling(high, high // rows), "ts_llava.down")
        grid = b.reshape(small, -1, rows, columns, channels, high // rows, wide // columns)
        placed = b.transpose(grid, perm=(0, 3, 1, 4, 2, 5))
        return another_picture(view, images, b.reshape(placed, -1, channels, high, wide))


def cells(count: int) -> tuple[int, int]:
    """Rows and columns of a grid of ``count`` cells, as near to a square as can be, rows first."""
    columns = next(n for n in range(math.isqrt(count), 0, -1) if count % n == 0)
    return count // columns, columns
