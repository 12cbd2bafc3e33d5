"""Weights to codes: the algorithms behind the weight passes, as functions of one matrix.

All take W [N, K] and compute in float32. Groups run along K; ``group`` 0 is one group per row. A
last group that K does not fill is fitted to the weights that are there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..ir.errors import BadInput

_TINY = 1e-12
"""Least scale: a group of zeros must not divide by zero. How a scale is stored is not decided here."""


@dataclass(frozen=True)
class Quantized:
    """``W ≈ (codes - zeros) * scales``, and where weights are kept exactly instead."""

    codes: Tensor
    """uint8 [N, K]"""
    scales: Tensor
    """float32 [N, groups]"""
    zeros: Tensor | None
    """uint8 (integer) or float32 (real) [N, groups]; ``None``: the middle code, 2^(bits-1)."""
    outliers: Tensor | None = None
    """bool [N, K]: weights that a side path restores."""


class _Groups:
    """W cut into groups: ``values`` [N, groups, size], ``mask`` False on the padding."""

    def __init__(self, weight: Tensor, group: int) -> None:
        if weight.dim() != 2 or weight.numel() == 0:
            raise BadInput(f"a matrix is needed, not a tensor of shape {list(weight.shape)}")
        if not bool(torch.isfinite(weight).all()):
            count = int((~torch.isfinite(weight)).sum())
            raise BadInput(f"the weight holds {count} values that are not finite (NaN or Inf)")
        self.rows, self.columns = weight.shape
        size = group or self.columns
        count = -(-self.columns // size)
        pad = (0, count * size - self.columns)
        self.values = torch.nn.functional.pad(weight.float(), pad).reshape(self.rows, count, size)
        self.mask = torch.nn.functional.pad(
            torch.ones(1, self.columns, dtype=torch.bool), pad, value=False
        ).reshape(1, count, size)

    def flat(self, grouped: Tensor) -> Tensor:
        return grouped.reshape(self.rows, -1)[:, : self.columns].contiguous()

    def span(self) -> tuple[Tensor, Tensor]:
        """Least and greatest weight of each group, 0 included: [N, groups, 1]."""
        low = self.values.masked_fill(~self.mask, 0.0).amin(-1, keepdim=True)
        high = self.values.masked_fill(~self.mask, 0.0).amax(-1, keepdim=True)
        return low.clamp(max=0.0), high.clamp(min=0.0)


def rtn(
    weight: Tensor, bits: int, group: int, symmetric: bool = True, *, mse_search: bool = False
) -> Quantized:
    """Round to nearest. Asymmetric: ``scale = (max - min) / (2^b - 1)``, ``zero = round(-min/scale)``.

    Symmetric: the extreme weight of a group lies on the lowest code, ``scale = -extreme / 2^(b-1)``
    with its sign, so that all 2^b codes serve. ``mse_search`` shrinks the range in 80 steps of 1 %
    to the least ``sum |error|^2.4`` (GPTQ's quantizer, arXiv 2210.17323). Raises ``BadInput`` on
    weights that are not finite.
    """
    groups = _Groups(weight, group)
    scales, zeros = _range(groups, bits, symmetric)
    if mse_search:
        scales, zeros = _search(groups, bits, symmetric, scales, zeros)
    codes = _encode(groups.values, scales, zeros, bits)
    integer = None if symmetric else zeros.squeeze(-1).to(torch.uint8)
    return Quantized(groups.flat(codes).to(torch.uint8), scales.squeeze(-1), integer)


def _range(groups: _Groups, bits: int, symmetric: bool, p: float = 1.0) -> tuple[Tensor, Tensor]:
    low, high = groups.span()
    if symmetric:
        extreme = torch.where(high > -low, high, low)
        scales = _floor(-extreme * p / (1 << (bits - 1)))
        return scales, torch.full_like(scales, float(1 << (bits - 1)))
    scales = _floor((high - low) * p / ((1 << bits) - 1))
    zeros = torch.round(-low * p / scales).clamp(0, (1 << bits) - 1)
    return scales, zeros


def _floor(scales: Tensor) -> Tensor:
    sign = torch.where(scales < 0, -1.0, 1.0)
    return sign * scales.abs().clamp_min(_TINY)


def _encode(values: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    return torch.round(values / scales + zeros).clamp(0, (1 << bits) - 1)


def _search(
    groups: _Groups, bits: int, symmetric: bool, scales: Tensor, zeros: Tensor
) -> tuple[Tensor, Tensor]:
    best = _power_error(groups, scales, zeros, bits)
    for i in range(1, 80):
        trial_scales, trial_zeros = _range(groups, bits, symmetric, 1 - i / 100)
        error = _power_error(groups, trial_scales, trial_zeros, bits)
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, trial_scales, scales)
        zeros = torch.where(better, trial_zeros, zeros)
    return scales, zeros


def _power_error(groups: _Groups, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    gap = (_encode(groups.values, scales, zeros, bits) - zeros) * scales - groups.values
    return gap.abs().pow(2.4).mul(groups.mask).sum(-1, keepdim=True)


def hqq(
    weight: Tensor, bits: int, group: int, *, iters: int = 20, beta: float = 10.0, p: float = 0.7,
    round_zero: bool = False,
) -> Quantized:  # fmt: skip
    """Real zero points by half-quadratic splitting (HQQ, mobiusml.github.io/hqq_blog).

    ``E = sign(D) relu(|D| - |D|^(p-1) / beta)`` with ``D = W - W_r``; then
    ``zero = mean(codes - (W - E) / scale)`` over the group. Stops when ``mean |D|`` no longer falls
    and keeps the best round.
    """
    groups = _Groups(weight, group)
    low, high = groups.span()
    scales = _floor((high - low) / ((1 << bits) - 1))
    zeros = -low / scales
    zeros = torch.round(zeros) if round_zero else zeros
    count = groups.mask.sum(-1, keepdim=True)
    best, best_error = zeros, _mean_error(groups, scales, zeros, bits)
    for _ in range(iters):
        codes = _encode(groups.values, scales, zeros, bits)
        gap = groups.values - (codes - zeros) * scales
        size = gap.abs()
        shrunk = gap.sign() * torch.relu(size - size.clamp_min(1e-12).pow(p - 1) / beta)
        target = codes - (groups.values - shrunk) / scales
        zeros = (target * groups.mask).sum(-1, keepdim=True) / count
        zeros = torch.round(zeros).clamp(0, (1 << bits) - 1) if round_zero else zeros
        error = _mean_error(groups, scales, zeros, bits)
        better = error < best_error
        if not bool(better.any()):
            break
        best = torch.where(better, zeros, best)
        best_error = torch.where(better, error, best_error)
    codes = groups.flat(_encode(groups.values, scales, best, bits)).to(torch.uint8)
    kept = best.squeeze(-1)
    return Quantized(codes, scales.squeeze(-1), kept.to(torch.uint8) if round_zero else kept)


def _mean_error(groups: _Groups, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    gap = (_encode(groups.values, scales, zeros, bits) - zeros) * scales - groups.values
    return gap.abs().mul(groups.mask).sum(-1, keepdim=True)


def easyquant(
    weight: Tensor, bits: int, group: int = 0, nsig: float = 3.0, *, per_row_stats: bool = False,
    solver: Literal["als", "adam"] = "als", steps: int = 500, rate: float = 1e-4,
) -> Quantized:  # fmt: skip
    """Outliers kept, the range of the rest fitted (EasyQuant, arXiv 2403.02775).

    Outliers are weights at least ``nsig`` standard deviations from the mean, of the matrix or of
    their row. The scale of the others minimises ``||Q(w) - w||²``: a grid of [0.3, 1] times the
    absolute maximum, then alternating exact steps ``scale = sum(w c) / sum(c²)``; or the paper's
    Adam on ``d/ds = 2 sum (Q(w) - w) c``. The start is one of the candidates, so the error never
    rises.
    """
    groups = _Groups(weight, group)
    dims = (1,) if per_row_stats else (0, 1)
    wide = weight.float()
    spread = wide.std(dims, keepdim=True, correction=0)
    outliers = (wide - wide.mean(dims, keepdim=True)).abs() >= nsig * spread.clamp_min(1e-30)
    inner = _Groups(wide.masked_fill(outliers, 0.0), group)
    low, high = inner.span()
    middle = float(1 << (bits - 1))
    start = _floor(torch.maximum(high, -low) / (middle - 1))
    if solver == "adam":
        scales = _adam(inner, start, bits, steps, rate)
    else:
        scales = _als(inner, start, bits)
    codes = _encode(inner.values, scales, torch.full_like(scales, middle), bits)
    return Quantized(groups.flat(codes).to(torch.uint8), scales.squeeze(-1), None, outliers)


def _signed_codes(values: Tensor, scales: Tensor, bits: int) -> Tensor:
    half = 1 << (bits - 1)
    return torch.round(values / scales).clamp(-half, half - 1)


def _square_error(groups: _Groups, scales: Tensor, bits: int) -> Tensor:
    gap = _signed_codes(groups.values, scales, bits) * scales - groups.values
    return gap.square().sum(-1, keepdim=True)


def _als(groups: _Groups, start: Tensor, bits: int, rounds: int = 20) -> Tensor:
    best, best_error = start, _square_error(groups, start, bits)

    def offer(scales: Tensor) -> bool:
        nonlocal best, best_error
        error = _square_error(groups, scales, bits)
        better = error < best_error
        best, best_error = torch.where(better, scales, best), torch.where(better, error, best_error)
        return bool(better.any())

    for i in range(36):
        offer(_floor(start * (0.3 + 0.02 * i)))
    for _ in range(rounds):
        codes = _signed_codes(groups.values, best, bits)
        square = codes.square().sum(-1, keepdim=True)
        exact = (groups.values * codes).sum(-1, keepdim=True) / square.clamp_min(1.0)
        if not offer(torch.where(square > 0, _floor(exact), best)):
            break
    return best


def _adam(groups: _Groups, start: Tensor, bits: int, steps: int, rate: float) -> Tensor:
    scales = start.clone()
    best, best_error = start, _square_error(groups, start, bits)
    first, second = torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, steps + 1):
        gradient = scale_gradient(groups.values, scales, bits)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient.square()
        mean, variance = first / (1 - 0.9**step), second / (1 - 0.999**step)
        scales = _floor(scales - rate * mean / (variance.sqrt() + 1e-8))
        error = _square_error(groups, scales, bits)
        better = error < best_error
        best, best_error = torch.where(better, scales, best), torch.where(better, error, best_error)
    return best


def scale_gradient(values: Tensor, scales: Tensor, bits: int) -> Tensor:
    """``d/ds sum (s c - w)²`` with the codes held fixed: ``2 sum (s c - w) c`` [..., 1]."""
    codes = _signed_codes(values, scales, bits)
    return 2 * ((codes * scales - values) * codes).sum(-1, keepdim=True)
