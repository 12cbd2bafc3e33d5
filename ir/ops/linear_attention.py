"""``linear_attention``: a state that each token decays, writes to and reads (linear attention).

What Gated DeltaNet (arXiv 2412.06464), Kimi Delta Attention (2510.26692) and Mamba 2 (2405.21060)
have in common. The ONNX form is the one node ``com.microsoft::LinearAttention``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.types import UNKNOWN_DIM, Dim, Type
from ..vocab.onnx import MICROSOFT
from ..vocab.spec import Macs
from .base import Sample, own_op
from .emit import cast, constant

if TYPE_CHECKING:
    import onnx_ir
    from onnx_ir.tape import Tape

NODE = "LinearAttention"


def linear_attention(
    x: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor | None = None,
    state: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``S <- exp(g) S``, then ``S <- S + k u``, and ``out = S q``, token by token.

    u is v, or with ``beta`` ``β (v - Sᵀ k)``, the delta rule. ``x`` (q) and ``key`` [B, T, H, K],
    ``value`` [B, T, H, V], ``decay`` (g, at most 0) [B, T, H] or [B, T, H, K], ``beta`` [B, T, H],
    ``state`` (S before the first token; 0 where it is absent) [B, H, K, V]. Of one node two
    results in one tensor: out [B, H, T, V], and S behind the last token as K more rows of it.
    """
    query, key, value, decay = (t.float() for t in (x, key, value, decay))
    kept = decay.exp() if decay.dim() == 4 else decay.exp().unsqueeze(-1)
    batch, tokens, heads, width = x.shape
    held = query.new_zeros(batch, heads, width, value.shape[-1]) if state is None else state.float()
    rows = []
    for t in range(tokens):
        held = held * kept[:, t].unsqueeze(-1)
        update = value[:, t]
        if beta is not None:
            known = torch.einsum("bhkv,bhk->bhv", held, key[:, t])
            update = beta[:, t].float().unsqueeze(-1) * (update - known)
        held = held + key[:, t].unsqueeze(-1) * update.unsqueeze(-2)
        rows.append(torch.einsum("bhkv,bhk->bhv", held, query[:, t]).unsqueeze(2))
    return torch.cat([*rows, held], 2).to(x.dtype)


def _infer(operands: Sequence[Any], attrs: Mapping[str, Any]) -> tuple[Type, ...]:
    x, key, value = operands[:3]
    for name, operand in (("x", x), ("key", key), ("value", value)):
        if operand.shape is not None and len(operand.shape) != 4:
            raise ValueError(f"linear_attention: {name} is {operand}, it must have 4 dimensions")
    if x.shape is None or value.shape is None:
        return (x.with_shape(None),)
    batch, tokens, heads, width = x.shape
    return (x.with_shape((batch, heads, _more(tokens, width), value.shape[3])),)


def _more(tokens: Dim, rows: Dim) -> Dim:
    """The sum, as torch writes it."""
    if not isinstance(tokens, str) and not isinstance(rows, str):
        return tokens + rows
    return f"{tokens} + {rows}" if str(tokens).isidentifier() else UNKNOWN_DIM


def _record(
    tape: Tape, operands: Sequence[onnx_ir.Value | None], attrs: Mapping[str, Any]
) -> onnx_ir.Value:
    import onnx_ir as ir

    x, key, value, decay, *rest = operands
    beta, state = (*rest, None, None)[:2]
    assert x is not None and key is not None and value is not None and decay is not None
    dtype, heads = x.dtype, x.shape[2] if x.shape is not None else None
    if not isinstance(heads, int) or dtype is None:
        raise ValueError("linear_attention needs a known number of heads")
    packed = constant(tape, [0, 0, -1])

    def flat(tensor: onnx_ir.Value | None, rank: int = 4) -> onnx_ir.Value | None:
        if tensor is None:
            return None
        wide = cast(tape, tensor, ir.DataType.FLOAT)
        return tape.op("Reshape", [wide, packed]) if rank == 4 else wide

    per_key = 4 if decay.shape is not None and len(decay.shape) == 4 else 3
    out, held = tape.op_multi_out(
        NODE,
        [flat(x), flat(key), flat(value), flat(state, 0), flat(decay, per_key), flat(beta, 3)],
        {"q_num_heads": heads, "kv_num_heads": heads, "scale": 1.0,
         "update_rule": "gated" if beta is None else "gated_delta"},
        num_outputs=2, domain=MICROSOFT, version=1,
    )  # fmt: skip
    rows = tape.op("Reshape", [out, constant(tape, [0, 0, heads, -1])])
    turned = tape.op("Transpose", [rows], {"perm": [0, 2, 1, 3]})
    joined = tape.op("Concat", [turned, held], {"axis": 2})
    joined.dtype = ir.DataType.FLOAT
    return cast(tape, joined, dtype)


def _samples() -> list[Sample]:
    rng = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=rng)

    cases = []
    for (batch, tokens, heads, width), values, fine in (((2, 5, 3, 4), 6, 0), ((1, 1, 2, 8), 1, 1)):
        sizes = batch, tokens, heads
        key = torch.nn.functional.normalize(draw(*sizes, width), dim=-1)
        decay = -draw(*sizes, *[width] * fine).abs()
        tensors = draw(*sizes, width), key, draw(*sizes, values), decay
        beta, state = draw(*sizes).sigmoid(), draw(batch, heads, width, values)
        label = f"{batch}x{tokens}x{heads}x{width}"
        cases.append(Sample((*tensors, beta, state), {}, f"{label} delta"))
        cases.append(Sample((*tensors, None, state), {}, label))
        cases.append(Sample((*tensors, beta, None), {}, f"{label} from 0"))
    return cases


LINEAR_ATTENTION = own_op(
    linear_attention, infer=_infer, record=_record, samples=_samples, heavy=True,
    macs=Macs(lambda shapes, out: 2 * prod(shapes[0]) * out[-1]),
)  # fmt: skip
