"""Phi-4-multimodal (arXiv 2503.01743) with images: its raster of crops on images of one size.

The library's forward takes an image as crops of one size, of which masks say how far each is
filled, and reads sizes and masks out of tensors, which no graph can follow. Here an image is crops
that are full, as many down and across as ``image_grid_pinpoints`` in its config.json says, alone
and in pixels; one where it says nothing. Sounds have a graph of their own (``phi4_sound``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...core.errors import BadInput

PHI4 = "phi4_multimodal"
PIXELS = "image_pixel_values"
"""The library's name of them."""
_PLACES = "_places_of_patches"


def crop_grid(config: Any) -> tuple[int, int]:
    """Rows and columns of crops, of a whole config. Raises ``BadInput`` for an image that is no
    whole number of them."""
    side = config.vision_config.crop_size
    sizes = getattr(config, "image_grid_pinpoints", None) or [[side, side]]
    height, width = sizes[0]
    if len(sizes) > 1 or height < side or width < side or height % side or width % side:
        raise BadInput(
            f"image_grid_pinpoints is {sizes}: Phi-4-multimodal needs one size there, of whole "
            f"crops of {side} x {side}"
        )
    return height // side, width // side


def image_sides(config: Any) -> tuple[int, int]:
    """Height and width of a crop, of a whole config."""
    side = config.vision_config.crop_size
    return side, side


def token_side(config: Any) -> int:
    """Tokens along each side of a crop."""
    vision = config.vision_config
    patches = vision.image_size // vision.patch_size
    return int(patches + patches % 2) // 2


def token_count(config: Any) -> int:
    """Tokens of an image: the crops' raster and the whole image, with one behind each row of both,
    and one between them."""
    side, (rows, columns) = token_side(config), crop_grid(config)
    return rows * side * (columns * side + 1) + 1 + side * (side + 1)


def crop_count(config: Any) -> int:
    rows, columns = crop_grid(config)
    return 1 + rows * columns


def size_note(config: Any) -> str:
    """What a person should know of a graph of such a model."""
    side, (rows, columns) = config.vision_config.crop_size, crop_grid(config)
    return (
        f"images are of {rows * side} x {columns * side}, which are {token_count(config)} tokens: "
        "another size alone in image_grid_pinpoints of config.json is that then"
    )


def settle(model: Any) -> None:
    """The token of an image where all families have it, and which row of the table of places each
    patch reads: counted by the library's rule with numbers, which a graph could not follow."""
    model.config.image_token_id = model.config.vision_config.image_token_id
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    step = torch.tensor(1.0) / side
    edges = torch.arange(1 / side, 1.0, 1 / side)
    along = (torch.arange(side, dtype=torch.float32) * step).clamp(max=1.0 - 1e-6)
    bucket = torch.bucketize(along, edges, right=True)
    places = (bucket[:, None] * side + bucket).flatten().tolist()
    setattr(_embedding(model).img_processor.embeddings, _PLACES, places)


def features(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What enters the text of images ``[images, 1 + crops, 3, side, side]``, the image as a whole
    first: ``[images, tokens, width]``."""
    inner, config = _embedding(model), model.config
    (rows, columns), side = crop_grid(config), token_side(config)
    tokens = _pooled(inner, pixels.flatten(0, 1))
    images, width = pixels.shape[0], tokens.shape[-1]
    crops = tokens.reshape(images, 1 + rows * columns, side, side, width)
    raster = crops[:, 1:].reshape(images, rows, columns, side, side, width)
    raster = raster.permute(0, 1, 3, 2, 4, 5).reshape(images, rows * side, columns * side, width)
    whole = crops[:, :1].squeeze(1)
    lines = [_with_ends(inner, part).flatten(1, 2) for part in (raster, whole)]
    between = inner.global_img_feature_extensor.expand(images, 1, width)
    stream = inner.img_projection_up(torch.cat([lines[0], between, lines[1]], 1))
    projected: torch.Tensor = inner.img_projection_down(torch.nn.functional.gelu(stream))
    return projected


def _embedding(model: Any) -> Any:
    return model.model.embed_tokens_extend.image_embed


def _pooled(inner: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The means of squares of 2 x 2 patches of crops ``[crops, 3, side, side]``: ``[crops, tokens
    down, tokens across, width]``."""
    tower = inner.img_processor
    embeddings = tower.embeddings
    patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    places = torch.tensor(getattr(embeddings, _PLACES))
    stream = patches + embeddings.position_embedding(places)
    states = [stream]
    for layer in tower.encoder.layers:
        states.append(layer(states[-1], None))
    stream = states[inner.layer_idx]
    side = embeddings.num_patches_per_side
    grid = stream.reshape(stream.shape[0], side, side, stream.shape[2])
    if side % 2:  # the last row and column look into a mirror
        grid = torch.cat([grid, grid[:, -2:-1]], 1)
        grid = torch.cat([grid, grid[:, :, -2:-1]], 2)
    half = grid.shape[1] // 2
    squares = grid.reshape(stream.shape[0], half, 2, half, 2, stream.shape[2])
    pooled: torch.Tensor = squares.mean((2, 4))
    return pooled


def _with_ends(inner: Any, grid: torch.Tensor) -> torch.Tensor:
    """``[images, rows, columns, width]`` with a token behind each row."""
    images, rows, _, width = grid.shape
    return torch.cat([grid, inner.sub_img_feature_extensor.expand(images, rows, 1, width)], 2)


def as_the_library_takes(model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A graph's inputs as the library's forward has them: crops that are all full."""
    pixels, config = inputs["pixel_values"], model.config
    side, (rows, columns) = config.vision_config.crop_size, crop_grid(config)
    patches = config.vision_config.image_size // config.vision_config.patch_size
    given = {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}
    return {
        **given, PIXELS: pixels,
        "image_sizes": torch.tensor([[rows * side, columns * side]] * len(pixels)),
        "image_attention_mask": torch.ones(*pixels.shape[:2], patches, patches, dtype=torch.int64),
    }  # fmt: skip
