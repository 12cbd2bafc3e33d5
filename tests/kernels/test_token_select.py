"""``token_select``, interpreted, against the op's reference: copies are exact."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.ops import OWN_OPS

OP = OWN_OPS["token_select"]
SHAPES = (
    ((1, 5, 3), 1), ((2, 17, 1500), 6), ((3, 5, 64), 5), ((2, 7), 3), ((2, 7, 3, 5), 4),
    ((1, 200, 1), 123), ((2, 5, 8), 0),
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.bool, torch.int64)
LABELS = [f"{shape}-{kept}-{dtype}" for shape, kept in SHAPES for dtype in DTYPES]


def measure() -> dict[str, float]:
    cases = [(shape, kept, dtype) for shape, kept in SHAPES for dtype in DTYPES]
    found = {label: _wrong(*case) for label, case in zip(LABELS, cases, strict=True)}
    return found | {"out of range": _out_of_range()}


def _wrong(shape: tuple[int, ...], kept: int, dtype: torch.dtype) -> float:
    """How many numbers differ, over layouts of ``x`` and widths of the index."""
    from graphwright.kernels.token_select import token_select

    x = (torch.randn(shape) * 9).to(dtype)
    index = torch.randint(shape[1], (shape[0], kept))
    want = OP.reference(x, index)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    results = (token_select(x, index), token_select(strided, index.int()))
    assert all(r.dtype == dtype and r.shape == want.shape for r in results)
    return float(sum(int((r != want).sum()) for r in results))


def _out_of_range() -> float:
    """How many numbers come out for tokens that are not there, which must be zeros."""
    from graphwright.kernels.token_select import token_select

    x = torch.ones(2, 5, 8)
    y = token_select(x, torch.tensor([[0, 5, -1], [7, 4, -6]]))
    assert y[0, 0].eq(1).all() and y[1, 1].eq(1).all()
    return float(y.sum()) - 16


@pytest.mark.parametrize("label", [*LABELS, "out of range"])
def test_interpreted(label: str, errors: Mapping[str, Mapping[str, float]]) -> None:
    assert errors["token_select"][label] == 0


def test_what_it_does_not_take() -> None:
    from graphwright.kernels.token_select import token_select

    x, index = torch.zeros(2, 5, 8), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(BadInput, match=r"got \[2, 5, 8\] and \[1, 3\]"):
        token_select(x, index[:1])
    with pytest.raises(BadInput, match=r"index torch\.int16"):
        token_select(x, index.to(torch.int16))
    with pytest.raises(BadInput, match="complex"):
        token_select(x.to(torch.complex128), index)
