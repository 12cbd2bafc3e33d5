"""LLaVA models: one forward that ``torch.export`` can follow, in place of the library's.

The library's forward makes a list of one tensor an image, which fixes the batch size, and scatters
the features with ``masked_scatter``, which no other runtime has.
"""

from __future__ import annotations

from typing import Any

import torch

from .florence2 import florence_forward
from .pictures import image_features, tower_of
from .places import text_options


def llava_forward(
    self: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    pixel_values: torch.Tensor,
    token_type_ids: torch.Tensor | None = None,
    decoder_input_ids: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """``logits`` ``[batch, seq, words]`` of prompts with one image each.

    ``input_ids``, ``attention_mask`` ``[batch, seq]`` i64, with as many placeholders
    (``config.image_token_id``) in each row as the image has features; ``pixel_values``
    ``[batch, 3, height, width]``, or ``[batch, crops, 3, height, width]`` where an image comes as
    several crops, whose features follow each other. ``token_type_ids`` ``[batch, seq]`` i64 are 0
    for the prompt of a model in which that sees all of itself. ``decoder_input_ids`` ``[batch,
    decoder_seq]`` i64 are what is written so far where the prompt is an encoder's: the logits are
    of these.
    """
    features, deep = image_features(self, pixel_values)
    shown = input_ids == self.config.image_token_id
    words = embedded(self, input_ids, pixel_values)
    merged = merge_features(words, shown, features)
    if decoder_input_ids is not None:
        return florence_forward(self, merged, attention_mask, decoder_input_ids)
    options, _ = text_options(
        self, input_ids, attention_mask, past=None, token_type_ids=token_type_ids
    )
    options |= deep_options([merge_features(0.0, shown, level) for level in deep])
    options |= word_options(self, input_ids)
    return {"logits": logits_of(self, merged, use_cache=False, **options)}


def embedded(model: Any, input_ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """The stream of words; a placeholder that the table has no row for is read as another. Words
    around images may be embedded in a way of their own."""
    table, tower = model.get_input_embeddings(), tower_of(model.config)
    token, read = model.config.image_token_id, input_ids
    if token >= table.num_embeddings:
        read = torch.where(input_ids == token, 0, input_ids)
    words: torch.Tensor = table(read)
    if tower is None or tower.words is None:
        return words
    return tower.words(model, input_ids, words, pixels)


def logits_of(model: Any, merged: torch.Tensor, **options: Any) -> torch.Tensor:
    """``logits`` of a stream ``[batch, seq, width]`` in which images and words are together."""
    logits: torch.Tensor
    if hasattr(model, "language_model"):  # one with its own head
        logits = model.language_model(inputs_embeds=merged, **options).logits
        return logits
    logits = model.lm_head(text_part(model)(inputs_embeds=merged, **options).last_hidden_state)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def text_part(model: Any) -> Any:
    """The part that reads the stream, with a head of its own or without."""
    inner = model if hasattr(model, "language_model") else model.model
    if hasattr(inner, "text_model"):
        return inner.text_model
    return getattr(inner, "language_model", inner)  # itself, where images are made within it


def word_options(model: Any, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What tells a text of its words beside their stream, of models that have such."""
    tower = tower_of(model.config)
    if tower is None or tower.beside_words is None:
        return {}
    return tower.beside_words(model, input_ids)


def deep_options(levels: list[torch.Tensor]) -> dict[str, Any]:
    """What tells a text of the features ``[batch, seq, width]`` that its first layers add."""
    return {"deepstack_visual_embeds": levels, "visual_pos_masks": None} if levels else {}


def merge_features(
    words: torch.Tensor | float, placeholders: torch.Tensor, features: torch.Tensor
) -> torch.Tensor:
    """``words`` with the features in the places of the placeholders, in order.

    ``words`` ``[batch, seq, width]`` or a number for all, ``placeholders`` ``[batch, seq]`` bool,
    ``features`` ``[batch, tokens, width]``; a row's n-th placeholder takes the row's n-th feature.
    """
    turn = placeholders.long().cumsum(1) - 1
    place = turn.clamp(0, features.shape[1] - 1).unsqueeze(-1).expand(-1, -1, features.shape[2])
    return torch.where(placeholders.unsqueeze(-1), features.gather(1, place), words)


def merge_rows(
    words: torch.Tensor | float, placeholders: torch.Tensor, features: torch.Tensor
) -> torch.Tensor:
    """``merge_features`` for any number of images, none among them.

    ``features`` ``[images, tokens, width]``; the batch's n-th placeholder, row by row, takes the
    n-th feature of all images together. One behind the last feature stays a word: a model may
    write it. A row of zeros stands before the features, so that there is one to read where there
    are none.
    """
    rows = features.flatten(0, 1)
    table = torch.cat([rows.new_zeros(1, rows.shape[-1]), rows])
    turn, shown = given_features(placeholders, features)
    return torch.where(shown.unsqueeze(-1), table[torch.where(shown, turn, 0)], words)


def given_features(
    placeholders: torch.Tensor, features: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The turn of each placeholder in the batch, from 1 on, and whether there is a feature for it:
    i64 and bool ``[batch, seq]``."""
    turn = placeholders.flatten().long().cumsum(0).reshape(placeholders.shape)
    return turn, placeholders & (turn <= features.shape[0] * features.shape[1])
