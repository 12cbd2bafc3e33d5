"""Qwen2.5-VL (arXiv 2502.13923): a tower most of whose blocks look at windows of an image.

The library sorts the patches by windows, which are cut short at the right and at the bottom. Of an
image of one size all of that is known: where whole windows cover it, patches come in the order of
windows, and attention is over so many in a row; where they do not, patches stay in the order of
rows, and a mask says which of them are in one window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .qwen_vl import attention, embedded_patches, joined, patch_places, patches, token_grid


@dataclass(frozen=True)
class _Windows:
    """The windows of a config's images."""

    rows: int
    """Rows of tokens in an image."""
    columns: int
    side: int
    """Tokens along each side of a whole window."""
    merge: int
    """Patches along each side of a token."""

    @classmethod
    def of(cls, config: Any) -> _Windows:
        vision = config.vision_config
        side = vision.window_size // vision.spatial_merge_size // vision.patch_size
        return cls(*token_grid(config), side, vision.spatial_merge_size)

    @property
    def one(self) -> bool:
        """Whether one window holds the whole image."""
        return self.side >= max(self.rows, self.columns)

    @property
    def sorts(self) -> bool:
        return not self.one and self.rows % self.side == 0 and self.columns % self.side == 0

    def sorted(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[images, tokens, ..]`` in the order of rows in that of windows."""
        return self._turned(tokens, self.rows // self.side, self.side, self.columns // self.side)

    def unsorted(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._turned(tokens, self.rows // self.side, self.columns // self.side, self.side)

    def _turned(self, tokens: torch.Tensor, *sides: int) -> torch.Tensor:
        if not self.sorts:
            return tokens
        split = tokens.reshape(tokens.shape[0], *sides, -1, *tokens.shape[2:])
        return split.transpose(2, 3).reshape(tokens.shape)

    def attended(self, places: torch.Tensor) -> dict[str, Any]:
        """What ``attention`` is told of windows, of patches at ``places`` ``[patches, 2]``."""
        if self.one:
            return {}
        if self.sorts:
            return {"window": (self.side * self.merge) ** 2}
        windows = places // (self.side * self.merge)
        return {"seen": (windows.unsqueeze(0) == windows.unsqueeze(1)).all(-1)[None, None]}


def features(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What the tower makes of images ``[images, 3, height, width]``: ``[images, tokens, width]``,
    in the order of rows."""
    config, tower = model.config, model.model.visual
    windows, square = _Windows.of(config), config.vision_config.spatial_merge_size**2
    rows = patches(config, pixels)
    tokens = rows.reshape(rows.shape[0], rows.shape[1] // square, square, rows.shape[2])
    stream = embedded_patches(tower, windows.sorted(tokens).reshape(rows.shape))
    places = patch_places(config)
    turned = windows.sorted(places.reshape(1, -1, square, 2)).reshape(places.shape)
    turns = tower.rotary_pos_emb(stream, turned)
    near = windows.attended(turned)
    for number, block in enumerate(tower.blocks):
        options = {} if number in config.vision_config.fullatt_block_indexes else near
        stream = stream + attention(block.attn, block.norm1(stream), turns, **options)
        stream = stream + block.mlp(block.norm2(stream))
    merged = tower.merger.mlp(joined(tower.merger.ln_q(stream), square))
    return windows.unsorted(merged)
