"""``dsnot``: another choice of zeros, by what each output is expected to lose."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.run.statistics import Mean, Square, Stat, Statistics
from ...ir.structure.recognize import Linear
from ..base import CHANGED, MASKED, STORED, Context, Needs, PassResult
from ..linear_pass import weight_of
from ..stored import Stored, relative_error
from .mask_pass import MaskingPass, Ratio, finite, with_note, with_zeros
from .wanda import wanda_scores

LARGEST_GROUP = 32
"""Groups of an ``N:M`` mask are looked for up to this size."""
_UNTOUCHED = "its weight is the source's own: there is no mask to refine"


@dataclass(frozen=True, kw_only=True)
class DSnoT(MaskingPass):
    """Swap zeros and weights of each row until its expected output is that of the dense row.

    DSnoT (Zhang et al. 2023, arXiv 2310.08915), on the mask that an earlier pass made: with the
    means ``mu`` and variances of the inputs, ``eps_i = sum_j (W - W^)_ij mu_j`` is what output i is
    expected to lose. Each of ``cycles`` swaps gives a row back the weight with the largest ``W_ij
    mu_j / var_j`` of the sign of ``eps_i``, and takes one whose loss has the other sign, by the
    lowest ``|W_ij| * ||x_j||`` (Wanda's). A swap has to bring ``|eps_i|`` down, no weight is
    swapped twice, and a row ends where ``|eps_i| <= tolerance * ||W_i|| * rms(x)``: the paper's 0.1
    is absolute, and has another meaning in each model. Where each M inputs of a row hold equally
    many zeros (2:4), the weight that is taken is one of the same M. Weights that stay are as the
    mask's pass left them, those that come back as they were in the source. The variance is that of
    all tokens; the published code averages those within sequences. Needs calibration data.
    """

    name: ClassVar[str] = "dsnot"
    provides: ClassVar[tuple[str, ...]] = (CHANGED,)
    excludes: ClassVar[tuple[str, ...]] = (STORED,)
    follows: ClassVar[tuple[str, ...]] = (MASKED,)
    needs: ClassVar[Needs] = Needs(
        stats=(Stat("mean", at="linear"), Stat("square", at="linear")), propagate="sequential"
    )
    cycles: int = 50
    """Most swaps in a row."""
    tolerance: float = 0.1
    """Expected loss of an output at which its row ends."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cycles < 1:
            raise BadInput(f"dsnot: cycles={self.cycles} must be at least 1")
        if not self.tolerance >= 0:
            raise BadInput(f"dsnot: tolerance={self.tolerance} must not be negative")

    def reason_against(self, context: Context, linear: Linear) -> str | None:
        reason = super().reason_against(context, linear)
        if reason is not None:
            return reason
        if linear.name not in context.original_linears:
            return "the source model has no linear of this name to take weights from"
        then, now = context.original_weight(linear), weight_of(context.view, linear)
        if now.shape != then.shape:
            return f"its weight is {list(now.shape)} and was {list(then.shape)} in the source"
        return _UNTOUCHED if now.key == then.key else None

    def foreseen(self, context: Context, changed: Container[str]) -> list[Linear]:
        def fits(linear: Linear) -> bool:
            reason = self.reason_against(context, linear)
            return reason is None or (reason is _UNTOUCHED and linear.name in changed)

        return [linear for linear in self.select(context.structure) if fits(linear)]

    def fitting(
        self, context: Context, chosen: Sequence[Linear]
    ) -> Callable[[Linear, Statistics], Stored]:
        return partial(self._refined, context)

    def _refined(self, context: Context, linear: Linear, statistics: Statistics) -> Stored:
        source = finite(context.original_weight(linear).read(), linear.name)
        current = weight_of(context.view, linear).read()
        mean, square = statistics[Mean], statistics[Square]
        sparse = refined(source, current, mean.mean, square, self.cycles, self.tolerance)
        stored = with_zeros(sparse, current)
        swapped = int(((sparse == 0) & (current != 0)).sum())
        note = f"{swapped} of {int((current == 0).sum())} zeros moved"
        return Stored(**{**vars(stored), "rel_l2": relative_error(source, sparse), "note": note})

    def plan(self, context: Context) -> PassResult:
        result = PassResult()
        for linear in self.select(context.structure):
            if linear.name in context.planned:
                result.sites.append(self.planned_site(context, linear))
            else:
                result.refused.append((linear.name, _UNTOUCHED))
        return with_note(result)


def refined(
    source: Tensor, current: Tensor, mean: Tensor, square: Square, cycles: int, tolerance: float
) -> Tensor:
    """``current [out, in]`` with zeros elsewhere, as many in each row; the dtype of ``current``."""
    swaps = _Swaps(source.float(), current.float(), mean, square, cycles)
    rms = (square.total.sum() / max(1, square.count * len(mean))).sqrt()
    bound = tolerance * torch.linalg.vector_norm(source.double(), dim=1) * rms
    for _ in range(cycles):
        if not swaps.once(bound):
            break
    return swaps.weight.to(current.dtype)


def group_of_mask(weight: Tensor) -> Ratio | None:
    """The least M such that each M inputs of a row hold equally many zeros; ``None`` for none."""
    zeros = weight == 0
    for group in range(2, LARGEST_GROUP + 1):
        if weight.shape[1] % group:
            continue
        counts = zeros.reshape(-1, group).sum(1)
        count = int(counts[0])
        if 0 < count < group and bool((counts == count).all()):
            return Ratio(group - count, group)
    return None


class _Swaps:
    """All rows of one matrix, each with what it may get back and what it may lose.

    Of each kind there are two orders, for rows that are expected to lose and for those that gain.
    """

    def __init__(
        self, source: Tensor, current: Tensor, mean: Tensor, square: Square, cycles: int
    ) -> None:
        self.source, self.weight, self.mean = source, current.clone(), mean
        self.ratio = group_of_mask(current)
        self.eps = ((source.double() - current.double()) * mean).sum(1)
        second = square.total / max(1, square.count)
        variance = second - mean.square()
        variance = variance.clamp_min(1e-12 * max(float(second.max()), 1e-30))
        self.free = current != 0
        """Weights that were kept and have not been taken."""
        self.candidates = min(cycles, int((~self.free).sum(1).max()))
        self.scores = wanda_scores(current, square)
        gain, loss = source * mean.float(), current * mean.float()
        per_variance = source * (mean / variance).float()
        back, gone = [], []
        for sign in (1, -1):
            # Those behind the first candidates are never reached.
            useful = ~self.free & (sign * gain > 0)
            back.append(_best(sign * per_variance, useful, self.candidates))
            spare = self.free & (sign * loss < 0)
            gone.append(_best(-self.scores, spare, self.candidates))
        self.back, self.gone = back, gone
        self.tried = torch.zeros(2, len(source), dtype=torch.long)
        self.taken = torch.zeros(2, len(source), dtype=torch.long)

    def once(self, bound: Tensor) -> bool:
        """Try a swap in each row whose expected loss is above ``bound``; whether there was one."""
        tried = False
        for side, sign in enumerate((1, -1)):
            above = (self.eps.abs() > bound) & (self.eps.sign() == sign)
            rows = torch.nonzero(above & (self.tried[side] < self.candidates))[:, 0]
            if len(rows):
                self._swap(rows, side)
                tried = True
        return tried

    def _swap(self, rows: Tensor, side: int) -> None:
        column = self.back[side][rows, self.tried[side][rows]]
        self.tried[side][rows] += 1
        taken = self._taken(rows, column, side)
        gain = self.source[rows, column].double() * self.mean[column]
        loss = self.weight[rows, taken].double() * self.mean[taken]
        after = self.eps[rows] - gain + loss
        fits = (column >= 0) & (taken >= 0) & (after.abs() < self.eps[rows].abs())
        rows, column, taken, after = rows[fits], column[fits], taken[fits], after[fits]
        self.weight[rows, column] = self.source[rows, column]
        self.weight[rows, taken] = 0
        self.free[rows, taken] = False
        self.taken[side][rows] += 1
        self.eps[rows] = after

    def _taken(self, rows: Tensor, column: Tensor, side: int) -> Tensor:
        """The weight that goes in each row; -1 for none."""
        if self.ratio is None:
            place = self.taken[side][rows]
            return self.gone[side][rows, place]
        start = column.clamp_min(0) // self.ratio.group * self.ratio.group
        block = start[:, None] + torch.arange(self.ratio.group)
        lines = rows[:, None]
        scores = torch.where(self.free[lines, block], self.scores[lines, block], torch.inf)
        least, index = scores.min(1)
        return torch.where(torch.isfinite(least), start + index, -1)


def _best(scores: Tensor, where: Tensor, count: int) -> Tensor:
    """Columns ``[rows, count]`` of the highest scores that are allowed, in order; then -1."""
    allowed = torch.where(where, scores, -torch.inf)
    values, columns = allowed.topk(count, dim=1)
    return torch.where(torch.isfinite(values), columns, -1)
