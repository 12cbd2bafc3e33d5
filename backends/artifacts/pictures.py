"""The images of a graph of which all have one size, as onnxruntime-genai hands them on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...ir.core.view import View
from ...ir.load.hf.gemma4 import GEMMA4
from ...ir.load.hf.phi4 import PHI4
from ...ir.structure.pictured import read_grid, read_places, read_squares
from .pictured_ends import inputs_of

IDS, MASK, PIXELS, LOGITS = "input_ids", "attention_mask", "pixel_values", "logits"
FEATURES, GRID, CORNERS = "image_features", "image_grid_thw", "pixel_position_ids"
FILLED, SIZES = "image_attention_mask", "image_sizes"
SIZE_CHECK = "image_size.check"
"""The weight that is read past its end where a picture has another size."""


@dataclass(frozen=True)
class Pictures:
    """The images of a graph of which all have one size."""

    rows: int
    """Rows of patches."""
    columns: int
    side: int
    """Pixels along a patch."""
    merge: int
    """Patches along the square that is one token."""
    frames: int
    """Times that a patch stands in its row: the library reads an image as a film of so many; 0 of
    a tower that takes the pixels of an image as they lie."""
    crop: int = 0
    """Pixels along the crops that an image comes as, with its height and width beside (Phi-4)."""
    placed: bool = False
    """Whether patches come as rows with the column and the row of each beside them (Gemma 4)."""

    @property
    def height(self) -> int:
        return self.rows * self.side

    @property
    def width(self) -> int:
        return self.columns * self.side


def pictures_of(graph: View, config: Mapping[str, Any]) -> Pictures | None:
    """What a graph and the config of its source say of them; ``None`` of a model that takes
    others, or whose images' size is open."""
    grid, squares = read_places(graph.metadata()), read_squares(graph.metadata())
    if grid is not None and squares is not None:
        side, merge, frames = squares
        return Pictures(grid[0] * merge, grid[1] * merge, side, merge, frames)
    inputs = inputs_of(graph)
    shape = (graph.type(inputs[PIXELS]).shape or ()) if PIXELS in inputs else ()
    vision = config.get("vision_config")
    vision = vision if isinstance(vision, dict) else {}
    placed = config.get("model_type") == GEMMA4
    pooled = vision.get("pooling_kernel_size") if placed else config.get("spatial_merge_size", 1)
    sizes = [*shape[2:], vision.get("patch_size"), pooled]
    if config.get("model_type") == PHI4:
        return _in_crops(graph, shape, vision)
    numbers = [size for size in sizes if isinstance(size, int) and size > 0]
    if len(numbers) != 4 or len(sizes) != 4:
        return None
    height, width, side, merge = numbers
    return Pictures(height // side, width // side, side, merge, 0, placed=placed)


def _in_crops(graph: View, shape: tuple[Any, ...], vision: Mapping[str, Any]) -> Pictures | None:
    """Of Phi-4-multimodal, whose pixels are ``[images, 1 + crops, 3, side, side]``."""
    grid, side = read_grid(graph.metadata()), vision.get("patch_size")
    if grid is None or len(shape) != 5 or not isinstance(side, int):
        return None
    rows, columns = (count * int(shape[3]) // side for count in grid)
    return Pictures(rows, columns, side, 2, 0, crop=int(shape[3]))
