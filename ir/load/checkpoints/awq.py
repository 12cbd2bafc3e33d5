"""AWQ's tensors, version GEMM: ``qweight``, ``qzeros`` and ``scales`` of each linear, 4 bits.

``W[n, k] = (q[k, n] - z[k / g, n]) * s[k / g, n]``; eight columns of ``qweight`` int32 ``[K, N/8]``
and of ``qzeros`` ``[K/g, N/8]`` share a word, in the order 0 2 4 6 1 3 5 7. Read from AutoAWQ 0.2.9
(``utils/packing_utils.py``).
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
from .tensor_kinds import FLOATS, WORDS, whole_number

TENSORS = {"qweight": WORDS, "qzeros": WORDS, "scales": FLOATS}
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in its word each of eight columns lies."""


def read_linear(name: str, own: Mapping[str, Weight], config: Mapping[str, Any]) -> Parts:
    """One linear from its tensors. Raises ``BadInput`` where one is absent or they contradict each
    other or the config."""
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if version != "gemm":
        raise BadInput(f"{name}: AWQ version {version!r}; gemm is read")
    bits = config.get("bits", config.get("w_bit"))
    if bits != 4:
        raise BadInput(f"{name}: bits={bits} of quantization_config; AWQ has 4")
    qweight, qzeros, scales = (needed(name, own, part) for part in TENSORS)
    columns, rows = qweight.shape[0], qweight.shape[1] * 8
    key = "group_size" if "group_size" in config else "q_group_size"
    stated = whole_number(name, config, key, -1)
    group = stated if stated > 0 else columns
    groups = columns // group
    expected = {"qzeros": (groups, rows // 8), "scales": (groups, rows)}
    for part, shape in expected.items():
        if own[part].shape != shape:
            raise BadInput(
                f"{name}.{part} is {list(own[part].shape)}; groups of {group} of a qweight "
                f"{list(qweight.shape)} make {list(shape)}"
            )
    return Parts(
        name, rows, columns, 4, 0 if group == columns else group,
        lambda: _columns(qweight.read(), rows).T.contiguous(), lambda: scales.read().T,
        scales.dtype, lambda: _columns(qzeros.read(), rows).T.contiguous(), None,
        (qweight.key, qzeros.key, scales.key),
    )  # fmt: skip


def _columns(words: Tensor, count: int) -> Tensor:
    """int32 ``[rows, count / 8]`` to uint8 ``[rows, count]``."""
    plain = unpack_rows(words, 4, count).view(len(words), count // 8, 8)
    return plain[..., torch.tensor(PLACES)].reshape(len(words), count)
