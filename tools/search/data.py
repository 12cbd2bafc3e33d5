"""Calibration data in two parts: what candidates are fitted to, and what they are judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ...ir.core.view import View
from ...ir.run.batches import batches_sha256
from ..data.calibration import SAMPLES, read
from ..data.text import BEGINNINGS

Batch = Mapping[str, torch.Tensor]
JUDGE_EVERY = 2
"""Each second batch is kept for judging: to tell recipes apart takes as many rows as to fit one."""
JUDGED = 384
"""Samples of named data, behind those that are fitted to, that recipes are judged by."""
TOKENS = 16384, 16384, 1024, 8
"""Tokens, or rows of data without any, that are fitted to, judged by and probed with at most; and
rows that are judged by and probed with at least, however many tokens they are: those of an image
are hundreds, and what is compared is the text behind it."""
LARGE = 5e8
"""Numbers in all weights from which a model is large: 16384 tokens through it take minutes."""
LARGE_TOKENS = 2048, 512, 256, 2
"""As ``TOKENS``, of a large model."""
SURE_TOKENS = 4096
"""Tokens that are judged by at least, whatever the model's outputs weigh."""
NUMBERS = 1 << 26
"""Numbers of outputs to which more tokens than those are judged: 256 MiB."""
JUDGED_LENGTH = 128
"""Tokens that texts are cut to where they are judged: more texts say more than longer ones."""


@dataclass(frozen=True)
class Parts:
    """Batches for fitting, and for judging."""

    fit: Sequence[Batch]
    judge: Sequence[Batch]
    shared: bool = False
    """Whether the data are one row, which is both fitted to and judged by."""
    large: bool = False
    """Whether the model is, so that a forecast has to do with less."""

    @property
    def probe(self) -> Sequence[Batch]:
        """Of the rows that are judged by, few, for what is asked often. Nothing was fitted to them:
        what stands in for heads that go, or for halves of blocks, hides what it was fitted to."""
        *_, probing, rows = LARGE_TOKENS if self.large else TOKENS
        return _limited(self.judge, probing, rows)


def unfitted(
    spec: str, view: View, fitted: Sequence[Batch], length: int | None = None,
    windows: str = BEGINNINGS,
) -> list[Batch]:  # fmt: skip
    """What lies behind the first batches of the named data, which are fitted to: nothing where the
    data end there, or come in another order where more of them are read."""
    more = read(spec, view, samples=SAMPLES + JUDGED, length=length, windows=windows).batches
    count = len(fitted)
    if len(more) <= count or batches_sha256(more[:count]) != batches_sha256(fitted):
        return []
    return [*more[count:]]


def parts(view: View, batches: Sequence[Batch], judged: Sequence[Batch] = ()) -> Parts:
    """The parts of some data, which depend on nothing but the data and the model's size.

    All of ``batches`` are for fitting where there are others to judge by. Else each second one is
    judged by, and of the rest what is more than is fitted to.
    """
    fit, judge, shared = ([*batches], [*judged], False) if judged else _split(batches)
    large = sum(weight.numel for weight in view.weights().values()) >= LARGE
    fitting, judging, _, rows = LARGE_TOKENS if large else TOKENS
    if not large:
        judging = min(judging, max(SURE_TOKENS, NUMBERS // _width(view)))
    fitted = _limited(fit, fitting)
    judge = [_cut(view, batch) for batch in (*judge, *fit[len(fitted) :])]
    return Parts(fitted, _limited(judge, judging, rows), shared, large)


def _split(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch], bool]:
    """What is fitted to and what is judged by, and whether that is one row."""
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
    return fit, judge, shared


def _width(view: View) -> int:
    """Numbers of a token, or a row, in the widest output."""
    ends = [shape[-1] for value in view.outputs() if (shape := view.type(value).shape)]
    return max((end for end in ends if isinstance(end, int)), default=1)


def _rows(batch: Batch) -> int:
    sizes = [tensor.shape[0] for tensor in batch.values() if tensor.dim()]
    return sizes[0] if sizes and len(set(sizes)) == 1 else 1


def _part(batch: Batch, rows: slice) -> dict[str, torch.Tensor]:
    return {n: t[rows] if t.dim() and _rows(batch) > 1 else t for n, t in batch.items()}


def _tokens(batch: Batch) -> int:
    ids = batch.get("input_ids")
    return _rows(batch) if ids is None else ids.numel()


def _limited(batches: Sequence[Batch], tokens: int, least: int = 1) -> list[Batch]:
    """The first batches, up to so many tokens together; the last one cut, ``least`` rows in all, if
    there are so many."""
    kept: list[Batch] = []
    for batch in batches:
        room = tokens - sum(map(_tokens, kept))
        rows = _rows(batch)
        lacking = least - sum(map(_rows, kept))
        fitting = min(rows, max(lacking, room * rows // _tokens(batch)))
        if fitting < 1:
            break
        whole = fitting == rows or rows == 1
        kept.append(batch if whole else _part(batch, slice(0, fitting)))
    return kept


def _cut(view: View, batch: Batch) -> Batch:
    """The first tokens of texts, where the batch is nothing but texts of a length that is free; a
    text that is padded on the left is left whole."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    declared = view.input_types()
    if ids is None or any(tensor.shape != ids.shape for tensor in batch.values()):
        return batch
    if any(isinstance(declared[n].shape[1], int) for n in batch if declared[n].shape):  # type: ignore[index]
        return batch
    if mask is not None and not bool(mask[:, 0].all()):
        return batch
    return {name: tensor[:, :JUDGED_LENGTH] for name, tensor in batch.items()}
