"""``pack-quantized`` of compressed-tensors: ``weight_packed``, ``weight_scale``, ``weight_shape``
and, where it is not symmetric, ``weight_zero_point`` of each linear.

``W = (q - z) * s``; codes are stored as ``q + 2^(bits-1)``, int32 ``[N, ceil(K bits / 32)]``, dense
along K. Before release 0.17 widths that do not divide 32 left the rest of a word empty (3 bits: ten
codes a word): the width of ``weight_packed`` tells. Zero points are packed along N. Read from
compressed-tensors 0.20 and held against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...core.errors import BadInput
from ...core.weights import Weight
from .packed_bits import unpack_rows
from .stored_linear import Parts, needed
from .tensor_kinds import FLOATS, WHOLE, WORDS, whole_number

TENSORS = {
    "weight_packed": WORDS, "weight_scale": FLOATS, "weight_shape": WHOLE,
    "weight_zero_point": WHOLE, "weight_g_idx": WHOLE,
}  # fmt: skip


def read_linear(name: str, own: Mapping[str, Weight], args: Mapping[str, Any]) -> Parts:
    """One linear from its tensors and the ``weights`` of its config group. Raises ``BadInput``
    where a tensor is absent or they contradict each other or the config."""
    bits, strategy = args.get("num_bits"), args.get("strategy") or "group"
    if args.get("type", "int") != "int" or bits not in (2, 3, 4, 8):
        raise BadInput(f"{name}: weights of {bits} bits, type {args.get('type')!r}; int of 2, 3, 4 "
                       "and 8 are read")  # fmt: skip
    if strategy not in ("group", "channel", "tensor"):
        raise BadInput(f"{name}: strategy {strategy!r}; group, channel and tensor are read")
    packed, scale = (needed(name, own, part) for part in ("weight_packed", "weight_scale"))
    shape = needed(name, own, "weight_shape").read().flatten().tolist()
    if len(shape) != 2 or min(shape) < 1:
        raise BadInput(f"{name}.weight_shape is {shape}; a linear has rows and columns")
    rows, columns = shape
    group = whole_number(name, args, "group_size", 0) if strategy == "group" else columns
    group = group if group > 0 else columns
    groups = -(-columns // group)
    widths = (-(-columns * bits // 32), -(-columns // (32 // bits)))
    if packed.shape not in [(rows, width) for width in widths]:
        raise BadInput(
            f"{name}.weight_packed is {list(packed.shape)}, for {bits} bits of {rows} x {columns}"
        )
    if scale.numel not in ({rows * groups} if strategy != "tensor" else {1}):
        raise BadInput(
            f"{name}.weight_scale is {list(scale.shape)}, for {groups} groups of {rows} rows"
        )
    symmetric = bool(args.get("symmetric", True))
    points = None if symmetric else needed(name, own, "weight_zero_point")
    if symmetric and "weight_zero_point" in own and bool(own["weight_zero_point"].read().any()):
        raise BadInput(f"{name}.weight_zero_point is not 0, and config_groups says symmetric")
    if points is not None and (
        points.shape != (-(-rows * bits // 32), groups) or points.dtype != torch.int32
    ):
        raise BadInput(
            f"{name}.weight_zero_point is {points.type}; {groups} groups of {rows} rows of {bits} "
            f"bits make i32{[-(-rows * bits // 32), groups]}"
        )
    dense = packed.shape[1] == widths[0]
    index = own["weight_g_idx"].read().long() if "weight_g_idx" in own else None
    order = None if index is None or bool((index < 0).any()) else _order(name, index, group)

    def codes() -> Tensor:
        words = packed.read()
        matrix = unpack_rows(words, bits, columns) if dense else _padded(words, bits, columns)
        return matrix if order is None else matrix[:, order]

    def zeros() -> Tensor:
        assert points is not None
        stored = unpack_rows(points.read().T, bits, rows)
        return stored.T.reshape(rows, groups).contiguous()

    return Parts(
        name, rows, columns, int(bits), 0 if group == columns else group, codes,
        lambda: scale.read().reshape(-1, groups).expand(rows, groups), scale.dtype,
        None if symmetric else zeros, None if order is None else lambda: order,
        (packed.key, scale.key),
    )  # fmt: skip


def _order(name: str, index: Tensor, group: int) -> Tensor | None:
    order = torch.sort(index, stable=True).indices
    if not torch.equal(index[order], torch.arange(len(index)) // group):
        raise BadInput(f"{name}.weight_g_idx: its groups are not of {group} columns each")
    return None if torch.equal(order, torch.arange(len(index))) else order


def _padded(words: Tensor, bits: int, count: int) -> Tensor:
    """Whole codes a word, as they were packed before release 0.17."""
    each = 32 // bits
    fields = [(words >> (bits * place)) & ((1 << bits) - 1) for place in range(each)]
    return torch.stack(fields, -1).flatten(1)[:, :count].to(torch.uint8)
