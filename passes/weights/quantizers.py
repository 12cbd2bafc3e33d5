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
hqq                    0.0765 at 5.000  0.0901 at 4.500  0.1317 at 4.063
easyquant, 3 sigma     0.0762 at 4.950  0.0832 at 4.700  0.0939 at 4.482
easyquant, 4 sigma     0.0822 at 4.581  0.0910 at 4.331  0.1059 at 4.113
=====================  ===============  ===============  ===============

At equal bits easyquant leads RTN once its outliers are few enough for the group (3.5 sigma and
group 64: 0.0881 at 4.433); hqq only ties with it (0.0901 against 0.0899 at 4.500), since its real
zero points take 16 bits a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.core.one_thread import one_thread
from ...ir.ops.pack import check_format, pack, pack_zeros, rows_in_cache
from ...ir.ops.sparse_linear import index_dtype
from .quantized import Outliers, Quantized

SMALLEST_SCALE = {torch.float16: 2.0**-14, torch.float32: 2.0**-126}
"""Smallest normal number of each dtype that scales are stored in; no scale lies below it."""
Fit = Callable[["Groups", torch.dtype], tuple[Tensor, Tensor, Tensor | float]]
"""Groups and the dtype of scales to codes [rows, groups, B], scales and zeros [rows, groups, 1], or
one zero for all of them; float32, integer zeros whole numbers."""
_SEARCHED = [1 - i / 100 for i in range(80)]
_POWER = 2.4
"""What ``mse_search`` tries, and how it counts an error."""
Solver = Literal["als", "adam"]


