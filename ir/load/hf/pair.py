"""Encoder-decoders in the three graphs that the ecosystem has of them.

``encoder`` reads the source; ``decoder`` the first tokens of the answer, and gives the keys and
values of both of its attentions (``present.N.decoder.key``, ``present.N.encoder.key``);
``decoder_with_past`` goes on from those, and gives its own grown ones. The names are Optimum's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch.export import Dim

from ...core.errors import BadInput, near_misses
from ...structure.cache_slots import PARTS, past_name
from ..tracing.plain_call import cache_name, cache_of, presents
from .inputs import Example
from .model import longest_text

PARTS_OF_PAIR = ("encoder", "decoder", "decoder_with_past")
_OF = ("decoder", "encoder")
"""Whose keys and values: those of the answer so far, and those of the source."""
_BATCH, _SOURCE, _ANSWER, _PAST = 2, 7, 3, 5
"""Sizes of the example: no two may agree by chance."""


@dataclass(frozen=True)
class Part:
    """One of the graphs: example inputs, dimensions that vary, and the call in tensors by name."""

    inputs: dict[str, torch.Tensor]
    shapes: dict[str, Any]
    call: Callable[[Any, Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
    by_library: Callable[[Any, Mapping[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None
    """The same by the library's own forward, where the call is another one."""
    notes: tuple[str, ...] = ()
    """What a person should know of it, in the place of what is said of the whole model's inputs."""

    def give_to(self, model: Any) -> None:
        """Let the model's forward be this call, on inputs in the order of the example."""
        names, call = list(self.inputs), self.call

        def forward(self: Any, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
            return call(self, dict(zip(names, tensors, strict=True)))

        model.forward = MethodType(forward, model)


def pair_part(model: Any, part: str, whole: Example) -> Part:
    """One of ``PARTS_OF_PAIR`` of a model whose inputs as a whole are ``whole``.

    Raises ``BadInput`` for a model that is not an encoder-decoder, and for a part that none has.
    """
    inputs, shapes = whole
    if part not in PARTS_OF_PAIR:
        raise BadInput(f"there is no part {part!r}; {near_misses(part, PARTS_OF_PAIR)}")
    if "decoder_input_ids" not in inputs or not hasattr(model, "get_encoder"):
        raise BadInput(f"{type(model).__name__} is not an encoder-decoder: it has no part {part!r}")
    if {"input_ids", "pixel_values"} <= inputs.keys():
        raise BadInput(
            f"the encoder of {type(model).__name__} reads images among its words, and is no graph "
            "of its own here: load the model as a whole, without a part"
        )
    if part == "encoder":
        source = {name: t for name, t in inputs.items() if name != "decoder_input_ids"}
        return Part(source, {name: shapes[name] for name in source}, _encode)
    # A mask of frames counts more than an encoder makes of them: of a sound a decoder sees all.
    masked = {"attention_mask", "input_ids"} <= inputs.keys()
    return _decoder(model, masked=masked, goes_on=part != "decoder")


def _encode(model: Any, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    output = model.get_encoder()(**feeds, return_dict=True)
    return {"last_hidden_state": output.last_hidden_state}


def _decoder(model: Any, *, masked: bool, goes_on: bool) -> Part:
    config = model.config.get_text_config(decoder=True)
    longest = longest_text(config)
    batch, source = Dim("batch"), Dim("encoder_seq", max=longest_text(model.config))
    dtype = next(model.parameters()).dtype
    inputs = {"input_ids": torch.ones(_BATCH, _ANSWER, dtype=torch.int64)}
    shapes: dict[str, Any] = {"input_ids": {0: batch, 1: Dim("seq", max=longest)}}
    if masked:
        inputs["encoder_attention_mask"] = torch.ones(_BATCH, _SOURCE, dtype=torch.int64)
        shapes["encoder_attention_mask"] = {0: batch, 1: source}
    if not goes_on:
        width = _source_width(model)
        inputs["encoder_hidden_states"] = torch.zeros(_BATCH, _SOURCE, width, dtype=dtype)
        shapes["encoder_hidden_states"] = {0: batch, 1: source}
        return Part(inputs, shapes, _start)
    # A decoder on its own, of a family that has encoders too (Donut's), counts its own heads.
    alone = getattr(model.config, "decoder", None)
    queries = getattr(alone, "decoder_attention_heads", None) or config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or queries
    own = getattr(config, "d_kv", None) or getattr(config, "head_dim", None)
    width = int(own or config.hidden_size // queries)
    lengths = {"decoder": (_PAST, Dim("past", max=longest)), "encoder": (_SOURCE, source)}
    for layer in range(_layers(model)):
        for of in _OF:
            for kind in PARTS:
                name, (length, dim) = past_name(layer, kind, of), lengths[of]
                inputs[name] = torch.zeros(_BATCH, heads, length, width, dtype=dtype)
                shapes[name] = {0: batch, 2: dim}
    return Part(inputs, shapes, _go_on)


def _source_width(model: Any) -> int:
    """The width of what the encoder gives: it may have a config of its own."""
    config = getattr(model.config, "encoder", model.config)
    return int(getattr(config, "hidden_size", 0) or model.get_encoder().config.hidden_size)


def _layers(model: Any) -> int:
    config = getattr(model.config, "decoder", model.config)
    count = getattr(config, "decoder_layers", None) or getattr(config, "num_decoder_layers", None)
    return int(count or config.get_text_config(decoder=True).num_hidden_layers)


def _start(model: Any, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    return _decode(model, feeds, feeds["encoder_hidden_states"], cache)


def _go_on(model: Any, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from transformers.cache_utils import EncoderDecoderCache

    caches = [
        cache_of([
            [feeds[past_name(layer, kind, of)] for kind in PARTS] for layer in range(_layers(model))
        ])
        for of in _OF
    ]  # fmt: skip
    cross = feeds[past_name(0, PARTS[0], "encoder")]
    # Of the encoder's result the length is read alone: its keys and values are there.
    hidden = cross.new_zeros(cross.shape[0], cross.shape[2], _source_width(model))
    outputs = _decode(model, feeds, hidden, EncoderDecoderCache(*caches))
    return {name: tensor for name, tensor in outputs.items() if ".encoder." not in name}


def _decode(
    model: Any, feeds: Mapping[str, torch.Tensor], hidden: torch.Tensor, cache: Any
) -> dict[str, torch.Tensor]:
    from transformers.modeling_outputs import BaseModelOutput

    forward, encoded = type(model).forward, BaseModelOutput(last_hidden_state=hidden)
    # Which models with experts, and Moonshine, ask of it, and do not need.
    encoded.router_logits = encoded.attention_mask = None
    output = forward(
        model, encoder_outputs=encoded,
        attention_mask=feeds.get("encoder_attention_mask"), decoder_input_ids=feeds["input_ids"],
        use_cache=True, return_dict=True, **{cache_name(forward): cache},
    )  # fmt: skip
    return {"logits": output.logits} | presents(cache)
