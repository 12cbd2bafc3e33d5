"""``token_scores``: what one query pays to each key, the mean of its heads.

The score of image tokens that FasterVLM (arXiv 2412.01818), VTC-CLS (2412.05819) and FastV
(2403.06764) rank by. Passes spell it out in ops of the vocabulary (``moves.attention_scores``); the
op stands for those where a device has a kernel for it. The ONNX form is the plain arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import InvalidGraph
from ..core.types import Type
from .base import Sample, own_op
from .emit import cast, constant

if TYPE_CHECKING:
    import onnx_ir
    from onnx_ir.tape import Tape


def token_scores(q: Tensor, k: Tensor, mask: Tensor | None = None, *, scale: float) -> Tensor:
    """``mean_h softmax(q_h k_gᵀ · scale)`` [rows, keys] in the dtype of ``q``.

    q [rows, heads, 1, width]; k [rows, groups, keys, width], heads a multiple of groups, each group
    for so many heads in a row; ``mask`` bool, true for keys that are seen, [rows or 1, 1, 1, keys].
    A row of which no key is seen gives equal parts.
    """
    rows, heads, _, width = q.shape
    groups = k.shape[1]
    together = q.float().reshape(rows, groups, heads // groups, width)
    logits = together @ k.float().transpose(2, 3) * scale
    if mask is not None:
        logits = torch.where(mask, logits, torch.finfo(torch.float32).min)
    return logits.softmax(-1).mean((1, 2)).to(q.dtype)


def _infer(operands: Sequence[Any], attrs: Mapping[str, Any]) -> tuple[Type, ...]:
    q, k = operands[:2]
    if q.shape is None or k.shape is None:
        return (Type(q.dtype, None),)
    heads, groups = q.shape[1], k.shape[1]
    if isinstance(heads, int) and isinstance(groups, int) and heads % max(1, groups):
        raise ValueError(f"token_scores: {heads} heads cannot share the keys of {groups}")
    return (Type(q.dtype, (q.shape[0], k.shape[2])),)


def _record(
    tape: Tape, operands: Sequence[onnx_ir.Value | None], attrs: Mapping[str, Any]
) -> onnx_ir.Value:
    import onnx_ir as ir

    q, k, mask = (*operands, None)[:3]
    if q is None or k is None or q.dtype is None or k.shape is None or q.shape is None:
        raise InvalidGraph("token_scores needs queries and keys of known types")
    groups, width = k.shape[1], k.shape[3]
    if not isinstance(groups, int) or not isinstance(width, int):
        raise InvalidGraph("token_scores: the number of heads or their width is not known")
    wide, keys = (cast(tape, x, ir.DataType.FLOAT) for x in (q, k))
    together = tape.op("Reshape", [wide, constant(tape, [0, groups, -1, width])])
    turned = tape.op("Transpose", [keys], {"perm": [0, 1, 3, 2]})
    scale = constant(tape, attrs["scale"], np.float32)
    logits = tape.op("Mul", [tape.op("MatMul", [together, turned]), scale])
    if mask is not None:
        lowest = constant(tape, np.finfo(np.float32).min, np.float32)
        logits = tape.op("Where", [mask, logits, lowest])
    weights = tape.op("Softmax", [logits], {"axis": -1})
    scores = tape.op("ReduceMean", [weights, constant(tape, [1, 2])], {"keepdims": 0})
    scores.dtype = ir.DataType.FLOAT
    return cast(tape, scores, q.dtype)


def _samples() -> list[Sample]:
    rng = torch.Generator().manual_seed(0)
    cases = []
    for rows, heads, groups, keys, width, masked in (
        (2, 3, 3, 7, 8, False), (1, 6, 2, 17, 12, True), (3, 4, 1, 5, 16, True),
    ):  # fmt: skip
        q = torch.randn(rows, heads, 1, width, generator=rng)
        k = torch.randn(rows, groups, keys, width, generator=rng)
        mask = torch.rand(rows, 1, 1, keys, generator=rng) > 0.3 if masked else None
        cases.append(Sample((q, k, mask), {"scale": 0.7}, f"{heads}of{groups}x{keys}-{masked}"))
    return cases


TOKEN_SCORES = own_op(token_scores, infer=_infer, record=_record, samples=_samples)
