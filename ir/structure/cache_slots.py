"""The key-value cache of a decoder: inputs and outputs of the graph, one slot an attention site.

A slot is four values. What was computed before comes in as ``past_key_values.N.key`` and ``.value``
(``[batch, heads, past, head_dim]``), what is known after goes out as ``present.N.key`` and
``.value``; the names are those that the ecosystem's exporters and runtimes use.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from ..core.errors import BadInput
from ..core.types import UNKNOWN_DIM, Dim, Type
from ..core.view import Node, Operand, Value, View
from ..vocab import traits

T = TypeVar("T")
PARTS = ("key", "value")
STATES = ("conv", "recurrent")
"""What layers keep that look at no token before: the last columns of a convolution, ``[batch,
channels, columns]``, and the state of a recurrence, ``[batch, ...]``."""
_WIDENING = frozenset({"rope", "mul", "sub", "div", "floor"})
PAST_AXIS = 2
"""The axis of a cache along which tokens follow each other."""
REREAD_KEY = "graphwright.reread"
"""Metadata: the tokens of a text behind which its keys are others from the first one on, so that it
is read again as a whole: of ``longrope``, whose frequencies change there."""
ROWS_KEY = "graphwright.rows"
"""Metadata: there where attention takes a row by its length, so that padding must be at its end.
``shared`` where nothing else looks at a cache, not even at its length: keys and values may then lie
in buffers of the longest text, in which attention writes; ``begin`` elsewhere."""
SLOTS_KEY = "graphwright.kv_slots"
"""Metadata: JSON list, for each slot the number of the layer, in the source, that it belongs to."""


def slot_layers(metadata: Mapping[str, str]) -> tuple[int, ...]:
    """For each slot the layer, in the source, that it belongs to; empty where they are 0, 1, 2 and
    so on."""
    return tuple(map(int, json.loads(metadata.get(SLOTS_KEY, "[]"))))


@dataclass(frozen=True)
class CacheSlot:
    """One slot: the graph's inputs that hold what was, its outputs that hold what is; each is
    (keys, values)."""

    past: tuple[Value, Value]
    present: tuple[Value, Value]


SHIFT = "past_key_values.shift"
"""The input i64 ``[batch, 1]`` that says how much farther the tokens of a cache stand than they are
many: an image of Qwen2-VL has fewer places than tokens. Its library's ``rope_deltas``; 0 at the
start of a text."""
_SLOT = r"present\.\d+\.(?:(?:de|en)coder\.)?"
_PRESENT = rf"{_SLOT}(?:key|value|conv|recurrent)|present\.shift"


def past_name(slot: int, part: str, of: str = "") -> str:
    """The name of a graph's input; ``of`` is ``decoder`` or ``encoder`` where a decoder looks at an
    encoder too, and holds keys and values of both."""
    return ".".join(filter(None, ("past_key_values", str(slot), of, part)))


def present_name(slot: int, part: str, of: str = "") -> str:
    return ".".join(filter(None, ("present", str(slot), of, part)))


def present_of(past: str) -> str:
    """The output that goes on with an input of a cache."""
    return re.sub(r"^past(_key_values)?\.", "present.", past)


def past_of(present: str) -> str:
    """The input that goes on with an output of a cache."""
    named = present.rpartition(".")[2] in STATES
    return present.replace("present", "past" if named else "past_key_values", 1)


def state_name(layer: int, part: str) -> str:
    """The name of an input that holds one of ``STATES``; onnxruntime-genai's."""
    return f"past.{layer}.{part}"


def is_recurrent(name: str) -> bool:
    """Whether an input of this name holds a state that does not grow with the text."""
    return re.fullmatch(r"past\.\d+\.(?:conv|recurrent)", name) is not None


def past_slot(name: str) -> int | None:
    """The slot that an input of this name belongs to; ``None`` for any other input."""
    match = re.fullmatch(r"past_key_values\.(\d+)\.(?:key|value)", name)
    return None if match is None else int(match[1])


def is_state(name: str) -> bool:
    """Whether an input of this name holds what was computed before."""
    return name == SHIFT or past_slot(name) is not None or is_recurrent(name)


def is_kept(name: str) -> bool:
    """Whether an output of this name holds keys or values, which grow with the text."""
    return re.fullmatch(f"{_SLOT}(?:key|value)", name) is not None


def has_cache(view: View) -> bool:
    """Whether the graph takes what was computed before as inputs."""
    return any(past_slot(n) is not None or is_recurrent(n) for n in view.input_names())


def has_states(view: View) -> bool:
    """Whether some of it cannot be cut back to fewer tokens, nor read a text that is padded at its
    end."""
    return any(map(is_recurrent, view.input_names()))



def reread_at(metadata: Mapping[str, str]) -> int:
    """What ``REREAD_KEY`` says; 0 where a cache is good for texts of any length."""
    text = metadata.get(REREAD_KEY, "")
    return int(text) if text.isdecimal() else 0

