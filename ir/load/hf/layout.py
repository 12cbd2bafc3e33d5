"""What tokens have beside their ids in models of documents and tables: a box on a page, the tags
around it, its row and column.

Left out, a forward takes zeros for all of them, and a graph without such an input would be of a
text that stands nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch.nn.functional import embedding

from ...structure.cache_slots import BOXES, TOKEN_TYPES

_IN_FLOATS = ("bros",)
"""Model types whose boxes are parts of a page, from 0 to 1; others count up to the last row of
their table."""
_TAGS = ("xpath_tags_seq", "xpath_subs_seq")
"""MarkupLM's: the tags from the root to a token, and their turns among those of the same name."""


_EXTENTS = ("h_position_embeddings", "w_position_embeddings")
"""Tables of LayoutLM's line by how high and how wide a box is."""


def settle_boxes(model: torch.nn.Module) -> None:
    """Let a box whose right is left of its left fail in every runtime: ONNX counts what is below 0
    from the end of a table, where the library fails."""
    for part in model.modules():
        for name in _EXTENTS:
            table: Any = getattr(part, name, None)
            if hasattr(table, "num_embeddings"):
                table.forward = partial(_extent, table)


def _extent(table: torch.nn.Embedding, sizes: torch.Tensor) -> torch.Tensor:
    """Rows ``[batch, seq, width]`` of sizes ``[batch, seq]``, which are none below 0."""
    known = torch.where(sizes < 0, table.num_embeddings, sizes)
    return embedding(known, table.weight)


def beside_tokens(
    model: Any, accepted: Mapping[str, Any], ids: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Examples for a text ``ids`` ``[batch, seq]``, by the names that the forward has for them.

    ``bbox`` ``[batch, seq, 4]`` (left, top, right, bottom); ``xpath_tags_seq`` and
    ``xpath_subs_seq`` ``[batch, seq, max_depth]`` i64; ``token_type_ids`` ``[batch, seq, kinds]``
    i64 where tokens are of a kind in several ways (TAPAS: segment, column, row, ranks).
    """
    config = model.config
    beside: dict[str, torch.Tensor] = {}
    if BOXES in accepted:
        floats = config.model_type in _IN_FLOATS
        dtype = next(model.parameters()).dtype if floats else torch.int64
        beside[BOXES] = torch.zeros(*ids.shape, 4, dtype=dtype)
    for name in _TAGS:
        if name in accepted:
            beside[name] = torch.zeros(*ids.shape, config.max_depth, dtype=torch.int64)
    kinds = getattr(config, "type_vocab_sizes", None)
    if kinds and TOKEN_TYPES in accepted:
        beside[TOKEN_TYPES] = torch.zeros(*ids.shape, len(kinds), dtype=torch.int64)
    return beside
