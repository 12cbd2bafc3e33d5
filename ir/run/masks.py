"""Which tokens of a batch count: padding masks, found by what the graph does with its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.view import Value, View, is_value

Masks = Sequence[Tensor]
"""The masks of one batch, bool ``[batch, seq]`` each; a model of two towers may have two."""

_SIZES = frozenset({"size", "arange"})
"""Ops whose results say how large their operands are, not what is in them."""


def padding_masks(view: View, batches: Sequence[Mapping[str, Tensor]]) -> list[list[Tensor]]:
    """The padding masks in each batch.

    A mask is an input ``[batch, seq]`` whose values are all 0 or 1, that picks no row of a table
    (as ids do), and that reaches the mask of an attention site. Where no input reaches one (its
    attention is not recognised, say), any such input as long as the ids is taken.
    """
    named = dict(zip(view.input_names(), view.inputs(), strict=True))
    ids = {name for name, value in named.items() if _picks_rows(view, value)}
    binary = [n for n in named if n not in ids and all(_is_binary(b.get(n)) for b in batches)]
    reaching = _behind_attention_masks(view)
    names = [name for name in binary if named[name] in reaching]
    if not names:
        names = [n for n in binary if any(_same_shape(batches, n, other) for other in ids)]
    return [[batch[name] != 0 for name in names if name in batch] for batch in batches]


def tokens_that_count(x: Tensor, masks: Masks) -> Tensor:
    """The tokens of ``x`` ``[..., K]`` that are not masked out, ``[tokens, K]``.

    A mask belongs to ``[batch, seq, K]``, or to its flattened form ``[batch * seq, K]``.
    """
    for mask in masks:
        if x.dim() == 3 and x.shape[:2] == mask.shape:
            return x[mask]
        if x.dim() == 2 and len(x) == mask.numel():
            return x[mask.reshape(-1)]
    return x.reshape(-1, x.shape[-1])


def last_tokens(x: Tensor, masks: Masks) -> Tensor:
    """The last token that counts of each sample of ``[batch, seq, K]``: ``[batch, K]``."""
    for mask in masks:
        if x.shape[:-1] == mask.shape:
            place = torch.arange(mask.shape[1]).expand_as(mask).masked_fill(~mask, -1).amax(1)
            return x[torch.arange(len(x)), place]
    return x[:, -1]


def _behind_attention_masks(view: View) -> set[Value]:
    """All values that the masks of attention sites are computed from."""
    stack: list[Value] = []
    for site in view.nodes():
        operands = view.operands(site) if view.op(site) == "sdpa" else ()
        stack += [mask for mask in operands[3:4] if is_value(mask)]
    values: set[Value] = set()
    while stack:
        value = stack.pop()
        if value in values:
            continue
        values.add(value)
        node = view.producer(value)
        if node is not None and view.op(node) not in _SIZES:
            stack += view.arguments(node)
    return values


def _picks_rows(view: View, value: Value, depth: int = 4) -> bool:
    for user in view.users(value):
        op, operands = view.op(user), view.operands(user)
        if op == "embedding" and operands[1] is value:
            return True
        passing = op in ("cast", "identity", "reshape", "clamp") and depth
        if passing and _picks_rows(view, view.results(user)[0], depth - 1):
            return True
    return False


def _is_binary(tensor: Any) -> bool:
    return (
        tensor is not None
        and tensor.dim() == 2
        and bool(((tensor == 0) | (tensor == 1)).all())
    )


def _same_shape(batches: Sequence[Mapping[str, Tensor]], a: str, b: str) -> bool:
    return all(a in batch and b in batch and batch[a].shape == batch[b].shape for batch in batches)
