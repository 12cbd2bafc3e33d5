"""How families that put images into a text make its features, and how their library takes images.

Images of a graph are all of one size, which is bound: LLaVA-NeXT's crops and the rows of its raster
depend on it. A library's forward reads sizes and padding out of tensors, which no graph can follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..structure.cache_slots import TOKEN_TYPES
from . import hf_qwen3_vl, hf_qwen25_vl, hf_qwen_vl
from .hf_siglip2 import PATCHED, as_patches, size_note
from .hf_towers import TOWERS, tower_of

RASTERS = ("llava_next", "llava_onevision")
"""Model types whose images are crops in a raster."""
SHUFFLED = ("smolvlm", "idefics3")
"""Model types of which a square of patches is one token."""
Deep = tuple[torch.Tensor, list[torch.Tensor]]
Features = Callable[[Any, torch.Tensor], torch.Tensor | Deep]


def crop_grid(config: Any) -> tuple[int, int]:
    """Rows and columns of crops of LLaVA-NeXT's image: its largest square, else its first size; of
    LLaVA-OneVision's the largest that its library does not scale down (``anyres_max_9``)."""
    side = config.vision_config.image_size
    most = str(getattr(config, "vision_aspect_ratio", "")).removeprefix("anyres_max_")
    largest = side * math.isqrt(int(most)) if most.isdigit() else math.inf
    squares = [h for h, w in config.image_grid_pinpoints if h == w <= largest]
    height, width = (max(squares),) * 2 if squares else config.image_grid_pinpoints[0]
    return height // side, width // side


def tokens_of(config: Any) -> int:
    """Tokens that stand for one image in a text."""
    kind, vision = config.model_type, getattr(config, "vision_config", config)
    tower = tower_of(config)
    if tower is not None:
        return tower.tokens(config)
    if kind == "blip-2":
        return int(config.num_query_tokens)
    if kind in hf_qwen_vl.TYPES:
        return math.prod(hf_qwen_vl.token_grid(config))
    if kind == "paligemma":
        return int((vision.image_size // vision.patch_size) ** 2)
    if kind in SHUFFLED:
        return int((vision.image_size // vision.patch_size // config.scale_factor) ** 2)
    if kind in RASTERS:
        side = vision.image_size // vision.patch_size
        rows, columns = crop_grid(config)
        return int(side * side + rows * side * (columns * side + 1))
    return int(getattr(config, "image_seq_length", 0))


def size_notes(config: Any) -> tuple[str, ...]:
    """What a person should know of the size of a graph's images, where there are others."""
    tower = tower_of(config)
    if tower is not None:
        return () if tower.note is None else (tower.note(config),)
    if config.model_type in PATCHED:
        return (size_note(config),)
    if config.model_type in hf_qwen_vl.TYPES:
        return (hf_qwen_vl.size_note(config),)
    if config.model_type not in RASTERS:
        return ()
    side, (rows, columns) = config.vision_config.image_size, crop_grid(config)
    size = f"{rows * side} x {columns * side}, which are {tokens_of(config)} tokens"
    return (
        f"images are of {size}: another alone in image_grid_pinpoints of config.json is that then",
    )


def projected(model: Any, pixels: torch.Tensor) -> torch.Tensor:
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


def _llava_next(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The whole image's tokens, then the crops' as one raster with a newline behind each row.

    ``pixels`` ``[images, 1 + crops, 3, height, width]``, the image as a whole first.
    """
    config = model.config
    rows, columns = crop_grid(config)
    side = config.vision_config.image_size // config.vision_config.patch_size
    tokens = projected(model, pixels.flatten(0, 1))
    images, width = pixels.shape[0], tokens.shape[-1]
    tokens = tokens.reshape(images, 1 + rows * columns, tokens.shape[1], width)
    raster = tokens[:, 1:].reshape(images, rows, columns, side, side, width)
    raster = raster.permute(0, 1, 3, 2, 4, 5).reshape(images, rows * side, columns * side, width)
    newline = model.model.image_newline.to(raster.dtype).expand(images, rows * side, 1, width)
    raster = torch.cat([raster, newline], 2)
    return torch.cat([tokens[:, :1].squeeze(1), raster.reshape(images, -1, width)], 1)


def _smolvlm(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Of whole images: every patch is there, and has its own place."""
    tower = model.model.vision_model
    patches = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    places = tower.embeddings.position_embedding.weight[: patches.shape[1]]
    states = tower.encoder(inputs_embeds=patches + places).last_hidden_state
    features: torch.Tensor = model.model.connector(tower.post_layernorm(states))
    return features


def _pooled(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    features: torch.Tensor = model.get_image_features(pixels, return_dict=True).pooler_output
    return features


FEATURES: Mapping[str, Features] = {
    **{kind: tower.features for kind, tower in TOWERS.items()},
    **dict.fromkeys(RASTERS, _llava_next), **dict.fromkeys(SHUFFLED, _smolvlm),
    **dict.fromkeys(("blip-2", "paligemma"), _pooled), "qwen2_vl": hf_qwen_vl.features,
    "qwen2_5_vl": hf_qwen25_vl.features,
    **dict.fromkeys(hf_qwen3_vl.TYPES, hf_qwen3_vl.features),
}  # fmt: skip
"""By model type; LLaVA itself is in ``hf_llava``."""
SETTLED: Mapping[str, Callable[[Any], None]] = dict.fromkeys(
    hf_qwen3_vl.TYPES, hf_qwen3_vl.settle
)
"""What a model's own code is replaced by before it is traced, by model type."""


def as_the_library_takes(model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A graph's inputs as the library's own forward has them."""
    pixels, kind = inputs.get("pixel_values"), model.config.model_type
    if kind == "paligemma":
        return {TOKEN_TYPES: torch.zeros_like(inputs["input_ids"]), **inputs}
    if pixels is None or not len(pixels):
        return dict(inputs)
    tower = tower_of(model.config)
    if tower is not None and tower.beside is not None:
        return tower.beside(model, inputs)
    if kind in PATCHED:
        return as_patches(model.config, inputs)
    if kind in hf_qwen_vl.TYPES:
        grid = torch.tensor([[1, *hf_qwen_vl.patch_grid(model.config)]] * len(pixels))
        kinds = (inputs["input_ids"] == model.config.image_token_id).int()
        patches = hf_qwen_vl.patches(model.config, pixels).flatten(0, 1)
        return {
            **inputs, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": kinds,
        }  # fmt: skip
    if kind in RASTERS:
        side = model.config.vision_config.image_size
        rows, columns = crop_grid(model.config)
        sizes = torch.tensor([[rows * side, columns * side]] * len(pixels))
        return {**inputs, "image_sizes": sizes}
    if kind in SHUFFLED:
        rows = len(inputs["input_ids"])
        batch = rows if len(pixels) % rows == 0 else 1
        return {**inputs, "pixel_values": pixels.reshape(batch, -1, *pixels.shape[1:])}
    if pixels.dim() != 5 or not getattr(model.config, "image_token_id", None):
        return dict(inputs)
    return {**inputs, "pixel_values": pixels.flatten(0, 1)}  # all crops in a row
