"""Quantizers against plain ones: the whole matrix at once, group by group, nothing reused.

Codes, scales and zero points are equal to the last bit, whatever the blocks in which the rows are
coded.
"""

from __future__ import annotations

import pytest
import torch
from graphwright.ir.ops.pack import GROUPS, n_groups, unpack, unpack_zeros
from graphwright.passes.weights.quantized import Quantized
from graphwright.passes.weights.quantizers import SMALLEST_SCALE, easyquant, hqq, rtn
from torch import Tensor

Plain = tuple[Tensor, Tensor, Tensor | None]


def ties(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Few distinct values of both signs, so that the extreme of a group is often met twice."""
    rng = torch.Generator().manual_seed(seed)
    steps = torch.randint(-20, 21, (rows, columns), generator=rng)
    steps[0] = 0
    return (steps / 512).to(dtype)


def normal(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=rng) * 0.02).to(dtype)


CASES = pytest.mark.parametrize(
    ("weight", "group"),
    [
        (ties(70, 1024, torch.bfloat16), 32),
        (ties(9, 123, torch.float32), 16),
        (normal(70, 1024, torch.float32), 128),
        (normal(5, 300, torch.float16), 0),
        (normal(2, 33_000, torch.bfloat16), 256),
        (normal(33, 1000, torch.float32) * 1e-7, 32),
    ],
    ids=["ties-bf16", "ties-odd", "normal", "normal-row", "wide", "tiny"],
)


def storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    least = SMALLEST_SCALE[dtype]
    scale = torch.where(scale < 0, scale.clamp(max=-least), scale.clamp(min=least))
    return scale.to(dtype).float()


def columns_of(weight: Tensor, group: int) -> list[Tensor]:
    """Each group [rows, B] float32; the last is filled with zeros."""
    size = group or weight.shape[1]
    padded = torch.nn.functional.pad(weight.float(), (0, -weight.shape[1] % size))
    return list(torch.split(padded, size, dim=1))


def coded(x: Tensor, scale: Tensor, zero: Tensor | float, bits: int) -> Tensor:
    return torch.clamp(torch.round(x / scale + zero), 0, 2**bits - 1)


def plain_rtn(
    weight: Tensor, bits: int, group: int, dtype: torch.dtype, *, symmetric: bool, search: bool
) -> Plain:
    """Each group of columns on its own, each row's extreme by ``argmax``."""
    codes, scales, zeros = [], [], []
    for x in columns_of(weight, group):
        best: list[Tensor] = []
        for i in range(80 if search else 1):
            fraction = 1 - i / 100
            if symmetric:
                extreme = x.gather(1, x.abs().argmax(1, keepdim=True)) * fraction
                scale = storable(-extreme / 2 ** (bits - 1), dtype)
                zero = torch.full_like(scale, 2 ** (bits - 1))
            else:
                low = x.amin(1, keepdim=True).clamp(max=0) * fraction
                high = x.amax(1, keepdim=True).clamp(min=0) * fraction
                scale = storable((high - low) / (2**bits - 1), dtype)
                zero = torch.round(-low / scale).clamp(0, 2**bits - 1)
            code = coded(x, scale, zero, bits)
            loss = ((code - zero) * scale - x).abs().pow(2.4).sum(1, keepdim=True)
            trial = [loss, code, scale, zero]
            better = loss < best[0] if best else None
            best = trial if better is None else [
                torch.where(better, new, old) for new, old in zip(trial, best, strict=True)
            ]  # fmt: skip
        codes.append(best[1])
        scales.append(best[2])
        zeros.append(best[3])
    return torch.cat(codes, 1), torch.cat(scales, 1), None if symmetric else torch.cat(zeros, 1)


def in_dtype(zero: Tensor, dtype: torch.dtype) -> Tensor:
    most = torch.finfo(dtype).max
    return zero.clamp(-most, most).to(dtype).float()


def apart(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return ((coded(x, scale, zero, bits) - zero) * scale - x).abs().sum(1, keepdim=True)


def plain_hqq(weight: Tensor, bits: int, group: int, dtype: torch.dtype, *, rounded: bool) -> Plain:
    codes, scales, zeros = [], [], []
    real = columns_of(torch.ones(1, weight.shape[1]), group)
    for x, counted in zip(columns_of(weight, group), real, strict=True):
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        scale = storable((high.clamp(min=0) - low.clamp(max=0)) / (2**bits - 1), dtype)
        zero = -low.clamp(max=0) / scale
        if not rounded:
            tight = storable((high - low) / (2**bits - 1), dtype)
            near, far = in_dtype(zero, dtype), in_dtype(-low / tight, dtype)
            better = apart(x, tight, far, bits) <= apart(x, scale, near, bits)
            scale, zero = torch.where(better, tight, scale), torch.where(better, far, near)
        least = best = None
        for _ in range(21):
            zero = zero.round().clamp(0, 2**bits - 1) if rounded else zero
            code = coded(x, scale, zero, bits)
            error = x - (code - zero) * scale
            size = error.abs()
            loss = size.sum(1, keepdim=True)
            better = torch.ones_like(loss, dtype=torch.bool) if least is None else loss < least
            least = loss if least is None else torch.where(better, loss, least)
            best = zero if best is None else torch.where(better, zero, best)
            shrunk = (size - size.clamp(min=1e-12) ** (0.7 - 1) / 10.0).clamp(min=0)
            gap = (code - (x - error.sign() * shrunk) / scale) * counted
            zero = gap.sum(1, keepdim=True) / counted.sum()
        assert best is not None
        best = best if rounded else in_dtype(best, dtype)
        codes.append(coded(x, scale, best, bits))
        scales.append(scale)
        zeros.append(best)
    return torch.cat(codes, 1), torch.cat(scales, 1), torch.cat(zeros, 1)


def plain_easyquant(weight: Tensor, bits: int, group: int, dtype: torch.dtype) -> Plain:
    wide = weight.float()
    outlying = (wide - wide.mean()).abs() >= 3 * wide.std(correction=0)
    middle = 2 ** (bits - 1)
    codes, scales = [], []
    for x in columns_of(torch.where(outlying, 0.0, wide), group):
        extreme = x.gather(1, x.abs().argmax(1, keepdim=True))
        start = storable(-extreme / middle, dtype)
        tried = [storable(start * f, dtype) for f in torch.linspace(1.0, 0.3, 29).tolist()]
        losses = [
            ((coded(x, s, middle, bits) - middle) * s - x).square().sum(1, keepdim=True)
            for s in tried
        ]
        scale, least = tried[0], losses[0]
        for s, loss in zip(tried, losses, strict=True):
            scale, least = torch.where(loss < least, s, scale), torch.minimum(loss, least)
        best = scale
        for _ in range(10):
            steps = coded(x, scale, middle, bits) - middle
            energy = (steps * steps).sum(1, keepdim=True)
            fitted = (x * steps).sum(1, keepdim=True) / energy.clamp(min=1)
            scale = storable(torch.where(energy > 0, fitted, scale), dtype)
            gap = (coded(x, scale, middle, bits) - middle) * scale - x
            loss = gap.square().sum(1, keepdim=True)
            best, least = torch.where(loss < least, scale, best), torch.minimum(loss, least)
        codes.append(coded(x, best, middle, bits))
        scales.append(best)
    return torch.cat(codes, 1), torch.cat(scales, 1), None


def same(quantized: Quantized, plain: Plain) -> None:
    codes, scales, zeros = plain
    groups = n_groups(quantized.group, quantized.in_features)
    stored = unpack(quantized.codes, quantized.bits, quantized.group, quantized.in_features)
    assert torch.equal(stored.float(), codes[:, : quantized.in_features])
    assert torch.equal(quantized.scales.float(), scales)
    if quantized.zeros is None or zeros is None:
        assert quantized.zeros is None
        assert zeros is None
    elif quantized.zeros.is_floating_point():
        assert torch.equal(quantized.zeros.float(), zeros)
    else:
        assert torch.equal(unpack_zeros(quantized.zeros, quantized.bits, groups).float(), zeros)


@CASES
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_round_to_nearest(weight: Tensor, group: int, bits: int, symmetric: bool) -> None:
    quantized = rtn(weight, bits, group, symmetric)
    dtype = quantized.scales.dtype
    same(quantized, plain_rtn(weight, bits, group, dtype, symmetric=symmetric, search=False))


@CASES
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search(weight: Tensor, group: int, symmetric: bool) -> None:
    weight = weight[:6]
    quantized = rtn(weight, 4, group, symmetric, mse_search=True)
    dtype = quantized.scales.dtype
    same(quantized, plain_rtn(weight, 4, group, dtype, symmetric=symmetric, search=True))


@CASES
@pytest.mark.parametrize("rounded", [True, False])
def test_half_quadratic(weight: Tensor, group: int, rounded: bool) -> None:
    quantized = hqq(weight, 4, group, round_zero=rounded)
    same(quantized, plain_hqq(weight, 4, group, quantized.scales.dtype, rounded=rounded))


@CASES
def test_outliers_and_alternating_steps(weight: Tensor, group: int) -> None:
    quantized = easyquant(weight, 4, group)
    same(quantized, plain_easyquant(weight, 4, group, quantized.scales.dtype))


def test_every_group_size_is_met() -> None:
    weight = ties(4, 500, torch.float32)
    for group in GROUPS:
        quantized = rtn(weight, 4, group)
        plain = plain_rtn(weight, 4, group, torch.float16, symmetric=True, search=False)
        same(quantized, plain)
