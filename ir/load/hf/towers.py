"""How images enter the texts of one family, and the families that need little beside a row of it.

Their texts read an image's features as they read words, but for what ``gemma3`` says of masks.
Most let the library make the features: ``get_image_features(pixel_values)`` gives one tensor of
sizes that the config has. Those of families that need more are in ``pictures``, where the tower
of any model is found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...core.errors import BadInput
from . import florence2, gemma3, gemma4, pixtral, siglip2

Deep = tuple[torch.Tensor, list[torch.Tensor]]
"""Features that enter the text, and those that its first layers add."""


def pooled(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The library's features of images ``[images, 3, height, width]``: ``[images, tokens,
    width]``."""
    maker = model if hasattr(model, "get_image_features") else model.model
    features: torch.Tensor = maker.get_image_features(pixels, return_dict=True).pooler_output
    return features


@dataclass(frozen=True)
class Tower:
    """How images enter the texts of one family."""

    tokens: Callable[[Any], int]
    """By its config, the tokens that stand for one image."""
    features: Callable[[Any, torch.Tensor], torch.Tensor | Deep] = pooled
    """By the model, the features of images, ``[images, tokens, width]``."""
    crops: Callable[[Any], int] | None = None
    """By its config, the crops that one image comes as; absent where it is one."""
    beside: Callable[[Any, Mapping[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None
    """What the library's forward takes beside ``pixel_values`` or in place of them, by the model
    and a graph's inputs."""
    note: Callable[[Any], str] | None = None
    """What a person should know of the size of images, where the config could set others."""
    metadata: Callable[[Any], dict[str, str]] | None = None
    """By its config, what a graph says of where the tokens of an image stand."""
    settle: Callable[[Any], None] | None = None
    """What replaces parts of a model's own code before it is traced."""
    words: Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    """By the model, its input ids, their embeddings and the pixels, embeddings of words that stand
    around images."""
    beside_words: Callable[[Any, torch.Tensor], dict[str, torch.Tensor]] | None = None
    """What its text is told of words beside their stream, by the model and its input ids."""


def _patch_grid(vision: Any) -> tuple[int, int]:
    """Rows and columns of patches of a vision config. Raises ``BadInput`` where it has none."""
    sides = [getattr(vision, name, None) for name in ("image_size", "patch_size")]
    (height, width), (down, across) = [
        size if isinstance(size, list | tuple) else (size, size) for size in sides
    ]
    if not all(isinstance(n, int) and n > 0 for n in (height, width, down, across)):
        raise BadInput("vision_config has no image_size and patch_size, which say how many tokens "
                       "an image is")  # fmt: skip
    return height // down, width // across


def _every_patch(config: Any) -> int:
    return math.prod(_patch_grid(config.vision_config))


def _shrunk(factor: Callable[[Any], float]) -> Callable[[Any], int]:
    """Squares of patches are one token each, ``factor`` patches along a side."""
    return lambda config: math.prod(
        int(n / factor(config)) for n in _patch_grid(config.vision_config)
    )


def _strides(config: Any) -> int:
    """Ovis2's squares, of which the last ones of a row are filled up."""
    stride = config.vision_config.hidden_stride
    return math.prod(-(-n // stride) for n in _patch_grid(config.vision_config))


def _with_indicators(
    model: Any, input_ids: torch.Tensor, words: torch.Tensor, pixels: torch.Tensor
) -> torch.Tensor:
    """``words`` ``[rows, seq, width]`` with the visual words around Ovis2's images, where
    ``pixels`` hold an image at all: the library looks at them then alone."""
    table = model.model.visual_embeddings_table.weight
    tokens = model.config.visual_indicator_token_ids
    pictured = torch.ones_like(pixels[:, 0, 0, 0]).sum() > 0
    first = table.shape[0] - model.model.vision_tower.num_visual_indicator_tokens
    for row, token in enumerate(tokens, first):
        shown = ((input_ids == token) & pictured).unsqueeze(-1)
        words = torch.where(shown, table[row].to(words.dtype), words)
    return words


def _llama4(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Of tiles, between which the processor writes words."""
    states = model.vision_model(pixels).last_hidden_state
    features: torch.Tensor = model.multi_modal_projector(states)
    return features


def _llama4_tokens(config: Any) -> int:
    return int(_every_patch(config) * config.vision_config.pixel_shuffle_ratio**2)


def _queries(config: Any) -> int:
    """Aria's tokens, by how many patches there are."""
    return int(config.projector_patch_to_query_dict[_every_patch(config)])


PIXTRAL = Tower(
    lambda config: math.prod(pixtral.token_grid(config)), pixtral.features,
    beside=lambda _, inputs: pixtral.sized(inputs), note=pixtral.size_note,
)  # fmt: skip
"""Also of LLaVA's type, where the config says that tower."""
_BY_FACTOR = Tower(_shrunk(lambda config: config.downsample_factor))
ROWS: Mapping[str, Tower] = {
    "gemma3": Tower(lambda config: int(config.mm_tokens_per_image), beside=gemma3.typed),
    "internvl": Tower(_shrunk(lambda config: 1 / config.downsample_ratio)),
    "aya_vision": _BY_FACTOR,
    "cohere2_vision": _BY_FACTOR,
    "blip-2": Tower(lambda config: int(config.num_query_tokens)),
    "paligemma": Tower(_every_patch),
    "vipllava": Tower(_every_patch),
    "llama4": Tower(_llama4_tokens, _llama4),
    "aria": Tower(_queries),
    "deepseek_vl": Tower(_every_patch),
    "janus": Tower(_every_patch),
    "ovis2": Tower(_strides, words=_with_indicators),
    "got_ocr2": Tower(_shrunk(lambda _: 4)),  # two convolutions of stride 2
    florence2.FLORENCE2: Tower(florence2.token_count, note=florence2.size_note),
    siglip2.LFM2: Tower(
        siglip2.token_count, siglip2.features,
        beside=lambda model, inputs: siglip2.as_patches(model.config, inputs),
        note=siglip2.size_note,
    ),
    gemma4.GEMMA4: Tower(
        gemma4.token_count, gemma4.features, beside=gemma4.as_the_library_takes,
        note=gemma4.size_note, words=gemma4.words, beside_words=gemma4.beside_words,
    ),
    **dict.fromkeys(pixtral.PARTS, PIXTRAL),
}
"""By model type."""
