"""``linear_bitstack``, interpreted, against the op's reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.ops import OWN_OPS
from graphwright.ir.ops.linear_bitstack import pack_signs

OP = OWN_OPS["linear_bitstack"]


@dataclass(frozen=True)
class Case:
    rows: tuple[int, ...]
    outputs: int
    columns: int
    blocks: int
    rank: int
    dtype: torch.dtype
    bias: bool = False
    strided: bool = False

    def __str__(self) -> str:
        rows, name = "x".join(map(str, self.rows)), str(self.dtype).removeprefix("torch.")
        more = "-bias" * self.bias + "-strided" * self.strided
        return f"{rows}-{self.outputs}of{self.columns}-{self.blocks}b-r{self.rank}-{name}{more}"


CASES = [
    Case((1,), 33, 123, 3, 2, torch.float32, True),  # rows of signs begin inside of bytes
    Case((1,), 40, 128, 4, 16, torch.float16),
    Case((2, 3), 5, 72, 2, 1, torch.bfloat16, True),
    Case((17,), 70, 64, 1, 3, torch.float32, strided=True),
    Case((70,), 33, 45, 2, 2, torch.float16, strided=True),
    Case((1,), 1, 1, 2, 1, torch.float32),
    Case((0, 3), 33, 64, 2, 1, torch.float32),
]


def measure() -> dict[str, float]:
    return {str(case): _error(seed, case) for seed, case in enumerate(CASES)}


def _error(seed: int, case: Case) -> float:
    from graphwright.kernels.linear_bitstack import linear_bitstack

    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(*case.rows, case.columns, generator=rng).to(case.dtype)
    x = torch.nn.functional.pad(x, (2, 3))[..., 2:-3] if case.strided else x
    drawn = torch.rand(case.blocks, case.outputs, case.columns, generator=rng) > 0.5
    signs = torch.stack([pack_signs(plane) for plane in drawn])
    factors = torch.rand(
        case.blocks, case.rank, case.outputs + case.columns, generator=rng
    ).half()  # fmt: skip
    bias = torch.randn(case.outputs, generator=rng).to(case.dtype) if case.bias else None
    attrs = {"in_features": case.columns, "out_features": case.outputs}
    wide = None if bias is None else bias.float()
    want = OP.reference(x.float(), signs, factors, wide, **attrs)
    got = linear_bitstack(x, signs, factors, bias, **attrs)
    assert got.dtype == x.dtype and got.shape == want.shape
    return float((got.float() - want).norm() / max(float(want.norm()), 1e-9))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted(case: Case, errors: Mapping[str, Mapping[str, float]]) -> None:
    assert errors["linear_bitstack"][str(case)] <= OP.tolerances[case.dtype]


def test_what_it_does_not_take() -> None:
    from graphwright.kernels.linear_bitstack import linear_bitstack

    x = torch.zeros(1, 8, dtype=torch.float64)
    signs, factors = torch.zeros(1, 4, dtype=torch.uint8), torch.zeros(1, 1, 12).half()
    with pytest.raises(BadInput, match=r"half and single floats, not torch\.float64"):
        linear_bitstack(x, signs, factors, in_features=8, out_features=4)
