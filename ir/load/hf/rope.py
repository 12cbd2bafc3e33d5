"""Rotary positions that change with the length of a text, as a graph can have them.

``dynamic`` (NTK by length) computes its frequencies anew behind ``max_position_embeddings`` alone,
which is the longest text that a graph is for; ``longrope`` (arXiv 2402.13753) has one set for texts
up to the original length, and another behind it. The library writes both into the module as it
runs. DeepSeek-V2 and Llama 4 turn by complex numbers, which ONNX has not: here by their two parts.
"""

from __future__ import annotations

import inspect
from functools import partial
from types import MethodType, SimpleNamespace
from typing import Any

import torch

from ...structure.cache_slots import REREAD_KEY
from ..tracing.rebound import rebind


def settle_rope(model: torch.nn.Module) -> tuple[str, ...]:
    """Let the rotary modules of a model compute without state; what a person should know of it."""
    notes: list[str] = []
    for part in model.modules():
        kind, name = getattr(part, "rope_type", None), type(part).__name__
        if name in _COMPLEX_TABLES:
            part.forward = MethodType(_in_parts, part)
        elif name == "Llama4VisionRotaryEmbedding":
            _say_in_parts(part)
        elif name in _TURNING:
            turned = partial(_turned, _TURNING[name])
            rebind(part, {"apply_rotary_emb": turned, "vision_apply_rotary_emb": turned})
        if kind == "longrope":
            part.forward = MethodType(_by_length, part)
        if kind == "dynamic":
            part.rope_type = "default"  # type: ignore[assignment]
            longest = getattr(part, "original_max_seq_len", None)
            notes.append(
                f"rope_type=dynamic: for texts of at most {longest} tokens; behind them the "
                "frequencies of the rotary positions would have to change"
            )
    return tuple(dict.fromkeys(notes))


def switch_metadata(model: torch.nn.Module) -> dict[str, str]:
    """What a graph's metadata say of the length behind which ``longrope`` makes other keys."""
    for part in model.modules():
        if getattr(part, "rope_type", None) == "longrope":
            rope: Any = part.config
            return {REREAD_KEY: str(rope.rope_parameters["original_max_position_embeddings"])}
    return {}


_COMPLEX_TABLES = ("DeepseekV2RotaryEmbedding", "Llama4TextRotaryEmbedding")
_TURNING = {"DeepseekV2Attention": 1, "Llama4TextAttention": 2, "Llama4VisionAttention": 1}
"""Attention that turns by complex numbers, and the axis of its heads."""


def _in_parts(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Cosines and sines, ``[batch, seq, width / 2, 2]`` f32."""
    angles = position_ids.unsqueeze(-1).float() * self.inv_freq
    table: torch.Tensor = torch.stack([angles.cos(), angles.sin()], -1) * self.attention_scaling
    return table


def _say_in_parts(part: Any) -> None:
    """The same of a table that is there, ``[patches, width / 2, 2]``."""
    table = torch.view_as_real(part._buffers.pop("freqs_ci")).squeeze(1)
    part.forward = lambda _: table


def _turned(
    heads: int, query: torch.Tensor, key: torch.Tensor, *freqs_cis: torch.Tensor,
    **named: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys ``[batch, ..., width]`` whose pairs of neighbours are turned, as complex
    numbers are by a product."""
    (table,) = *freqs_cis, *named.values()  # each family has a name of its own for it
    cos, sin = table.unsqueeze(heads).unbind(-1)

    def turned(x: torch.Tensor) -> torch.Tensor:
        real, imaginary = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
        parts = real * cos - imaginary * sin, real * sin + imaginary * cos
        return torch.stack(parts, -1).flatten(-2).type_as(x)

    return turned(query), turned(key)


def _by_length(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
    """The module's own forward with the frequencies of this length, which are not kept."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    original = self.config.rope_parameters["original_max_position_embeddings"]
    long, _ = ROPE_INIT_FUNCTIONS["longrope"](self.config, x.device, seq_len=original + 1)
    inv_freq = torch.where(position_ids.max() + 1 > original, long, self.original_inv_freq)
    chosen = SimpleNamespace(
        inv_freq=inv_freq, attention_scaling=self.attention_scaling, config=self.config
    )
    return inspect.unwrap(type(self).forward)(chosen, x, position_ids)
