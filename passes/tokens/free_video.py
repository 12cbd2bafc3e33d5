"""``free-video``: a few frames in detail, by what changes, and all of them coarsely."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ...ir.core.errors import BadInput, Refusal
from ...ir.core.view import Value, View
from ...ir.core.weights import MemoryWeight
from ...ir.moves.matching import directions
from ...ir.moves.selection import ascending, best, top_places
from ...ir.structure.vision import ImageTokens
from ...ir.vocab import END
from ...ir.vocab.builder import Builder
from .fastervlm import check_cls, cls_row
from .frame_pass import FramePass, by_video, checked_fewer, pooled_grid
from .token_pass import behind


@dataclass(frozen=True, kw_only=True)
class FreeVideo(FramePass):
    """Let the text read a region of a few frames, and a coarse grid of all.

    Free Video-LLM (Han et al. 2024, arXiv 2410.10441), without its text tower. *Slow*: the first
    frame and those ``frames - 1`` whose mean features differ most from the frame before (least
    cosine), the authors' score without words. *Middle*: ``middle`` more at ``floor(i F / middle)``.
    Of both, neighbours in a row are put together by their maximum (``halve``), and of this map a
    box of ``round(side sqrt(region))`` a side goes on, round the mean place of the best ``region``
    of its patches, within the map. *Fast*: every frame averaged to ``fast`` x ``fast``. The text
    reads slow, middle and fast tokens in this order. The paper: 3, 5, .8 and 4 of 50 frames.

    ``guide=prompt``, frames and patches by their likeness to the question, needs a text tower
    beside CLIP's images, which language models with images do not carry: it is refused. Instead,
    patches are scored by what the CLS token pays to them. The authors take the halved map of 24 x
    24 patches for 12 rows of 24; it is 24 rows of 12, as here.
    """

    name: ClassVar[str] = "free-video"
    frames: int = 3
    """Slow frames, by what changes."""
    region: float = 0.8
    """Share of these frames' patches that goes on."""
    middle: int = 5
    """More of them, at even distances."""
    fast: int = 4
    """Side of the grid of every frame; 0: none."""
    halve: bool = True
    """Put neighbours in a row together in these."""
    guide: Literal["change", "prompt"] = "change"
    """What chooses frames and regions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.frames, self.middle, self.fast) < 0 or not self.frames + self.fast:
            raise BadInput(
                f"free-video: frames={self.frames}, middle={self.middle} and fast={self.fast} must "
                "be at least 0, and frames or fast above it"
            )
        if not 0 < self.region <= 1:
            raise BadInput(f"free-video: region={self.region:g} must be above 0 and at most 1")

    def count(self, images: ImageTokens) -> int:
        self._check(images)
        if self._keeps_all(images):
            return images.count
        rows, columns = self._box(self._map(images))
        count = (self.frames + self.middle) * rows * columns + images.pictures * self.fast**2
        return checked_fewer(images, count, "take fewer frames, a smaller region or fast")

    def remade(self, view: View, images: ImageTokens) -> Value:
        x = by_video(view, images)
        width = (view.type(x).shape or ())[-1]
        scores = None if self.region == 1 else _by_frame(view, images)
        b = behind(view, x) if scores is None else behind(view, x, scores)
        parts = []
        if self.frames:
            chosen = _most_changed(b, x, images, self.frames)
            parts.append(self._regions(b, x, scores, images, chosen, self.frames))
        if self.middle:
            line = [i * images.pictures // self.middle for i in range(self.middle)]
            places = view.add_weight("free_video.middle", MemoryWeight(torch.tensor([line])))
            one = b.slice(b.reshape(x, -1, images.count * int(width)), 0, 1, dim=1)
            chosen = b.add(_zeros(b, one), places)
            parts.append(self._regions(b, x, scores, images, chosen, self.middle))
        if self.fast:
            assert images.grid is not None
            coarse = pooled_grid(b, x, images.grid, (self.fast, self.fast), "free_video.fast")
            parts.append(b.reshape(coarse, -1, images.pictures * self.fast**2, width))
        return parts[0] if len(parts) == 1 else b.concat(*parts, dim=1)

    def _check(self, images: ImageTokens) -> None:
        if self.guide == "prompt":
            raise Refusal(
                "guide=prompt needs a text tower that was trained with the vision tower, as CLIP's "
                "was, and the graph has none: guide=change needs no words"
            )
        if images.grid is None:
            raise Refusal("no grid of patches is seen, so that no region of it can be")
        if max(self.frames, self.middle) > images.pictures:
            raise Refusal(
                f"frames={self.frames} and middle={self.middle}: a video has {images.pictures} "
                "frames here"
            )
        if self.fast > min(images.grid):
            raise Refusal(f"fast={self.fast}: a frame is {images.grid[0]} x {images.grid[1]} here")
        if self.halve and images.grid[1] % 2 and self.frames + self.middle:
            raise Refusal(
                f"a row has {images.grid[1]} patches, which are no pairs: give halve=false"
            )
        if self.region < 1 and self.frames + self.middle:
            check_cls(images)

    def _keeps_all(self, images: ImageTokens) -> bool:
        others = self.middle or self.fast or self.halve
        return self.frames == images.pictures and self.region == 1 and not others

    def _map(self, images: ImageTokens) -> tuple[int, int]:
        """Rows and columns of a frame in which neighbours are together."""
        assert images.grid is not None
        rows, columns = images.grid
        return rows, columns // 2 if self.halve else columns

    def _box(self, grid: tuple[int, int]) -> tuple[int, int]:
        high, wide = (max(1, round(side * math.sqrt(self.region))) for side in grid)
        return high, wide

    def _regions(
        self, b: Builder, x: Value, scores: Value | None, images: ImageTokens, chosen: Value,
        count: int,
    ) -> Value:  # fmt: skip
        """The region of each of the ``chosen`` frames, i64 ``[videos, count]``."""
        view, (rows, columns) = b.view, self._map(images)
        width = int((view.type(x).shape or ())[-1])
        flat = b.reshape(x, -1, images.pictures, images.patches * width)
        picked = b.token_select(flat, chosen)
        picked = self._together(b, b.reshape(picked, -1, images.patches, width), width)
        patches = rows * columns
        if scores is None:
            return b.reshape(picked, -1, count * patches, width)
        rated = b.reshape(b.token_select(scores, chosen), -1, images.patches, 1)
        rated = b.reshape(self._together(b, rated, 1), -1, patches)
        high, wide = self._box((rows, columns))
        top = best(b, rated, max(1, int(patches * self.region)))
        here = b.cast(top, dtype=torch.float32)
        down = b.floor(b.div(here, float(columns)))
        along = b.sub(here, b.mul(down, float(columns)))
        vertical, across = _corner(b, down, high, rows), _corner(b, along, wide, columns)
        inside = (torch.arange(high)[:, None] * columns + torch.arange(wide)).flatten()
        table = view.add_weight("free_video.inside", MemoryWeight(inside[None]))
        places = b.add(b.add(b.mul(vertical, columns), across), table)
        return b.reshape(b.token_select(picked, places), -1, count * high * wide, width)

    def _together(self, b: Builder, x: Value, width: int) -> Value:
        """Neighbours in a row put together, ``[frames, patches / 2, width]``."""
        if not self.halve:
            return x
        patches = int((b.view.type(x).shape or ())[1])
        pairs = b.reshape(x, -1, patches // 2, 2, width)
        return b.amax(pairs, dims=(2,), keepdim=False)


def _by_frame(view: View, images: ImageTokens) -> Value:
    """What the CLS token of each frame pays to its patches: ``[videos, frames, patches]``."""
    row = cls_row(view, images.attention)
    b = Builder(view, view.after(view.maker(row)))
    return b.reshape(row, -1, images.pictures, images.patches)


def _most_changed(b: Builder, x: Value, images: ImageTokens, count: int) -> Value:
    """The first frame and those that are least like the one before: i64 ``[videos, count]``."""
    unit = directions(b, b.sum(x, dims=(2,), keepdim=False))
    before, after = b.slice(unit, 0, -1, dim=1), b.slice(unit, 1, END, dim=1)
    alike = b.sum(b.mul(before, after), dims=(2,), keepdim=False)
    first = _zeros(b, b.slice(alike, 0, 1, dim=1))
    if count == 1:
        return first
    least = b.topk(alike, k=count - 1, dim=1, largest=False, sorted=True)
    later = b.add(ascending(b, top_places(b, least), count - 1), 1)
    return b.concat(first, later, dim=1)


def _corner(b: Builder, places: Value, box: int, side: int) -> Value:
    """Where a box round the mean of ``places`` f32 ``[frames, count]`` starts, within the side:
    i64 ``[frames, 1]``. The mean is rounded down before the box is moved inside."""
    count = int((b.view.type(places).shape or ())[1])
    middle = b.floor(b.div(b.sum(places, dims=(1,), keepdim=True), float(count)))
    start = b.clamp(b.sub(middle, float(box // 2)), min=0.0, max=float(side - box))
    return b.cast(start, dtype=torch.int64)


def _zeros(b: Builder, x: Value) -> Value:
    """Zeros i64 in the shape of ``x``, whatever is in it."""
    return b.cast(b.lt(x, x), dtype=torch.int64)