def answers(outputs: Mapping[str, T]) -> dict[str, T]:
    """Outputs by name without the cache, which is state: what passes are measured by."""
    return {n: t for n, t in outputs.items() if not re.fullmatch(_PRESENT, n)}


def empty_past(
    types: Mapping[str, Type], inputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Caches of length 0 for those inputs among ``types`` that are caches and not in ``inputs``,
    and the shift of a text's start.

    ``types`` are all inputs' types by name. A caller that starts a text needs no cache: whatever
    runs a graph takes one left out as empty.
    """
    batch = next((len(inputs[name]) for name in ("input_ids", STREAM) if name in inputs), 1)
    caches = {}
    if SHIFT in types and SHIFT not in inputs:
        caches[SHIFT] = torch.zeros(batch, 1, dtype=torch.int64)
    for name, type_ in types.items():
        sizes = (type_.shape or ())[1:]
        if is_recurrent(name) and name not in inputs and all(isinstance(s, int) for s in sizes):
            caches[name] = torch.zeros(batch, *map(int, sizes), dtype=type_.dtype)
        if name in inputs or past_slot(name) is None or type_.rank != 4:
            continue
        _, heads, _, width = type_.shape or ()
        if isinstance(heads, int) and isinstance(width, int):  # else it is missing, and told so
            caches[name] = torch.zeros(batch, heads, 0, width, dtype=type_.dtype)
    return caches


STREAM = "inputs_embeds"
"""The input f32 ``[batch, seq, width]`` of a text model whose tokens come as vectors."""


POSITIONS = "position_ids"
"""The input that says at which place of its text each token stands."""


TOKEN_TYPES = "token_type_ids"
"""The input that says of which kind each token is: 0, but in the second text of a pair."""


BOXES = "bbox"
"""The input ``[batch, seq, 4]`` that says where on its page each token stands: left, top, right,
bottom."""


GLOBAL_MASK = "global_attention_mask"
"""The input i64 ``[batch, seq]`` of Longformer that marks the tokens that see all others, and are
seen by all: none where it is left out."""


RELEVANCE = "frame_relevance"
"""The input f32 ``[videos, frames]`` that says how much each frame of a video has to do with what
is asked: another model's word. All alike where it is left out."""


def positions(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Places i64 ``[rows, count]`` of the last tokens, of all that ``mask`` ``[rows, all]`` counts;
    what is masked out at the left has the first."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)[:, -count:]


def check_shared(shapes: Mapping[str, tuple[Sequence[Dim], Sequence[int]]]) -> None:
    """Raise ``BadInput`` where a dimension that inputs share by name has two sizes.

    ``shapes`` are the declared and the given shape of each input. Where tokens were dropped between
    blocks, caches differ in length.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for name, (declared, shape) in shapes.items():
        for axis, (dim, size) in enumerate(zip(declared, shape, strict=False)):
            # Some files call all dimensions that they do not know so.
            if not isinstance(dim, str) or dim in ("", UNKNOWN_DIM):
                continue
            if axis == PAST_AXIS and past_slot(name) is not None:
                continue
            known, first = sizes.setdefault(dim, (size, name))
            if known != size:
                raise BadInput(f"{dim} is {known} in input {first} and {size} in input {name}")


def left_out(
    types: Mapping[str, Type], inputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What follows from the inputs that are given: ``empty_past``, the positions of tokens, that
    all are of one kind, that none is marked, and that all frames count alike."""
    implied = empty_past(types, inputs)
    ids = inputs.get("input_ids")
    for name in (TOKEN_TYPES, GLOBAL_MASK):
        if name in types and name not in inputs and ids is not None and types[name].rank == 2:
            implied[name] = torch.zeros_like(ids, dtype=types[name].dtype or torch.int64)
    if RELEVANCE in types and RELEVANCE not in inputs and "pixel_values" in inputs:
        frames = (types[RELEVANCE].shape or (0, 0))[1]
        implied[RELEVANCE] = torch.ones(len(inputs["pixel_values"]), int(frames))
    if POSITIONS not in types or POSITIONS in inputs or ids is None or ids.dim() != 2:
        return implied
    if types[POSITIONS].rank not in (None, 2):
        return implied
    held = [t.shape[PAST_AXIS] for n, t in inputs.items() if past_slot(n) is not None]
    total = ids.shape[1] + max(held, default=0)
    mask = inputs.get("attention_mask", torch.ones(len(ids), total, dtype=torch.int64))
    if mask.dim() == 2 and mask.shape[1] >= ids.shape[1]:
        dtype = types[POSITIONS].dtype or torch.int64
        implied[POSITIONS] = positions(mask, ids.shape[1]).to(dtype)
    return implied


def next_step(
    inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor] | None:
    """``later`` of one token."""
    return later(inputs, outputs, 1)


def later(
    inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor], tokens: int
) -> dict[str, torch.Tensor] | None:
    """Inputs of what follows a prompt or a step: its last tokens again, what it left in the cache,
    and no image. ``None`` for a graph without a cache."""
    state = {n: t for n, t in outputs.items() if n not in answers(outputs)}
    if not state or not {"input_ids", "attention_mask"} <= set(inputs):
        return None
    mask, ids = inputs["attention_mask"], inputs["input_ids"][:, -tokens:]
    past = {past_of(name): t for name, t in state.items()}
    rest = {n: t[:0] for n, t in inputs.items() if n == "pixel_values"}
    # Where image tokens left before the first slot, it holds fewer: padding is on the left.
    slots = (t for n, t in past.items() if past_slot(n) is not None)
    held = min((t.shape[2] for t in itertools.islice(slots, 1)), default=0)
    grown = torch.cat([mask[:, :held], mask.new_ones(ids.shape)], 1)
    if POSITIONS in inputs:
        rest[POSITIONS] = positions(grown, ids.shape[1]).to(inputs[POSITIONS].dtype)
    return {
        "input_ids": ids, **past, **rest, "attention_mask": grown,
    }  # fmt: skip


def is_past(view: View, value: Value) -> bool:
    """Whether an input of the graph is a cache: joined to what the graph then returns."""
    joins = (u for u in view.users(value) if view.op(u) == "concat")
    return any(_output_below(view, view.results(node)[0]) is not None for node in joins)


# --- recognised in a graph ------------------------------------------------------------------------


def find_slot(view: View, sdpa: Node) -> CacheSlot | None:
    """The slot of an attention site: ``sdpa(q, concat(past, k), concat(past, v))``.

    ``None`` where one of the two is not joined to an input of the graph, or is not returned.
    """
    joined = [_joined(view, operand) for operand in view.operands(sdpa)[1:3]]
    if joined[0] is None or joined[1] is None:
        return None
    (past_key, present_key), (past_value, present_value) = joined[0], joined[1]
    return CacheSlot((past_key, past_value), (present_key, present_value))


def latent_slots(view: View, known: Collection[Value]) -> list[tuple[Node, CacheSlot]]:
    """Slots of layers that make keys and values of what they keep, each by the node that joins its
    first part to what was before; ``known`` are the inputs of other slots.

    Of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) the first part is a latent that
    all heads share, the second the rotated part of their keys.
    """
    parts: dict[str, list[tuple[Node, Value, Value]]] = {}
    for value, name in zip(view.inputs(), view.input_names(), strict=True):
        match = re.fullmatch(r"past_key_values\.(\d+)\.(?:key|value)((?:\.copy)?)", name)
        if match is None or value in known:
            continue
        for node in view.users(value):
            joins = view.op(node) == "concat" and view.operands(node)[0] is value
            present = _output_below(view, view.results(node)[0]) if joins else None
            if present is not None:
                parts.setdefault(match[1] + match[2], []).append((node, value, present))
    return [
        (first[0], CacheSlot((first[1], second[1]), (first[2], second[2])))
        for first, second in (pair for pair in parts.values() if len(pair) == len(PARTS))
    ]  # fmt: skip


def _joined(view: View, operand: Operand) -> tuple[Value, Value] | None:
    """Past and present behind the keys or values of ``sdpa``."""
    for value in _chain(view, operand, lambda node: view.operands(node)[0]):
        node = view.producer(value)
        if node is None or view.op(node) != "concat":
            continue
        past = _input_above(view, view.operands(node)[0])
        if past is None:  # the row of an attention's sink stands behind all keys
            return _joined(view, view.operands(node)[0])
        present = _output_below(view, value)
        return None if present is None else (past, present)
    return None


def _chain(view: View, value: Operand, step: Callable[[Node], Operand]) -> Sequence[Value]:
    """A value and those that it was shaped from, the nearest first."""
    chain: list[Value] = []
    while value is not None and not isinstance(value, int | float):
        chain.append(value)
        node = view.producer(value)
        value = step(node) if node is not None and _passes_on(view, node) else None
    return chain


def _passes_on(view: View, node: Node) -> bool:
    """Whether keys and values go through a node between the cache and ``sdpa``; where the cache
    holds codes, these are made numbers again."""
    op = view.op(node)
    return op in _WIDENING or traits(op).rearranges


def _input_above(view: View, value: Operand) -> Value | None:
    last = _chain(view, value, lambda node: view.operands(node)[0])[-1:]
    return last[0] if last and view.producer(last[0]) is None and not view.weight(last[0]) else None


def _output_below(view: View, value: Value) -> Value | None:
    """The value itself, or one that it is shaped into, that the graph returns; where rows of a
    batch differ in length, each one's tokens may be picked out of it, and the rest made zeros."""
    queue = [value]
    for current in queue:
        if view.is_output(current):
            return current
        users = view.users(current)
        picking = ("index_select", "mul")
        shaping = (u for u in users if _passes_on(view, u) or view.op(u) in picking)
        queue += [view.results(u)[0] for u in shaping if view.operands(u)[0] is current]
    return None
