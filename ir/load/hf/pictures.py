"""How a model's images enter its text: the tower of each family, and how its library takes images.

Images of a graph are all of one size, which is bound: LLaVA-NeXT's crops and the rows of its raster
depend on it. A library's forward reads sizes and padding out of tensors, which no graph can follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...structure.cache_slots import TOKEN_TYPES
from ...structure.pictured import grid_metadata, places_metadata
from . import glm4v, phi4, pixtral, qwen3_vl, qwen25_vl, qwen_vl
from .places import PREFIXED
from .siglip2 import PATCHED, as_patches, size_note
from .towers import PIXTRAL, ROWS, Deep, Tower

RASTERS = ("llava_next", "llava_onevision", "llava_next_video")
"""Model types whose images are crops in a raster."""


def tower_of(config: Any) -> Tower | None:
    """How a model's images enter its text; ``None`` of a model whose images enter none."""
    if config.model_type == LLAVA and pixtral.is_pixtral(config):
        return PIXTRAL
    return TOWERS.get(config.model_type)


def tokens_of(config: Any) -> int:
    """Tokens that stand for one image in a text; 0 where it is not known how images enter one."""
    tower = tower_of(config)
    return 0 if tower is None else tower.tokens(config)


def crop_count(config: Any) -> int:
    """Crops that an image comes as."""
    tower = tower_of(config)
    return 1 if tower is None or tower.crops is None else tower.crops(config)


def image_features(model: Any, pixel_values: torch.Tensor) -> Deep:
    """The features that enter the text, ``[images, tokens, width]``: of an image in crops all of
    them; and those that its first layers add, of models that have such."""
    tower = tower_of(model.config)
    assert tower is not None
    features = tower.features(model, pixel_values)
    return features if isinstance(features, tuple) else (features, [])


def size_notes(config: Any) -> tuple[str, ...]:
    """What a person should know of the size of a graph's images, where there are others."""
    if config.model_type in PATCHED:
        return (size_note(config),)
    tower = tower_of(config)
    return () if tower is None or tower.note is None else (tower.note(config),)


