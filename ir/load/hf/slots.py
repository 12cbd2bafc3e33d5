"""What a decoder of transformers keeps of a text, layer by layer, and caches that hold it.

The model itself says it: two tokens go through it as fake tensors, and the cache that its config
asks for then shows which layers keep keys and values, and how wide; which ones the last columns of
a convolution (``conv``) and the state of a recurrence (``recurrent``); and which ones nothing,
since they look at what another layer keeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from ...core.quiet import quiet
from ...structure.cache_slots import PARTS, STATES, past_name, present_of, state_name
from ..tracing.fake import all_meta, faked
from ..tracing.plain_call import cache_argument

_TOKENS = 2


@dataclass(frozen=True)
class Held:
    """One tensor that a layer keeps."""

    layer: int
    part: str
    """``key``, ``value``, ``conv`` or ``recurrent``."""
    sizes: tuple[int | None, ...]
    """Behind the batch; ``None`` for the tokens before."""
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """Of the graph's input."""
        named = past_name if self.part in PARTS else state_name
        return named(self.layer, self.part)


def held_by(model: Any) -> tuple[Held, ...]:
    """What the layers of a model without data keep, in order.

    Raises ``ValueError`` for a kind of layer that keeps something else, and whatever the model
    raises where it does not run so.
    """
    try:
        with all_meta(model):
            return _held_of(model, torch.ones(2, _TOKENS, dtype=torch.int64))
    except (RuntimeError, NotImplementedError):  # a number is asked for, which fake tensors have
        ids = torch.ones(2, _TOKENS, dtype=torch.int64)
        with faked(model, ((), {"input_ids": ids})) as (_, inputs):
            return _held_of(model, **inputs)


def _held_of(model: Any, input_ids: torch.Tensor) -> tuple[Held, ...]:
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.no_grad(), quiet():
        type(model).forward(
            model, input_ids=input_ids, use_cache=True, **{cache_argument(model): cache}
        )
    return tuple(held for i, layer in enumerate(cache.layers) for held in _held(i, layer))


def _held(index: int, layer: Any) -> Iterable[Held]:
    from transformers.cache_utils import CacheLayerMixin, DynamicIndexedLayer, DynamicLayer

    kind = type(layer).__name__
    if isinstance(layer, DynamicIndexedLayer) or not (
        isinstance(layer, DynamicLayer) or hasattr(layer, "conv_states") or kind == "DummyLayer"
    ):
        raise ValueError(f"layer {index} keeps a {kind}")
    if isinstance(layer, CacheLayerMixin) and layer.keys is not None:
        for part, tensor in zip(PARTS, (layer.keys, layer.values), strict=True):
            heads, _, width = map(int, tensor.shape[1:])
            yield Held(index, part, (heads, None, width), tensor.dtype)
    states = [getattr(layer, f"{part}_states", {}) for part in STATES]
    if any(len(by_number) > 1 for by_number in states):
        raise ValueError(f"layer {index} keeps several states of a kind")
    for part, by_number in zip(STATES, states, strict=True):
        tensor = by_number.get(0)
        if tensor is None:
            continue
        sizes = list(map(int, tensor.shape[1:]))
        # Of what the library keeps the first column is never looked at.
        sizes[-1] -= part == "conv"
        yield Held(index, part, tuple(sizes), tensor.dtype)


def grouped(held: Iterable[Held]) -> dict[int, list[Held]]:
    """By layer."""
    groups: dict[int, list[Held]] = {}
    for one in held:
        groups.setdefault(one.layer, []).append(one)
    return groups


def cache_holding(
    config: Any, held: Sequence[Held], tensors: Mapping[str, torch.Tensor], *, own: bool = False
) -> Any:
    """A library's cache with these tensors, by the names of a graph's inputs: every layer keeps all
    tokens. Layers of which there is none start a text. An update changes none of the tensors,
    unless the library's ``own`` layers are asked for."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache(config=config)
    for index, parts in grouped(held).items():
        given = {one.part: tensors[one.name] for one in parts if one.name in tensors}
        layer = cache.layers[index]
        if not hasattr(layer, "conv_states"):
            layer = DynamicLayer()
        elif not own:
            layer = _stateful(hybrid=any(one.part in PARTS for one in parts))()
        _put(layer, given)
        cache.layers[index] = layer
    return cache


def _put(layer: Any, given: Mapping[str, torch.Tensor]) -> None:
    """Fill a layer by hand: an update would first join what is given to an empty tensor."""
    for part in STATES:
        if part not in given:
            continue
        # The library keeps a column more of a convolution than is ever looked at.
        state = given[part] if part == "recurrent" else pad(given[part], (1, 0))
        getattr(layer, f"{part}_states")[0] = state
        getattr(layer, f"is_{part}_states_initialized")[0] = True
        layer.has_previous_state[0] = True
        if part == "conv":
            layer.conv_kernel_size[0] = state.shape[-1]
    if PARTS[0] in given:
        layer.keys, layer.values = (given[part] for part in PARTS)
        layer.is_initialized = True
        layer.dtype, layer.device = layer.keys.dtype, layer.keys.device


def presents_in(cache: Any, held: Iterable[Held]) -> dict[str, torch.Tensor]:
    """What a cache holds now, by the names of a graph's outputs."""
    return {present_of(one.name): _in_layer(cache.layers[one.layer], one) for one in held}


def _in_layer(layer: Any, one: Held) -> torch.Tensor:
    if one.part in PARTS:
        tensor: torch.Tensor = getattr(layer, f"{one.part}s")
        return tensor
    state: torch.Tensor = getattr(layer, f"{one.part}_states")[0]
    return state if one.part == "recurrent" else state[..., 1:]


def _stateful(*, hybrid: bool) -> type:
    """The library's layer with states, which writes to none of the tensors that it was given."""
    from transformers.cache_utils import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

    base: Any = LinearAttentionAndFullAttentionLayer if hybrid else LinearAttentionLayer

    class Stateful(base):  # type: ignore[misc]
        def update_conv_state(
            self, conv_states: torch.Tensor, state_idx: int = 0, **_: Any
        ) -> torch.Tensor:
            held = self.conv_states[state_idx]
            whole = torch.cat([held, conv_states], -1)
            self.conv_states[state_idx] = whole[..., -held.shape[-1] :]
            return whole

        def update_recurrent_state(
            self, recurrent_states: torch.Tensor, state_idx: int = 0, **_: Any
        ) -> torch.Tensor:
            self.recurrent_states[state_idx] = recurrent_states
            return recurrent_states

    return Stateful
