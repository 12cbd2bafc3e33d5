"""Putting similar tokens together: who is merged into whom, in static shapes.

Bipartite soft matching (ToMe, Bolya et al. 2023, arXiv 2210.09461, restated): even tokens look for
the most similar odd one, and the pairs that are most alike become one token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.errors import Refusal
from ..core.view import Value
from ..core.weights import MemoryWeight
from ..vocab import END
from ..vocab.builder import Builder
from .selection import ascending, top_places

_EPS = 1e-6
_NEVER = -1e4
"""Similarity of a pair that must not be merged: within the range of float16."""


@dataclass(frozen=True)
class Matching:
    """What becomes of ``tokens`` of each row."""

    left: int
    home: Value
    """i64 ``[rows, tokens]``: the new row that each token goes into."""
    kept: Value
    """i64 ``[rows, left]``: the token that each new row goes on from."""


def lengths(b: Builder, x: Value) -> Value:
    """``|x|`` over the last dimension of ``[rows, tokens, width]``, never 0: ``[.., 1]``."""
    squares = b.sum(b.mul(x, x), dims=(2,), keepdim=True)
    return b.add(b.sqrt(squares), _EPS)


def directions(b: Builder, x: Value) -> Value:
    """``x / |x|`` over the last dimension of ``[rows, tokens, width]``, in float32; 0 stays 0."""
    if b.view.type(x).dtype != torch.float32:
        x = b.cast(x, dtype=torch.float32)
    return b.div(x, lengths(b, x))


def similarity(b: Builder, x: Value) -> Value:
    """The cosine of each pair of tokens: ``[rows, tokens, tokens]``."""
    unit = directions(b, x)
    return b.matmul(unit, b.transpose(unit, perm=(0, 2, 1)))


def closest_of(b: Builder, alike: Value, kept: Value, tokens: int) -> Value:
    """For each of the tokens the one of ``kept`` that it is most like, itself where it is kept.

    ``alike`` is ``[rows, tokens, tokens]``, ``kept`` i64 ``[rows, count]``; i64 ``[rows, tokens]``.
    """
    rows = b.token_select(alike, kept)
    every = b.view.add_weight("tokens.every", MemoryWeight(torch.arange(tokens)))
    itself = b.cast(b.eq(b.unsqueeze(kept, dims=(2,)), every), dtype=b.view.type(alike).dtype)
    # No cosine comes near 4: a kept token is its own nearest, copies of it or not.
    rows = b.add(rows, b.mul(itself, 4.0))
    return b.squeeze(top_places(b, b.topk(rows, k=1, dim=1, largest=True, sorted=True)), dims=(1,))


def match(b: Builder, metric: Value, count: int, *, first: bool) -> Matching:
    """Merge ``count`` of the even tokens, those most similar to an odd one, into it.

    ``metric`` is ``[rows, tokens, width]``; with ``first`` the first token (CLS) is not merged. New
    rows are the even tokens that are left, in their order, and then the odd ones.
    """
    shape = b.view.type(metric).shape or ()
    tokens = shape[1] if len(shape) == 3 else None
    if not isinstance(tokens, int):
        raise Refusal(f"{b.view.type(metric)} has no fixed number of tokens")
    odd = tokens // 2
    even = tokens - odd
    if not 0 < count <= even - first or not odd:
        raise Refusal(f"{count} of {tokens} tokens cannot be merged: {even - first} at most can be")
    unit = directions(b, metric)
    sources = b.slice(unit, 0, END, dim=1, step=2)
    targets = b.slice(unit, 1, END, dim=1, step=2)
    scores = b.matmul(sources, b.transpose(targets, perm=(0, 2, 1)))
    if first:
        scores = b.add(scores, _never_first(b, scores, even))
    closest = b.topk(scores, k=1, dim=2, largest=True, sorted=True)
    target = b.squeeze(top_places(b, closest), dims=(2,))
    ranked = b.topk(b.squeeze(closest, dims=(2,)), k=even, dim=1, largest=True, sorted=True)
    order = top_places(b, ranked)
    staying = ascending(b, b.slice(order, count, END, dim=1), even - count)
    # Sorting a permutation says at which place of it each number stands.
    place = top_places(b, b.topk(order, k=even, dim=1, largest=False, sorted=True))
    stays = b.ge(place, count)
    counted = b.sub(b.cumsum(b.cast(stays, dtype=torch.int64), dim=1), 1)
    homes = b.where(stays, counted, b.add(target, even - count))
    others = _numbers(b, homes, torch.arange(odd) + even - count)
    woven = torch.tensor([t // 2 + (t % 2) * even for t in range(tokens)])
    index = b.view.add_weight("tokens.woven", MemoryWeight(woven))
    home = b.index_select(b.concat(homes, others, dim=1), index, dim=1)
    kept = b.concat(b.mul(staying, 2), _numbers(b, homes, 2 * torch.arange(odd) + 1), dim=1)
    return Matching(tokens - count, home, kept)


def _never_first(b: Builder, scores: Value, even: int) -> Value:
    table = torch.zeros(1, even, 1, dtype=b.view.type(scores).dtype)
    table[:, 0] = _NEVER
    return b.view.add_weight("tokens.never_first", MemoryWeight(table))


def _numbers(b: Builder, rows: Value, numbers: torch.Tensor) -> Value:
    """The same numbers in each of the rows that ``rows`` i64 has: ``[rows, len(numbers)]``."""
    table = b.view.add_weight("tokens.numbers", MemoryWeight(numbers.unsqueeze(0)))
    return b.add(b.mul(b.slice(rows, 0, 1, dim=1), 0), table)
