"""Florence-2 (arXiv 2311.06242): an encoder that reads images among its words, and a decoder.

The library scatters the features with ``masked_scatter``, which no other runtime has.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.export import Dim

FLORENCE2 = "florence2"
_SIDE = 768
"""Rows and columns of an image where the config sets none: its processor's."""


def image_sides(config: Any) -> tuple[int, int]:
    """Height and width of an image, of a whole config."""
    size = getattr(config.vision_config, "image_size", None) or _SIDE
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return int(height), int(width)


def token_count(config: Any) -> int:
    """Tokens that an image enters a text as: what the last stage sees, and the mean of it."""
    vision = config.vision_config
    sides = list(image_sides(config))
    stages = zip(vision.patch_size, vision.patch_stride, vision.patch_padding, strict=True)
    for kernel, stride, padding in stages:
        sides = [(side + 2 * padding - kernel) // stride + 1 for side in sides]
    return math.prod(sides) + 1


def size_note(config: Any) -> str:
    """What a person should know of a graph of such a model."""
    height, width = image_sides(config)
    return (
        f"images are of {height} x {width}, which are {token_count(config)} tokens: image_size "
        "under vision_config in config.json sets another size"
    )


def answer(longest: int | None) -> tuple[torch.Tensor, dict[int, Any]]:
    """What its decoder is given: an example, and the dimensions that vary, of at most ``longest``
    tokens."""
    example = torch.ones(2, 5, dtype=torch.int64)
    return example, {0: Dim("batch"), 1: Dim("decoder_seq", max=longest)}


def florence_forward(
    model: Any, words: torch.Tensor, attention_mask: torch.Tensor, decoder_input_ids: torch.Tensor
) -> dict[str, torch.Tensor]:
    """``logits`` ``[batch, decoder_seq, words]`` of answers to what the stream ``words`` ``[batch,
    seq, width]``, with the images in it, says."""
    text = model.model.language_model
    read = text.encoder(inputs_embeds=words, attention_mask=attention_mask).last_hidden_state
    written = text.decoder(
        input_ids=decoder_input_ids, encoder_hidden_states=read,
        encoder_attention_mask=attention_mask, use_cache=False,
    ).last_hidden_state  # fmt: skip
    return {"logits": model.lm_head(written)}
