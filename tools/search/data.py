"""Calibration data in two parts: what candidates are fitted to, and what they are judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ...ir.core.view import View

Batch = Mapping[str, torch.Tensor]
JUDGE_EVERY = 4
"""Each fourth batch is kept for judging."""
TOKENS = 16384, 4096, 1024
"""Tokens, or rows of data without any, that are fitted to, judged by and probed with at most."""
LARGE = 5e8
"""Numbers in all weights from which a model is large: 16384 tokens through it take minutes."""
LARGE_TOKENS = 2048, 512, 256
"""As ``TOKENS``, of a large model."""
JUDGED_LENGTH = 128
"""Tokens that texts are cut to where they are judged: more texts say more than longer ones."""


@dataclass(frozen=True)
class Parts:
    """Batches for fitting, for judging, and for probing, which are rows of the fitting part."""

    fit: Sequence[Batch]
    judge: Sequence[Batch]
    probe: Sequence[Batch]
    shared: bool = False
    """Whether the data are one row, which is both fitted to and judged by."""
    large: bool = False
    """Whether the model is, so that a forecast has to do with less."""


def parts(view: View, batches: Sequence[Batch]) -> Parts:
    """The parts of some data, which depend on nothing but the data."""
    fit = [batch for i, batch in enumerate(batches) if i % JUDGE_EVERY != JUDGE_EVERY - 1]
    judge = [batch for i, batch in enumerate(batches) if i % JUDGE_EVERY == JUDGE_EVERY - 1]
    shared = False
    if not judge:
        last = batches[-1]
        count = _rows(last)
        kept = count - max(1, count // JUDGE_EVERY)
        shared = not kept and len(fit) == 1
        judge = [_part(last, slice(kept, count))]
        fit = [*fit[:-1], *([_part(last, slice(0, kept))] if kept else [])] or list(batches)
    texts = [_cut(view, batch) for batch in fit]
    large = sum(weight.numel for weight in view.weights().values()) >= LARGE
    fitting, judging, probing = LARGE_TOKENS if large else TOKENS
    judge = [_cut(view, batch) for batch in judge]
    return Parts(
        _limited(fit, fitting), _limited(judge, judging), _limited(texts, probing), shared, large
    )


def _rows(batch: Batch) -> int:
    sizes = [tensor.shape[0] for tensor in batch.values() if tensor.dim()]
    return sizes[0] if sizes and len(set(sizes)) == 1 else 1


def _part(batch: Batch, rows: slice) -> dict[str, torch.Tensor]:
    return {n: t[rows] if t.dim() and _rows(batch) > 1 else t for n, t in batch.items()}


def _tokens(batch: Batch) -> int:
    ids = batch.get("input_ids")
    return _rows(batch) if ids is None else ids.numel()


def _limited(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """The first batches, up to so many tokens together; the last one cut, one row at least."""
    kept: list[Batch] = []
    for batch in batches:
        left = tokens - sum(map(_tokens, kept))
        rows = _rows(batch)
        fitting = min(rows, left * rows // _tokens(batch))
        if fitting < 1 and kept:
            break
        whole = fitting == rows or rows == 1
        kept.append(batch if whole else _part(batch, slice(0, max(1, fitting))))
    return kept


def _cut(view: View, batch: Batch) -> Batch:
    """The first tokens of texts, where the batch is nothing but texts of a length that is free; a
    text that is padded on the left is left whole."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    declared = dict(zip(view.input_names(), map(view.type, view.inputs()), strict=True))
    if ids is None or any(tensor.shape != ids.shape for tensor in batch.values()):
        return batch
    if any(isinstance(declared[n].shape[1], int) for n in batch if declared[n].shape):  # type: ignore[index]
        return batch
    if mask is not None and not bool(mask[:, 0].all()):
        return batch
    return {name: tensor[:, :JUDGED_LENGTH] for name, tensor in batch.items()}
