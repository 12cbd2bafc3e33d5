"""Quantizers that look at the weight only: ``rtn``, ``hqq`` and ``easyquant``.

Each takes a matrix [N, K] of any float dtype and works in float32. Relative Frobenius error over
the 37 linears of all-MiniLM-L6-v2 at 4 bits, with the stored bits per weight:

=====================  ===============  ===============  ===============
quantizer              group 32         group 64         per row
=====================  ===============  ===============  ===============
rtn                    0.0899 at 4.500  0.1011 at 4.250  0.1379 at 4.031
rtn, asymmetric        0.0831 at 4.625  0.0951 at 4.313  0.1336 at 4.047
rtn, search            0.0862 at 4.500  0.0962 at 4.250  0.1187 at 4.031
rtn, asym., search     0.0804 at 4.625  0.0913 at 4.313  0.1174 at 4.047
hqq                    0.0765 at 5.000  0.0901 at 4.500  0.1318 at 4.063
easyquant, 3 sigma     0.0762 at 4.950  0.0832 at 4.700  0.0939 at 4.482
easyquant, 4 sigma     0.0822 at 4.581  0.0910 at 4.331  0.1059 at 4.113
=====================  ===============  ===============  ===============

At equal bits easyquant leads RTN once its outliers are few enough for the group (3.5 sigma and
group 64: 0.0881 at 4.433); hqq only ties with it (0.0901 against 0.0899 at 4.500), since its real
zero points take 16 bits a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.ops.pack import check_format
from ...ir.ops.sparse_linear import index_dtype
from .quantized import Outliers, Quantized

SMALLEST_SCALE = {torch.float16: 2.0**-14, torch.float32: 2.0**-126}
"""Smallest normal number of each dtype that scales are stored in; no scale lies below it."""
CHUNK = 1 << 22
"""Elements worked on at a time: a search holds about six float32 copies of them."""

Fit = Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]
"""Groups [rows, groups, B] to codes of that shape, scales and zeros [rows, groups, 1]."""
Solver = Literal["als", "adam"]


def rtn(
    weight: Tensor,
    bits: int,
    group: int,
    symmetric: bool = True,
    mse_search: bool = False,
    *,
    scale_dtype: torch.dtype = torch.float16,
    name: str = "weight",
) -> Quantized:
    """Round to nearest in each group of ``group`` columns (0: the row).

    ``symmetric``: ``scale = -e / 2^(bits-1)``, e the element of largest magnitude, so that it has
    code 0 and no error. Over MiniLM's 37 linears this beats max|w| / 2^(bits-1), which clips a
    positive extreme (4 bits, group 32: relative error 0.0899 against 0.0983; max|w| / 7.5 0.0995,
    / 7 0.1017), at 2, 3, 4 and 8 bits and every group size. Otherwise the range from the least to
    the greatest element, 0 included, with an integer zero point.
    ``mse_search`` shrinks the range to the fraction 1, 0.99, ... 0.21 that gives the least
    ``sum |error|^2.4``, group by group (the search of GPTQ's quantizer, arXiv 2210.17323).

    Scales are rounded to ``scale_dtype`` (float16 or float32) before codes are chosen. Float16
    becomes float32 for a matrix whose values would suffer from its range; a group that is too small
    for its scale's dtype alone is coded as zeros.
    Raises ``BadInput`` on a format without storage form and on NaN or infinite weights.
    """
    weight = _checked(weight, bits, group, name)
    dtype = _scale_dtype(weight, bits, group, scale_dtype)

    def fit(x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        fractions = [1 - i / 100 for i in range(80)] if mse_search else [1.0]
        best: list[Tensor] = []
        for fraction in fractions:
            scale, zero = _range(x, bits, symmetric, fraction, dtype)
            codes = _codes(x, scale, zero, bits)
            loss = ((codes - zero) * scale - x).abs_().pow_(2.4).sum(-1, keepdim=True)
            _keep_best(best, [loss, scale, zero, codes])
        _, scale, zero, codes = best
        return codes, scale, None if symmetric else zero

    return _quantized(weight, fit, bits, group, dtype, integer_zeros=True)


def hqq(
    weight: Tensor,
    bits: int,
    group: int,
    iters: int = 20,
    beta: float = 10.0,
    p: float = 0.7,
    round_zero: bool = False,
    *,
    scale_dtype: torch.dtype = torch.float16,
    name: str = "weight",
) -> Quantized:
    """Half-quadratic quantization: fit zero points under an l_p error, p < 1 (Mobius Labs, 2023).

    ``e = shrink(w - q(w))`` with ``shrink(x) = sign(x) max(0, |x| - |x|^(p-1) / beta)``, then
    ``zero = mean over the group of (code - (w - e) / scale)``; the scale is that of the range.
    Of all iterates, the start among them, each group keeps the one of least mean |error|. Zero
    points are real unless ``round_zero``. Other parameters and errors as in ``rtn``.
    """
    weight = _checked(weight, bits, group, name)
    dtype = _scale_dtype(weight, bits, group, scale_dtype)
    valid = _valid(weight, group)

    def fit(x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        scale, zero = _range(x, bits, False, 1.0, dtype, real=True)
        best: list[Tensor] = []
        for _ in range(iters + 1):
            zero = zero.round().clamp_(0, (1 << bits) - 1) if round_zero else zero.to(dtype).float()
            codes = _codes(x, scale, zero, bits)
            error = x - (codes - zero) * scale
            _keep_best(best, [error.abs().sum(-1, keepdim=True), zero, codes])
            size = error.abs()
            shrunk = error.sign() * (size - size.clamp_min(1e-12).pow(p - 1) / beta).clamp_min_(0)
            zero = ((codes - (x - shrunk) / scale) * valid).sum(-1, keepdim=True) / valid.sum(
                -1, keepdim=True
            )
        _, zero, codes = best
        return codes, scale, zero

    return _quantized(weight, fit, bits, group, dtype, integer_zeros=round_zero)


def easyquant(
    weight: Tensor,
    bits: int,
    group: int = 0,
    nsig: float = 3.0,
    per_row_stats: bool = False,
    solver: Solver = "als",
    *,
    scale_dtype: torch.dtype = torch.float16,
    name: str = "weight",
) -> Quantized:
    """Keep outliers as they are and fit the scale of the rest (EasyQuant, arXiv 2403.02775).

    Outliers are entries with ``|w - mean| >= nsig * std`` over the matrix, or over their row with
    ``per_row_stats``. They hold the code of zero and go, in the dtype of ``weight``, to a side path
    (``sparse_linear``): 0 + w is w to the last bit.

    The scale of the rest minimises ``sum (q(w) - w)^2``. ``als``: the best of 29 fractions from 1
    to 0.3 of the symmetric range, then ``code = round(w / scale)`` and
    ``scale = sum(w code) / sum(code^2)`` in turn, ten times, the best iterate kept. ``adam``: the
    paper's gradient ``2 sum (q(w) - w) code``, 200 steps of rate 1e-3 on the scale relative to its
    start; on MiniLM it errs 1 % more and takes ten times as long.
    Other parameters and errors as in ``rtn``; an unknown ``solver`` is a ``BadInput`` too.
    """
    weight = _checked(weight, bits, group, name)
    dtype = _scale_dtype(weight, bits, group, scale_dtype)
    if solver not in _SOLVERS:
        raise BadInput(f"solver={solver!r}: it is one of {', '.join(_SOLVERS)}")
    over = [1] if per_row_stats else [0, 1]
    wide = weight.float()
    spread = wide.std(over, correction=0, keepdim=True)
    outlying = (wide - wide.mean(over, keepdim=True)).abs() >= nsig * spread
    # A constant matrix has no outliers, though each entry is 0 deviations from the mean.
    outlying &= spread > 0
    inliers = torch.where(outlying, 0.0, wide)

    def fit(x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        middle = 1 << (bits - 1)
        scale, _ = _range(x, bits, True, 1.0, dtype)
        scale = _SOLVERS[solver](x, scale, bits, dtype)
        return _codes(x, scale, float(middle), bits), scale, None

    result = _quantized(inliers, fit, bits, group, dtype, integer_zeros=True)
    rows, cols = outlying.nonzero(as_tuple=True)
    kept = Outliers(
        rows.to(index_dtype(weight.shape[0])),
        cols.to(index_dtype(weight.shape[1])),
        weight[rows, cols],
    )
    return Quantized(result.codes, result.scales, None, kept, bits, group)


def _als(x: Tensor, start: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    best: list[Tensor] = []
    for fraction in torch.linspace(1.0, 0.3, 29).tolist():
        scale = _storable(start * fraction, dtype)
        _keep_best(best, [_loss(x, scale, bits), scale])
    scale = best[1]
    for _ in range(10):
        steps = _codes(x, scale, float(1 << (bits - 1)), bits) - (1 << (bits - 1))
        energy = (steps * steps).sum(-1, keepdim=True)
        fitted = (x * steps).sum(-1, keepdim=True) / energy.clamp_min(1)
        scale = _storable(torch.where(energy > 0, fitted, scale), dtype)
        _keep_best(best, [_loss(x, scale, bits), scale])
    return best[1]


def _adam(x: Tensor, start: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    ratio = torch.ones_like(start, requires_grad=True)
    adam = torch.optim.Adam([ratio], lr=1e-3)
    best = [_loss(x, start, bits), start]
    for _ in range(200):
        ratio.grad = scale_gradient(x, start * ratio.detach(), bits) * start
        adam.step()
        scale = _storable(start * ratio.detach(), dtype)
        _keep_best(best, [_loss(x, scale, bits), scale])
    return best[1]


_SOLVERS: dict[str, Callable[[Tensor, Tensor, int, torch.dtype], Tensor]] = {
    "als": _als,
    "adam": _adam,
}


def scale_gradient(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """``d/ds sum (q(x) - x)^2 = 2 sum (q(x) - x) code`` over the last dimension, codes fixed."""
    middle = 1 << (bits - 1)
    steps = _codes(x, scale, float(middle), bits) - middle
    return 2 * ((steps * scale - x) * steps).sum(-1, keepdim=True)


def _loss(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    middle = 1 << (bits - 1)
    steps = _codes(x, scale, float(middle), bits) - middle
    return (steps * scale - x).square_().sum(-1, keepdim=True)


def _keep_best(best: list[Tensor], candidate: list[Tensor]) -> None:
    """Take over, group by group, the candidate where its first tensor, the loss, is lower."""
    if not best:
        best.extend(candidate)
        return
    better = candidate[0] < best[0]
    best[:] = [torch.where(better, new, old) for new, old in zip(candidate, best, strict=True)]


def _codes(x: Tensor, scale: Tensor, zero: Tensor | float, bits: int) -> Tensor:
    return (x / scale).add_(zero).round_().clamp_(0, (1 << bits) - 1)


def _range(
    x: Tensor, bits: int, symmetric: bool, fraction: float, dtype: torch.dtype, real: bool = False
) -> tuple[Tensor, Tensor]:
    """Scale and zero point [rows, groups, 1] of a fraction of each group's range."""
    top = (1 << bits) - 1
    if symmetric:
        extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True)) * fraction
        scale = _storable(-extreme / (1 << (bits - 1)), dtype)
        return scale, torch.full_like(scale, 1 << (bits - 1))
    low = x.amin(-1, keepdim=True).clamp_max_(0) * fraction
    high = x.amax(-1, keepdim=True).clamp_min_(0) * fraction
    scale = _storable((high - low) / top, dtype)
    zero = -low / scale
    return scale, zero if real else zero.round_().clamp_(0, top)


