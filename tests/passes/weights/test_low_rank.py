"""Spectra: the truncated against the whole, and what linears with one input share."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from graphwright.passes.weights import low_rank
from graphwright.passes.weights.low_rank import Spectrum, Whitening, spectrum
from torch import Tensor

CASES = pytest.mark.parametrize(
    ("shape", "rank"),
    [((300, 300), 1), ((640, 300), 4), ((288, 520), 4), ((560, 600), 16)],
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decaying(m: int, n: int) -> Tensor:
    """Singular values 1, 0.9, 0.81, ..., and a floor a thousandth as high."""
    k = min(m, n)
    left, right = torch.linalg.qr(normal(m, k)).Q, torch.linalg.qr(normal(n, k, seed=1)).Q
    return (left * (0.9 ** torch.arange(k) + 1e-3)) @ right.T


def flat(m: int, n: int) -> Tensor:
    return normal(m, n) * 1e-2


def inputs(n: int) -> Tensor:
    """1000 tokens whose features differ in size by up to 300, one of them a hundred times more."""
    x = normal(1000, n, seed=2) @ torch.diag(torch.logspace(-1.5, 1, n))
    x[:, 5] *= 100
    return x


def whitening(x: Tensor) -> Whitening:
    return Whitening(x.double().T @ x.double())


@CASES
@pytest.mark.parametrize("make", [decaying, flat])
@pytest.mark.parametrize("weighted", [True, False])
def test_the_leading_vectors_capture_what_those_of_the_whole_do(
    shape: tuple[int, int], rank: int, make: Callable[..., Tensor], weighted: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    gap, weight, x = make(*shape), normal(*shape, seed=3), inputs(shape[1])
    weighting = whitening(x) if weighted else None
    whole = spectrum(weight, gap, weighting)
    outputs = gap.double() @ x.double().T if weighted else gap.double()
    best = float(torch.linalg.eigvalsh(outputs @ outputs.T)[-rank:].sum())
    of = torch.linalg.norm(weight.double() @ x.double().T if weighted else weight.double())
    for double in (True, False):
        monkeypatch.setattr(low_rank, "SPECTRUM_DOUBLE_UP_TO", 4096 if double else 0)
        part = spectrum(weight, gap, weighting, rank)
        assert len(part.sigma) == rank < len(whole.sigma)
        captured = float(part.sigma.square().sum())
        assert best * (1 - 1e-4) <= captured <= best * (1 + (1e-9 if double else 1e-4))
        # The tail is exact: what is left of the gap when the factors are taken away from it.
        for taken in (0, 1, rank):
            down, up = part.factors(taken)
            gone = gap.double() - up.double() @ down.double()
            gone = gone @ x.double().T if weighted else gone
            error = float(torch.linalg.norm(gone) / of)
            assert part.relative_error(taken) == pytest.approx(error, rel=1e-4)
            assert error <= whole.relative_error(taken) * (1 + 1e-4) + 1e-9


def test_a_truncated_spectrum_is_always_the_same() -> None:
    gap, weight, weighting = flat(320, 300), normal(320, 300, seed=3), whitening(inputs(300))
    torch.manual_seed(1)
    first = spectrum(weight, gap, weighting, 8)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    second = spectrum(weight, gap, weighting, 8)
    assert torch.equal(first.left, second.left) and torch.equal(first.sigma, second.sigma)
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers stay"


@pytest.mark.parametrize(("shape", "rank"), [((256, 900), 4), ((300, 300), 90), ((300, 300), None)])
def test_small_matrices_and_high_ranks_are_decomposed_whole(
    shape: tuple[int, int], rank: int | None
) -> None:
    gap, x = flat(*shape), inputs(shape[1])
    whole = spectrum(normal(*shape), gap, whitening(x), rank, tokens=1000)
    sigma = torch.linalg.svdvals(gap.double() @ x.double().T)
    assert torch.allclose(whole.sigma, sigma, rtol=1e-6, atol=0)
    assert whole.beyond == 0.0
    assert whole.relative_error(len(sigma)) == 0.0


@pytest.mark.parametrize("size", [120, 320])
@pytest.mark.parametrize("double", [True, False])
def test_one_channel_thousands_of_times_as_large(
    size: int, double: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real models have such channels. All others are compensated as if it were not there: what is
    left of their part of the output is held against the optimum, whole and truncated."""
    monkeypatch.setattr(low_rank, "SPECTRUM_DOUBLE_UP_TO", 4096 if double else 0)
    gap, x = flat(size, size), normal(1000, size, seed=2) @ torch.diag(torch.logspace(-1, 0, size))
    x[:, 5] *= 3000
    gram = (x.T @ x).double()  # products in float32, as the statistic has them
    down, up = spectrum(gap, gap, Whitening(gram), 16).factors(16)
    assert len(down) == 16
    sigma = torch.linalg.svdvals(gap.double() @ x.double().T)
    rest = torch.linalg.norm((gap.double() - up.double() @ down.double()) @ x.double().T)
    best = float(sigma[16:].square().sum().sqrt())
    assert best * (1 - 1e-6) <= float(rest) <= best * (1 + 1e-4)


