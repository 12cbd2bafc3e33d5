"""GPTQ's tensors: ``qweight``, ``qzeros``, ``scales`` and ``g_idx`` of each linear.

``W[n, k] = (q[k, n] - z[g_idx[k], n]) * s[g_idx[k], n]``. ``qweight`` int32 ``[K bits / 32, N]``
holds codes densely down its first axis, ``qzeros`` ``[groups, N bits / 32]`` along its second, in
as many words as are begun.
Format ``gptq``, the first version and the one where none is said, stores ``z - 1``, modulo
``2^bits``; ``gptq_v2`` stores ``z``. With act-order ``g_idx`` is not sorted: columns are then put
in the order of their groups, and the linear's input with them. Read from gptqmodel 7.7
(``nn_modules/qlinear/torch.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...core.errors import BadInput
from ...core.weights import Weight
from .packed_bits import unpack_rows
from .stored_linear import Parts
from .tensor_kinds import FLOATS, WHOLE, WORDS, whole_number

TENSORS = {"qweight": WORDS, "qzeros": WORDS, "scales": FLOATS, "g_idx": WHOLE}
FORMATS = {"gptq": 1, "gptq_v2": 0}
"""What is missing from a stored zero point, by the name of the format."""


def read_linear(name: str, own: Mapping[str, Weight], config: Mapping[str, Any]) -> Parts:
    """One linear from its tensors. Raises ``BadInput`` where one is absent or they contradict each
    other or the config."""
    bits, stated = _bits(name, config), whole_number(name, config, "group_size", -1)
    parts = ("qweight", "qzeros", "scales")
    missing = [part for part in parts if part not in own]
    if missing:
        raise BadInput(f"{name}: {missing[0]} is not in the checkpoint, and qweight is")
    qweight, qzeros, scales = (own[part] for part in parts)
    columns, rows = qweight.shape[0] * 32 // bits, qweight.shape[1]
    groups = scales.shape[0]
    group = stated if stated > 0 else columns
    width = -(-rows * bits // 32)  # the last word is not full in a linear of one row, say a gate
    expected = {"scales": (-(-columns // group), rows), "qzeros": (groups, width)}
    for part, shape in expected.items():
        if own[part].shape != shape or (qweight.shape[0] * 32) % bits:
            raise BadInput(
                f"{name}.{part} is {list(own[part].shape)}; {bits} bits in groups of {group} of a "
                f"qweight {list(qweight.shape)} make {list(shape)}"
            )
    index = own["g_idx"].read().long() if "g_idx" in own else None
    if index is None and config.get("desc_act"):
        raise BadInput(f"{name}: desc_act is true, and g_idx is not in the checkpoint")
    order = None if index is None else _order(name, index, columns, group)
    zeros = _zeros(name, qzeros, bits, rows, config)
    middle = bool((zeros == 1 << (bits - 1)).all())

    def codes() -> Tensor:
        matrix = unpack_rows(qweight.read().T, bits, columns)
        return matrix if order is None else matrix[:, order]

    return Parts(
        name, rows, columns, bits, 0 if group == columns else group, codes,
        lambda: scales.read().T, scales.dtype, None if middle else lambda: zeros.T,
        None if order is None else lambda: order, (qweight.key, qzeros.key, scales.key),
    )  # fmt: skip


def _bits(name: str, config: Mapping[str, Any]) -> int:
    bits = config.get("bits")
    if type(bits) is not int or bits not in (2, 3, 4, 8):
        raise BadInput(f"{name}: bits={bits} of quantization_config; 2, 3, 4 and 8 are read")
    return int(bits)


def _zeros(name: str, qzeros: Weight, bits: int, rows: int, config: Mapping[str, Any]) -> Tensor:
    """Zero points uint8 ``[groups, N]``. They are few, and decide of the form that is stored."""
    kind = config.get("checkpoint_format") or config.get("format") or "gptq"
    if kind not in FORMATS:
        raise BadInput(f"{name}: checkpoint_format {kind!r}; {', '.join(FORMATS)} are read")
    fields = unpack_rows(qzeros.read(), bits, rows)
    return (fields + FORMATS[kind]) & ((1 << bits) - 1)


def _order(name: str, index: Tensor, columns: int, group: int) -> Tensor | None:
    """Columns in the order of their groups; ``None`` where they are in it already."""
    ascending = torch.arange(columns) // group
    if index.shape != (columns,):
        raise BadInput(f"{name}.g_idx is {list(index.shape)}, for {columns} columns")
    if torch.equal(index, ascending):
        return None
    order = torch.sort(index, stable=True).indices
    if not torch.equal(index[order], ascending):
        raise BadInput(f"{name}.g_idx: its groups are not of {group} columns each")
    return order
