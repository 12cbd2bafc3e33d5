"""``rope``, interpreted, against the op's reference."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.ops import OWN_OPS

OP = OWN_OPS["rope"]
Shape = tuple[int, ...]
CASES: list[tuple[Shape, Shape, bool]] = [
    # x, tables, whether x is a transposed view as attention makes it
    ((2, 3, 5, 8), (2, 1, 5, 8), True),
    ((1, 2, 7, 6), (7, 6), False),
    ((3, 4), (3, 4), False),
    ((2, 3, 5, 8), (1, 1, 5, 1), False),
    ((1, 3, 123, 64), (1, 1, 123, 64), True),
    ((0, 3, 5, 8), (1, 1, 5, 8), False),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _label(case: tuple[Shape, Shape, bool], dtype: torch.dtype) -> str:
    return f"{case}-{dtype}"


def measure() -> dict[str, float]:
    return {_label(case, dtype): _error(*case, dtype) for case in CASES for dtype in DTYPES}


def _error(shape: Shape, table: Shape, transposed: bool, dtype: torch.dtype) -> float:
    from graphwright.kernels.rope import rope

    x, cos, sin = (torch.randn(s).to(dtype) for s in (shape, table, table))
    if transposed:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    want = OP.reference(x.float(), cos.float(), sin.float())
    got = rope(x, cos, sin)
    assert got.dtype == dtype and got.shape == x.shape
    return float((got.float() - want).norm() / max(float(want.norm()), 1e-9))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted(
    case: tuple[Shape, Shape, bool], dtype: torch.dtype, errors: Mapping[str, Mapping[str, float]]
) -> None:
    assert errors["rope"][_label(case, dtype)] <= OP.tolerances[dtype]


def test_what_it_does_not_take() -> None:
    from graphwright.kernels.rope import rope

    x = torch.zeros(1, 2, 3, 8)
    for given, reason in [
        ((x[..., :7],) * 3, "the last even"),
        ((x[None],) * 3, "up to 4 dimensions"),
        ((x, x.half(), x), "cos torch.float16"),
        ((x.double(),) * 3, "x is torch.float64"),
    ]:
        with pytest.raises(BadInput, match=reason):
            rope(*given)
