"""``--calib-select most-moved``: the samples on which few bits change the model most."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.core.view import View
from ...ir.run.sweep import sweep
from ...passes.manager import optimize

PROBE = "quantize{bits=3 group=32}"
"""What moves them: what is lost to rounding tells where it shows, whatever rounds later."""
Batch = dict[str, Tensor]


def most_moved(view: View, batches: Sequence[Batch], count: int) -> list[Batch]:
    """The ``count`` samples whose outputs move most, by relative L2, when all weights are rounded.

    They stay in the batches and in the order in which they came. Raises ``BadInput`` for a graph
    that takes batches of one size alone.
    """
    fixed = view.type(view.inputs()[0]).shape
    if fixed is not None and fixed[:1] and isinstance(fixed[0], int) and fixed[0] > 1:
        raise BadInput(
            f"--calib-select most-moved: the graph takes exactly {fixed[0]} samples at a time, and "
            "they are chosen one by one; leave it out"
        )
    rounded = optimize(view, PROBE, samples=batches[:1]).graph
    moves = [_moves(view, rounded, batch) for batch in batches]
    least = torch.cat(moves).topk(min(count, sum(map(len, moves)))).values[-1]
    chosen, rest = [], count
    for batch, moved in zip(batches, moves, strict=True):
        rows = (moved >= least).nonzero().flatten()[:rest]
        rest -= len(rows)
        if len(rows):
            chosen.append({n: t[rows] if len(t) == len(moved) else t for n, t in batch.items()})
    return chosen


def _moves(view: View, rounded: View, batch: Batch) -> Tensor:
    """Of each row, the relative L2 distance of the outputs, tokens of padding left out."""
    mask = batch.get("attention_mask")
    gap: Tensor | float = 0.0
    size: Tensor | float = 0.0
    before, after = sweep(view, batch), sweep(rounded, batch)
    for name, a in before.items():
        b = after[name]
        if not a.is_floating_point() or not a.dim():
            continue
        weight = torch.ones(a.shape[:1])
        if mask is not None and a.shape[:2] == mask.shape:
            weight = mask.float()
        weight = weight.reshape(*weight.shape, *[1] * (a.dim() - weight.dim()))
        gap = gap + ((a.float() - b.float()).square() * weight).flatten(1).sum(1)
        size = size + (a.float().square() * weight).flatten(1).sum(1)
    return torch.as_tensor(gap / size)
