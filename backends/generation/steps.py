"""Steps of a text behind its prompt: where keys and values lie while a graph runs over and over."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from onnx_ir.tensor_adapters import from_torch_dtype

from ...ir.core.errors import BadInput
from ...ir.structure.cache_slots import is_state, past_slot, present_of
from ..base import Executable

ROOM = 256
"""Tokens by which a buffer grows. A step fills it anew, so that growing copies nothing."""


class PlainSteps:
    """Each step takes the cache as inputs, and as outputs the grown one, as the executable gives
    them. ``outputs`` are those of the prompt."""

    def __init__(self, run: Executable, outputs: Mapping[str, torch.Tensor]) -> None:
        self._run = run
        pasts = (name for name in run.input_names if is_state(name))
        self.cache = {past: outputs[present_of(past)] for past in pasts}

    def __call__(self, feeds: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See ``Steps``."""
        outputs = self._run(**feeds, **self.cache)
        self.cache = {past: outputs[present_of(past)] for past in self.cache}
        return outputs["logits"]


class _Slot:
    """Keys or values of a layer, ``[rows, heads, length, width]``: two flat buffers take turns at
    holding them. What a step needs of them is numbers, since 48 views of tensors a step take as
    long as all else that is done around the session."""

    def __init__(self, past: str, held: torch.Tensor) -> None:
        self.past, self.present = past, present_of(past)
        self.rows, self.heads, self.length, self.width = held.shape
        self.element = _element(held)
        self._full = held.contiguous()
        self._free = held.new_empty(0)
        self.held_at, self._free_at, self._room = self._full.data_ptr(), 0, 0

    def shape(self, length: int) -> tuple[int, int, int, int]:
        return self.rows, self.heads, length, self.width

    def room(self, length: int) -> int:
        """The address of memory for so many tokens, in which what is held does not lie."""
        if self._room < length:
            self._room = -(-length // ROOM) * ROOM
            self._free = self._free.new_empty(self.shape(self._room))
            self._free_at = self._free.data_ptr()
        return self._free_at

    def turn(self, length: int) -> None:
        """So many tokens were written into that memory, and are held there from now on."""
        full = self._full.numel() // (self.rows * self.heads * self.width)
        self._free, self._full = self._full, self._free
        self._free_at, self.held_at = self.held_at, self._free_at
        self._room, self.length = full, length

    @property
    def held(self) -> torch.Tensor:
        shape = self.shape(self.length)
        return self._full.flatten()[: math.prod(shape)].view(shape)


class BoundSteps:
    """Steps in a session of ONNX Runtime, with inputs and outputs bound to memory of ours.

    Keys and values lie in two buffers a layer that take turns: the session reads one and writes the
    other, and no tensor is made for a step. What a graph joins by ``Concat`` is copied inside the
    session all the same. ``plain`` goes on where a cache does not grow by what is read (one that
    keeps a window of it): the runtime refuses to write it. On a machine at work, where a step of
    24 keys and values takes the session 8.7 ms, 0.6 ms are spent around it, of which 0.1 choose
    the token; with tensors made for each step it was 1.5 ms.
    """

    def __init__(
        self, binding: Any, run: Callable[[], None], device: str, plain: PlainSteps,
        logits: torch.Tensor,
    ) -> None:  # fmt: skip
        self._binding, self._run, self._device = binding, run, device
        self._plain = plain
        self._grows = all(past_slot(name) is not None for name in plain.cache)
        self._slots = [_Slot(*pair) for pair in plain.cache.items()] if self._grows else []
        self._logits = logits.new_empty(len(logits), 1, logits.shape[-1])
        _bind(binding.bind_output, "logits", self._logits, device)

    def __call__(self, feeds: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See ``Steps``."""
        if self._grows:
            try:
                return self._bound(feeds)
            except BadInput:
                self._grows = False
                self._plain.cache = {slot.past: slot.held for slot in self._slots}
        return self._plain(feeds)

    def _bound(self, feeds: Mapping[str, torch.Tensor]) -> torch.Tensor:
        device, bind_input, bind_output = (
            self._device, self._binding.bind_input, self._binding.bind_output,
        )  # fmt: skip
        for slot in self._slots:
            length = slot.length
            now, then, at = slot.shape(length), slot.shape(length + 1), slot.room(length + 1)
            bind_input(slot.past, device, 0, slot.element, now, slot.held_at)
            bind_output(slot.present, device, 0, slot.element, then, at)
        _run_fed(self._binding, self._run, feeds, device)
        for slot in self._slots:
            slot.turn(slot.length + 1)
        return self._logits


class SharedSteps:
    """As ``BoundSteps``, where attention writes what is new behind what it reads, in one buffer a
    layer: nothing is copied, and but for where a buffer grows nothing is bound anew."""

    def __init__(
        self, binding: Any, run: Callable[[], None], device: str,
        cache: Mapping[str, torch.Tensor], logits: torch.Tensor,
    ) -> None:  # fmt: skip
        self._binding, self._run, self._device = binding, run, device
        self._buffers = dict(cache)
        self._length = max((held.shape[2] for held in cache.values()), default=0)
        self._room = 0
        self._logits = logits.new_empty(len(logits), 1, logits.shape[-1])
        _bind(binding.bind_output, "logits", self._logits, device)

    def __call__(self, feeds: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See ``Steps``."""
        if self._length >= self._room:
            self._grow()
        _run_fed(self._binding, self._run, feeds, self._device)
        self._length += 1
        return self._logits

    def _grow(self) -> None:
        self._room = (self._length // ROOM + 1) * ROOM
        for past, held in self._buffers.items():
            rows, heads, length, width = held.shape
            buffer = held.new_zeros(rows, heads, self._room, width)
            buffer[:, :, :length] = held
            self._buffers[past] = buffer
            _bind(self._binding.bind_input, past, buffer, self._device)
            _bind(self._binding.bind_output, present_of(past), buffer, self._device)


def _run_fed(
    binding: Any, run: Callable[[], None], feeds: Mapping[str, torch.Tensor], device: str
) -> None:
    """Run with the feeds bound, which live until it ends."""
    ready = [(name, tensor.to(device).contiguous()) for name, tensor in feeds.items()]
    for name, tensor in ready:
        _bind(binding.bind_input, name, tensor, device)
    run()


def _bind(bind: Callable[..., None], name: str, tensor: torch.Tensor, device: str) -> None:
    bind(name, device, 0, _element(tensor), tuple(tensor.shape), tensor.data_ptr())


def _element(tensor: torch.Tensor) -> int:
    """The number that ONNX has for a dtype."""
    return int(from_torch_dtype(tensor.dtype))
