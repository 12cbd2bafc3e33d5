"""Choosing tokens in a graph: one row of attention as a score, the best ones, where they lie.

Static shapes throughout: ``TopK`` of a constant count, then positions in ascending order. Nothing
of the size tokens x tokens is made.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from ..core.errors import Refusal
from ..core.types import same_dim
from ..core.view import Node, Value, View, is_value
from ..core.weights import MemoryWeight
from ..structure.vision import ImageTokens
from ..vocab import END


def attention_row(view: View, site: Node, row: Literal["first", "last"]) -> Value:
    """What one query pays to each key, the mean of the heads: ``[rows, keys]``, behind ``site``.

    A branch beside the ``sdpa`` node, with its scale, soft cap and mask, over all keys: the
    attention itself stays fused. Raises ``Refusal`` where the site's form is another.
    """
    q, k = view.tensor(site, 0), view.tensor(site, 1)
    mask = next(iter(view.operands(site)[3:]), None)
    attrs = view.attrs(site)
    if row == "first" and attrs["causal"]:
        raise Refusal("the first query of causal attention sees itself alone", site)
    heads, width = _head_shape(view, q, site)
    groups, _ = _head_shape(view, k, site)
    place = view.after(site)
    start, end = (0, 1) if row == "first" else (-1, END)
    query = view.build("slice", [q, start, end], {"dim": 2}, before=place)
    if heads != groups:
        query = view.build("reshape", [query, -1, groups, heads // groups, width], before=place)
    keys = view.build("transpose", [k], {"perm": (0, 1, 3, 2)}, before=place)
    logits = view.build("matmul", [query, keys], before=place)
    scale, cap = attrs["scale"] or 1 / math.sqrt(width), attrs["softcap"]
    logits = view.build("mul", [logits, scale if cap is None else scale / cap], before=place)
    if cap is not None:
        logits = view.build("tanh", [logits], before=place)
        logits = view.build("mul", [logits, cap], before=place)
    if is_value(mask):
        logits = _masked(view, logits, mask, start, end, heads == groups, place)
    weights = view.build("softmax", [logits], {"dim": 3}, before=place)
    if heads != groups:
        return view.build("mean", [weights], {"dims": (1, 2), "keepdim": False}, before=place)
    # Not by a mean: ONNX Runtime 1.31's keeps the shape of a tensor without elements (no images).
    weights = view.build("squeeze", [weights], {"dims": (2,)}, before=place)
    sums = view.build("cumsum", [weights], {"dim": 1}, before=place)
    total = view.build("slice", [sums, -1, END], {"dim": 1}, before=place)
    total = view.build("squeeze", [total], {"dims": (1,)}, before=place)
    return view.build("mul", [total, 1 / heads], before=place)


def best(view: View, scores: Value, count: int, before: Node) -> Value:
    """Places of the ``count`` highest scores of each row, ascending: i64 ``[rows, count]``.

    Which of equal scores is taken is up to the runtime.
    """
    attrs = {"k": count, "dim": 1, "largest": True, "sorted": True}
    highest = view.build("topk", [scores], attrs, before=before)
    places = view.results(view.maker(highest))[1]
    attrs = {"k": count, "dim": 1, "largest": False, "sorted": True}
    return view.build("topk", [places], attrs, before=before)


def kept_positions(
    view: View, images: ImageTokens, marked: Value, chosen: Value, left: int, before: Node
) -> Value:
    """The positions of a sequence that stay: all but the image tokens that were not chosen.

    ``marked`` bool ``[rows, seq]`` marks one run of ``images.count`` image tokens in each row,
    ``chosen`` i64 ``[rows, left]``, or ``[images, left]``, says, ascending, which of them stay. The
    result is i64 ``[rows, seq - count + left]``, ascending. Where a graph may run without any image
    (a step with a cache), all positions stay then.
    """
    known = view.type(marked).shape
    if known is None:
        raise Refusal(f"{view.name(marked)} has no shape")
    rows, seq = known
    dropped: Value | int = images.count - left
    length: Value | int = dropped
    name = str(dropped)
    if not same_dim(rows, images.images):
        name = f"({dropped}*{images.images}//{rows})"
        length, dropped = _dropped(view, images.features, images.count - left, name, before)
    short = view.build("slice", [marked, length, END], {"dim": 1}, before=before)
    view.name_dim(short, 1, f"{seq} - {name}")
    # Counted, not made by ``arange``, so that the type says the length by name.
    ones = view.build("eq", [short, short], before=before)
    ones = view.build("cast", [ones], {"dtype": torch.int64}, before=before)
    every = view.build("cumsum", [ones], {"dim": 1}, before=before)
    every = view.build("sub", [every, 1], before=before)
    start = image_start(view, marked, before)
    turn = view.build("sub", [every, start], before=before)
    inside = view.build("clamp", [turn], {"min": 0, "max": left - 1}, before=before)
    shape = view.type(chosen).shape
    if shape is not None and same_dim(shape[0], rows):
        picked = view.build("token_select", [chosen, inside], before=before)
    else:
        picked = _picked(view, marked, chosen, inside, left, before)
    picked = view.build("add", [picked, start], before=before)
    later = view.build("add", [every, dropped], before=before)
    is_before = view.build("lt", [turn, 0], before=before)
    is_image = view.build("lt", [turn, left], before=before)
    kept = view.build("where", [is_image, picked, later], before=before)
    return view.build("where", [is_before, every, kept], before=before)


def _dropped(
    view: View, features: Value, count: int, name: str, before: Node
) -> tuple[Value, Value]:
    """``count``, and 0 where there are no images (``features`` of no rows): as a size, and as a
    tensor i64 ``[1]``. ``name`` is what types call it."""
    one = view.build("slice", [features, 0, 1], {"dim": 1}, before=before)
    one = view.build("slice", [one, 0, 1], {"dim": 2}, before=before)
    one = view.build("slice", [one, 0, 1], {"dim": 0}, before=before)
    line = view.build("reshape", [one, -1, 1], before=before)
    line = view.build("expand", [line, -1, count], before=before)
    line = view.build("reshape", [line, -1], before=before)
    view.name_dim(line, 0, name)
    ones = view.build("eq", [line, line], before=before)
    ones = view.build("cast", [ones], {"dtype": torch.int64}, before=before)
    total = view.build("sum", [ones], {"dims": (0,), "keepdim": True}, before=before)
    return view.build("size", [line], {"dim": 0}, before=before), total


def _picked(
    view: View, marked: Value, chosen: Value, inside: Value, left: int, before: Node
) -> Value:
    """``chosen[image of the row, inside]`` where images may be fewer than rows: none at all."""
    spare = view.add_weight("token_pass.none", MemoryWeight(torch.zeros(1, dtype=torch.int64)))
    line = view.build("reshape", [chosen, -1], before=before)
    line = view.build("concat", [spare, line], {"dim": 0}, before=before)
    line = view.build("unsqueeze", [line], {"dims": (1,)}, before=before)
    counted = view.build("cast", [marked], {"dtype": torch.int64}, before=before)
    counted = view.build("sum", [counted], {"dims": (1,), "keepdim": True}, before=before)
    ones = view.build("eq", [counted, counted], before=before)
    ones = view.build("cast", [ones], {"dtype": torch.int64}, before=before)
    row = view.build("cumsum", [ones], {"dim": 0}, before=before)
    first = view.build("mul", [row, left], before=before)
    first = view.build("sub", [first, left - 1], before=before)
    place = view.build("add", [inside, first], before=before)
    has_image = view.build("gt", [counted, 0], before=before)
    place = view.build("where", [has_image, place, 0], before=before)
    taken = view.build("embedding", [line, place], before=before)
    return view.build("squeeze", [taken], {"dims": (2,)}, before=before)


def image_start(view: View, image: Value, before: Node) -> Value:
    """Where each row's image starts, i64 ``[rows, 1]``; the row's length where it has none."""
    counted = view.build("cast", [image], {"dtype": torch.int64}, before=before)
    counted = view.build("cumsum", [counted], {"dim": 1}, before=before)
    early = view.build("eq", [counted, 0], before=before)
    early = view.build("cast", [early], {"dtype": torch.int64}, before=before)
    return view.build("sum", [early], {"dims": (1,), "keepdim": True}, before=before)


def image_scores(view: View, scores: Value, image: Value, count: int, before: Node) -> Value:
    """Of scores ``[rows, seq]`` those of the image's ``count`` tokens: ``[rows, count]``."""
    start = image_start(view, image, before)
    last = view.build("size", [image], {"dim": 1}, before=before)
    positions = view.build("arange", [0, last, 1], {"dtype": torch.int64}, before=before)
    end = view.build("amax", [positions], {"dims": (0,), "keepdim": True}, before=before)
    steps = view.build("arange", [0, count, 1], {"dtype": torch.int64}, before=before)
    steps = view.build("unsqueeze", [steps], {"dims": (0,)}, before=before)
    places = view.build("add", [start, steps], before=before)
    places = view.build("minimum", [places, end], before=before)
    return view.build("token_select", [scores, places], before=before)


def _masked(
    view: View, logits: Value, mask: Value, start: int, end: int, all_heads: bool, place: Node
) -> Value:
    shape = view.type(mask).shape
    if shape is None or len(shape) != 4 or not (all_heads or shape[1] == 1):
        raise Refusal(f"the mask is {view.type(mask)}, of which one row cannot be taken")
    if shape[2] != 1:
        mask = view.build("slice", [mask, start, end], {"dim": 2}, before=place)
    if view.type(mask).dtype != torch.bool:
        return view.build("add", [logits, mask], before=place)
    dtype = view.type(logits).dtype or torch.float32
    return view.build("where", [mask, logits, torch.finfo(dtype).min], before=place)


def _head_shape(view: View, value: Value, site: Node) -> tuple[int, int]:
    shape = view.type(value).shape
    if shape is None or len(shape) != 4:
        raise Refusal(f"attention over {view.type(value)}, [rows, heads, tokens, width] is needed")
    heads, width = shape[1], shape[3]
    if not isinstance(heads, int) or not isinstance(width, int):
        raise Refusal("the number of heads is not fixed", site)
    return heads, width
