"""``pool-frames``: a video's tokens averaged to fewer frames and smaller grids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...ir.core.errors import BadInput, Refusal
from ...ir.core.view import Value, View
from ...ir.moves.mixed_rows import mixed_rows
from ...ir.structure.vision import ImageTokens
from ...ir.vocab.builder import Builder
from .frame_pass import FramePass, by_video, pooled_grid, pooling


@dataclass(frozen=True, kw_only=True)
class PoolFrames(FramePass):
    """Average the projected tokens of a video to ``to``: frames x rows x columns.

    PLLaVA (Xu et al. 2024, arXiv 2404.16994): adaptive average pooling, in which window ``i`` of
    ``m`` over ``n`` places runs from ``floor(i n / m)`` to ``ceil((i + 1) n / m)``. The paper's
    16x12x12 of 16 frames of 24 x 24 averages in space alone; it finds that averaging over time
    costs more. ``to=12x12`` keeps every frame. Not the model that was trained on pooled tokens:
    here they are new to it.
    """

    name: ClassVar[str] = "pool-frames"
    to: str
    """Frames x rows x columns, as 16x12x12; or a grid."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = self.to.split("x")
        if len(parts) not in (2, 3) or not all(part.isdigit() and int(part) for part in parts):
            raise BadInput(
                f"pool-frames: to={self.to} is neither frames x rows x columns, as 16x12x12, nor a "
                "grid, as 12x12"
            )

    def count(self, images: ImageTokens) -> int:
        frames, rows, columns = self._target(images)
        return frames * rows * columns

    def remade(self, view: View, images: ImageTokens) -> Value:
        frames, *left = self._target(images)
        assert images.grid is not None
        x = by_video(view, images)
        width = (view.type(x).shape or ())[-1]
        b = Builder(view, view.after(view.maker(x)))
        if frames < images.pictures:
            flat = b.reshape(x, -1, images.pictures, images.patches * int(width))
            x = mixed_rows(b, flat, pooling(images.pictures, frames), "pool_frames.time")
            x = b.reshape(x, -1, frames, images.patches, width)
        x = pooled_grid(b, x, images.grid, (left[0], left[1]), "pool_frames.space")
        return b.reshape(x, -1, frames * left[0] * left[1], width)

    def _target(self, images: ImageTokens) -> tuple[int, int, int]:
        if images.grid is None:
            raise Refusal("no grid of patches is seen, so that their neighbours are not known")
        sizes = [int(part) for part in self.to.split("x")]
        frames, rows, columns = sizes if len(sizes) == 3 else (images.pictures, *sizes)
        whole = images.pictures, *images.grid
        if any(new > old for new, old in zip((frames, rows, columns), whole, strict=True)):
            raise Refusal(
                f"to={self.to}: a video is {'x'.join(map(str, whole))} here, frames x rows x "
                "columns, and no side can grow"
            )
        return frames, rows, columns
