"""HQQ's tensors: ``W_q``, ``scale``, ``zero`` and what says how they lie, for each linear.

``W = (q - zero) * scale``, both real numbers. The matrix is reshaped to ``[-1, g]`` (axis 1: groups
along the columns, our form with real zero points) or ``[g, -1]`` (axis 0: groups of the flattened
matrix, which no form of ours is equal to). Its codes are cut by rows into as many equal slabs as a
word holds codes, the first slab in the highest bits; 3 bits lie ten in an int32, rows padded. Every
setting is a tensor, a text one of bytes. Read from hqq 0.2.8 (``core/quantize.py``,
``core/bitpack.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...core.errors import BadInput
from ...core.weights import ComputedWeight, Weight
from .dense import Dense
from .stored_linear import Parts, finite, needed
from .tensor_kinds import BYTES, FLOATS, NUMBER, WHOLE, Kind

_SETTINGS = (
    "group_size", "unpack_view_dtype", "compute_dtype", "offload_meta", "encoded_state_dict",
    "stores_quant_config", "channel_wise", "optimize", "round_zero",
)  # fmt: skip
TENSORS: dict[str, Kind | None] = {
    "W_q": WHOLE, "scale": FLOATS, "zero": FLOATS, "shape": WHOLE, "packing": BYTES,
    "nbits": WHOLE, "axis": WHOLE, "view_as_float": NUMBER, "quant_scale": NUMBER,
    "quant_zero": NUMBER, **dict.fromkeys(_SETTINGS),
}  # fmt: skip
SLABS = {"8bit_u8": (8, 1), "4bit_u8": (4, 2), "3bit_32": (3, 10), "2bit_u8": (2, 4)}
"""Bits, and codes in a word, of each packing."""


def read_linear(name: str, own: Mapping[str, Weight], config: Mapping[str, Any]) -> Parts | Dense:
    """One linear from its tensors. Raises ``BadInput`` where one is absent or they contradict each
    other, and for layouts that are not read."""
    words, scale, zero = (needed(name, own, part) for part in ("W_q", "scale", "zero"))
    packing = bytes(needed(name, own, "packing").read().tolist()).decode(errors="replace")
    if packing not in SLABS:
        raise BadInput(f"{name}.packing is {packing!r}; {', '.join(SLABS)} are read")
    for part in ("view_as_float", "quant_scale", "quant_zero"):
        if part in own and own[part].numel and bool(own[part].read().any()):
            raise BadInput(f"{name}.{part} is set: such tensors of HQQ are not read")
    bits, slabs = SLABS[packing]
    rows, columns = _shape(name, own)
    axis, count = int(_number(name, own, "axis")), rows * columns
    if int(_number(name, own, "nbits")) != bits:
        raise BadInput(f"{name}.nbits is {int(own['nbits'].read())}, and its packing {packing}")
    group = max(1, count // max(scale.numel, 1))
    lines = (count // group, group) if axis == 1 else (group, count // group)
    expected = (-(-lines[0] // slabs), lines[1])
    if (
        axis not in (0, 1) or scale.numel != zero.numel or scale.numel * group != count
        or words.shape != expected or (axis == 1 and columns % group)
    ):  # fmt: skip
        raise BadInput(
            f"{name}.W_q is {list(words.shape)}, with {scale.numel} scales and {zero.numel} zeros; "
            f"{rows} x {columns} of {packing} in groups along axis {axis} need {list(expected)}"
        )

    def codes() -> Tensor:
        return _slabs(words.read(), bits, slabs)[: lines[0]]

    key = (words.key, scale.key, zero.key)
    if axis == 0:

        def make() -> Tensor:
            numbers = codes().float() - zero.read().float()
            stored = finite(name, "scale or zero", numbers * scale.read().float())
            return stored.reshape(rows, columns)

        handle = ComputedWeight(make, (rows, columns), torch.float32, key)
        return Dense(handle, f"{bits} bits of HQQ in groups across rows")
    groups = columns // group
    return Parts(
        name, rows, columns, bits, 0 if groups == 1 else group,
        lambda: codes().reshape(rows, columns), lambda: scale.read().reshape(rows, groups),
        scale.dtype, lambda: zero.read().to(scale.dtype).reshape(rows, groups), None, key,
        real_zeros=True,
    )  # fmt: skip


def _slabs(words: Tensor, bits: int, slabs: int) -> Tensor:
    """uint8 ``[slabs * rows, columns]`` of ``[rows, columns]`` words."""
    mask = (1 << bits) - 1
    parts = [(words >> (bits * (slabs - 1 - place))) & mask for place in range(slabs)]
    return torch.cat(parts).to(torch.uint8)


def _shape(name: str, own: Mapping[str, Weight]) -> tuple[int, int]:
    shape = [int(size) for size in needed(name, own, "shape").read().flatten().tolist()]
    if len(shape) != 2 or min(shape) < 1:
        raise BadInput(f"{name}.shape is {shape}; a linear has rows and columns")
    return shape[0], shape[1]


def _number(name: str, own: Mapping[str, Weight], part: str) -> float:
    stored = needed(name, own, part)
    if stored.numel != 1:
        raise BadInput(f"{name}.{part} is {stored.type}; one number is read")
    return float(stored.read())