def test_a_gap_of_lower_rank_than_asked_for() -> None:
    gap = normal(300, 3) @ normal(3, 400, seed=1)
    part = spectrum(normal(300, 400), gap, whitening(inputs(400)), 16)
    down, up = part.factors(min(16, len(part.sigma)))
    assert torch.isfinite(down).all() and torch.isfinite(up).all()
    assert float(torch.linalg.norm(gap - up @ down) / torch.linalg.norm(gap)) < 1e-4
    nothing = spectrum(normal(300, 400), torch.zeros(300, 400), None, 16)
    assert nothing.relative_error(0) == 0.0
    assert len(nothing.sigma) == 0


def test_fewer_tokens_than_features() -> None:
    gap, weight, x = flat(300, 400), normal(300, 400, seed=3), inputs(400)[:20]
    part = spectrum(weight, gap, whitening(x), 16, tokens=20)
    assert part.short
    down, up = part.factors(16)
    unseen = normal(50, 400, seed=9)
    before, after = (torch.linalg.norm(unseen @ g.T) for g in (gap, gap - up @ down))
    assert float(after) < float(before)
    assert part.relative_error(16) < 0.3 * part.relative_error(0)


def test_where_nothing_converges_the_whole_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "CONVERGED", -1.0)
    whole = spectrum(normal(300, 300), flat(300, 300), None, 16)
    assert len(whole.sigma) == 300


def test_eigenvalues_are_computed_once_and_only_for_a_whole_spectrum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = []
    plain = torch.linalg.eigh

    def counted(matrix: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(matrix))
        values, vectors = plain(matrix)
        return values, vectors

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    shared = whitening(inputs(400))
    for m in (300, 320):
        spectrum(normal(m, 400), flat(m, 400), shared, 8)
    assert 400 not in sizes
    for m in (20, 30):
        spectrum(normal(m, 400), flat(m, 400), shared, 8)
    assert sizes.count(400) == 1


def test_whitening_by_its_definition() -> None:
    x, matrix = inputs(60), normal(7, 60, seed=4)
    weighting = whitening(x)
    weighted = weighting.apply(matrix)
    assert weighted.shape == (7, 60)
    outputs = matrix.double() @ x.double().T
    assert math.isclose(weighting.energy(matrix), float(outputs.square().sum()), rel_tol=1e-5)
    assert torch.allclose(weighted @ weighted.T, outputs @ outputs.T, rtol=1e-6)


def test_a_cut_spectrum_keeps_its_tail() -> None:
    whole = spectrum(normal(300, 300), flat(300, 300), None, 16)
    cut = Spectrum(**whole.cut(4))
    assert cut.left.shape == (300, 4)
    for rank in (0, 4, 16):
        assert cut.relative_error(rank) == whole.relative_error(rank)