@dataclass(frozen=True)
class Groups:
    """Some rows of a matrix, group by group, the last group filled with zeros."""

    x: Tensor
    """float32 [rows, groups, B]."""
    low: Tensor
    """The least element of each group [rows, groups, 1]; ``high`` the greatest."""
    high: Tensor

    @classmethod
    def of(cls, rows: Tensor, group: int) -> Groups:
        x = _grouped(rows, group)
        return cls(x, x.amin(-1, keepdim=True), x.amax(-1, keepdim=True))

    def magnitude(self) -> Tensor:
        """The largest ``|x|`` of each group; NaN where it holds one."""
        return torch.maximum(self.high, -self.low)

    def extreme(self) -> Tensor:
        """The element of largest magnitude, the first of several.

        By ``argmax`` only where ``-low = high``: it takes as long as all else that is done.
        """
        lowest = -self.low
        extreme = torch.where(self.high > lowest, self.high, self.low)
        tied = (self.high == lowest).squeeze(-1)
        if bool(tied.any()):
            few = self.x[tied]
            extreme[tied] = few.gather(-1, few.abs().argmax(-1, keepdim=True))
        return extreme


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
    ``sum |error|^2.4``, group by group (the search of GPTQ's quantizer, arXiv 2210.17323). At 2
    bits it tries both whole zero points beside the real one: three steps hold half of one ill.

    Scales are rounded to ``scale_dtype`` (float16 or float32) before codes are chosen. Float16
    becomes float32 for a matrix whose values would suffer from its range; a group that is too small
    for its scale's dtype alone is coded as zeros.
    Raises ``BadInput`` on a format without storage form and on NaN or infinite weights.
    """

    fit = _nearest(bits, symmetric, mse_search)
    _check(weight, bits, group, name)
    return _Coding(weight, fit, bits, group, name).run(scale_dtype)


def rounded(
    weight: Tensor, bits: int, group: int, symmetric: bool, *, scale_dtype: torch.dtype, name: str
) -> Tensor:
    """What ``rtn`` stands for, f32: nothing is packed, for those who try many weights."""
    coding = _Coding(weight, _nearest(bits, symmetric, False), bits, group, name)
    return coding.dense(scale_dtype)


def _nearest(bits: int, symmetric: bool, mse_search: bool) -> Fit:
    def fit(groups: Groups, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | float]:
        fractions = _candidates(_SEARCHED) if mse_search else 1.0
        zero: Tensor | float
        if symmetric:
            scale, zero = _symmetric(groups.extreme() * fractions, bits, dtype)
        else:
            low, high = groups.low.clamp_max(0) * fractions, groups.high.clamp_min(0) * fractions
            scale, real = _asymmetric(low, high, bits, dtype)
            zero = real.round().clamp_(0, (1 << bits) - 1)
            if mse_search and bits == 2:
                other = (2 * real.floor()).add_(1).sub_(zero).clamp_(0, 3)
                scale, zero = torch.cat([scale, scale]), torch.cat([zero, other])
        if mse_search:
            scale, zero = _least_loss(groups.x, scale, zero, bits, _POWER)
        return codes_of(groups.x, scale, zero, bits), scale, zero

    return fit


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
    points are real unless ``round_zero``: float32 until the end, and where it starts better the
    range leaves 0 out, as groups of one sign want it. Other parameters and errors as in ``rtn``.
    """
    _check(weight, bits, group, name)
    valid = _grouped(torch.ones(1, weight.shape[-1]), group)

    def fit(groups: Groups, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | float]:
        x = groups.x
        scale, zero = _asymmetric(
            groups.low.clamp_max(0), groups.high.clamp_min(0), bits, dtype
        )
        if not round_zero:
            # A real zero point lets a range leave 0 out, unless float16 holds it too coarsely.
            tight, far = _asymmetric(groups.low, groups.high, bits, dtype)
            scales, zeros = torch.stack([tight, scale]), torch.stack([far, zero])
            scale, picked = _least_loss(x, scales, _rounded_zeros(zeros, dtype), bits, 1)
            zero = torch.as_tensor(picked)
        best: list[Tensor] = []
        for _ in range(iters + 1):
            if round_zero:
                zero = zero.round().clamp_(0, (1 << bits) - 1)
            codes = codes_of(x, scale, zero, bits)
            error = x - (codes - zero).mul_(scale)
            size = error.abs()
            _keep_best(best, [size.sum(-1, keepdim=True), zero])
            least = size.clamp_min(1e-12).pow_(p - 1).div_(beta)
            shrunk = error.sign_().mul_(size.sub_(least).clamp_min_(0))
            rest = codes.sub_((x - shrunk).div_(scale)).mul_(valid)
            zero = rest.sum(-1, keepdim=True) / valid.sum(-1, keepdim=True)
        zero = best[1] if round_zero else _rounded_zeros(best[1], dtype)
        return codes_of(x, scale, zero, bits), scale, zero

    return _Coding(weight, fit, bits, group, name, real_zeros=not round_zero).run(scale_dtype)


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
    if solver not in _SOLVERS:
        raise BadInput(f"solver={solver!r}: it is one of {', '.join(_SOLVERS)}")
    _check(weight, bits, group, name)
    matrix = None if per_row_stats else _spread(weight.float(), [0, 1])

    def outlying(rows: Tensor) -> Tensor:
        return _outlying(rows, matrix, nsig)

    def fit(groups: Groups, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | float]:
        scale, zero = _symmetric(groups.extreme(), bits, dtype)
        scale = _SOLVERS[solver](groups.x, scale, bits, dtype)
        return codes_of(groups.x, scale, zero, bits), scale, zero

    # A hundred small ops on each block: 14 M weights/s on one thread, 21 in blocks of this size.
    result = _Coding(weight, fit, bits, group, name, outlying=outlying, times=4).run(scale_dtype)
    mask = torch.cat([outlying(rows.float()) for rows in _split(weight)])
    rows, cols = mask.nonzero(as_tuple=True)
    outliers = Outliers(
        rows.to(index_dtype(weight.shape[0])),
        cols.to(index_dtype(weight.shape[1])),
        weight[rows, cols].detach(),
    )
    return replace(result, outliers=outliers)


def inliers(weight: Tensor, nsig: float, per_row_stats: bool) -> Tensor:
    """A matrix f32 with 0 where ``easyquant`` keeps a weight as it is."""
    matrix = None if per_row_stats else _spread(weight, [0, 1])
    return weight.masked_fill(_outlying(weight, matrix, nsig), 0.0)


def _outlying(rows: Tensor, matrix: tuple[Tensor, Tensor] | None, nsig: float) -> Tensor:
    """Entries ``nsig`` deviations from the mean, of the matrix or of their row."""
    mean, spread = _spread(rows, [1]) if matrix is None else matrix
    # A constant matrix has no outliers, though each entry is 0 deviations from the mean.
    return ((rows - mean).abs_() >= nsig * spread) & (spread > 0)


def _spread(rows: Tensor, over: list[int]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation."""
    return rows.mean(over, keepdim=True), rows.std(over, correction=0, keepdim=True)


def _als(x: Tensor, start: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    zero = float(1 << (bits - 1))
    grid = storable(start * _candidates(torch.linspace(1.0, 0.3, 29).tolist()), dtype)
    scale, _ = _least_loss(x, grid, zero, bits, 2)
    best: list[Tensor] = []
    for _ in range(11):
        steps = codes_of(x, scale, zero, bits).sub_(zero)
        _keep_best(best, [(steps * scale).sub_(x).square_().sum(-1, keepdim=True), scale])
        energy = (steps * steps).sum(-1, keepdim=True)
        fitted = (x * steps).sum(-1, keepdim=True) / energy.clamp_min(1)
        scale = storable(torch.where(energy > 0, fitted, scale), dtype)
    return best[1]


def _adam(x: Tensor, start: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    ratio = torch.ones_like(start, requires_grad=True)
    adam = torch.optim.Adam([ratio], lr=1e-3)
    zero = float(1 << (bits - 1))
    best = [_loss(x, start, zero, bits, 2), start]
    for _ in range(200):
        ratio.grad = scale_gradient(x, start * ratio.detach(), bits) * start
        adam.step()
        scale = storable(start * ratio.detach(), dtype)
        _keep_best(best, [_loss(x, scale, zero, bits, 2), scale])
    return best[1]


_SOLVERS: dict[str, Callable[[Tensor, Tensor, int, torch.dtype], Tensor]] = {
    "als": _als,
    "adam": _adam,
}


def scale_gradient(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """``d/ds sum (q(x) - x)^2 = 2 sum (q(x) - x) code`` over the last dimension, codes fixed."""
    middle = 1 << (bits - 1)
    steps = codes_of(x, scale, float(middle), bits) - middle
    return 2 * ((steps * scale - x) * steps).sum(-1, keepdim=True)


def _loss(x: Tensor, scale: Tensor, zero: Tensor | float, bits: int, power: float) -> Tensor:
    """``sum |q(x) - x|^power`` of each group."""
    gap = codes_of(x, scale, zero, bits).sub_(zero).mul_(scale).sub_(x)
    return (gap.square_() if power == 2 else gap.abs_().pow_(power)).sum(-1, keepdim=True)


def _candidates(fractions: list[float]) -> Tensor:
    """As many sets of scales, tried one after another: [candidates, 1, 1, 1]."""
    return torch.tensor(fractions).reshape(-1, 1, 1, 1)


def _least_loss(
    x: Tensor, scales: Tensor, zeros: Tensor | float, bits: int, power: float
) -> tuple[Tensor, Tensor | float]:
    """Of scales and zeros [candidates, rows, groups, 1] each group's first best."""
    each = zeros if isinstance(zeros, Tensor) else [zeros] * len(scales)
    pairs = zip(scales, each, strict=True)
    losses = torch.stack([_loss(x, scale, zero, bits, power) for scale, zero in pairs])
    best = losses.argmin(0, keepdim=True)
    chosen = scales.gather(0, best)[0]
    return chosen, zeros.gather(0, best)[0] if isinstance(zeros, Tensor) else zeros


def _keep_best(best: list[Tensor], candidate: list[Tensor]) -> None:
    """Take over, group by group, the candidate where its first tensor, the loss, is lower."""
    if not best:
        best.extend(candidate)
        return
    better = candidate[0] < best[0]
    best[:] = [torch.where(better, new, old) for new, old in zip(candidate, best, strict=True)]


def codes_of(x: Tensor, scale: Tensor, zero: Tensor | float, bits: int) -> Tensor:
    # The zero point is added before rounding, for it may be real. In 8 bits a weight within 2^-17
    # of half way between two codes may so get the other one than round(x / scale) + zero gives:
    # 2 of 90,000, errors equal to five digits, and outputs that differ by 1e-4 of themselves.
    # Adding and subtracting 1.5 * 2^23 rounds half to even, as ``round`` does. But torch
    # shares ``round`` among threads from 2048 elements: with two on a busy machine a block took
    # 8 ms instead of 20 us. From 2^22 on it rounds otherwise; there ``clamp`` decides.
    shift = 1.5 / torch.finfo(x.dtype).eps
    return (x / scale).add_(zero).add_(shift).sub_(shift).clamp_(0, (1 << bits) - 1)


def _symmetric(extreme: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Scale of groups whose code 0 stands for ``extreme`` [..., 1], and their zero point."""
    middle = float(1 << (bits - 1))
    return storable(-extreme / middle, dtype), middle


def _asymmetric(
    low: Tensor, high: Tensor, bits: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scale and real zero point of groups that reach from ``low`` to ``high``, 0 between them."""
    scale = storable((high - low) / ((1 << bits) - 1), dtype)
    return scale, -low / scale


def _rounded_zeros(zero: Tensor, dtype: torch.dtype) -> Tensor:
    """Real zero points as a dtype holds them, finite."""
    most = torch.finfo(dtype).max
    return zero.clamp(-most, most).to(dtype).float()


def storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales rounded to a dtype, none of them 0 or denormal; an all-zero group gets the least."""
    least = SMALLEST_SCALE[dtype]
    raised = torch.where(scale < 0, scale.clamp_max(-least), scale.clamp_min(least))
    return raised.to(dtype).float()


def _too_narrow(magnitudes: Tensor, bits: int) -> bool:
    """Whether float16 scales would cost accuracy, by the largest ``|x|`` of each group.

    A float16 scale raised to its floor, 2^-14, moves a weight by 2^-15 at most; that passes where
    it is below 2^-12 of the greatest weight.
    """
    if not magnitudes.numel():
        return False
    greatest = float(magnitudes.max())
    floored = bool(((magnitudes > 0) & (magnitudes < 2.0**-14 * (1 << (bits - 1)))).any())
    return greatest > 6e4 or (floored and greatest < 2.0**-3)


def _check(weight: Tensor, bits: int, group: int, name: str) -> None:
    check_format(bits, group)
    if weight.dim() != 2 or not weight.is_floating_point():
        raise BadInput(
            f"{name}: a matrix of floats is quantized, not {weight.dtype} {list(weight.shape)}"
        )


def not_finite(weight: Tensor, name: str) -> BadInput:
    bad = int((~torch.isfinite(weight)).sum())
    return BadInput(
        f"{name}: {bad} of {weight.numel()} weights are NaN or infinite; "
        "exclude this weight or repair the checkpoint"
    )


def _split(weight: Tensor, times: int = 1) -> tuple[Tensor, ...]:
    """Blocks of rows that stay in cache, or some times as large."""
    return torch.split(weight.detach(), rows_in_cache(weight.shape[1]) * times)


def _grouped(x: Tensor, group: int) -> Tensor:
    """[N, K] as [N, groups, B], the last group filled with zeros."""
    rows, columns = x.shape
    size = group or columns
    missing = -columns % size
    return (torch.nn.functional.pad(x, (0, missing)) if missing else x).reshape(rows, -1, size)


@dataclass(frozen=True)
class _Coding:
    """A matrix, its format, and how rows are fitted."""

    weight: Tensor
    fit: Fit
    bits: int
    group: int
    name: str
    real_zeros: bool = False
    outlying: Callable[[Tensor], Tensor] | None = None
    """What is not coded of rows [rows, K] float32; nothing where it is not given."""
    times: int = 1
    """Blocks are so many times what stays in cache."""

    def run(self, dtype: torch.dtype) -> Quantized:
        """With scales in ``dtype``, or in float32 where float16 would cost accuracy."""
        if dtype not in SMALLEST_SCALE:
            raise BadInput(f"scales are stored as float16 or float32, not {dtype}")
        with one_thread():
            result, magnitudes = self._blocks(dtype)
            if dtype == torch.float16 and _too_narrow(magnitudes, self.bits):
                result, _ = self._blocks(torch.float32)
        return result

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix f32 that ``run`` would store."""
        parts, magnitudes = [], []
        with one_thread():
            for block in _split(self.weight):
                rows = block.float()
                groups = Groups.of(rows, self.group)
                magnitudes.append(groups.magnitude())
                codes, scale, zero = self.fit(groups, dtype)
                parts.append(codes.sub_(zero).mul_(scale).flatten(1)[:, : rows.shape[1]])
        if dtype == torch.float16 and _too_narrow(torch.cat(magnitudes), self.bits):
            return self.dense(torch.float32)
        return torch.cat(parts)

    def _blocks(self, dtype: torch.dtype) -> tuple[Quantized, Tensor]:
        """Fit, pack and compare rows while they are in cache; the groups' magnitudes too."""
        # Codes have one place from the beginning: those of a table of 8 bits, joined, would be two.
        packed, done = torch.empty(0), 0
        scales, zeros, magnitudes = [], [], []
        gap = norm = 0.0
        for block in _split(self.weight, self.times):
            rows = block.float()
            groups = Groups.of(rows, self.group)
            magnitudes.append(groups.magnitude())
            # A NaN or an infinity shows in its group's magnitude.
            if rows.numel() and not math.isfinite(magnitudes[-1].max()):
                raise not_finite(self.weight, self.name)
            if self.outlying is not None:
                groups = Groups.of(rows.masked_fill(self.outlying(rows), 0.0), self.group)
            codes, scale, zero = self.fit(groups, dtype)
            stored = codes.flatten(1)[:, : rows.shape[1]].to(torch.uint8)
            part = pack(stored, self.bits, self.group)
            if not done:
                packed = part.new_empty((len(self.weight), *part.shape[1:]))
            packed[done : done + len(part)] = part
            done += len(part)
            scales.append(scale.squeeze(-1).to(dtype))
            if isinstance(zero, Tensor):
                zeros.append(self._stored_zeros(zero.squeeze(-1), dtype))
            error = codes.sub_(zero).mul_(scale).sub_(groups.x).flatten(1)[:, : rows.shape[1]]
            gap = math.hypot(gap, float(torch.linalg.vector_norm(error)))
            norm = math.hypot(norm, float(torch.linalg.vector_norm(rows)))
        result = Quantized(
            packed, torch.cat(scales),
            torch.cat(zeros) if zeros else None,
            None, self.bits, self.group, self.weight.shape[1], gap / max(norm, 1e-30),
        )  # fmt: skip
        return result, torch.cat(magnitudes)

    def _stored_zeros(self, zero: Tensor, dtype: torch.dtype) -> Tensor:
        if self.real_zeros:
            return zero.to(dtype)
        return pack_zeros(zero.to(torch.uint8), self.bits)
