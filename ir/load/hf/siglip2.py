"""SigLIP 2's tower (arXiv 2502.14786) on images of one size, alone, in its pair and in LFM2-VL.

The library takes an image as rows of patches with their number beside them, and stretches the
table of places by what it reads out of tensors, which no graph can follow. Here an image is an
image, of ``image_size`` in the config's ``vision_config`` where it is there, else of as many
patches as the table has places.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch

PATCHED = ("siglip2", "siglip2_vision_model")
"""Model types whose images the library takes as patches, where they enter no text."""
LFM2 = "lfm2_vl"
TOKENS = 16
"""Tokens along each side of an image of LFM2-VL where the config sets no size."""


def has_patches(config: Any) -> bool:
    """Whether this tower looks at the images of a model, of a whole config."""
    return config.model_type in (*PATCHED, LFM2)


def patch_grid(config: Any) -> tuple[int, int]:
    """Rows and columns of patches of an image, of a whole config."""
    vision = getattr(config, "vision_config", config)
    merge = getattr(config, "downsample_factor", 1)
    side = vision.patch_size * merge
    usual = side * TOKENS if config.model_type == LFM2 else (
        vision.patch_size * math.isqrt(vision.num_patches)
    )  # fmt: skip
    size = getattr(vision, "image_size", None) or usual
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return height // side * merge, width // side * merge


def image_sides(config: Any) -> tuple[int, int]:
    """Height and width of an image, of a whole config."""
    side = getattr(config, "vision_config", config).patch_size
    rows, columns = patch_grid(config)
    return rows * side, columns * side


def token_count(config: Any) -> int:
    """Tokens that an image of LFM2-VL enters its text as."""
    return math.prod(patch_grid(config)) // int(config.downsample_factor) ** 2


def size_note(config: Any) -> str:
    """What a person should know of a graph of such a model."""
    (height, width), (rows, columns) = image_sides(config), patch_grid(config)
    count = f"{token_count(config)} tokens" if config.model_type == LFM2 else (
        f"{rows * columns} patches"
    )  # fmt: skip
    where = " under vision_config" if hasattr(config, "vision_config") else ""
    return (
        f"images are of {height} x {width}, which are {count}: image_size{where} in config.json "
        "sets another size"
    )


def as_patches(config: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A graph's inputs as the library's forward has them: ``pixel_values`` ``[images, 3, height,
    width]`` as patches, which are all there."""
    pixels, (rows, columns) = inputs["pixel_values"], patch_grid(config)
    images, count = len(pixels), rows * columns
    return {
        **inputs, "pixel_values": _rows(pixels, rows, columns),
        "pixel_attention_mask": torch.ones(images, count, dtype=torch.int64),
        "spatial_shapes": torch.tensor([[rows, columns]] * images).reshape(images, 2),
    }  # fmt: skip


def _rows(pixels: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """``[images, channels, height, width]`` as ``[images, patches, side * side * channels]``."""
    images, channels, height, width = pixels.shape
    down, across = height // rows, width // columns
    split = pixels.reshape(images, channels, rows, down, columns, across)
    return split.permute(0, 2, 4, 3, 5, 1).reshape(
        images, rows * columns, down * across * channels
    )


def settle(model: Any) -> dict[str, None]:
    """Let a model's tower take images; the arguments that its forward needs no more."""
    config = model.config
    if not has_patches(config):
        return {}
    rows, columns = patch_grid(config)
    for part in model.modules():
        if type(part).__name__ == "Siglip2VisionEmbeddings":
            _take_images(part, rows, columns)
    return {} if config.model_type == LFM2 else dict.fromkeys(
        ("pixel_attention_mask", "spatial_shapes")
    )  # fmt: skip


def _take_images(part: Any, rows: int, columns: int) -> None:
    side = part.position_embedding_size
    stretch = None
    if (rows, columns) != (side, side):
        eye = torch.eye(side * side).reshape(side, side, side * side)
        shapes = torch.tensor([[rows, columns]])
        stretch = part.resize_positional_embeddings(eye, shapes, max_length=rows * columns)[0]

    def forward(self: Any, pixels: torch.Tensor, _: Any = None) -> torch.Tensor:
        table = self.position_embedding.weight
        if stretch is not None:
            table = (stretch @ table.float()).to(table.dtype)
        embedded: torch.Tensor = self.patch_embedding(_rows(pixels, rows, columns)) + table
        return embedded

    part.forward = MethodType(forward, part)


def features(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What the projector of LFM2-VL makes of images: ``[images, tokens, width]``."""
    tower = model.model.vision_tower
    stream = tower(pixels, pixel_attention_mask=None, spatial_shapes=None).last_hidden_state
    rows, columns = patch_grid(model.config)
    grid = stream.reshape(stream.shape[0], rows, columns, stream.shape[2])
    projected: torch.Tensor = model.model.multi_modal_projector(grid)
    return projected.flatten(1, 2)
