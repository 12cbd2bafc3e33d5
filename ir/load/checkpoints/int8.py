"""Checkpoints whose codes a form of ours in 8 bits is equal to: int8, and FP4 with scales.

* int8 of compressed-tensors: ``W = (q - z) s``, s one number, one a row or one a group; what the
  config says of activations is left out.
* int8 of bitsandbytes: ``W = q SCB / 127``, SCB one a row; its outlier threshold is left out.
* FP4 (e2m1, two a byte, the earlier one in the low nibble) is a codebook of whole numbers when
  doubled. MXFP4: ``2^(e - 127)`` for 32 columns. NVFP4: a float8 scale for 16 columns, over a
  global one (compressed-tensors) or times it (ModelOpt's ``weight_scale_2``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.errors import BadInput
from ...core.weights import Weight
from .stored_linear import Parts, needed, powers_of_two
from .tensor_kinds import FLOATS, INT8, PACKED, SCALES8, WHOLE, whole_number

INT8_TENSORS = {
    "weight": INT8, "weight_scale": FLOATS, "weight_zero_point": WHOLE, "weight_shape": WHOLE,
    "weight_g_idx": WHOLE, "input_scale": None, "input_zero_point": None, "output_scale": None,
}  # fmt: skip
BNB8_TENSORS = {"weight": INT8, "SCB": FLOATS, "weight_format": WHOLE}
FP4_TENSORS = {
    "weight_packed": PACKED, "weight": PACKED, "weight_scale": SCALES8,
    "weight_global_scale": FLOATS, "weight_scale_2": FLOATS, "input_global_scale": None,
    "input_scale": None,
}  # fmt: skip
TWICE = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])
"""Twice the numbers of e2m1."""


def read_int8(name: str, own: Mapping[str, Weight], config: Mapping[str, Any]) -> Parts:
    """int8 with scales. Raises ``BadInput`` where tensors are absent or contradict each other."""
    weight, scale = needed(name, own, "weight"), own["weight_scale"]
    if "weight_zero_point" in own and bool(own["weight_zero_point"].read().any()):
        raise BadInput(f"{name}.weight_zero_point: int8 weights are read where they are symmetric")
    rows, columns = weight.shape
    group = whole_number(name, config, "group_size", 0)
    group = group if 0 < group < columns else columns
    groups = -(-columns // group)
    if scale.numel not in (1, rows * groups) or (scale.numel == 1 and groups > 1):
        raise BadInput(
            f"{name}.weight_scale is {list(scale.shape)}, for {groups} groups of {rows} rows"
        )

    def scales() -> Tensor:
        return scale.read().reshape(-1, groups).expand(rows, groups)

    return _parts(name, weight, (rows, columns), 0 if group == columns else group,
                  lambda: (weight.read().to(torch.int16) + 128).to(torch.uint8), scales,
                  scale.dtype, (weight.key, scale.key))  # fmt: skip


def read_bnb8(name: str, own: Mapping[str, Weight], config: Mapping[str, Any]) -> Parts:
    """bitsandbytes' int8 with its row scales."""
    weight, scale = needed(name, own, "weight"), own["SCB"]
    if scale.numel != weight.shape[0]:
        raise BadInput(f"{name}.SCB is {list(scale.shape)}, for {weight.shape[0]} rows")
    if "weight_format" in own and own["weight_format"].numel == 1:
        kind = int(own["weight_format"].read())
        if kind:
            raise BadInput(f"{name}.weight_format is {kind}; 0, by rows, is read")
    return _parts(name, weight, (weight.shape[0], weight.shape[1]), 0,
                  lambda: (weight.read().to(torch.int16) + 128).to(torch.uint8),
                  lambda: (scale.read().float() / 127).reshape(-1, 1), torch.float32,
                  (weight.key, scale.key))  # fmt: skip


def read_fp4(name: str, own: Mapping[str, Weight], config: Mapping[str, Any]) -> Parts:
    """NVFP4 where there are float8 scales, else MXFP4."""
    packed = own["weight_packed"] if "weight_packed" in own else needed(name, own, "weight")
    scale = own["weight_scale"]
    rows, columns = packed.shape[0], packed.shape[1] * 2
    exponents = scale.dtype == torch.uint8
    group = 32 if exponents else 16
    if scale.shape != (rows, columns // group):
        raise BadInput(
            f"{name}.weight_scale is {list(scale.shape)}; groups of {group} of {rows} x {columns} "
            f"make {[rows, columns // group]}"
        )
    outer = own.get("weight_global_scale", own.get("weight_scale_2"))
    if not exponents and outer is None:
        needed(name, own, "weight_global_scale")
    if outer is not None and outer.numel != 1:
        raise BadInput(f"{name}: its global scale is {list(outer.shape)}; one number is read")

    def codes() -> Tensor:
        return torch.from_numpy(_pairs()[packed.read().numpy()].view(np.uint8))

    def scales() -> Tensor:
        stored = scale.read()
        if exponents:
            return powers_of_two(name, stored) / 2
        assert outer is not None
        whole = outer.read().float().reshape(())
        wide = stored.float() / 2
        return wide / whole if "weight_global_scale" in own else wide * whole

    return _parts(name, packed, (rows, columns), group, codes, scales, torch.float32,
                  (packed.key, scale.key, outer and outer.key))  # fmt: skip


def _pairs() -> np.ndarray[Any, Any]:
    """Both codes of each byte, the earlier one first: uint16 ``[256]``."""
    codes = (TWICE + 128).to(torch.uint8)
    pairs = torch.stack((codes.repeat(16), codes.repeat_interleave(16)), -1)
    return pairs.numpy().view(np.uint16).reshape(-1)


def _parts(
    name: str, weight: Weight, shape: tuple[int, int], group: int, codes: Callable[[], Tensor],
    scales: Callable[[], Tensor], dtype: torch.dtype, key: object,
) -> Parts:  # fmt: skip
    return Parts(name, *shape, 8, group, codes, scales, dtype, None, None, key)
