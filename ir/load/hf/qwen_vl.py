"""Qwen2-VL (arXiv 2409.12191): its tower on images of one size, and the places of its tokens.

The library takes an image as rows of patches with a grid beside them, and reads both, as the
lengths of texts, out of tensors, which no graph can follow. Here an image is an image, of
``image_size`` in the config's ``vision_config`` where it is there, else of 16 by 16 tokens. What
its successors share is here too; their towers are in ``qwen25_vl``, ``qwen3_vl`` and
``hf_glm4v``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

TYPES = (
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v",
    "glm4v_moe", "glm46v", "glm_ocr",
)  # fmt: skip
"""Model types of the line: patches in squares, and tokens that stand in time, down and across."""
TOKENS = 16
"""Tokens along each side of an image where the config sets no size."""


def patch_grid(config: Any) -> tuple[int, int]:
    """Rows and columns of patches of an image, of a whole config."""
    height, width = image_sides(config.vision_config)
    return height // config.vision_config.patch_size, width // config.vision_config.patch_size


def token_grid(config: Any) -> tuple[int, int]:
    """Rows and columns of the tokens that an image enters a text as."""
    rows, columns = patch_grid(config)
    merge = config.vision_config.spatial_merge_size
    return rows // merge, columns // merge


def squares(config: Any) -> tuple[int, int, int]:
    """Pixels along a patch, patches along a token, and frames that a patch stands for."""
    vision = config.vision_config
    return vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size


def image_sides(vision: Any) -> tuple[int, int]:
    """Height and width of an image."""
    size = getattr(vision, "image_size", None)
    side = vision.patch_size * vision.spatial_merge_size
    height, width = size if isinstance(size, tuple | list) else (size or side * TOKENS,) * 2
    return height // side * side, width // side * side


def size_note(config: Any) -> str:
    """What a person should know of a graph of such a model."""
    return f"{size_of(config)}: image_size under vision_config in config.json sets another size"


def size_of(config: Any) -> str:
    """How large images are, in pixels and in tokens."""
    (height, width), (rows, columns) = image_sides(config.vision_config), token_grid(config)
    return f"images are of {height} x {width}, which are {rows * columns} tokens"


def patches(config: Any, pixels: torch.Tensor) -> torch.Tensor:
    """``pixels`` ``[images, 3, height, width]`` as the library's processor has them: ``[images,
    patches, 3 * frames * side * side]``, those of one token next to each other, and every frame of
    a patch the same one."""
    return patch_rows(pixels, patch_grid(config), squares(config))


def patch_rows(
    pixels: torch.Tensor, grid: tuple[int, int], squares: tuple[int, int, int]
) -> torch.Tensor:
    """``patches`` of a ``grid`` of them, with ``squares`` as in the function of that name."""
    (rows, columns), (side, merge, frames) = grid, squares
    images, channels = pixels.shape[:2]
    split = pixels.reshape(images, channels, rows, side, columns, side)
    ordered = _in_order(split.permute(0, 2, 4, 1, 3, 5), 1, merge)
    repeated = ordered.unsqueeze(3).expand(-1, -1, -1, frames, -1, -1)
    return repeated.reshape(images, rows * columns, channels * frames * side * side)


def _in_order(grid: torch.Tensor, axis: int, merge: int) -> torch.Tensor:
    """Rows and columns at ``axis`` as one axis, in which the squares of ``merge`` follow each
    other."""
    before, (rows, columns), after = (
        grid.shape[:axis], grid.shape[axis : axis + 2], grid.shape[axis + 2 :],
    )  # fmt: skip
    squares = grid.reshape(*before, rows // merge, merge, columns // merge, merge, *after)
    return squares.transpose(axis + 1, axis + 2).reshape(*before, rows * columns, *after)


def features(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What the tower makes of images ``[images, 3, height, width]``: ``[images, tokens, width]``.

    Each image is looked at by itself: the library's blocks, with the images side by side.
    """
    tower, merge = model.model.visual, model.config.vision_config.spatial_merge_size
    stream = embedded_patches(tower, patches(model.config, pixels))
    turns = tower.rotary_pos_emb(stream, patch_places(model.config))
    for block in tower.blocks:
        stream = stream + attention(block.attn, block.norm1(stream), turns)
        stream = stream + block.mlp(block.norm2(stream))
    merged: torch.Tensor = tower.merger.mlp(joined(tower.merger.ln_q(stream), merge**2))
    return merged


