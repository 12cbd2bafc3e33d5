"""What the text half of a model of images is told beside its stream: masks, places of tokens."""

from __future__ import annotations

from typing import Any

import torch

from . import qwen_vl
from .gemma3 import MUTUAL, image_masks
from .gemma4 import sees_both_ways

PREFIXED = ("paligemma",)
"""Model types whose prompt sees all of itself."""
TURNED = qwen_vl.TYPES
"""Model types whose tokens stand in time, down and across."""


def text_options(
    model: Any,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    *,
    past: int | None,
    token_type_ids: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    shown: torch.Tensor | None = None,
) -> tuple[dict[str, Any], torch.Tensor | None]:
    """The options of a text model, and the ``shift`` of what follows, of the types that have one.

    ``past`` is the length of the cache, as its tensors have it, so that the exporter learns what
    the mask's is; ``None`` of a graph without one. ``input_ids`` and ``token_type_ids`` ``[batch,
    seq]``, ``mask`` ``[batch, past + seq]``, ``shift`` as in ``qwen_vl.places``, all i64;
    ``shown`` bool ``[batch, seq]`` are the tokens that stand for a feature, all placeholders where
    absent: one that the model has written is a word.
    """
    config = model.config
    if config.model_type in TURNED:
        places, shift = qwen_vl.places(
            config, input_ids, mask, past or 0, shift, shown
        )
        return {"attention_mask": mask, "position_ids": places}, shift
    options: dict[str, Any] = {"attention_mask": mask}
    seq = input_ids.shape[1]
    if past is not None:
        options["position_ids"] = token_places(mask, past)
    everywhere = config.model_type in MUTUAL
    if everywhere or sees_both_ways(config):
        shown = input_ids == config.image_token_id
        options["attention_mask"] = image_masks(
            config.get_text_config(), mask, shown, past or 0, full=everywhere
        )
    if config.model_type in PREFIXED:
        kinds = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        options["attention_mask"] = _prefix_masks(config.get_text_config(), mask, kinds, past or 0)
        first = options.get("position_ids", torch.arange(seq).expand(input_ids.shape))
        options["position_ids"] = first + 1  # the library counts from 1
    return options, None


def token_places(mask: torch.Tensor, past: int) -> torch.Tensor:
    """Each token's place among the real ones of its row; padding, which nothing reads, has 0."""
    return (mask.cumsum(-1) - 1).clamp(min=0)[:, past:]


def _prefix_masks(
    config: Any, mask: torch.Tensor, kinds: torch.Tensor, past: int
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Which keys each token sees, ``[batch, 1, seq, past + seq]`` bool, or one for each kind of
    layer: all of its prompt for tokens of kind 0, those before it for others and behind a prompt.
    """
    keys = torch.arange(past + kinds.shape[1])
    queries = keys[past:].unsqueeze(1)
    prefix = torch.cat([mask[:, :past], kinds], 1) == 0
    whole = (queries[:1] == 0) & (kinds == 0).unsqueeze(2) & prefix.unsqueeze(1)
    real = mask.bool().unsqueeze(1)
    causal = keys <= queries
    full = ((causal | whole) & real).unsqueeze(1)
    window = getattr(config, "sliding_window", None)
    if window is None:
        return full
    near = causal & (queries - keys < window)
    return {
        "full_attention": full, "sliding_attention": ((near | whole) & real).unsqueeze(1),
    }  # fmt: skip
