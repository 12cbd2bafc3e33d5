"""Scores of tokens that come of attention: branches beside an ``sdpa``, which itself stays fused.

One row of attention costs as much as one token; what all queries pay together is made of the whole
map of one layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..core.errors import Refusal
from ..core.view import Node, Value, View, is_value
from ..structure.cache_slots import is_past
from ..vocab import END
from ..vocab.builder import Builder
from .upstream import upstream

_SPREADING = ("reshape", "expand", "unsqueeze")
"""From the last to the first: how keys are repeated for each head of a group."""
HIDDEN = -1e4
"""Logits below it are of keys that a mask hides."""


@dataclass(frozen=True)
class _Keys:
    """The keys of an attention site."""

    fresh: Value
    """As they are before a cache is put in front of them, each once for its heads."""
    past: Value | None
    """That cache."""

    @classmethod
    def of(cls, view: View, site: Node) -> _Keys:
        k = view.tensor(site, 1)
        keys, source = k, k
        for op in _SPREADING:
            node = view.producer(keys)
            if node is None or view.op(node) != op:
                break
            keys = view.tensor(node)
        else:
            source = keys
        node = view.producer(source)
        if node is not None and view.op(node) == "concat" and is_past(view, view.tensor(node)):
            return cls(view.tensor(node, 1), view.tensor(node))
        return cls(source, None)


def attention_row(
    view: View, site: Node, row: Literal["first", "last"], *, logits: bool = False
) -> Value:
    """What one query pays to each key, the mean of the heads: ``[rows, keys]``, behind ``site``.

    A branch beside the ``sdpa`` node, with its scale, soft cap and mask, over all keys. With
    ``logits`` it is the mean of what goes into the softmax. Raises ``Refusal`` where the site's
    form is another.
    """
    q, k = view.tensor(site, 0), view.tensor(site, 1)
    if row == "first" and view.attrs(site)["causal"]:
        raise Refusal("the first query of causal attention sees itself alone", site)
    masks = [o for o in view.operands(site)[3:] if is_value(o)]
    return _one_row(Builder(view, view.after(site)), site, q, k, masks, row, logits=logits)


def coming_row(view: View, site: Node, entry: Value, previous: Node) -> Value:
    """What the last query will pay to each token in a block, before tokens leave at its entry.

    ``site`` is the block's ``sdpa``, ``entry`` its residual stream, ``previous`` the ``sdpa`` of
    the block before, whose mask has as many columns. The way to the block's queries and keys is
    computed a second time, for all tokens, right behind ``entry``: what comes after can then depend
    on the score. Keys in a cache do not count. ``[rows, tokens]``.
    """
    keys = _Keys.of(view, site)
    operands = [view.tensor(site, 0), keys.fresh]
    operands += [o for o in view.operands(site)[3:] if is_value(o)]
    place = view.after(view.maker(entry))
    late, needed = False, upstream(view, *operands)
    copies: dict[Value, Value] = {}
    for node in list(view.nodes()):
        if late and node in needed:
            results = view.clone(node, copies, before=place)
            copies.update(zip(view.results(node), results, strict=True))
        late = late or node is view.maker(entry)
    q, k, *masks = (copies.get(value, value) for value in operands)
    b = Builder(view, place)
    masks = [_uncached(b, mask, _Keys.of(view, previous).past) for mask in masks]
    return _one_row(b, site, q, k, masks, "last")


def received(view: View, site: Node) -> Value:
    """What all queries together pay to each key, the mean of the heads: ``[rows, keys]``.

    The whole map of the layer is made: ``heads tokens²`` numbers.
    """
    b = Builder(view, view.after(site))
    weights = b.softmax(_map(b, site), dim=3)
    return b.sum(b.mean(weights, dims=(1,), keepdim=False), dims=(1,), keepdim=False)


def paid(view: View, site: Node, last: int = 0) -> Value:
    """What each of the ``last`` queries, or of all of them for 0, pays to every key, the mean of
    the heads: ``[rows, queries, keys]``, behind ``site``.

    A branch beside the ``sdpa`` node, with its scale, soft cap and mask, a cache's keys among all.
    Where there are fewer than ``last``, the first one stands at the front repeated: the size is
    always the same. A query that sees no key pays to all of them alike. Raises ``Refusal`` where
    the site's form is another.
    """
    b = Builder(view, view.after(site))
    q, k = view.tensor(site, 0), view.tensor(site, 1)
    heads, width = _head_shape(view, q, site)
    groups, _ = _head_shape(view, k, site)
    if view.attrs(site)["causal"]:
        raise Refusal("attention is causal by an attribute, without a mask to take rows of", site)
    query, places = q, None
    if last:
        # Not by a slice from -last on: a size would have to be at least as large.
        line = b.arange(0, last, 1, dtype=torch.int64)
        places = b.clamp(b.add(line, b.sub(b.size(q, dim=2), last)), min=0)
        query = b.index_select(q, places, dim=2)
    count = b.size(query, dim=2)
    # Queries of the heads that share keys lie behind each other: keys are not repeated.
    together = b.reshape(query, b.size(query, dim=0), groups, -1, width)
    logits = _capped(b, b.matmul(together, b.transpose(k, perm=(0, 1, 3, 2))), site, width)
    logits = b.reshape(logits, b.size(query, dim=0), heads, count, b.size(k, dim=2))
    for mask in (o for o in view.operands(site)[3:] if is_value(o)):
        if places is not None and (view.type(mask).shape or (1, 1, 1))[2] != 1:
            mask = b.index_select(mask, places, dim=2)
        logits = _masked(b, logits, mask, True)
    return b.mean(b.softmax(logits, dim=3), dims=(1,), keepdim=False)


def ranked_by_links(view: View, site: Node, *, steps: int, temperature: float) -> Value:
    """PageRank over attention as links, ``[rows, keys]``, behind ``site``.

    Of each head ``v <- vᵀ softmax(logits / temperature)``, ``steps`` times from equal parts on all
    tokens that the last query sees (padding is none of them); heads are put together by the root of
    their mean square (AIM, arXiv 2412.03248). Keys in a cache are not looked at.
    """
    b = Builder(view, view.after(site))
    logits = _map(b, site, factor=1 / temperature)
    weights = b.softmax(logits, dim=3)
    # Not by the weights: a small one is 0 at a low temperature.
    last = b.slice(logits, -1, END, dim=2)
    visible = b.cast(b.gt(last, HIDDEN), dtype=view.type(weights).dtype)
    ranked = b.div(visible, b.sum(visible, dims=(3,), keepdim=True))
    for _ in range(steps):
        ranked = b.matmul(ranked, weights)
    squares = b.mean(b.mul(ranked, ranked), dims=(1,), keepdim=False)
    return b.squeeze(b.sqrt(squares), dims=(1,))


def _map(b: Builder, site: Node, factor: float = 1.0) -> Value:
    """The logits of every query for every key that is not a cached one, ``factor`` times as large
    before they are masked: ``[rows, heads, n, n]``."""
    view, keys = b.view, _Keys.of(b.view, site)
    q, k = view.tensor(site, 0), keys.fresh
    heads, width = _head_shape(view, q, site)
    groups, _ = _head_shape(view, k, site)
    if heads != groups:
        k = b.concat(*[b.unsqueeze(k, dims=(2,))] * (heads // groups), dim=2)
        k = b.reshape(k, b.size(q, dim=0), heads, b.size(q, dim=2), width)
    logits = _capped(b, b.matmul(q, b.transpose(k, perm=(0, 1, 3, 2))), site, width)
    if factor != 1:
        logits = b.mul(logits, factor)
    for mask in (o for o in view.operands(site)[3:] if is_value(o)):
        logits = _masked(b, logits, _uncached(b, mask, keys.past), True)
    return logits


def _uncached(b: Builder, mask: Value, past: Value | None) -> Value:
    """A mask without the columns of a cache."""
    return mask if past is None else b.slice(mask, b.size(past, dim=2), END, dim=3)


def _one_row(
    b: Builder, site: Node, q: Value, k: Value, masks: Sequence[Value],
    row: Literal["first", "last"], *, logits: bool = False,
) -> Value:  # fmt: skip
    view = b.view
    heads, width = _head_shape(view, q, site)
    groups, _ = _head_shape(view, k, site)
    start, end = (0, 1) if row == "first" else (-1, END)
    query = b.slice(q, start, end, dim=2)
    if heads != groups:
        query = b.reshape(query, -1, groups, heads // groups, width)
    weights = _capped(b, b.matmul(query, b.transpose(k, perm=(0, 1, 3, 2))), site, width)
    for mask in masks:
        if (view.type(mask).shape or (1, 1, 1))[2] != 1:
            mask = b.slice(mask, start, end, dim=2)
        weights = _masked(b, weights, mask, heads == groups)
    if not logits:
        weights = b.softmax(weights, dim=3)
    if heads != groups:
        return b.mean(weights, dims=(1, 2), keepdim=False)
    # Not by a mean: ONNX Runtime 1.31's keeps the shape of a tensor without elements (no images).
    sums = b.cumsum(b.squeeze(weights, dims=(2,)), dim=1)
    total = b.squeeze(b.slice(sums, -1, END, dim=1), dims=(1,))
    return b.mul(total, 1 / heads)


def _capped(b: Builder, logits: Value, site: Node, width: int) -> Value:
    attrs = b.view.attrs(site)
    scale, cap = attrs["scale"] or 1 / math.sqrt(width), attrs["softcap"]
    logits = b.mul(logits, scale if cap is None else scale / cap)
    return logits if cap is None else b.mul(b.tanh(logits), cap)


def _masked(b: Builder, logits: Value, mask: Value, all_heads: bool) -> Value:
    view = b.view
    shape = view.type(mask).shape
    if shape is None or len(shape) != 4 or not (all_heads or shape[1] == 1):
        raise Refusal(f"the mask is {view.type(mask)}, of which one row cannot be taken")
    if view.type(mask).dtype != torch.bool:
        return b.add(logits, mask)
    dtype = view.type(logits).dtype or torch.float32
    return b.where(mask, logits, torch.finfo(dtype).min)


def _head_shape(view: View, value: Value, site: Node) -> tuple[int, int]:
    shape = view.type(value).shape
    if shape is None or len(shape) != 4:
        raise Refusal(f"attention over {view.type(value)}, [rows, heads, tokens, width] is needed")
    heads, width = shape[1], shape[3]
    if not isinstance(heads, int) or not isinstance(width, int):
        raise Refusal("the number of heads is not fixed", site)
    return heads, width
