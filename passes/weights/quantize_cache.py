"""``quantize-cache``: keys and values that are kept in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.core.view import NATIVE, Node, Value, View
from ...ir.core.weights import MemoryWeight
from ...ir.run.sweep import Results, sweep_together
from ...ir.structure.cache_slots import PARTS, PAST_AXIS, has_cache
from ...ir.vocab.builder import Builder
from ..base import Context, Needs, Pass, PassResult, Site

NARROW_CACHE = "narrow cache"
LEAST = 1e-6
"""Of a channel's range: one that the data never moves would have no scale."""


@dataclass(frozen=True)
class Half:
    """Keys or values of one slot."""

    name: str
    past: Value
    """``[batch, heads, past, width]``, an input."""
    joined: Value
    """``concat(past, new)``, an output."""
    new: Value
    heads: int
    width: int


@dataclass(frozen=True, kw_only=True)
class QuantizeCache(Pass):
    """Let the graph take and return its cache of keys and values in 8 or 4 bits.

    ``code = round(x / s)``, ``s`` the greatest magnitude of its channel (of its head) on the
    calibration data over 127, or over 7 (per channel as KIVI, Liu et al. 2024, arXiv 2402.02750,
    has keys; values too, since a scale that is a constant needs no place in the cache). A new token
    is coded once, joined to the codes, and attention reads what all codes stand for, its own among
    them: every step sees the same numbers. What is beyond the range is cut off. Two codes of 4 bits
    share a byte. The inputs and outputs of the cache change their dtype, and with 4 bits their last
    dimension is half as long.

    On the zoo's tiny-llama perplexity goes from 34.68 to 34.64 with 8 bits, and to 35.28 with 4.
    What is saved is memory: codes are made floats again in front of the attention, by ops of the
    standard. Needs calibration data. A graph without a cache is refused; so are heads of an odd
    size with 4 bits. Passes on weights and depth work before it and behind it.
    """

    name: ClassVar[str] = "quantize-cache"
    exact: ClassVar[bool] = False
    needs: ClassVar[Needs] = Needs(calibration=True)
    provides: ClassVar[tuple[str, ...]] = (NARROW_CACHE,)
    bits: Literal[8, 4] = 8
    """Of a number in the cache."""

    def run(self, context: Context) -> PassResult:
        result = PassResult()
        halves = self._halves(context, result)
        ranges = context.once("ranges", lambda: _ranges(context, halves))
        for half in halves:
            scales = (ranges[half.name] / self._most).clamp_min(LEAST)
            self._narrow(context.view, half, scales)
            result.sites.append(self._site(context.view, half))
        context.edited()
        return self._with_note(result)

    def plan(self, context: Context) -> PassResult:
        result = PassResult()
        for half in self._halves(context, result):
            result.sites.append(self._site(context.view, half))
        return self._with_note(result)

    @property
    def _most(self) -> int:
        return 127 if self.bits == 8 else 7

    def _halves(self, context: Context, result: PassResult) -> list[Half]:
        """The halves of slots that are coded; the others are refused with their reasons."""
        halves: list[Half] = []
        slots = [site.cache for site in context.structure.attentions if site.cache is not None]
        if not slots and has_cache(context.view):
            raise BadInput(
                "quantize-cache: no attention reads the graph's cache as keys and values: latents, "
                "of which a layer makes both, and states are kept as they are"
            )
        if not slots:
            raise BadInput(
                "quantize-cache: the graph takes no keys and values that were computed before; "
                "export or load the model with its cache"
            )
        names = dict(zip(context.view.inputs(), context.view.input_names(), strict=True))
        for slot in dict.fromkeys(slots):
            for past, present in zip(slot.past, slot.present, strict=True):
                half = self._half(context.view, names[past], past, present)
                if isinstance(half, str):
                    result.refused.append((names[past], half))
                else:
                    halves.append(half)
        return halves

    def _half(self, view: View, name: str, past: Value, present: Value) -> Half | str:
        shape, node = view.type(past).shape or (), view.producer(present)
        if node is None or view.op(node) != "concat" or view.operands(node)[0] is not past:
            return "what the graph returns is not the past with the new tokens behind it"
        if len(view.operands(node)) != 2 or view.attrs(node)["dim"] % 4 != PAST_AXIS:
            return "more than the past and the new tokens is joined"
        others = [u for u in view.users(past) if u != node and not _asks_size(view, u)]
        if others:
            return f"{view.name(others[0])} reads the past as well"
        dtype = view.type(past).dtype
        if dtype is None or not dtype.is_floating_point:
            return "it holds codes already"
        heads, width = (shape[1], shape[3]) if len(shape) == 4 else (None, None)
        if not isinstance(heads, int) or not isinstance(width, int):
            return f"its heads and their size are not known: {view.type(past)}"
        if self.bits == 4 and width % 2:
            return f"heads of {width} numbers do not fill whole bytes with 4 bits each"
        return Half(name, past, present, view.tensor(node, 1), heads, width)

    # --- the graph ---------------------------------------------------------------------------

    def _narrow(self, view: View, half: Half, scales: Tensor) -> None:
        """Let a half of a slot hold codes; ``scales`` f32 ``[1, heads, 1, width]``."""
        node = view.producer(half.joined)
        assert node is not None
        dtype = view.type(half.new).dtype
        b = Builder(view, node)
        scale = view.add_weight(f"{half.name}.scales", MemoryWeight(scales.to(dtype)))
        like = self._codes(b, half.past, scale, half)
        assert view.type(like).shape is not None
        past = view.add_input(f"{half.name}.codes", like)
        maker = view.producer(like)
        assert maker is not None
        joined = b.concat(past, self._codes(b, half.new, scale, half), dim=PAST_AXIS)
        wide = self._values(b, joined, scale, half)
        view.erase_dead(maker)
        for user in view.users(half.past):
            if user != node:
                view.rewire(user, half.past, past)
        outputs = dict(zip(view.output_names(), view.outputs(), strict=True))
        held = {n: joined if v is half.joined else v for n, v in outputs.items()}
        view.set_outputs(held)
        for user in view.users(half.joined):
            view.rewire(user, half.joined, wide)
        view.erase_dead(node)
        inputs = dict(zip(view.input_names(), view.inputs(), strict=True))
        inputs[half.name] = inputs.pop(f"{half.name}.codes")
        names = [n for n in view.input_names() if n in inputs]
        view.set_inputs({n: inputs[n] for n in names})

    def _codes(self, b: Builder, x: Value, scale: Value, half: Half) -> Value:
        """The codes of numbers ``[batch, heads, tokens, width]``."""
        rounded = b.floor(b.add(b.div(x, scale), 0.5))
        codes = b.clamp(rounded, min=float(-self._most), max=float(self._most))
        if self.bits == 8:
            return b.cast(codes, dtype=torch.int8)
        pairs = b.reshape(b.add(codes, 8.0), 0, 0, -1, half.width // 2, 2)
        factors = self._nibbles(b, (1, 16), scale)
        return b.cast(b.sum(b.mul(pairs, factors), dims=(-1,)), dtype=torch.uint8)

    def _values(self, b: Builder, codes: Value, scale: Value, half: Half) -> Value:
        """What codes stand for, in the dtype of the scales."""
        wide = b.cast(codes, dtype=b.view.type(scale).dtype)
        if self.bits == 8:
            return b.mul(wide, scale)
        pairs = b.unsqueeze(wide, dims=(-1,))
        cut = b.floor(b.div(pairs, self._nibbles(b, (1, 16), scale)))
        rest = b.mul(b.floor(b.div(pairs, self._nibbles(b, (16, 256), scale))), 16.0)
        return b.mul(b.sub(b.reshape(b.sub(cut, rest), 0, 0, -1, half.width), 8.0), scale)

    def _nibbles(self, b: Builder, factors: tuple[int, int], scale: Value) -> Value:
        """In the dtype of the scales: half types hold all whole numbers up to 256."""
        held = torch.tensor(factors, dtype=b.view.type(scale).dtype)
        return b.view.add_weight(f"nibbles.{factors[0]}", MemoryWeight(held))

    # --- the report --------------------------------------------------------------------------

    def _site(self, view: View, half: Half) -> Site:
        numbers = half.heads * half.width
        dtype = view.type(half.new).dtype or torch.float32
        note = f"{numbers * dtype.itemsize} bytes a token become {numbers * self.bits // 8}"
        return Site(
            name=half.name, kind="cache", shape=(half.heads, half.width), bytes_before=0,
            bytes_after=numbers * dtype.itemsize, note=note,
        )  # fmt: skip

    def _with_note(self, result: PassResult) -> PassResult:
        if result.sites:
            result.notes.append(
                f"the cache's inputs and outputs are {'int8' if self.bits == 8 else 'uint8'} codes "
                f"now, {len(result.sites) // len(PARTS)} slots; their scales are in the graph"
            )
        return result


def _asks_size(view: View, user: Node) -> bool:
    """Whether a node reads nothing of a value but how long it is."""
    return view.op(user) == "size" or (view.op(user) == NATIVE and view.native_op(user) == "Shape")


def _ranges(context: Context, halves: list[Half]) -> dict[str, Tensor]:
    """The greatest magnitude of each channel, f32 ``[1, heads, 1, width]``, by the half's name."""
    view = context.view
    by_node: dict[Node, Half] = {}
    for half in halves:
        node = view.producer(half.joined)
        assert node is not None
        by_node[node] = half
    ranges = {half.name: torch.zeros(1, half.heads, 1, half.width) for half in halves}

    def visit(node: Node, inputs: list[list[Any]], results: list[Results]) -> None:
        half = by_node[node]
        place = view.arguments(node).index(half.new)
        for row, batch in zip(inputs, context.calibration, strict=True):
            for x in _that_count(row[place], batch):
                most = x.abs().float().amax((0, 2), keepdim=True)
                ranges[half.name] = torch.maximum(ranges[half.name], most)

    sweep_together(view, context.calibration, visit, frozenset(by_node), outputs=False)
    return ranges


def _that_count(x: Tensor, batch: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Row by row ``[1, heads, tokens, width]`` without padding, where the mask is that long."""
    mask = batch.get("attention_mask")
    fits = mask is not None and mask.dim() == 2 and mask.shape[-1] == x.shape[2]
    for i, row in enumerate(x):
        tokens = row[:, mask[i].bool()] if fits and mask is not None else row
        if tokens.shape[1]:
            yield tokens.unsqueeze(0)
