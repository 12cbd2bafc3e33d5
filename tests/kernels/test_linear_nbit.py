"""``linear_nbit`` and its low-rank form, interpreted, against the op's reference."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.ops import OWN_OPS
from graphwright.ir.ops.pack import n_groups, pack, pack_zeros

OP = OWN_OPS["linear_nbit"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    rows: tuple[int, ...]
    outputs: int
    columns: int
    group: int
    bits: int
    zeros: str
    bias: bool
    dtype: torch.dtype
    rank: int = 0
    strided: bool = False
    level: int = 0

    def __str__(self) -> str:
        rows, dtype = "x".join(map(str, self.rows)), str(self.dtype).removeprefix("torch.")
        more = [f"rank{self.rank}"] * (self.rank > 0) + ["bias"] * self.bias
        more += ["strided"] * self.strided + [f"level{self.level}"] * (self.level > 0)
        return "-".join([
            rows, f"{self.outputs}of{self.columns}", f"g{self.group}", f"{self.bits}bit",
            self.zeros, dtype, *more,
        ])  # fmt: skip


def _grid() -> list[Case]:
    """Every pair of rows and format; the other choices go round."""
    formats = [(123, 32), (192, 64), (300, 128), (77, 0), (64, 16), (256, 32)]
    shapes = [((1,), 5), ((5,), 33), ((17,), 257)]
    found = []
    for i, ((rows, outputs), (columns, group), bits) in enumerate(
        itertools.product(shapes, formats, (4, 8))
    ):
        found.append(Case(
            rows, outputs, columns, group, bits, ("none", "integer", "real")[i % 3], i % 2 == 1,
            DTYPES[(i // 2) % 3], (0, 8, 32)[(i + i // 3) % 3],
        ))  # fmt: skip
    return found


BASE = Case((1,), 5, 128, 32, 4, "none", False, torch.float32)
CASES = [
    *_grid(),
    BASE,
    replace(BASE, rows=(2,), columns=256, strided=True),
    replace(BASE, rows=(2,), bits=8, zeros="integer", dtype=torch.float16, rank=8),
    replace(BASE, rows=(2, 1), columns=45, zeros="real", bias=True, dtype=torch.bfloat16),
    replace(BASE, outputs=33, columns=192, group=64, dtype=torch.float16, rank=8),
    replace(BASE, columns=2048, dtype=torch.float16),  # more words than a tile
    replace(BASE, columns=2400, zeros="integer"),
    replace(BASE, outputs=3, rank=70),  # more ranks than a step
    replace(BASE, outputs=1, columns=1),
    replace(BASE, rows=(0, 3)),
    replace(BASE, rows=(2, 3), columns=1100, dtype=torch.float16, rank=8, strided=True),
    replace(BASE, rows=(7,), outputs=1, columns=1, bits=8, zeros="integer"),
    replace(BASE, rows=(33,), outputs=33, columns=123, dtype=torch.bfloat16, rank=32, bias=True),
    replace(BASE, rows=(70,), outputs=33, columns=123, group=16, dtype=torch.float16, rank=70),
    replace(BASE, rows=(130,), outputs=130, dtype=torch.float16, zeros="integer"),
    replace(BASE, rows=(130,), outputs=33, columns=256, bits=8, group=0, zeros="real"),
    replace(BASE, columns=123, group=16, bits=2, zeros="integer", bias=True),
    replace(BASE, columns=123, group=16, bits=3, zeros="integer", bias=True),
    replace(BASE, rows=(2,), columns=256, group=64, bits=3, dtype=torch.float16, rank=8),
    replace(BASE, columns=300, group=0, bits=2, zeros="real", dtype=torch.bfloat16),
    replace(BASE, outputs=3, columns=5000, group=256, bits=3),  # more words than a tile
    replace(BASE, rows=(5,), outputs=33, columns=123, bits=2, dtype=torch.float16, bias=True),
    replace(BASE, rows=(17,), outputs=33, columns=192, group=16, bits=3, zeros="real"),
    replace(BASE, rows=(70,), outputs=33, columns=300, group=128, bits=2, zeros="integer", rank=8),
    replace(BASE, rows=(130,), outputs=33, columns=256, group=0, bits=3, dtype=torch.bfloat16),
]


def measure() -> dict[str, float]:
    return {str(case): _error(seed, case) for seed, case in enumerate(CASES)}


def _error(seed: int, case: Case) -> float:
    from graphwright.kernels.linear_nbit import linear_nbit, linear_nbit_low_rank

    rng = torch.Generator().manual_seed(seed)
    x = _strided(torch.randn(*case.rows, case.columns, generator=rng).to(case.dtype), case.strided)
    codes, scales, zeros = _weight(rng, case)
    bias = torch.randn(case.outputs, generator=rng).to(case.dtype) if case.bias else None
    attrs = {
        "bits": case.bits, "group": case.group,
        "in_features": case.columns, "out_features": case.outputs,
    }  # fmt: skip
    # Rounded once: the kernel adds both paths before it rounds.
    wide = None if bias is None else bias.float()
    want = OP.reference(x.float(), codes, scales, zeros, wide, **attrs)
    if not case.rank:
        got = linear_nbit(x, codes, scales, zeros, bias, **attrs)
    else:
        # The path's first part is cut from what siblings share; its second is stored in float16.
        down = torch.randn(case.rank + 3, case.columns, generator=rng).to(case.dtype) * 0.1
        up = torch.randn(case.outputs, case.rank, generator=rng).half()
        narrow = torch.nn.functional.linear(x, down)[..., 3:]
        want = want + narrow.float() @ up.to(case.dtype).float().T
        got = linear_nbit_low_rank(x, codes, scales, zeros, bias, narrow, up, **attrs)
    assert got.dtype == x.dtype and got.shape == want.shape
    return float((got.float() - want).norm() / max(float(want.norm()), 1e-9))


def _weight(
    rng: torch.Generator, case: Case
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    size, top = (case.outputs, n_groups(case.group, case.columns)), 1 << case.bits
    codes = torch.randint(top, (case.outputs, case.columns), generator=rng, dtype=torch.uint8)
    scales = (torch.randn(size, generator=rng) * 0.05).half()
    zeros = None
    if case.zeros == "integer":
        drawn = torch.randint(top, size, generator=rng, dtype=torch.uint8)
        zeros = pack_zeros(drawn, case.bits)
    if case.zeros == "real":
        zeros = (torch.rand(size, generator=rng) * top).half()
    return pack(codes, case.bits, case.group), scales, zeros


def _strided(x: torch.Tensor, strided: bool) -> torch.Tensor:
    return torch.nn.functional.pad(x, (2, 3))[..., 2:-3] if strided else x


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted(case: Case, errors: Mapping[str, Mapping[str, float]]) -> None:
    assert errors["linear_nbit"][str(case)] <= OP.tolerances[case.dtype]


def test_labels_are_distinct() -> None:
    assert len({str(case) for case in CASES}) == len(CASES)


@pytest.mark.parametrize(
    ("bits", "dtype", "reason"),
    [
        (5, torch.float32, "the kernel takes 2, 3, 4 and 8 bits, not 5"),
        (4, torch.float64, "takes float16, bfloat16, float32, not torch.float64"),
    ],
)
def test_what_it_does_not_take(bits: int, dtype: torch.dtype, reason: str) -> None:
    from graphwright.kernels.linear_nbit import linear_nbit

    x = torch.zeros(1, 32, dtype=dtype)
    codes, scales = torch.zeros(4, 1, 4 * bits, dtype=torch.uint8), torch.ones(4, 1)
    with pytest.raises(BadInput, match=reason):
        linear_nbit(x, codes, scales, bits=bits, group=32, in_features=32, out_features=4)


def test_a_tile_leaves_an_eighth_of_its_lanes_idle_at_most() -> None:
    from graphwright.kernels.linear_nbit_gemv import tile_for

    assert (tile_for(704).words, tile_for(256).words, tile_for(4096).words) == (256, 256, 1024)
    for words in range(1, 3000):
        tile = tile_for(words)
        assert tile.words in (32, 64, 128, 256, 512, 1024)
        assert tile.warps * 32 <= max(32, tile.words)
        if tile.words > 128:
            assert -(-words // tile.words) * tile.words <= words * 9 / 8


def test_splits_of_k_cover_it_and_are_no_more_than_needed() -> None:
    from graphwright.kernels.linear_nbit_gemm import splits_for, tile_for

    for rows, outputs, columns in itertools.product((5, 16, 129), (33, 4096), (1, 123, 5632)):
        tile = tile_for(rows, wide=False)
        splits = splits_for(rows, outputs, columns, tile, 132)
        assert 1 <= splits <= 16
        steps = -(-columns // tile.columns)
        assert splits == 1 or steps // splits >= 4
    assert splits_for(16, 5632, 2048, tile_for(16, wide=False), 132) == 3
    assert splits_for(4096, 5632, 2048, tile_for(4096, wide=False), 132) == 1
