"""Phi-4-multimodal's tower of sounds as a graph of its own: the part ``sounds``.

The library's forward counts a mask of chunks in numpy and packs clips by their lengths, which no
graph can follow. Here clips come as frames ``[clips, frames, bands]`` with a mask of those that
count, and go as ``[clips, steps, width]``, a step for every eight frames; which of them a prompt
has is for the caller to say. The library cuts sounds of more than 500 steps, 40 seconds, into
pieces that do not see each other: they are not in the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.export import Dim

from ...core.errors import BadInput
from .pair import Part
from .phi4 import PHI4

SOUNDS = "sounds"
FRAMES, HEARD, MODE = "audio_embeds", "audio_attention_mask", "audio_projection_mode"
"""Inputs by onnxruntime-genai's names: f32 ``[clips, frames, bands]``, bool ``[clips, frames]``,
and i64 ``[1]``, 2 where a prompt has sounds alone and 3 where it has images, too."""
FEATURES = "audio_features"
MOST_STEPS = 500
_CLIPS, _EXAMPLE, _LEAST = 2, 69, 9
_ALONE = 2


def own_part(model: Any, part: str) -> Part | None:
    """The part of that name; ``None`` of another model's. Raises ``BadInput`` where the model has
    no such part, or sounds none."""
    hears = str(getattr(model.config, "model_type", "")) == PHI4
    if hears and part == SOUNDS:
        return sounds_part(model)
    if not hears and part != SOUNDS:
        return None
    has = f"it has {SOUNDS}" if hears else "Phi-4-multimodal has one"
    raise BadInput(f"{type(model).__name__} has no part {part!r}: {has}")


def sounds_part(model: Any) -> Part:
    """The tower with what leads into the text."""
    config = model.config.audio_config
    most = MOST_STEPS * config.time_reduction
    clips, frames = Dim("clips"), Dim("frames", min=_LEAST, max=most)
    sides = {0: clips, 1: frames}
    dtype = next(model.parameters()).dtype
    inputs = {
        FRAMES: torch.zeros(_CLIPS, _EXAMPLE, config.input_size, dtype=dtype),
        HEARD: torch.ones(_CLIPS, _EXAMPLE, dtype=torch.bool),
        MODE: torch.full((1,), _ALONE),
    }  # fmt: skip
    note = f"sounds are of {most} frames at most: the library cuts longer ones into pieces"
    return Part(
        inputs, {FRAMES: sides, HEARD: sides, MODE: {}}, _features, by_library=_by_library,
        notes=(note,),
    )  # fmt: skip


def _features(model: Any, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    embed = model.model.embed_tokens_extend.audio_embed
    tower, config = embed.encoder, model.config.audio_config
    states = tower.encoder_embedding(feeds[FRAMES])
    states, seen = tower.embed(states, feeds[HEARD])
    if config.chunk_size > 0:
        seen = seen & _chunks(states.shape[1], config.chunk_size, config.left_chunk)
    # A flag is added, as the library does: a step that does not count is seen with less weight.
    bias = seen.unsqueeze(1) + tower.relative_attention_bias_layer(states)
    for layer in tower.encoders:
        states = layer(states, bias)
    gelu = torch.nn.functional.gelu
    alone = embed.down_proj_for_speech(gelu(embed.up_proj_for_speech(states)))
    beside = embed.down_proj_for_vision_speech(gelu(embed.up_proj_for_vision_speech(states)))
    return {FEATURES: torch.where(feeds[MODE] == _ALONE, alone, beside)}


def _chunks(steps: Any, size: int, left: int) -> torch.Tensor:
    """Which of ``[steps, steps]`` see which: those of their own chunk, and of ``left`` before."""
    chunk = torch.arange(steps) // size
    apart = chunk.unsqueeze(1) - chunk
    return (apart >= 0) & (apart <= left)


def _by_library(model: Any, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The library's own tower and its own choice of what leads into the text."""
    embed = model.model.embed_tokens_extend.audio_embed
    token = model.config.audio_config.audio_token_id
    clips, frames = feeds[HEARD].shape
    steps = -(-frames // model.config.audio_config.time_reduction)
    ids = torch.full((1, clips * steps), token)
    words = feeds[FRAMES].new_zeros(1, clips * steps, model.config.hidden_size)
    rows = embed(
        ids, words, feeds[FRAMES], audio_embed_sizes=[steps] * clips,
        audio_attention_mask=feeds[HEARD],
        audio_projection_mode="speech" if int(feeds[MODE]) == _ALONE else "vision",
    )  # fmt: skip
    return {FEATURES: rows.reshape(clips, steps, -1)}