def _storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales rounded to a dtype, none of them 0 or denormal; an all-zero group gets the least."""
    least = SMALLEST_SCALE[dtype]
    raised = torch.where(scale < 0, scale.clamp_max(-least), scale.clamp_min(least))
    return raised.to(dtype).float()


def _scale_dtype(weight: Tensor, bits: int, group: int, wanted: torch.dtype) -> torch.dtype:
    """``wanted``, or float32 where float16 scales would cost accuracy.

    A float16 scale raised to its floor, 2^-14, moves a weight by 2^-15 at most; that passes where
    it is below 2^-12 of the greatest weight.
    """
    if wanted not in SMALLEST_SCALE:
        raise BadInput(f"scales are stored as float16 or float32, not {wanted}")
    if wanted == torch.float32 or not weight.numel():
        return wanted
    extremes = _blocks(weight, group).abs().amax(-1)
    greatest = float(extremes.max())
    floored = bool(((extremes > 0) & (extremes < 2.0**-14 * (1 << (bits - 1)))).any())
    if greatest > 6e4 or (floored and greatest < 2.0**-3):
        return torch.float32
    return torch.float16


def _checked(weight: Tensor, bits: int, group: int, name: str) -> Tensor:
    check_format(bits, group)
    if weight.dim() != 2 or not weight.is_floating_point():
        raise BadInput(
            f"{name}: a matrix of floats is quantized, not {weight.dtype} {list(weight.shape)}"
        )
    if not bool(torch.isfinite(weight).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise BadInput(
            f"{name}: {bad} of {weight.numel()} weights are NaN or infinite; "
            "exclude this weight or repair the checkpoint"
        )
    return weight.detach()


def _blocks(x: Tensor, group: int) -> Tensor:
    """[N, K] as [N, groups, B], the last group filled with zeros."""
    rows, columns = x.shape
    size = group or columns
    padded = torch.nn.functional.pad(x, (0, -columns % size if size else 0))
    return padded.reshape(rows, -1, size)


def _valid(weight: Tensor, group: int) -> Tensor:
    """1 at real columns, 0 at the filling of the last group: float32 [1, groups, B]."""
    return _blocks(torch.ones(1, weight.shape[1]), group)


def _quantized(
    weight: Tensor, fit: Fit, bits: int, group: int, dtype: torch.dtype, *, integer_zeros: bool
) -> Quantized:
    """Fit rows in chunks and put the results together."""
    columns = weight.shape[1]
    step = max(1, CHUNK // max(columns, 1))
    parts = [fit(_blocks(chunk.float(), group)) for chunk in torch.split(weight, step)]
    codes, scales, zeros = zip(*parts, strict=True)
    zero = None
    if zeros[0] is not None:
        zero = torch.cat([z.squeeze(-1) for z in zeros if z is not None])
        zero = zero.to(torch.uint8 if integer_zeros else dtype)
    return Quantized(
        torch.cat([c.flatten(1)[:, :columns].to(torch.uint8) for c in codes]),
        torch.cat([s.squeeze(-1) for s in scales]).to(dtype),
        zero,
        None,
        bits,
        group,
    )
