"""How codes of 2, 3, 4 and 8 bits lie in bytes, and what numbers they stand for.

The columns of a matrix [N, K] are cut into blocks; the last is padded where K is not a multiple.
A block of ``group`` columns has one scale. With ``group`` 0 a row has one scale, and its blocks are
a storage matter only (``block_of``). Codes are uint8 [N, blocks, block * bits / 8]:

* 4 bits: two codes a byte, the earlier one in the low nibble; 8 bits: one. This is the layout of
  operand B of ``com.microsoft::MatMulNBits``.
* 2 bits: four codes a byte, the earliest one lowest.
* 3 bits: a block's low two bits as above, then its high bits, eight a byte, the earliest lowest.

Zero points are absent (all are 2^(bits-1)), integers (uint8; nibbles, two groups a byte, up to 4
bits; whole bytes for 8 bits) or real numbers in the dtype of the scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import BadInput
from ..core.one_thread import one_thread

BITS = (2, 3, 4, 8)
GROUPS = (0, 16, 32, 64, 128, 256)
"""Columns that share a scale; 0 is the whole row. ONNX Runtime 1.31 takes blocks of 16 to 256."""
IN_CACHE = 1 << 18
"""Elements worked on at a time, by one thread: a few float32 copies of them stay in a core's share
of the last cache. Rounding to 4 bits takes 3.9 ns a weight then; with an eighth of them, which
stay in the second-level cache, 9: each op costs microseconds whatever it works on."""


def check_format(bits: int, group: int) -> None:
    """Raise ``BadInput`` on a width or a group size that has no storage form."""
    if bits not in BITS:
        raise BadInput(f"bits={bits}: weights are stored in {', '.join(map(str, BITS))} bits")
    if group not in GROUPS:
        raise BadInput(
            f"group={group}: a group is {', '.join(map(str, GROUPS[1:]))} columns, "
            "or 0 for one range per row"
        )


def block_of(group: int, in_features: int) -> int:
    """Columns in one stored block: the group; for one range per row, a divisor of padded K.

    K is then padded to a multiple of 16 and cut into the largest blocks that fit evenly, so that no
    row is padded by more than 15 codes.
    """
    if group:
        return group
    padded = -(-in_features // 16) * 16
    return min(padded & -padded, GROUPS[-1])


def n_blocks(group: int, in_features: int) -> int:
    """Stored blocks in a row."""
    return -(-in_features // block_of(group, in_features))


def n_groups(group: int, in_features: int) -> int:
    """Scales in a row."""
    return n_blocks(group, in_features) if group else 1


def rows_in_cache(columns: int) -> int:
    """Rows of a matrix that are worked on together, at least one.

    An even number where it can be: whole vectors of 16 numbers make a block then, also in groups of
    16, and no element takes torch's scalar path, whose ``pow`` differs in the last bit.
    """
    rows = max(1, IN_CACHE // max(columns, 1))
    return rows - rows % 2 if rows > 1 else 1


def zero_bytes(bits: int, groups: int) -> int:
    """Bytes of a row's integer zero points."""
    return groups if bits == 8 else -(-groups // 2)


_WIDE = {4: torch.int16, 2: torch.int32, 1: torch.int64}
"""The integer that holds the codes of one byte, each in a byte of its own, by the codes' width."""
_SHIFTS = {4: (4,), 2: (12, 6), 1: (28, 14, 7)}
"""How far the later half of the codes, then of each half, moves to leave the byte or enter it."""
_MASKS = {4: 0x0F0F, 2: 0x03030303, 1: 0x0101010101010101}


def _pack_plane(codes: Tensor, width: int) -> Tensor:
    """[..., n] codes below 2^width to [..., n * width / 8] bytes, the earliest code lowest."""
    wide = codes.view(_WIDE[width])
    for shift in reversed(_SHIFTS[width]):
        wide = wide | (wide >> shift)
    return wide.to(torch.uint8)


def _unpack_plane(data: Tensor, width: int) -> Tensor:
    wide = data.contiguous().to(_WIDE[width])
    for shift in _SHIFTS[width]:
        wide = wide | (wide << shift)
    return (wide & _MASKS[width]).view(torch.uint8)


def pack(codes: Tensor, bits: int, group: int) -> Tensor:
    """Codes [N, K] uint8 to their stored form [N, blocks, block * bits / 8]; padding holds 0.

    Raises ``BadInput`` on a format without storage form and on a code that needs more bits.
    """
    check_format(bits, group)
    if codes.numel() and int(codes.max()) >> bits:
        raise BadInput(f"a code of {int(codes.max())} does not fit in {bits} bits")
    rows, columns = codes.shape
    block, blocks = block_of(group, columns), n_blocks(group, columns)
    missing = block * blocks - columns
    padded = torch.nn.functional.pad(codes, (0, missing)) if missing else codes.contiguous()
    padded = padded.reshape(rows, blocks, block)
    if bits == 8:
        return padded.contiguous()
    if bits == 3:
        return torch.cat((_pack_plane(padded & 3, 2), _pack_plane(padded >> 2, 1)), -1)
    return _pack_plane(padded, bits)


def unpack(data: Tensor, bits: int, group: int, in_features: int) -> Tensor:
    """The inverse of ``pack``: uint8 [N, in_features]."""
    return _unpacked(data, bits, group, in_features)[:, :in_features]


def _unpacked(data: Tensor, bits: int, group: int, in_features: int) -> Tensor:
    """Codes uint8 [N, blocks * block], with those of the padding."""
    if bits == 8:
        return data.flatten(1)
    if bits == 3:
        low = block_of(group, in_features) // 4
        codes = _unpack_plane(data[..., :low], 2) | (_unpack_plane(data[..., low:], 1) << 2)
        return codes.flatten(1)
    return _unpack_plane(data, bits).flatten(1)


def pack_zeros(zeros: Tensor, bits: int) -> Tensor:
    """Integer zero points [N, groups] uint8 to their stored form [N, zero_bytes]."""
    if bits == 8:
        return zeros
    return _pack_plane(torch.nn.functional.pad(zeros, (0, zeros.shape[1] % 2)), 4)


def unpack_zeros(data: Tensor, bits: int, groups: int) -> Tensor:
    """The inverse of ``pack_zeros``: uint8 [N, groups]."""
    return data if bits == 8 else _unpack_plane(data, 4)[:, :groups]


def dequantize(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    bits: int,
    group: int,
    in_features: int,
) -> Tensor:
    """The matrix ``(code - zero) * scale`` in float32 [N, in_features].

    ``codes`` uint8 [N, blocks, bytes], ``scales`` [N, groups] of any float dtype, ``zeros`` as
    stored.
    """
    rows, groups = len(codes), n_groups(group, in_features)
    if zeros is not None and not zeros.is_floating_point():
        zeros = unpack_zeros(zeros, bits, groups)
    weight = scales.new_empty((rows, in_features), dtype=torch.float32)
    step = rows_in_cache(in_features)
    with one_thread():
        for start in range(0, rows, step):
            part = slice(start, start + step)
            padded = _unpacked(codes[part], bits, group, in_features)
            values = padded.float().view(len(padded), groups, -1)
            middle = float(1 << (bits - 1))
            values -= middle if zeros is None else zeros[part].float().unsqueeze(-1)
            values *= scales[part].float().unsqueeze(-1)
            weight[part] = values.flatten(1)[:, :in_features]
    return weight
