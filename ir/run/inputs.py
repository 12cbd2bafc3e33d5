"""Inputs that are made where nobody gives any: random, and of shapes that fit the graph."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from ..core.dims import dim_value, names_in
from ..core.errors import BadInput
from ..core.memory import refuse_beyond_memory
from ..core.types import UNKNOWN_DIM, Dim, Type
from ..core.view import Value, View
from ..structure.cache_slots import (
    BOXES,
    GLOBAL_MASK,
    PAST_AXIS,
    POSITIONS,
    SHIFT,
    TOKEN_TYPES,
    is_recurrent,
    left_out,
    past_slot,
)
from .masks import picked_tables
from .needs import Key, Needs

_SIZES = (2, 12, 7, 5, 3)
"""Sizes given to the symbolic dimensions in order of appearance: the batch first."""

_COPIES = 4
"""An input is drawn, kept, and read by a node that makes as much of it, in two runs."""


def sample_inputs(
    view: View, *, seed: int = 0, sizes: Mapping[str, int] | None = None,
    usual: Sequence[int] = _SIZES,
) -> dict[str, torch.Tensor]:
    """Random inputs that fit the graph: ids below the vocabulary's size, masks of ones, and one
    image a row where ``source.prompt`` says what stands for it.

    ``sizes`` fixes symbolic dimensions by name, ``usual`` gives the others theirs in order of
    appearance; sums of them follow. A key-value cache is empty and left out, unless ``sizes`` gives
    its length. Raises ``BadInput`` where an input's type is not known well enough.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[str, int] = dict(sizes or {})
    for number, (name, least) in enumerate(view.source.least.items()):
        chosen.setdefault(name, least + usual[number % len(usual)])
    inputs: dict[str, torch.Tensor] = {}
    named = dict(zip(view.input_names(), view.inputs(), strict=True))
    needs = Needs(view) if view.kind == "onnx" else None
    if view.source.prompt:
        _make_room(view, named, chosen, usual)
    lengths = {n: _length(view, v) for n, v in named.items() if past_slot(n) is not None}
    empty = {length for length in lengths.values() if length not in chosen}
    chosen |= dict.fromkeys(empty, 0)
    if lengths:
        _fit_mask(view, named, chosen, next(iter(lengths.values())), usual)
    drawn: list[tuple[str, torch.dtype, list[int]]] = []
    for name, value in named.items():
        if lengths.get(name) in empty or name == SHIFT or is_recurrent(name):
            continue
        type_ = view.type(value)
        if type_.shape is None or type_.dtype is None:
            raise BadInput(
                f"input {name} has no type: give samples, by --calib DATA (samples=[...] in Python)"
            )
        shape = [
            _size(value, axis, dim, chosen, needs, usual) for axis, dim in enumerate(type_.shape)
        ]
        drawn.append((name, type_.dtype, shape))
    for name, dtype, shape in drawn:
        needed = _COPIES * math.prod(shape) * dtype.itemsize
        what = f"the input {name}, {Type(dtype, tuple(shape))}, with what is computed of it,"
        refuse_beyond_memory(needed, what)
        inputs[name] = _sample(view, named[name], dtype, shape, generator, chosen)
    if view.source.prompt:
        inputs["input_ids"] = _with_image(inputs["input_ids"], view.source.prompt)
    if POSITIONS in inputs:
        types = {name: view.type(value) for name, value in named.items()}
        rest = {name: tensor for name, tensor in inputs.items() if name != POSITIONS}
        inputs[POSITIONS] = left_out(types, rest).get(POSITIONS, inputs[POSITIONS])
    return inputs


def _fit_mask(
    view: View, named: Mapping[str, Value], chosen: dict[str, int], past: str, usual: Sequence[int]
) -> None:
    """A decoder's mask is as long as its cache and its text, whatever its length is called."""
    shapes = [view.type(named[n]).shape for n in ("input_ids", "attention_mask") if n in named]
    if len(shapes) < 2 or not all(shape and len(shape) == 2 for shape in shapes):
        return
    (rows, tokens), (_, total) = (shape or () for shape in shapes)
    if isinstance(total, str) and total.isidentifier() and total != tokens:
        for dim in (d for d in (rows, tokens) if isinstance(d, str)):
            chosen.setdefault(dim, _next_size(chosen, usual))
        count = tokens if isinstance(tokens, int) else chosen[tokens]
        chosen.setdefault(total, chosen.get(past, 0) + count)


def _make_room(
    view: View, named: Mapping[str, Value], chosen: dict[str, int], usual: Sequence[int]
) -> None:
    """Sizes by which every row has a prompt of some words, and an image."""
    rows, seq = view.type(named["input_ids"]).shape or ("", "")
    images = (view.type(named["pixel_values"]).shape or ("",))[0]
    batch = chosen.setdefault(str(rows), usual[0])
    chosen.setdefault(str(seq), len(view.source.prompt) + usual[1])
    chosen.setdefault(str(images), batch)