def as_the_library_takes(model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A graph's inputs as the library's own forward has them."""
    pixels, config = inputs.get("pixel_values"), model.config
    if config.model_type in PREFIXED:
        return {TOKEN_TYPES: torch.zeros_like(inputs["input_ids"]), **inputs}
    if pixels is None or not len(pixels):
        return dict(inputs)
    if config.model_type in PATCHED:
        return as_patches(config, inputs)
    tower = tower_of(config)
    return dict(inputs) if tower is None or tower.beside is None else tower.beside(model, inputs)


# --- LLaVA and its rasters ----------------------------------------------------------------------


def crop_grid(config: Any) -> tuple[int, int]:
    """Rows and columns of crops of LLaVA-NeXT's image: its largest square, else its first size; of
    LLaVA-OneVision's the largest that its library does not scale down (``anyres_max_9``)."""
    side = config.vision_config.image_size
    most = str(getattr(config, "vision_aspect_ratio", "")).removeprefix("anyres_max_")
    largest = side * math.isqrt(int(most)) if most.isdigit() else math.inf
    squares = [h for h, w in config.image_grid_pinpoints if h == w <= largest]
    height, width = (max(squares),) * 2 if squares else config.image_grid_pinpoints[0]
    return height // side, width // side


def _projected(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What the projector makes of each picture, ``[pictures, tokens, width]``."""
    features: torch.Tensor = model.model.multi_modal_projector(_selected(model, pixels))
    return features


def _selected(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The tower's features as the config selects them, ``[images, tokens, width]``."""
    config = model.config
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    layers = config.vision_feature_layer
    chosen = [hidden[i] for i in ([layers] if isinstance(layers, int) else layers)]
    if config.vision_feature_select_strategy == "default":
        chosen = [state[:, 1:] for state in chosen]
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen, -1)


def _llava_crops(config: Any) -> int:
    """1 unless ``image_seq_length`` is a multiple of what one crop gives.

    It is how a config of transformers' ``LlavaConfig`` can say it; features follow each other
    without any token between.
    """
    vision = getattr(config, "vision_config", None)
    size, patch = (getattr(vision, name, None) for name in ("image_size", "patch_size"))
    if not isinstance(size, int) or not isinstance(patch, int):
        return 1
    tokens = (size // patch) ** 2 + (config.vision_feature_select_strategy == "full")
    count, rest = divmod(int(config.image_seq_length), tokens)
    return 1 if rest else max(1, count)


def _llava(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    if pixels.dim() != 5:
        return _projected(model, pixels)
    images, count = pixels.shape[:2]
    features = _projected(model, pixels.flatten(0, 1))
    # In full: of no image at all, nothing could be inferred.
    return features.reshape(images, count * features.shape[1], features.shape[2])


def _crops_in_a_row(_: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    pixels = inputs["pixel_values"]
    return {**inputs, "pixel_values": pixels.flatten(0, 1) if pixels.dim() == 5 else pixels}


def _llava_next(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The whole image's tokens, then the crops' as one raster with a newline behind each row.

    ``pixels`` ``[images, 1 + crops, 3, height, width]``, the image as a whole first.
    """
    config = model.config
    rows, columns = crop_grid(config)
    side = config.vision_config.image_size // config.vision_config.patch_size
    tokens = _projected(model, pixels.flatten(0, 1))
    images, width = pixels.shape[0], tokens.shape[-1]
    tokens = tokens.reshape(images, 1 + rows * columns, tokens.shape[1], width)
    raster = tokens[:, 1:].reshape(images, rows, columns, side, side, width)
    raster = raster.permute(0, 1, 3, 2, 4, 5).reshape(images, rows * side, columns * side, width)
    newline = model.model.image_newline.to(raster.dtype).expand(images, rows * side, 1, width)
    raster = torch.cat([raster, newline], 2)
    return torch.cat([tokens[:, :1].squeeze(1), raster.reshape(images, -1, width)], 1)


def _raster_crops(config: Any) -> int:
    rows, columns = crop_grid(config)
    return 1 + rows * columns


def _raster_tokens(config: Any) -> int:
    side = config.vision_config.image_size // config.vision_config.patch_size
    rows, columns = crop_grid(config)
    return int(side * side + rows * side * (columns * side + 1))


def _raster_note(config: Any) -> str:
    height, width = _raster_sides(config)
    return (
        f"images are of {height} x {width}, which are {_raster_tokens(config)} tokens: another "
        "alone in image_grid_pinpoints of config.json is that then"
    )


def _raster_sides(config: Any) -> tuple[int, int]:
    side, (rows, columns) = config.vision_config.image_size, crop_grid(config)
    return rows * side, columns * side


def _raster_sized(model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    sizes = torch.tensor([_raster_sides(model.config)] * len(inputs["pixel_values"]))
    return {**inputs, "image_sizes": sizes}


# --- squares of patches ---------------------------------------------------------------------------


def _smolvlm(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Of whole images: every patch is there, and has its own place."""
    features: torch.Tensor = model.model.connector(_whole_squares(model, pixels))
    return features


def _whole_squares(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    tower = model.model.vision_model
    patches = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    places = tower.embeddings.position_embedding.weight[: patches.shape[1]]
    states = tower.encoder(inputs_embeds=patches + places).last_hidden_state
    normed: torch.Tensor = tower.post_layernorm(states)
    return normed


def _idefics2(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The same, of which a resampler (arXiv 2405.02246) makes as many tokens for any image."""
    states, connector = _whole_squares(model, pixels), model.model.connector
    every = torch.ones(1, states.shape[1], dtype=torch.int64)
    features: torch.Tensor = connector(states, every.expand(states.shape[0], -1))
    return features


def _square_tokens(config: Any) -> int:
    vision = config.vision_config
    return int((vision.image_size // vision.patch_size // config.scale_factor) ** 2)


def _by_row(_: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With images as ``[rows, images of each, ..]``; all in one row where rows have other numbers
    of them."""
    pixels, rows = inputs["pixel_values"], len(inputs["input_ids"])
    batch = rows if len(pixels) % rows == 0 else 1
    return {**inputs, "pixel_values": pixels.reshape(batch, -1, *pixels.shape[1:])}


# --- Qwen's line --------------------------------------------------------------------------------


def _qwen(
    features: Callable[[Any, torch.Tensor], torch.Tensor | Deep],
    note: Callable[[Any], str] = qwen_vl.size_note, **more: Any,
) -> Tower:  # fmt: skip
    return Tower(
        lambda config: math.prod(qwen_vl.token_grid(config)), features, beside=_gridded,
        note=note, metadata=lambda config: places_metadata(
            qwen_vl.token_grid(config), qwen_vl.squares(config)
        ), **more,
    )  # fmt: skip


def _gridded(model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    config, pixels = model.config, inputs["pixel_values"]
    grid = torch.tensor([[1, *qwen_vl.patch_grid(config)]] * len(pixels))
    kinds = (inputs["input_ids"] == config.image_token_id).int()
    patches = qwen_vl.patches(config, pixels).flatten(0, 1)
    return {
        **inputs, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": kinds,
    }  # fmt: skip


LLAVA = "llava"
_RASTER = Tower(
    _raster_tokens, _llava_next, _raster_crops, _raster_sized, _raster_note,
    lambda config: grid_metadata(crop_grid(config)),
)  # fmt: skip
_SQUARES = Tower(_square_tokens, _smolvlm, beside=_by_row)
TOWERS: Mapping[str, Tower] = {
    LLAVA: Tower(
        lambda config: int(config.image_seq_length), _llava, _llava_crops, _crops_in_a_row
    ),
    **dict.fromkeys(RASTERS, _RASTER),
    "smolvlm": _SQUARES,
    "idefics3": _SQUARES,
    "idefics2": Tower(
        lambda config: int(config.perceiver_config.resampler_n_latents), _idefics2, beside=_by_row
    ),
    "qwen2_vl": _qwen(qwen_vl.features),
    "qwen2_5_vl": _qwen(qwen25_vl.features),
    **dict.fromkeys(
        qwen3_vl.TYPES, _qwen(qwen3_vl.features, settle=qwen3_vl.settle)
    ),
    **dict.fromkeys(glm4v.TYPES, _qwen(glm4v.features, glm4v.size_note)),
    phi4.PHI4: Tower(
        phi4.token_count, phi4.features, phi4.crop_count, phi4.as_the_library_takes,
        phi4.size_note, lambda config: grid_metadata(phi4.crop_grid(config)), phi4.settle,
    ),
    **ROWS,
}
"""By model type, all families that put images into a text and are read."""
