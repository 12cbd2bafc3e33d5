"""LLaVA models: one forward that ``torch.export`` can follow, in place of the library's.

The library's forward makes a list of one tensor an image, which fixes the batch size, and scatters
the features with ``masked_scatter``, which no other runtime has.
"""

from __future__ import annotations

from typing import Any

import torch


def llava_forward(
    self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, pixel_values: torch.Tensor
) -> dict[str, torch.Tensor]:
    """``logits`` ``[batch, seq, words]`` of prompts with one image each.

    ``input_ids``, ``attention_mask`` ``[batch, seq]`` i64, with as many placeholders
    (``config.image_token_id``) in each row as the image has features; ``pixel_values``
    ``[batch, 3, height, width]``, or ``[batch, crops, 3, height, width]`` where an image comes as
    several crops, whose features follow each other.
    """
    inner = self.model
    features = image_features(self, pixel_values)
    words = inner.get_input_embeddings()(input_ids)
    merged = merge_features(words, input_ids == self.config.image_token_id, features)
    states = inner.language_model(
        inputs_embeds=merged, attention_mask=attention_mask, use_cache=False
    ).last_hidden_state
    return {"logits": self.lm_head(states)}


def image_features(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """The projector's features, ``[images, tokens, width]``: of an image in crops all of them."""
    crops = pixel_values.dim() == 5
    pixels = pixel_values.flatten(0, 1) if crops else pixel_values
    features: torch.Tensor = model.model.multi_modal_projector(_selected(model, pixels))
    if not crops:
        return features
    images, count = pixel_values.shape[:2]
    # In full: of no image at all, nothing could be inferred.
    return features.reshape(images, count * features.shape[1], features.shape[2])


def crop_count(config: Any) -> int:
    """Crops that an image comes as: 1 unless ``image_seq_length`` is a multiple of what one gives.

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


def _selected(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The tower's features as the config selects them, ``[images, tokens, width]``."""
    config = model.config
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    layers = config.vision_feature_layer
    chosen = [hidden[i] for i in ([layers] if isinstance(layers, int) else layers)]
    if config.vision_feature_select_strategy == "default":
        chosen = [state[:, 1:] for state in chosen]
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen, -1)


def merge_features(
    words: torch.Tensor, placeholders: torch.Tensor, features: torch.Tensor
) -> torch.Tensor:
    """``words`` with the features in the places of the placeholders, in order.

    ``words`` ``[batch, seq, width]``, ``placeholders`` ``[batch, seq]`` bool, ``features``
    ``[batch, tokens, width]``; a row's n-th placeholder takes the row's n-th feature.
    """
    turn = placeholders.long().cumsum(1) - 1
    place = turn.clamp(0, features.shape[1] - 1).unsqueeze(-1).expand(-1, -1, words.shape[-1])
    return torch.where(placeholders.unsqueeze(-1), features.gather(1, place), words)


def merge_rows(
    words: torch.Tensor, placeholders: torch.Tensor, features: torch.Tensor
) -> torch.Tensor:
    """``merge_features`` for any number of images, none among them.

    ``features`` ``[images, tokens, width]``; the batch's n-th placeholder, row by row, takes the
    n-th feature of all images together. One behind the last feature stays a word: a model may
    write it. A row of zeros stands before the features, so that there is one to read where there
    are none.
    """
    rows = features.flatten(0, 1)
    table = torch.cat([rows.new_zeros(1, rows.shape[-1]), rows])
    turn = placeholders.flatten().long().cumsum(0).reshape(placeholders.shape)
    shown = placeholders & (turn <= rows.shape[0])
    return torch.where(shown.unsqueeze(-1), table[torch.where(shown, turn, 0)], words)
