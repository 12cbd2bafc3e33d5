"""gpt-oss's experts in MXFP4: ``gate_up_proj_blocks`` and ``_scales``, ``down_proj_`` likewise.

A stack of blocks is uint8 ``[experts, N, K / 32, 16]``, its exponents uint8 ``[experts, N, K /
32]``: ``W = e2m1 * 2^(e - 127)``, the earlier of two codes in the low nibble. The model has each
matrix as ``[K, N]``. Read from transformers 5.23 (``integrations/mxfp4.py``) and held against it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ...core.errors import BadInput
from ...core.weights import FileWeight, Weight
from .stored_linear import cut_stack, needed
from .tensor_kinds import BYTES, Kind, check_kinds

_STACK = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)_(blocks|scales)")
BLOCK = 32
"""Columns that share an exponent."""


def by_expert(tensors: Mapping[str, Weight]) -> dict[str, Weight]:
    """The tensors with each expert's matrix by itself, as ``weight_packed`` uint8 ``[N, K / 2]``
    and ``weight_scale`` uint8 ``[N, K / 32]``; nothing is read. Raises ``BadInput`` where there is
    no such stack, and where one lacks a part or they contradict each other."""
    split = dict(tensors)
    stacks: dict[tuple[str, str], dict[str, Weight]] = {}
    for name in tensors:
        part = _STACK.fullmatch(name)
        if part is not None:
            stacks.setdefault((part[1], part[2]), {})[f"{part[2]}_{part[3]}"] = split.pop(name)
    if not stacks:
        raise BadInput(
            "quantization_config says mxfp4, and the checkpoint has no tensor gate_up_proj_blocks"
        )
    for (path, kind), own in stacks.items():
        if f"{path}.{kind}" in tensors:
            raise BadInput(f"{path} has both {kind} and {next(iter(own))}: one of them is stale")
        split |= _matrices(path, kind, own)
    return split


def _matrices(path: str, kind: str, own: Mapping[str, Weight]) -> dict[str, Weight]:
    blocks, scales = (needed(path, own, f"{kind}_{part}") for part in ("blocks", "scales"))
    check_kinds(path, own, {
        f"{kind}_blocks": Kind("uint8 [experts, rows, blocks, 16]", BYTES.dtypes, 4),
        f"{kind}_scales": Kind("uint8 [experts, rows, blocks]", BYTES.dtypes, 3),
    })  # fmt: skip
    if blocks.shape != (*scales.shape, BLOCK // 2):
        raise BadInput(
            f"{path}.{kind}_blocks is {list(blocks.shape)}; {kind}_scales {list(scales.shape)} "
            f"make {[*scales.shape, BLOCK // 2]}"
        )
    assert isinstance(blocks, FileWeight) and isinstance(scales, FileWeight)
    matrices: dict[str, Weight] = {}
    for index, codes in enumerate(cut_stack(blocks)):
        rows, count, size = codes.shape
        packed = codes.part(0, (rows, count * size))
        matrices[f"{path}.{index}.{kind}.weight_packed"] = packed
    for index, exponents in enumerate(cut_stack(scales)):
        matrices[f"{path}.{index}.{kind}.weight_scale"] = exponents
    return matrices
