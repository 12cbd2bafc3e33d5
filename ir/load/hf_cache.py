"""Decoders with their key-value cache as inputs and outputs: one graph for prompts and steps."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.export import Dim

from ..structure.cache_slots import PARTS, SHIFT, TOKEN_TYPES, past_name, present_of
from .hf_llava import deep_options, embedded, given_features, image_features, logits_of, merge_rows
from .hf_model import longest_text
from .hf_places import PREFIXED, TURNED, text_options, token_places
from .hf_towers import with_indicators
from .plain_call import cache_argument, cache_of, presents

PAST, SEQ = 3, 2
"""Lengths of the example's cache and text: no two dimensions of an example may agree by chance."""
_ATTENDING = ("full_attention", "sliding_attention", "chunked_attention")

Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]


def cached_inputs(
    model: Any, inputs: Mapping[str, torch.Tensor]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Example inputs and dynamic shapes of a decoder with its cache, from those without."""
    config = model.config.get_text_config(decoder=True)
    longest = longest_text(config)
    heads, widths = _slot_sizes(config)
    dtype = next(model.parameters()).dtype
    batch, past = Dim("batch"), Dim("past", max=longest)
    layer = {0: batch, 2: past}
    layers = range(config.num_hidden_layers)
    pixels = inputs.get("pixel_values")
    # Long enough for an image: sizes that depend on it (tokens left out) are told by the example.
    seq = SEQ if pixels is None else int(inputs["input_ids"].shape[1])
    examples: dict[str, Any] = {
        "input_ids": torch.ones(2, seq, dtype=torch.int64),
        "attention_mask": torch.ones(2, PAST + seq, dtype=torch.int64),
        "past_key_values": [
            tuple(torch.zeros(2, heads, PAST, width, dtype=dtype) for width in widths)
            for _ in layers
        ],
    }
    shapes: dict[str, Any] = {
        "input_ids": {0: batch, 1: Dim("seq", max=longest)},
        "attention_mask": {0: batch, 1: Dim.AUTO},  # the exporter finds that it is past + seq
        "past_key_values": [(layer, layer) for _ in layers],
    }
    if pixels is not None:
        examples["pixel_values"] = torch.cat([pixels, pixels])[:3]
        shapes["pixel_values"] = {0: Dim("images")}
    if model.config.model_type in PREFIXED:
        examples[TOKEN_TYPES] = torch.zeros_like(examples["input_ids"])
        shapes[TOKEN_TYPES] = shapes["input_ids"]
    if model.config.model_type in TURNED:
        examples["shift"] = torch.zeros(2, 1, dtype=torch.int64)
        shapes["shift"] = {0: batch}
    return examples, shapes


def _slot_sizes(config: Any) -> tuple[int, tuple[int, int]]:
    """Heads of a layer's cache, and the widths of its keys and of its values."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    # Falcon's newer form repeats its heads before they are cached, whatever multi_query says.
    if getattr(config, "multi_query", False) and not getattr(
        config, "new_decoder_architecture", False
    ):
        heads = 1
    if getattr(config, "kv_lora_rank", None):  # DeepSeek's latent attention (arXiv 2405.04434)
        return 1, (config.kv_lora_rank, config.qk_rope_head_dim)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads, (width, width)


def input_names(model: Any, names: Sequence[str]) -> list[str]:
    """The graph's input names, in the order of ``cached_inputs``."""
    layers = range(model.config.get_text_config(decoder=True).num_hidden_layers)
    slots = [past_name(slot, part) for slot in layers for part in PARTS]
    renamed = {"past_key_values": slots, "shift": [SHIFT]}
    return [n for name in names for n in renamed.get(name, [name])]


def why_uncached(model: Any, task: str) -> str:
    """Why a model has no cache to give; empty where its state is keys and values of every layer."""
    name = type(model).__name__
    if task not in ("text-generation", "image-text-to-text"):
        return f"{name} does not generate text, so it has no cache to export"
    if model.config.is_encoder_decoder:
        return f"{name} reads its images by an encoder, which no cache holds; load it without"
    config = model.config.get_text_config(decoder=True)
    strange = sorted(set(getattr(config, "layer_types", None) or ()) - set(_ATTENDING))
    if not strange and cache_argument(model):
        return ""
    what = f"layers of kind {strange[0]}" if strange else "no past_key_values"
    return f"{name} has {what}, whose state is not a cache of keys and values; load it without"


def cached_forward(
    self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, past_key_values: Pairs
) -> dict[str, torch.Tensor]:
    """``logits`` and the grown cache of a text model.

    ``input_ids`` ``[batch, seq]`` i64; ``attention_mask`` ``[batch, past + seq]`` i64, with zeros
    for padding on the left; ``past_key_values`` a pair ``[batch, heads, past, head_dim]`` a layer.
    """
    forward = type(self).forward
    cache = cache_of(past_key_values)
    accepted = inspect.signature(forward).parameters
    options: dict[str, Any] = {
        cache_argument(self): cache, "use_cache": True, "return_dict": True
    }  # fmt: skip
    if "position_ids" in accepted:
        options["position_ids"] = token_places(attention_mask, past_key_values[0][0].shape[2])
    output = forward(self, input_ids=input_ids, attention_mask=attention_mask, **options)
    return {"logits": output.logits} | presents(cache)


def cached_llava_forward(
    self: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    past_key_values: Pairs,
    pixel_values: torch.Tensor,
    token_type_ids: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """``cached_forward`` for a LLaVA model; see ``text_options`` for what others take beside.

    ``pixel_values`` ``[images, 3, height, width]`` or ``[images, crops, 3, height, width]``: the
    images of the whole batch, in the order of their placeholders in ``input_ids``, row by row. A
    step that reads no placeholder takes none: with ``images = 0`` the tower costs nothing.
    """
    features, deep = image_features(self, pixel_values)
    shown = input_ids == self.config.image_token_id
    words = with_indicators(self, input_ids, embedded(self, input_ids), pixel_values)
    merged = merge_rows(words, shown, features)
    cache = cache_of(past_key_values)
    options, grown = text_options(
        self, input_ids, attention_mask, past=past_key_values[0][0].shape[2],
        token_type_ids=token_type_ids, shift=shift, shown=given_features(shown, features)[1],
    )  # fmt: skip
    options |= deep_options([merge_rows(0.0, shown, level) for level in deep])
    logits = logits_of(self, merged, use_cache=True, **{cache_argument(self): cache}, **options)
    state = {} if grown is None else {present_of(SHIFT): grown}
    return {"logits": logits} | presents(cache) | state
