"""Decoders with their key-value cache as inputs and outputs: one graph for prompts and steps."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.export import Dim

from ...core.errors import first_line
from ...structure.cache_slots import SHIFT, TOKEN_TYPES, present_of
from ..tracing.plain_call import cache_argument
from .llava import (
    deep_options,
    embedded,
    given_features,
    logits_of,
    merge_rows,
    text_part,
    word_options,
)  # fmt: skip
from .model import longest_text
from .pictures import image_features
from .places import PREFIXED, TURNED, text_options, token_places
from .recurrent import starting_anew
from .slots import Held, cache_holding, grouped, held_by, presents_in

PAST, SEQ = 3, 2
"""Lengths of the example's cache and text: no two dimensions of an example may agree by chance."""

Pairs = Sequence[tuple[torch.Tensor, ...]]


def cached_inputs(
    model: Any, inputs: Mapping[str, torch.Tensor], held: Sequence[Held]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Example inputs and dynamic shapes of a decoder with its cache, from those without."""
    config = model.config.get_text_config(decoder=True)
    longest = longest_text(config)
    batch, past = Dim("batch"), Dim("past", max=longest)
    layers = list(grouped(held).values())
    pixels = inputs.get("pixel_values")
    # Long enough for an image: sizes that depend on it (tokens left out) are told by the example.
    seq = SEQ if pixels is None else int(inputs["input_ids"].shape[1])
    growing = any(None in one.sizes for one in held)
    examples: dict[str, Any] = {
        "input_ids": torch.ones(2, seq, dtype=torch.int64),
        "attention_mask": torch.ones(2, growing * PAST + seq, dtype=torch.int64),
        "past_key_values": [
            tuple(torch.zeros(2, *(s or PAST for s in one.sizes), dtype=one.dtype) for one in layer)
            for layer in layers
        ],
    }
    tokens = Dim("seq", max=longest)
    shapes: dict[str, Any] = {
        "input_ids": {0: batch, 1: tokens},
        # The exporter finds that it is past + seq; without keys, it is of the tokens that are read.
        "attention_mask": {0: batch, 1: Dim.AUTO if growing else tokens},
        "past_key_values": [
            tuple({0: batch, 2: past} if None in one.sizes else {0: batch} for one in layer)
            for layer in layers
        ],
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


def input_names(held: Sequence[Held], names: Sequence[str]) -> list[str]:
    """The graph's input names, in the order of ``cached_inputs``."""
    renamed = {"past_key_values": [one.name for one in held], "shift": [SHIFT]}
    return [n for name in names for n in renamed.get(name, [name])]


def kept_by(model: Any, task: str) -> tuple[tuple[Held, ...], str]:
    """What the layers of a model keep of a text, or why it has no cache to give."""
    name = type(model).__name__
    if task not in ("text-generation", "image-text-to-text"):
        return (), f"{name} does not generate text, so it has no cache to export"
    if model.config.is_encoder_decoder:
        return (), f"{name} reads its images by an encoder, which no cache holds; {_WITHOUT}"
    if not cache_argument(model):
        return (), f"{name} has no past_key_values, so it has no cache; {_WITHOUT}"
    anew = starting_anew(model)
    if anew:
        return (), f"{name} has layers that begin at every call anew ({anew}); {_WITHOUT}"
    try:
        held = held_by(text_part(model) if task == "image-text-to-text" else model)
    except Exception as error:
        # Whatever a model's own code raises: with a cache of the library's it does not run.
        why = first_line(error)
        return (), f"{name} does not run with a cache of keys, values and states: {why}; {_WITHOUT}"
    return held, "" if held else f"{name} keeps nothing of a text; {_WITHOUT}"


_WITHOUT = "load it without (--no-cache, cache=False)"


def cached_forward(
    self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, past_key_values: Pairs, *,
    held: Sequence[Held],
) -> dict[str, torch.Tensor]:  # fmt: skip
    """``logits`` and the grown cache of a text model.

    ``input_ids`` ``[batch, seq]`` i64; ``attention_mask`` ``[batch, past + seq]`` i64, with zeros
    for padding on the left, or ``[batch, seq]`` where no layer keeps keys; ``past_key_values`` what
    each layer keeps, as in ``held``: a pair ``[batch, heads, past, head_dim]``, or its states.
    """
    forward = type(self).forward
    tensors = by_name(held, past_key_values)
    cache = cache_holding(self.config, held, tensors)
    accepted = inspect.signature(forward).parameters
    options: dict[str, Any] = {
        cache_argument(self): cache, "use_cache": True, "return_dict": True
    }  # fmt: skip
    if "position_ids" in accepted:
        options["position_ids"] = token_places(attention_mask, past_length(held, tensors))
    output = forward(self, input_ids=input_ids, attention_mask=attention_mask, **options)
    return {"logits": output.logits} | presents_in(cache, held)


def by_name(held: Sequence[Held], layers: Pairs) -> dict[str, torch.Tensor]:
    """What each layer keeps, by the names of a graph's inputs."""
    flat = [tensor for layer in layers for tensor in layer]
    return dict(zip((one.name for one in held), flat, strict=True))


def past_length(held: Sequence[Held], tensors: Mapping[str, torch.Tensor]) -> int:
    """The length of a cache, as its tensors have it; 0 where none grows with the text."""
    return next((tensors[one.name].shape[2] for one in held if None in one.sizes), 0)


def cached_llava_forward(
    self: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    past_key_values: Pairs,
    pixel_values: torch.Tensor,
    token_type_ids: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    *,
    held: Sequence[Held],
) -> dict[str, torch.Tensor]:
    """``cached_forward`` for a LLaVA model; see ``text_options`` for what others take beside.

    ``pixel_values`` ``[images, 3, height, width]`` or ``[images, crops, 3, height, width]``: the
    images of the whole batch, in the order of their placeholders in ``input_ids``, row by row. A
    step that reads no placeholder takes none: with ``images = 0`` the tower costs nothing.
    """
    features, deep = image_features(self, pixel_values)
    shown = input_ids == self.config.image_token_id
    merged = merge_rows(embedded(self, input_ids, pixel_values), shown, features)
    tensors = by_name(held, past_key_values)
    cache = cache_holding(text_part(self).config, held, tensors)
    options, grown = text_options(
        self, input_ids, attention_mask, past=past_length(held, tensors),
        token_type_ids=token_type_ids, shift=shift, shown=given_features(shown, features)[1],
    )  # fmt: skip
    options |= deep_options([merge_rows(0.0, shown, level) for level in deep])
    options |= word_options(self, input_ids)
    logits = logits_of(self, merged, use_cache=True, **{cache_argument(self): cache}, **options)
    state = {} if grown is None else {present_of(SHIFT): grown}
    return {"logits": logits} | presents_in(cache, held) | state
