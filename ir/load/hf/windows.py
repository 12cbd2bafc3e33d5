"""Attention that long texts have in parts: Longformer's windows (arXiv 2004.05150), which LED's
encoder has too, as masks over all tokens, and BigBird's blocks (arXiv 2007.14062), of which a graph
takes the texts alone that it reads as a whole.

The library cuts a text into chunks of a window, for which it pads it, and picks the tokens that see
all others by where they are found, which no graph can follow. What a token sees is the same here:
its window, and what the global mask marks; a marked token sees all, by projections of its own. The
matrix of scores is of all tokens by all tokens, so that time and memory grow with its square.
"""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

import torch
from torch.nn.functional import embedding, scaled_dot_product_attention

from .model import fully_attended

_WINDOWED = ("LongformerSelfAttention", "LEDEncoderSelfAttention")
_PADS = "_pad_to_window_size"


def settle_windows(model: torch.nn.Module) -> tuple[str, ...]:
    """Let attention in windows run on whole texts, without padding; what a person should know."""
    sizes: set[int] = set()
    part: Any
    for part in model.modules():
        if hasattr(type(part), _PADS):
            setattr(part, _PADS, MethodType(_unpadded, part))
        if type(part).__name__ in _WINDOWED:
            part.forward = MethodType(_attention, part)
            sizes.add(2 * part.one_sided_attn_window_size)
    most = fully_attended(model.config)
    if most is not None:
        _bound_places(model, most)
        longer = (
            f"texts are of {most} tokens at most, up to which the library looks at all of them, "
            "and behind which at blocks that it picks by chance: "
            '"attention_type": "original_full" in config.json takes longer ones'
        )
        return (longer,)
    if not sizes:
        return ()
    windows = (
        f"windows of {', '.join(map(str, sorted(sizes)))} tokens are a mask over all of a text: "
        "the library's numbers, in time that grows with the square of its length"
    )
    return (windows,)


def _bound_places(model: Any, most: int) -> None:
    """Leave that many places to a text, so that a graph fails on a longer one as on one that is
    longer than its table."""
    reader = model.get_encoder() if model.config.is_encoder_decoder else model
    for part in reader.modules():
        if isinstance(getattr(part, "position_ids", None), torch.Tensor):
            part.position_ids = part.position_ids[:, :most]
        table = getattr(part, "embed_positions", None)
        if table is not None:
            table.forward = partial(_within, table, most)


def _within(table: Any, most: int, shape: torch.Size) -> torch.Tensor:
    """The places of a text of this ``shape`` ``[batch, seq]``: ``[seq, width]``."""
    return embedding(torch.arange(shape[1]), table.weight[:most])


def _unpadded(
    _: Any, input_ids: Any, attention_mask: Any, *rest: Any, **named: Any
) -> tuple[Any, ...]:
    """No padding, and what the library's own gives back beside it."""
    kept = {name: value for name, value in named.items() if name != "pad_token_id"}
    return (0, input_ids, attention_mask, *rest, *kept.values())


def _attention(
    self: Any, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None,
    is_index_masked: torch.Tensor | None = None, is_index_global_attn: torch.Tensor | None = None,
    is_global_attn: Any = None, output_attentions: bool = False,
) -> tuple[torch.Tensor]:  # fmt: skip
    """``hidden_states`` ``[batch, seq, width]``; ``is_index_masked`` and ``is_index_global_attn``
    bool ``[batch, seq]``. What is masked out gives zeros."""
    assert is_index_masked is not None and is_index_global_attn is not None
    masked, marked = is_index_masked, is_index_global_attn
    batch, seq, width = hidden_states.shape

    def heads(linear: Any) -> torch.Tensor:
        split: torch.Tensor = linear(hidden_states).view(batch, seq, self.num_heads, self.head_dim)
        return split.transpose(1, 2)

    places = torch.arange(seq, device=hidden_states.device)
    near = (places[:, None] - places).abs() <= self.one_sided_attn_window_size
    seen = ~masked[:, None, None, :]
    # A row that is masked out sees all, so that no row of scores is empty.
    alone = masked[:, None, :, None]
    near_or_marked = (near | marked[:, None, None, :]) & seen
    local = scaled_dot_product_attention(
        heads(self.query), heads(self.key), heads(self.value), attn_mask=near_or_marked | alone
    )
    wide = scaled_dot_product_attention(
        heads(self.query_global), heads(self.key_global), heads(self.value_global),
        attn_mask=seen | alone,
    )  # fmt: skip
    local = local.masked_fill(masked[:, None, :, None], 0.0)
    out = torch.where(marked[:, None, :, None], wide, local)
    return (out.transpose(1, 2).reshape(batch, seq, width),)
