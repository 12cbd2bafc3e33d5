"""BitStack's arithmetic on matrices: packing of signs, decomposition, and the order of blocks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.ops.linear_bitstack import dense, pack_signs, unpack_signs
from graphwright.passes.weights.bitstack_decomposition import (
    Stack,
    block_bytes,
    decompose,
    default_rank,
    highest_rank,
    input_scale,
)
from graphwright.passes.weights.bitstack_order import by_levels
from hypothesis import given, settings
from hypothesis import strategies as st


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def stack(weight: torch.Tensor, blocks: int, rank: int, scale: torch.Tensor | None = None) -> Stack:
    scale = torch.ones(weight.shape[1], dtype=torch.float64) if scale is None else scale
    return decompose(weight, scale, blocks=blocks, rank=rank, name="w")


def restored(stacked: Stack, count: int, rows: int) -> torch.Tensor:
    return dense(torch.cat(stacked.signs[:count]), torch.cat(stacked.factors[:count]), rows)


# --- signs ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.sampled_from([1, 5, 8, 13, 123]), st.integers(0, 2**31))
def test_signs_survive_packing(rows: int, columns: int, seed: int) -> None:
    positive = gaussian(rows, columns, seed) >= 0
    packed = pack_signs(positive)
    assert packed.shape == (math.ceil(rows * columns / 8),)
    expected = torch.where(positive, 1.0, -1.0)
    assert torch.equal(unpack_signs(packed, rows, columns), expected)


def test_the_first_sign_is_the_highest_bit() -> None:
    positive = torch.tensor([[True, False, False], [False, False, False], [True, True, True]])
    assert pack_signs(positive).tolist() == [0b10000011, 0b10000000]


# --- the decomposition ----------------------------------------------------------------------------


def test_the_residuals_are_those_of_the_method() -> None:
    """Figures of an independent numpy run on a Gaussian 512 x 512."""
    weight = gaussian(512, 512)
    for rank, expected in (
        (1, [0.602, 0.360, 0.240, 0.180, 0.149, 0.131]),
        (16, [0.568, 0.323, 0.198, 0.130, 0.092, 0.070]),
    ):
        stacked = stack(weight, 6, rank)
        energies = torch.tensor(stacked.energies)
        residuals = (energies[1:] / energies[0]).sqrt().tolist()
        assert residuals == pytest.approx(expected, rel=0.04)


@pytest.mark.parametrize("shape", [(1, 1), (5, 123), (123, 5), (33, 40), (300, 280)])
def test_each_block_takes_its_share_and_no_more(shape: tuple[int, int]) -> None:
    weight = gaussian(*shape)
    scale = torch.linspace(0.1, 3, shape[1], dtype=torch.float64)
    stacked = stack(weight, 6, min(2, *shape), scale)
    assert all(a > b or a < 1e-9 for a, b in itertools.pairwise(stacked.energies))
    for count in (1, 3, 6):
        residual = (weight - restored(stacked, count, shape[0])).double() * scale
        energy = float(residual.square().sum())
        assert energy == pytest.approx(stacked.energies[count], rel=1e-3, abs=1e-9)
    whole = torch.linalg.norm(weight - restored(stacked, 6, shape[0])) / torch.linalg.norm(weight)
    assert float(whole) == pytest.approx(stacked.rel_l2, rel=1e-3, abs=1e-6)


def test_many_blocks_are_the_matrix() -> None:
    weight = gaussian(24, 40)
    assert stack(weight, 24, 6).rel_l2 < 1e-3
    assert stack(weight, 4, 6).rel_l2 > 1e-2


def test_a_longer_stack_starts_with_the_shorter() -> None:
    weight = gaussian(24, 40)
    short, long = stack(weight, 3, 2), stack(weight, 5, 2)
    for part in ("signs", "factors"):
        pairs = zip(getattr(short, part), getattr(long, part), strict=False)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert short.energies == long.energies[:4]


def test_scaling_protects_the_inputs_that_are_large() -> None:
    weight = gaussian(64, 48)
    loud = torch.ones(48)
    loud[:4] = 30.0
    x = gaussian(400, 48, 1) * loud
    scale = input_scale(x.double().square().sum(0), len(x))
    assert float(scale.log().mean()) == pytest.approx(0.0, abs=1e-9)
    errors = [
        float(torch.linalg.norm(x @ (weight - restored(stacked, 2, 64)).T))
        for stacked in (stack(weight, 2, 2), stack(weight, 2, 2, scale))
    ]
    assert errors[1] < 0.7 * errors[0]


def test_a_dead_input_has_a_scale_above_zero() -> None:
    scale = input_scale(torch.tensor([4.0, 0.0, 9.0], dtype=torch.float64), 1)
    assert scale.tolist() == pytest.approx([2 / math.sqrt(6), 1e-3, 3 / math.sqrt(6)])
    assert input_scale(torch.zeros(2, dtype=torch.float64), 5).tolist() == [1.0, 1.0]


def test_factors_of_large_and_small_weights_fit_in_half() -> None:
    for size in (1e-4, 1e6):
        scale = torch.logspace(-3, 3, 40, dtype=torch.float64)
        stacked = stack(gaussian(24, 40) * size, 6, 2, scale)
        assert torch.isfinite(torch.cat(stacked.factors)).all()
        assert stacked.energies[6] < 0.05 * stacked.energies[0]


def test_a_weight_without_numbers_is_refused() -> None:
    weight = gaussian(8, 8)
    weight[3, 2] = math.nan
    with pytest.raises(BadInput, match="w: its weight holds NaN"):
        stack(weight, 2, 1)
    with pytest.raises(BadInput, match="too large for factors in float16"):
        stack(gaussian(8, 8) * 1e20, 2, 1)


def test_zeros_stay_zero() -> None:
    stacked = stack(torch.zeros(4, 9), 2, 1)
    assert torch.equal(restored(stacked, 2, 4), torch.zeros(4, 9))
    assert stacked.rel_l2 == 0.0


def test_ranks_and_bytes() -> None:
    assert default_rank(4096, 4096) == 16
    assert default_rank(3, 5) == 1
    assert highest_rank(4096, 4096) == 2047
    assert block_bytes(4096, 4096, 16) == 4096 * 4096 // 8 + 32 * 8192
    assert block_bytes(3, 5, 1) == 2 + 16


# --- the order ------------------------------------------------------------------------------------


def test_the_order_goes_level_by_level_and_by_energy_for_bytes() -> None:
    energies = {"a": (100.0, 36.0, 20.0), "b": (40.0, 25.0, 8.0), "c": (12.0, 9.0, 1.0)}
    order = by_levels(energies, {"a": 10, "b": 10, "c": 1})
    assert order == [("c", 0), ("a", 0), ("b", 0), ("c", 1), ("a", 1), ("b", 1)]
    cheap = by_levels(energies, {"a": 10, "b": 1, "c": 1})
    assert cheap == [("b", 0), ("c", 0), ("a", 0), ("b", 1), ("c", 1), ("a", 1)]


def test_equals_keep_the_order_of_the_sites() -> None:
    energies = dict.fromkeys(("z", "a", "m"), (1.0, 0.5, 0.25))
    order = by_levels(energies, dict.fromkeys(energies, 7))
    assert order == [(name, block) for block in (0, 1) for name in ("z", "a", "m")]
