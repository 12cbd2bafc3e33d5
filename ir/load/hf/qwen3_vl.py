"""Qwen3-VL (arXiv 2511.21631): places of patches by interpolation, and features for early layers.

Beside the features that enter the text, blocks within the tower give some for each of its first
layers, which add them to their result (DeepStack, arXiv 2406.04334).
"""

from __future__ import annotations

from typing import Any

import torch

from .qwen_vl import attention, embedded_patches, joined, patch_grid, patch_places, patches

TYPES = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")


def features(model: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What the tower makes of images ``[images, 3, height, width]``: ``[images, tokens, width]``,
    and as much for each of the first layers of the text."""
    config, tower = model.config, model.model.visual
    square = config.vision_config.spatial_merge_size**2
    where = patch_places(config)
    stream = embedded_patches(tower, patches(config, pixels))
    stream = stream + _positions(tower, where, patch_grid(config)).to(stream.dtype)
    turns = tower.rotary_pos_emb(stream, where)
    deep: dict[int, torch.Tensor] = {}
    levels = list(getattr(config.vision_config, "deepstack_visual_indexes", ()))
    for number, block in enumerate(tower.blocks):
        stream = stream + attention(block.attn, block.norm1(stream), turns)
        stream = stream + block.mlp(block.norm2(stream))
        if number in levels:
            merger = tower.deepstack_merger_list[levels.index(number)]
            deep[number] = _merged(merger, stream, square)
    return _merged(tower.merger, stream, square), [deep[number] for number in sorted(deep)]


def _positions(tower: Any, where: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The table of a square's places, stretched over the ``grid``: at corners it is the table's.

    ``[patches, width]`` of patches at ``where`` i64 ``[patches, 2]``.
    """
    side = tower.num_grid_per_side
    steps = torch.tensor([(side - 1) / max(count - 1, 1) for count in grid])
    place = where * steps
    low = place.floor().long().clamp(max=side - 1)
    high, share = (low + 1).clamp(max=side - 1), place - low
    taps, weights = [], []
    for down, by_row in ((low, 1 - share), (high, share)):
        for across, by_column in ((low, 1 - share), (high, share)):
            taps.append(down[:, 0] * side + across[:, 1])
            weights.append(by_row[:, 0] * by_column[:, 1])
    rows: torch.Tensor = tower.pos_embed(torch.stack(taps, 1))
    return (rows * torch.stack(weights, 1).unsqueeze(-1)).sum(1)


def _merged(merger: Any, stream: torch.Tensor, square: int) -> torch.Tensor:
    if merger.use_postshuffle_norm:
        normed = merger.norm(joined(stream, square))
    else:
        normed = joined(merger.norm(stream), square)
    merged: torch.Tensor = merger.linear_fc2(merger.act_fn(merger.linear_fc1(normed)))
    return merged


def settle(model: Any) -> None:
    """Let the text add what each layer is given to all tokens, and choose the direction of each
    frequency: the library does both by assignments to parts of a tensor."""
    text = model.model.language_model
    text._deepstack_process = lambda hidden, _, given: hidden + given
    rope = text.rotary_emb
    rope.recomposition_frequencies = lambda angles: _interleaved(angles, rope.mrope_section)


def _interleaved(angles: torch.Tensor, sections: list[int]) -> torch.Tensor:
    """Of angles ``[3, batch, seq, width / 2]`` those in time, down, across and again, as often as
    ``sections`` say, and in time behind: ``[batch, seq, width]``."""
    turn = torch.arange(angles.shape[-1])
    chosen = angles[0]
    for axis in (1, 2):
        own = (turn % 3 == axis) & (turn < 3 * sections[axis])
        chosen = torch.where(own, angles[axis], chosen)
    return torch.cat([chosen, chosen], -1)
