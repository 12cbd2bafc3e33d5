"""Pixtral's tower (arXiv 2410.07073) on images of one size, in Mistral 3 and its kin.

The library puts the patches of all images behind each other and cuts the rows by sizes that it
reads out of tensors, which no graph can follow. Here each image is looked at by itself, of
``image_size`` in the config's ``vision_config``. The words between the rows of an image
(``[IMG_BREAK]``, ``[IMG_END]``), which the processor writes, are words like others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...core.errors import BadInput

PARTS: Mapping[str, tuple[str, str]] = {
    "mistral3": ("vision_tower", "multi_modal_projector"),
    "lighton_ocr": ("vision_encoder", "vision_projection"),
}
"""By model type: what the library calls its tower and its projector."""


def is_pixtral(config: Any) -> bool:
    """Whether this tower makes the features of a model, of a whole config."""
    return getattr(getattr(config, "vision_config", None), "model_type", "") == "pixtral"


def token_grid(config: Any) -> tuple[int, int]:
    """Rows and columns of the tokens that an image enters a text as. Raises ``BadInput``."""
    rows, columns = _patch_grid(config)
    merge = getattr(config, "spatial_merge_size", 1)  # LLaVA's (Pixtral 12B) merges none
    if rows % merge or columns % merge or not rows * columns:
        raise BadInput(
            f"vision_config has an image_size of {config.vision_config.image_size}, of which whole "
            f"squares of {merge} patches of {config.vision_config.patch_size} pixels are needed"
        )
    return rows // merge, columns // merge


def _patch_grid(config: Any) -> tuple[int, int]:
    height, width = image_sides(config.vision_config)
    side = config.vision_config.patch_size
    return height // side, width // side


def image_sides(vision: Any) -> tuple[int, int]:
    """Height and width of an image."""
    size = vision.image_size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return int(height), int(width)


def size_note(config: Any) -> str:
    """What a person should know of a graph of such a model."""
    (height, width), (rows, columns) = image_sides(config.vision_config), token_grid(config)
    return (
        f"images are of {height} x {width}, which are {rows * columns} tokens, and the processor "
        f"writes a word behind each {columns} of them: image_size under vision_config in "
        "config.json sets another size"
    )


def sized(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A graph's inputs, with the size of each image, as the library takes them."""
    pixels = inputs["pixel_values"]
    return {**inputs, "image_sizes": torch.tensor([pixels.shape[2:]] * len(pixels))}


def features(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What the projector makes of images ``[images, 3, height, width]``: ``[images, tokens,
    width]``."""
    parts = PARTS.get(model.config.model_type, PARTS["mistral3"])
    tower, projector = (getattr(model.model, name) for name in parts)
    streams = _streams(tower, pixels)
    layers = getattr(model.config, "vision_feature_layer", -1)
    chosen = [streams[i] for i in ([layers] if isinstance(layers, int) else layers)]
    stream = torch.cat(chosen, -1)
    if model.config.model_type == "llava":
        unmerged: torch.Tensor = projector(stream)
        return unmerged
    stream = projector.norm(stream)
    merged = projector.patch_merger.merging_layer(_squares(model.config, stream))
    projected: torch.Tensor = projector.linear_2(projector.act(projector.linear_1(merged)))
    return projected


def _streams(tower: Any, pixels: torch.Tensor) -> list[torch.Tensor]:
    """The stream of patches ``[images, patches, width]`` before each layer and behind the last."""
    grid = tower.patch_conv(pixels)
    rows, columns = grid.shape[2:]
    streams = [tower.ln_pre(grid.flatten(2).transpose(1, 2))]
    down = torch.arange(rows).reshape(rows, 1).expand(rows, columns).flatten()
    across = torch.arange(columns).expand(rows, columns).flatten()
    turns = tower.patch_positional_embedding(streams[0], torch.stack([down, across], -1))
    for layer in tower.transformer.layers:
        streams.append(layer(streams[-1], None, position_embeddings=turns))
    return streams


def _squares(config: Any, stream: torch.Tensor) -> torch.Tensor:
    """The patches of each token side by side, a feature of all of them after the other."""
    (rows, columns), merge = token_grid(config), config.spatial_merge_size
    images, _, width = stream.shape
    squares = stream.reshape(images, rows, merge, columns, merge, width)
    return squares.permute(0, 1, 3, 5, 2, 4).reshape(images, rows * columns, width * merge**2)