def _with_image(ids: torch.Tensor, prompt: Sequence[int]) -> torch.Tensor:
    """``ids`` ``[rows, seq]`` with the image's tokens at the start of each row and nowhere else."""
    token, prompt = prompt[0], prompt[: ids.shape[1]]
    words = torch.where(ids == token, (token or 2) - 1, ids)
    return torch.cat([torch.tensor([prompt] * len(ids)), words[:, len(prompt) :]], 1)


def _length(view: View, cache: Value) -> str:
    """The name of a cache's length."""
    shape = view.type(cache).shape or ()
    return str(shape[PAST_AXIS]) if len(shape) > PAST_AXIS else ""


def _size(
    value: Value, axis: int, dim: Dim, chosen: dict[str, int], needs: Needs | None,
    usual: Sequence[int],
) -> int:  # fmt: skip
    """The size of a dimension; names without one get theirs, and sums of names follow from it."""
    if dim == UNKNOWN_DIM:
        # Sizes without a name are those of other inputs along the same axis, as a rule.
        size = chosen.setdefault(f"{UNKNOWN_DIM}{axis}", _next_size(chosen, usual))
        return size if needs is None else _needed(needs, (value, axis), size)
    known = dim_value(dim, chosen)
    if known is not None:
        return known
    for name in names_in(dim):
        size = _next_size(chosen, usual)
        chosen.setdefault(name, size if needs is None else _needed(needs, name, size))
    known = dim_value(dim, chosen)
    if known is not None:
        return known
    return chosen.setdefault(str(dim), _next_size(chosen, usual))


def _needed(needs: Needs, key: Key, size: int) -> int:
    """The size that comes nearest to the usual one."""
    if key in needs.fixed:
        return needs.fixed[key]
    step = needs.multiples.get(key, 1)
    return step * math.ceil(max(size, needs.least.get(key, 1)) / step)


def _next_size(chosen: Mapping[str, int], usual: Sequence[int]) -> int:
    """Of the dimension that comes next; one that is empty, a cache's, takes no size from others."""
    return usual[sum(size > 0 for size in chosen.values()) % len(usual)]


def _sample(
    view: View, value: Value, dtype: torch.dtype, shape: list[int], generator: torch.Generator,
    sizes: Mapping[str, int],
) -> torch.Tensor:  # fmt: skip
    if dtype.is_floating_point:
        drawn = torch.randn(shape, generator=generator)
        return (_boxes(drawn.sigmoid()) if _is_boxes(view, value) else drawn).to(dtype)
    if len(shape) == 1 and _is_target(view, value):
        return torch.tensor([-1, *[1] * (shape[0] - 1)], dtype=dtype)[: shape[0]]
    bound = _id_bound(view, value, sizes)
    if bound is None:
        return torch.ones(shape, dtype=dtype)
    picked = torch.randint(0, bound, shape, generator=generator)
    return (_boxes(picked) if _is_boxes(view, value) else picked).to(dtype)


def _is_boxes(view: View, value: Value) -> bool:
    named = dict(zip(view.input_names(), view.inputs(), strict=True))
    return value == named.get(BOXES)


def _boxes(corners: torch.Tensor) -> torch.Tensor:
    """``[..., 4]`` with the lesser of each two ordinates first: no box is less than 0 wide."""
    pairs = corners.reshape(*corners.shape[:-1], 2, 2)
    return pairs.sort(-2).values.reshape(corners.shape)


def _is_target(view: View, value: Value) -> bool:
    """Whether an input is the shape that something takes."""
    users = [user for user in view.users(value) if view.op(user) == "reshape"]
    return any(view.operands(user)[1:] == (value,) for user in users)


def _id_bound(view: View, value: Value, sizes: Mapping[str, int]) -> int | None:
    """Rows of the table that an integer input indexes, of the least one of those that columns of an
    input of more than two dimensions do; ``None`` for a mask."""
    least: list[int] = []
    for table, axis in picked_tables(view, value):
        shape = view.type(table).shape or ()
        # Where the graph does not say along which axis, an index below the least size is safe.
        rows = shape if axis is None else shape[axis : axis + 1]
        known = [size for size in (dim_value(dim, sizes) for dim in rows) if size]
        if known and view.type(value).rank in (1, 2):
            return min(known)
        least += known
    if least:
        return min(least)
    named = dict(zip(view.input_names(), view.inputs(), strict=True))
    return 2 if value in (named.get(TOKEN_TYPES), named.get(GLOBAL_MASK)) else None