def embedded_patches(tower: Any, rows: torch.Tensor) -> torch.Tensor:
    """The stream of a tower, ``[images, patches, width]``: the convolution over patches that do
    not overlap is a linear."""
    convolution = tower.patch_embed.proj
    return linear(rows, convolution.weight.flatten(1), convolution.bias)


def patch_places(config: Any) -> torch.Tensor:
    """Row and column of each patch, in the order of ``patches``: i64 ``[patches, 2]``."""
    rows, columns = patch_grid(config)
    down = torch.arange(rows).reshape(rows, 1).expand(rows, columns)
    across = torch.arange(columns).reshape(1, columns).expand(rows, columns)
    return _in_order(torch.stack([down, across], -1), 0, config.vision_config.spatial_merge_size)


def joined(stream: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` rows of a stream as one: ``[images, patches / count, count * width]``."""
    images, patches, width = stream.shape
    return stream.reshape(images, patches // count, count * width)


def attention(
    module: Any,
    stream: torch.Tensor,
    turns: tuple[torch.Tensor, torch.Tensor],
    *,
    window: int | None = None,
    seen: torch.Tensor | None = None,
) -> torch.Tensor:
    """A tower's attention over each image of a stream ``[images, patches, width]``.

    With ``window`` over so many patches in a row; with ``seen`` bool ``[1, 1, patches, patches]``
    over those keys that are true for a query.
    """
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

    images, count, width = stream.shape
    heads = module.num_heads
    stacked = module.qkv(stream).reshape(images, count, 3, heads, width // heads)
    query, key, value = stacked.unbind(2)
    if hasattr(module, "q_norm"):
        query, key = module.q_norm(query), module.k_norm(key)
    query, key = apply_rotary_pos_emb_vision(query, key, *turns)
    if window is not None:
        shape = images * (count // window), window, heads, width // heads
        query, key, value = (t.reshape(shape) for t in (query, key, value))
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    mixed = scaled_dot_product_attention(query, key, value, seen)
    projected: torch.Tensor = module.proj(mixed.transpose(1, 2).reshape(images, count, width))
    return projected


def places(
    config: Any,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    past: int = 0,
    shift: torch.Tensor | None = None,
    shown: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where tokens stand, ``[3, batch, seq]`` (in time, down and across), and the ``shift`` of what
    follows them.

    ``input_ids`` ``[batch, seq]`` of ``mask`` ``[batch, past + seq]``; ``shift`` ``[batch, 1]`` is
    how much farther than they are many the tokens before stand: an image takes as many places as
    the longer one of its sides has tokens. All i64; the library calls the last ``rope_deltas``.
    ``shown`` bool ``[batch, seq]`` are an image's tokens, all of ``image_token_id`` where absent.
    """
    if shown is None:
        shown = input_ids == config.image_token_id
    return token_places(shown, mask, token_grid(config), past, shift)


def token_places(
    shown: torch.Tensor,
    mask: torch.Tensor,
    grid: tuple[int, int],
    past: int = 0,
    shift: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``places`` of images that are a ``grid`` of tokens."""
    rows, columns = grid
    real = mask[:, past:]
    before = mask[:, :past].sum(1, keepdim=True)
    if shift is None:
        shift = torch.zeros_like(before)
    turn = (shown.long().cumsum(1) - 1) % (rows * columns)
    last = turn == rows * columns - 1
    step = torch.where(shown, torch.where(last, max(rows, columns), 0), real)
    start = before + shift + step.cumsum(1) - step
    inside = torch.stack([torch.zeros_like(turn), turn // columns, turn % columns])
    grown = shift + (step - real).sum(1, keepdim=True)
    return start + torch.where(shown, inside, 0), grown
