"""GLM-4.1V, GLM-4.5V (arXiv 2507.01006) and GLM-OCR: a table of places and a strided convolution.

The library stretches the table of places over the grid of an image. Images of a graph are as large
as the table, ``image_size`` in the config's ``vision_config``, and the table stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear

from ...core.errors import BadInput
from .qwen_vl import attention, embedded_patches, patch_grid, patch_places, patches, size_of
from .qwen_vl import size_note as any_size_note

TYPES = ("glm4v", "glm4v_moe", "glm46v", "glm_ocr")


def size_note(config: Any) -> str:
    """What a person should know of a graph of such a model."""
    if not _has_table(config):
        return any_size_note(config)
    return f"{size_of(config)}: as large as the tower's table of places"


def _has_table(config: Any) -> bool:
    """GLM-OCR's tower has turns alone."""
    return bool(config.model_type != "glm_ocr")


def features(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What the tower makes of images ``[images, 3, height, width]``: ``[images, tokens, width]``.

    Raises ``BadInput`` where the side of an image is no whole number of tokens.
    """
    config, tower = model.config, model.model.visual
    where = patch_places(config)
    stream = embedded_patches(tower, patches(config, pixels))
    if _has_table(config):
        stream = tower.post_conv_layernorm(stream)
        stream = stream + _positions(tower, where, patch_grid(config)).to(stream.dtype)
    turns = tower.rotary_pos_emb(stream, where)
    for block in tower.blocks:
        stream = stream + attention(block.attn, block.norm1(stream), turns)
        stream = stream + block.mlp(block.norm2(stream))
    merged: torch.Tensor = tower.merger(_downsampled(tower, tower.post_layernorm(stream)))
    return merged


def _positions(tower: Any, where: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The table's rows, ``[patches, width]``, of patches at ``where`` i64 ``[patches, 2]``."""
    vision = tower.config
    side = vision.image_size // vision.patch_size
    if grid != (side, side):
        raise BadInput(
            f"vision_config has an image_size of {vision.image_size}, and a token is "
            f"{vision.patch_size * vision.spatial_merge_size} pixels wide: a multiple of that is "
            "read, for the table of places is not stretched"
        )
    rows: torch.Tensor = tower.embeddings.position_embedding(where[:, 0] * side + where[:, 1])
    return rows


def _downsampled(tower: Any, stream: torch.Tensor) -> torch.Tensor:
    """Squares of patches as one token each: the convolution over squares that do not overlap is a
    linear."""
    images, patches_, width = stream.shape
    square = tower.spatial_merge_size**2
    squares = stream.reshape(images, patches_ // square, square, width).transpose(2, 3)
    convolution = tower.downsample
    return linear(squares.flatten(2), convolution.weight.flatten(1), convolution.bias)
