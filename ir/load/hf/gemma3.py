"""Gemma 3 (arXiv 2503.19786): which tokens see which, where an image's see each other both ways.

The library is told by ``token_type_ids`` what is an image; here the placeholders tell. It finds
the places of images with a scan that another runtime has too, ``cumsum``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...structure.cache_slots import TOKEN_TYPES

MUTUAL = ("gemma3",)
"""Model types in which an image's tokens see each other both ways."""


def typed(model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A graph's inputs, with the kinds of tokens that the library's processor tells it."""
    return {TOKEN_TYPES: (inputs["input_ids"] == model.config.image_token_id).long(), **inputs}


def image_masks(
    config: Any, mask: torch.Tensor, shown: torch.Tensor, past: int, *, full: bool = True
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Which keys each token sees, ``[batch, 1, seq, past + seq]`` bool, or one for each kind of
    layer: those before it, and the other tokens of its image. A window bounds how far back. Without
    ``full``, layers that have no window show those before alone.

    ``config`` is the text's, ``mask`` ``[batch, past + seq]`` i64, ``shown`` ``[batch, seq]`` bool
    says what is an image. Tokens next to each other are one image, as the library has it.
    """
    keys = torch.arange(past + shown.shape[1])
    queries = keys[past:].unsqueeze(1)
    # Tokens of one image have the same number of words before them, and of others another.
    number = torch.where(shown, 1 + (~shown).long().cumsum(1), 0)
    of_keys = torch.cat([torch.zeros_like(mask[:, :past]), number], 1).unsqueeze(1)
    together = (of_keys == number.unsqueeze(2)) & shown.unsqueeze(2)
    causal, real = keys <= queries, mask.bool().unsqueeze(1)
    seen = (causal | together) & real
    window = getattr(config, "sliding_window", None)
    if window is None:
        return seen.unsqueeze(1)
    near = seen & (queries - keys < window)
    whole = seen if full else causal & real
    return {"full_attention": whole.unsqueeze(1), "sliding_attention": near.unsqueeze(1)}
