"""Gemma 4 with images: its tower on images of one size, and what its text is told beside.

The library takes an image as rows of patches with their places and pads them to a fixed number,
reads which are there out of tensors, and gives the features of all images behind each other, which
no graph can follow. Here an image is an image, of ``image_size`` in the config's
``vision_config`` where it is there, else of 16 by 16 tokens. Its pixels lie between 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ...core.errors import BadInput
from ...structure.cache_slots import TOKEN_TYPES

GEMMA4 = "gemma4"
TOKENS = 16
"""Tokens along each side of an image where the config sets no size."""
_KINDS = "mm_token_type_ids"


def patch_grid(config: Any) -> tuple[int, int]:
    """Rows and columns of patches of an image, of a whole config. Raises ``BadInput``."""
    vision = config.vision_config
    side = vision.patch_size * vision.pooling_kernel_size
    size = getattr(vision, "image_size", None) or side * TOKENS
    height, width = size if isinstance(size, tuple | list) else (size, size)
    if height < side or width < side:
        raise BadInput(f"vision_config has an image_size of {size}, and a token is {side} pixels "
                       "wide")  # fmt: skip
    return (height // side * vision.pooling_kernel_size, width // side * vision.pooling_kernel_size)


def image_sides(config: Any) -> tuple[int, int]:
    """Height and width of an image, of a whole config."""
    rows, columns = patch_grid(config)
    return rows * config.vision_config.patch_size, columns * config.vision_config.patch_size


def token_count(config: Any) -> int:
    """Tokens that an image enters a text as."""
    return math.prod(patch_grid(config)) // int(config.vision_config.pooling_kernel_size) ** 2


def size_note(config: Any) -> str:
    """What a person should know of a graph of such a model."""
    height, width = image_sides(config)
    return (
        f"images are of {height} x {width}, which are {token_count(config)} tokens: image_size "
        "under vision_config in config.json sets another size"
    )


def features(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What the tower makes of images ``[images, 3, height, width]``: ``[images, tokens, width]``.

    Each image is looked at by itself: the library's layers, with the images side by side.
    """
    tower, vision = model.model.vision_tower, model.config.vision_config
    rows, columns = patch_grid(model.config)
    where = patch_places(rows, columns)
    none = torch.zeros(1, rows * columns, dtype=torch.bool)
    stream = tower.patch_embedder(patch_rows(pixels, rows, columns), where, none)
    turns = tower.encoder.rotary_emb(stream, where)
    for layer in tower.encoder.layers:
        stream = layer(stream, position_embeddings=turns, position_ids=where)
    dtype, merge = stream.dtype, vision.pooling_kernel_size
    images, _, width = stream.shape
    squares = stream.float().reshape(images, rows // merge, merge, columns // merge, merge, width)
    pooled = squares.mean((2, 4)).flatten(1, 2).to(dtype).float() * width**0.5
    if vision.standardize:
        pooled = (pooled - tower.std_bias.float()) * tower.std_scale.float()
    projected: torch.Tensor = model.model.embed_vision(pooled.to(dtype))
    return projected


def patch_rows(pixels: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """``[images, 3, height, width]`` as ``[images, patches, side * side * 3]``."""
    images, channels, height, width = pixels.shape
    split = pixels.reshape(images, channels, rows, height // rows, columns, width // columns)
    return split.permute(0, 2, 4, 3, 5, 1).reshape(
        images, rows * columns, height * width * channels // (rows * columns)
    )


def patch_places(rows: int, columns: int) -> torch.Tensor:
    """Column and row of each patch: i64 ``[1, patches, 2]``."""
    down = torch.arange(rows).reshape(rows, 1).expand(rows, columns)
    across = torch.arange(columns).expand(rows, columns)
    return torch.stack([across, down], -1).reshape(1, rows * columns, 2)


def words(
    model: Any, input_ids: torch.Tensor, _: torch.Tensor, __: torch.Tensor
) -> torch.Tensor:
    """The stream of words, in which every placeholder is read as padding."""
    stream: torch.Tensor = model.get_input_embeddings()(_as_padding(model.config, input_ids))
    return stream


def beside_words(model: Any, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each layer of the text takes of each word for itself, of models that have that."""
    text = model.model.language_model
    if not text.hidden_size_per_layer_input:
        return {}
    read = _as_padding(model.config, input_ids)
    return {"per_layer_inputs": text.get_per_layer_inputs(read, None)}


def _as_padding(config: Any, input_ids: torch.Tensor) -> torch.Tensor:
    tokens = (getattr(config, f"{kind}_token_id", None) for kind in ("image", "video", "audio"))
    for token in tokens:
        if token is not None:
            padding = config.get_text_config().pad_token_id
            input_ids = torch.where(input_ids == token, padding, input_ids)
    return input_ids


def sees_both_ways(config: Any) -> bool:
    """Whether the tokens of an image see each other both ways, in layers with a window."""
    if config.model_type != GEMMA4:
        return False
    return bool(config.get_text_config().use_bidirectional_attention == "vision")


def as_the_library_takes(model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A graph's inputs as the library's forward has them: ``pixel_values`` ``[images, 3, height,
    width]`` as patches, which are all there, and the kinds of tokens."""
    rows, columns = patch_grid(model.config)
    pixels = inputs["pixel_values"]
    kinds = (inputs["input_ids"] == model.config.image_token_id).long()
    given = {name: tensor for name, tensor in inputs.items() if name != TOKEN_TYPES}
    return {
        **given, "pixel_values": patch_rows(pixels, rows, columns), _KINDS: kinds,
        "image_position_ids": patch_places(rows, columns).expand(len(pixels), -1, -1),
    }  # fmt: skip
