"""``token_scores``, interpreted, against the op's reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.ops import OWN_OPS

OP = OWN_OPS["token_scores"]


@dataclass(frozen=True)
class Case:
    rows: int
    heads: int
    groups: int
    keys: int
    width: int
    dtype: torch.dtype
    mask: str = ""
    """``rows``: one a row; ``shared``: one for all; ``none``: a row that sees nothing."""

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        shape = f"{self.rows}x{self.heads}of{self.groups}x{self.keys}x{self.width}"
        return f"{shape}-{name}{self.mask}"


CASES = [
    Case(2, 3, 3, 77, 12, torch.float32),
    Case(1, 6, 2, 130, 64, torch.float16, "rows"),
    Case(2, 4, 1, 600, 8, torch.bfloat16, "shared"),
    Case(2, 2, 2, 5, 16, torch.float32, "none"),
    Case(1, 2, 1, 1, 1, torch.float32),
    Case(0, 2, 1, 9, 8, torch.float32),
]


def measure() -> dict[str, float]:
    return {str(case): _error(seed, case) for seed, case in enumerate(CASES)}


def _error(seed: int, case: Case) -> float:
    from graphwright.kernels.token_scores import token_scores

    rng = torch.Generator().manual_seed(seed)
    # The last query of several, and keys as attention makes them: views.
    q = torch.randn(case.rows, 4, case.heads, case.width, generator=rng).to(case.dtype)
    q = q.transpose(1, 2)[:, :, -1:]
    k = torch.randn(case.rows, case.keys, case.groups, case.width, generator=rng).to(case.dtype)
    k = k.transpose(1, 2)
    drawn = torch.rand(1 if case.mask == "shared" else case.rows, 1, 1, case.keys, generator=rng)
    mask = drawn > (2 if case.mask == "none" else 0.4) if case.mask else None
    want = OP.reference(q.float(), k.float(), mask, scale=0.3)
    got = token_scores(q, k, mask, scale=0.3)
    assert got.dtype == case.dtype and got.shape == want.shape
    return float((got.float() - want).norm() / max(float(want.norm()), 1e-9))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted(case: Case, errors: Mapping[str, Mapping[str, float]]) -> None:
    assert errors["token_scores"][str(case)] <= OP.tolerances[case.dtype]


def test_what_it_does_not_take() -> None:
    from graphwright.kernels.token_scores import token_scores

    x = torch.zeros(1, 2, 1, 8)
    with pytest.raises(BadInput, match=r"q is torch\.float32 and k torch\.float16"):
        token_scores(x, x.half(), scale=1.0)
