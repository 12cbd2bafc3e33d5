"""How codes of 2, 3, 4 and 8 bits lie in bytes, and what numbers they stand for.

The columns of a matrix [N, K] are cut into blocks; the last one is padded where K is no multiple.
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

BITS = (2, 3, 4, 8)
GROUPS = (0, 16, 32, 64, 128, 256)
"""Columns that share a scale; 0 is the whole row. ONNX Runtime 1.31 takes blocks of 16 to 256."""


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


def zero_bytes(bits: int, groups: int) -> int:
    """Bytes of a row's integer zero points."""
    return groups if bits == 8 else -(-groups // 2)


def _pack_plane(codes: Tensor, width: int) -> Tensor:
    """[..., n] codes below 2^width to [..., n * width / 8] bytes, the earliest code lowest."""
    per = 8 // width
    parts = codes.reshape(*codes.shape[:-1], -1, per).unbind(-1)
    out = parts[0].clone()
    for i, part in enumerate(parts[1:], 1):
        out |= part << (width * i)
    return out


def _unpack_plane(data: Tensor, width: int) -> Tensor:
    mask = (1 << width) - 1
    parts = [(data >> (width * i)) & mask for i in range(8 // width)]
    return torch.stack(parts, -1).flatten(-2)


def pack(codes: Tensor, bits: int, group: int) -> Tensor:
    """Codes [N, K] uint8 to their stored form [N, blocks, block * bits / 8]; padding holds 0.

    Raises ``BadInput`` on a format without storage form and on a code that needs more bits.
    """
    check_format(bits, group)
    if codes.numel() and int(codes.max()) >> bits:
        raise BadInput(f"a code of {int(codes.max())} does not fit in {bits} bits")
    rows, columns = codes.shape
    block, blocks = block_of(group, columns), n_blocks(group, columns)
    padded = torch.nn.functional.pad(codes, (0, block * blocks - columns))
    padded = padded.reshape(rows, blocks, block)
    if bits == 8:
        return padded.contiguous()
    if bits == 3:
        return torch.cat((_pack_plane(padded & 3, 2), _pack_plane(padded >> 2, 1)), -1)
    return _pack_plane(padded, bits)


def unpack(data: Tensor, bits: int, group: int, in_features: int) -> Tensor:
    """The inverse of ``pack``: uint8 [N, in_features]."""
    if bits == 8:
        codes = data
    elif bits == 3:
        low = block_of(group, in_features) // 4
        codes = _unpack_plane(data[..., :low], 2) | (_unpack_plane(data[..., low:], 1) << 2)
    else:
        codes = _unpack_plane(data, bits)
    return codes.flatten(1)[:, :in_features]


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
    groups = n_groups(group, in_features)
    columns = group or in_features
    zero: Tensor | float = float(1 << (bits - 1))
    if zeros is not None:
        whole = zeros if zeros.is_floating_point() else unpack_zeros(zeros, bits, groups)
        zero = _per_column(whole, columns, in_features)
    values = unpack(codes, bits, group, in_features).float() - zero
    return values * _per_column(scales, columns, in_features)


def _per_column(per_group: Tensor, columns: int, in_features: int) -> Tensor:
    return per_group.float().repeat_interleave(columns, 1)[:, :in_features]
