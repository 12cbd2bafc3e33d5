"""Packing and dequantizing against plain ones: code by code, a scale for every column."""

from __future__ import annotations

import pytest
import torch
from graphwright.ir.ops import linear_bitstack, linear_nbit, pack, sparse_linear
from graphwright.ir.ops.pack import BITS, IN_CACHE, block_of, n_blocks, n_groups, rows_in_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

FORMATS = pytest.mark.parametrize(
    ("bits", "group", "rows", "columns"),
    [(bits, *rest) for bits in BITS for rest in (
        (16, 3, 45), (32, 70, 1024), (0, 5, 123), (256, 2, 40_000), (64, 1, 1), (0, 4, 384)
    )],
)  # fmt: skip


def drawn(bits: int, rows: int, columns: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, columns), generator=rng, dtype=torch.uint8)


def plain_plane(codes: list[int], width: int) -> list[int]:
    """Codes below 2^width to bytes, the earliest code lowest."""
    per = 8 // width
    return [
        sum(code << (width * i) for i, code in enumerate(codes[start : start + per]))
        for start in range(0, len(codes), per)
    ]


def plain_row(codes: list[int], bits: int, group: int) -> list[list[int]]:
    """The stored blocks of one row."""
    block = block_of(group, len(codes))
    padded = codes + [0] * (n_blocks(group, len(codes)) * block - len(codes))
    blocks = [padded[i : i + block] for i in range(0, len(padded), block)]
    if bits == 3:
        return [plain_plane([c & 3 for c in b], 2) + plain_plane([c >> 2 for c in b], 1)
                for b in blocks]  # fmt: skip
    return [plain_plane(b, bits) for b in blocks]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(BITS), st.sampled_from([0, 16, 64]), st.integers(1, 130), st.integers(0, 2**31)
)
def test_packing_code_by_code(bits: int, group: int, columns: int, seed: int) -> None:
    codes = drawn(bits, 2, columns, seed)
    rows = [plain_row(row, bits, group) for row in codes.tolist()]
    packed = pack.pack(codes, bits, group)
    assert packed.tolist() == rows
    assert torch.equal(pack.unpack(packed, bits, group, columns), codes)


@pytest.mark.parametrize("bits", BITS)
def test_codes_out_of_a_larger_tensor(bits: int) -> None:
    """Rows and columns of another tensor start at any byte of its memory."""
    codes = drawn(bits, 5, 67)
    for part in (codes[1:], codes[:, 3:], codes[1:, 3:35], codes.T):
        packed = pack.pack(part, bits, 32)
        assert torch.equal(packed, pack.pack(part.clone(), bits, 32))
        whole = torch.cat((packed, packed))[len(packed) :]
        assert torch.equal(pack.unpack(whole, bits, 32, part.shape[1]), part)


def plain(codes: Tensor, scales: Tensor, zeros: Tensor | float, group: int) -> Tensor:
    """``(code - zero) * scale``, the group's numbers repeated for each of its columns."""
    columns = codes.shape[1]

    def spread(numbers: Tensor) -> Tensor:
        return numbers.float().repeat_interleave(group or columns, 1)[:, :columns]

    zero = spread(zeros) if isinstance(zeros, Tensor) else zeros
    return (codes.float() - zero) * spread(scales)


@FORMATS
@pytest.mark.parametrize("kind", ["none", "integer", "real"])
def test_dequantizing_is_bit_exact(
    bits: int, group: int, rows: int, columns: int, kind: str
) -> None:
    rng = torch.Generator().manual_seed(bits)
    codes, groups = drawn(bits, rows, columns), n_groups(group, columns)
    scales = torch.randn(rows, groups, generator=rng).half()
    integer = drawn(bits, rows, groups, 1)
    real = torch.rand(rows, groups, generator=rng).mul(1 << bits).half()
    zeros, stored = {
        "none": (float(1 << (bits - 1)), None),
        "integer": (integer, pack.pack_zeros(integer, bits)),
        "real": (real, real),
    }[kind]
    packed = pack.pack(codes, bits, group)
    form = {"bits": bits, "group": group, "in_features": columns}
    matrix = pack.dequantize(packed, scales, stored, **form)
    assert matrix.dtype == torch.float32
    assert matrix.is_contiguous()
    assert torch.equal(matrix, plain(codes, scales, zeros, group))


def test_blocks_of_rows_fill_a_share_of_the_cache() -> None:
    for columns in (1, 16, 123, 896, 4096, 16_383):
        rows = rows_in_cache(columns)
        assert rows * columns <= IN_CACHE
        assert rows % 2 == 0
        assert (rows + 2) * columns > IN_CACHE
    assert rows_in_cache(IN_CACHE // 2 + 1) == rows_in_cache(1 << 20) == 1


def test_blocks_are_worked_on_by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, before = [], torch.get_num_threads()
    real = pack._unpacked
    monkeypatch.setattr(
        pack, "_unpacked", lambda *args: [seen.append(torch.get_num_threads()), real(*args)][1]
    )
    codes = pack.pack(torch.zeros(4, 32, dtype=torch.uint8), 4, 32)
    torch.set_num_threads(2)
    try:
        pack.dequantize(codes, torch.ones(4, 1), bits=4, group=32, in_features=32)
        assert (seen, torch.get_num_threads()) == ([1], 2)
        with pytest.raises(RuntimeError):
            pack.dequantize(codes, torch.ones(4, 3), bits=4, group=32, in_features=32)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def identity(columns: int) -> Tensor:
    return torch.eye(columns)


def test_the_dense_weight_is_what_the_linear_multiplies_by() -> None:
    rng = torch.Generator().manual_seed(0)
    form = {"bits": 3, "group": 16, "in_features": 45}
    stored = pack.pack(drawn(3, 7, 45), 3, 16), torch.rand(7, 3, generator=rng)
    weight = pack.dequantize(*stored, **form)
    y = linear_nbit.linear_nbit(identity(45), *stored, out_features=7, **form)
    assert torch.equal(weight, y.T)

    signs = torch.stack([linear_bitstack.pack_signs(drawn(1, 7, 45, i).bool()) for i in range(3)])
    factors = torch.rand(3, 2, 52, generator=rng).half()
    weight = linear_bitstack.dense(signs, factors, 7)
    sizes = {"in_features": 45, "out_features": 7}
    y = linear_bitstack.linear_bitstack(identity(45), signs, factors, **sizes)
    assert torch.equal(weight, y.T)
    left, right = factors.float().split([7, 45], -1)
    sum_of_blocks = sum(
        torch.where(drawn(1, 7, 45, i).bool(), 1.0, -1.0) * (left[i].T @ right[i]) for i in range(3)
    )
    assert torch.allclose(weight, torch.as_tensor(sum_of_blocks), rtol=1e-6, atol=1e-7)

    rows, cols = torch.tensor([0, 0, 6]), torch.tensor([3, 44, 0])
    entries = rows.to(torch.uint16), cols.to(torch.uint16), torch.tensor([1.5, -2.0, 3.0]).half()
    weight = sparse_linear.dense(*entries, **sizes)
    y = sparse_linear.sparse_linear(identity(45), *entries, out_features=7)
    assert torch.equal(weight, y.T)
    assert weight.count_nonzero() == 3
