"""``python -m graphwright.tools.bench.method_errors``: what four details of methods are worth.

Each is a place in which this package once did otherwise than the method's paper, or than its own
arithmetic allows. A row has the error with the detail left out and with it as it is now.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...passes.weights.low_rank import Whitening, spectrum
from ...passes.weights.quantizers import hqq, rtn
from .showing import ended, growing

LARGE = 3000
"""Times that a channel is larger than the others."""
RANK = 16


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _error(actual: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.norm(actual - expected) / torch.linalg.norm(expected))


class _Cut(Whitening):
    """Without the directions below the rounding of float32, though the Gram matrix is float64."""

    def apply(self, matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(self.gram.double())
        least = values[-1] * len(values) * torch.finfo(torch.float32).eps
        root: Tensor = vectors * torch.where(values > least, values, 0).sqrt()
        return matrix.double() @ root


def _large_channel() -> tuple[str, float, float]:
    """eora: of the outputs that all other channels make."""
    size = 256
    weight = _normal(size, size, seed=0) * 0.02
    x = _normal(1000, size, seed=2) @ torch.diag(torch.logspace(-0.5, 0, size))
    x[:, 5] *= LARGE
    rounded = rtn(weight, 2, 64).dequantized()
    gram = x.double().T @ x.double()
    others = x.clone()
    others[:, 5] = 0
    errors = []
    for whitening in (_Cut(gram), Whitening(gram)):
        part = spectrum(weight, weight - rounded, whitening)
        down, up = part.factors(min(RANK, len(part.sigma)))
        errors.append(_error((rounded + up @ down) @ others.T, weight @ others.T))
    alone = _error(rounded @ others.T, weight @ others.T)
    what = f"eora rank {RANK}, a channel of x{LARGE} (2 bits alone {alone:.3f}): float32's cut"
    return what, errors[0], errors[1]


def _one_sign() -> tuple[str, float, float]:
    """hqq: of groups that leave 0 out."""
    weight = _normal(64, 256, seed=0).abs() * 0.02 + 0.2
    with_zero = rtn(weight, 4, 64, symmetric=False)
    now = hqq(weight, 4, 64)
    return "hqq 4 bits, groups of one sign: 0 in the range", with_zero.rel_l2, now.rel_l2


def _real_zeros() -> tuple[str, float, float]:
    """hqq: zero points are real (rounded to float16 at each step, they once ended at .00519)."""
    weight = _normal(256, 1024, seed=0) * 0.02
    early = hqq(weight, 8, 64, round_zero=True)
    return "hqq 8 bits: whole zero points", early.rel_l2, hqq(weight, 8, 64).rel_l2


def _both_zeros() -> tuple[str, float, float]:
    """2 bits with the range search: of the zero points beside the real one, the nearer alone."""
    weight = _normal(512, 1024, seed=0)
    now = rtn(weight, 2, 64, symmetric=False, mse_search=True)
    return "2 bits asymmetric with the search: the nearer zero point", _NEARER, now.rel_l2


_NEARER = 0.3559
"""What the nearer zero point alone gives on these numbers."""


def rows() -> Iterator[Sequence[str]]:
    for measure in (_large_channel, _one_sign, _real_zeros, _both_zeros):
        what, before, now = measure()
        yield what, f"{before:#.3g}", f"{now:#.3g}"


def main() -> int:
    return ended(lambda console: console.print(
        growing("relative errors", ("left out", "without", "now"), rows())
    ))  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
