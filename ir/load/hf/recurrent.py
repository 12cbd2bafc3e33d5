"""Layers with a state in the place of keys and values, as a graph of texts of any length has them.

The library runs them in chunks, or token by token, in loops of Python, which an exporter unrolls
for the one length that it sees. Here each is one ``linear_attention``, the same sums in another
order: Gated DeltaNet (Qwen3-Next, Qwen3.5, OLMo Hybrid), Kimi Delta Attention, Mamba, Mamba 2, and
MiniMax's lightning attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch.nn.functional import silu, softplus

from ...ops import torch_op
from ..tracing.rebound import globals_called, rebind

_EPS = 1e-6
"""Beside squared lengths of keys and queries, as the library has it."""


def settle_recurrence(model: torch.nn.Module) -> None:
    """Let modules whose forward calls one of ``_OURS`` call that instead of the library's, and
    those whose class is in ``_FORWARDS`` run so as a whole."""
    for part in model.modules():
        whole = _FORWARDS.get(type(part).__name__)
        if whole is not None:
            part.forward = MethodType(whole, part)
            continue
        rebind(part, _OURS)


def starting_anew(model: torch.nn.Module) -> str:
    """The function of the library by which some layer's state is made of the tokens of one call
    alone, whatever was before; empty where there is none."""
    names = {name for part in model.modules() for name in globals_called(part)}
    return next((name for name in ("mamba_selective_scan",) if name in names), "")


def _run(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor,
    beta: torch.Tensor | None, state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Results ``[batch, seq, heads, value width]`` and the state behind them, both f32."""
    wide = [None if t is None else t.float() for t in (query, key, value, decay, beta, state)]
    both = torch_op("linear_attention")(*wide)
    width = key.shape[-1]
    # Contiguous: callers view it in other shapes.
    return both[:, :, :-width].transpose(1, 2).contiguous(), both[:, :, -width:]


def _gated_delta(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, g: torch.Tensor,
    beta: torch.Tensor, chunk_size: int = 64, initial_state: torch.Tensor | None = None,
    output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False, **_: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """``query`` and ``key`` ``[batch, seq, key heads, K]``, each for as many heads of ``value``
    ``[batch, seq, heads, V]``; ``g`` ``[batch, seq, heads]`` or ``[batch, seq, heads, K]``."""
    dtype, groups = query.dtype, value.shape[2] // key.shape[2]
    query, key = query.float(), key.float()
    if use_qk_l2norm_in_kernel:
        query, key = (
            t * torch.rsqrt((t * t).sum(-1, keepdim=True) + _EPS) for t in (query, key)
        )  # fmt: skip
    if groups > 1:
        query, key = (t.repeat_interleave(groups, dim=2) for t in (query, key))
    scaled = query * query.shape[-1] ** -0.5
    out, state = _run(scaled, key, value, g, beta, initial_state)
    return out.to(dtype), state if output_final_state else None


def _mamba2_scan(
    hidden_states: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor,
    C: torch.Tensor, chunk_size: int, D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None, initial_states: torch.Tensor | None = None,
    dt_softplus: bool = False, dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False, **_: Any,
) -> Any:  # fmt: skip
    """``hidden_states`` ``[batch, seq, heads, width]``, ``dt`` ``[batch, seq, heads]``, ``A`` and
    ``D`` ``[heads]``, ``B`` and ``C`` ``[batch, seq, groups, N]``; states ``[batch, heads, width,
    N]``."""
    dt = _step(dt, dt_bias, softly=dt_softplus).clamp(min=dt_limit[0]).float()
    if dt_limit[1] != float("inf"):
        dt = dt.clamp(max=dt_limit[1])
    x, groups = hidden_states.float(), hidden_states.shape[2] // B.shape[2]
    key, query = (t.float().repeat_interleave(groups, dim=2) for t in (B, C))
    state = None if initial_states is None else initial_states.transpose(2, 3)
    out, state = _run(query, key, x * dt.unsqueeze(-1), A.float() * dt, None, state)
    if D is not None:
        out = out + D.unsqueeze(-1) * x
    return (out, state.transpose(2, 3)) if return_final_states else out


def _mamba_scan(
    hidden_states: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor,
    C: torch.Tensor, D: torch.Tensor | None = None, z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None, delta_softplus: bool = False,
    return_last_state: bool = False, **_: Any,
) -> Any:  # fmt: skip
    """``hidden_states``, ``dt`` and ``z`` ``[batch, channels, seq]``, ``A`` ``[channels, N]``,
    ``B`` and ``C`` ``[batch, N, seq]``: every channel is a head of width 1, and the keys of all
    are the same."""
    bias = None if delta_bias is None else delta_bias.unsqueeze(-1)
    step = _step(dt, bias, softly=delta_softplus).transpose(1, 2).float()
    x = hidden_states.transpose(1, 2).float()
    key, query = (
        t.transpose(1, 2).unsqueeze(2).expand(-1, -1, x.shape[2], -1) for t in (B, C)
    )  # fmt: skip
    value, decay = (x * step).unsqueeze(-1), A * step.unsqueeze(-1)
    rows, state = _run(query, key, value, decay, None, None)
    out = rows.squeeze(-1).transpose(1, 2)
    out = out if D is None else out + hidden_states * D.unsqueeze(-1)
    out = out if z is None else out * silu(z)
    return (out, state.squeeze(-1)) if return_last_state else out


def _lightning(
    self: Any, hidden_states: torch.Tensor, position_embeddings: Any,
    attention_mask: torch.Tensor | None, cache: Any = None, **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """MiniMax-01's attention (arXiv 2501.08313), whose heads decay each at a rate of its own."""
    batch, seq, _width = hidden_states.shape
    packed = self.act_fn(self.qkv_proj(hidden_states))
    if attention_mask is not None:
        packed = (packed * attention_mask.unsqueeze(-1)).to(packed.dtype)
    split = packed.reshape(batch, seq, self.num_attention_heads, 3 * self.head_dim)
    decay = -self.slope_rate.reshape(-1).expand(batch, seq, -1)
    query, key, value = split.chunk(3, -1)
    out, state = _run(query, key, value, decay, None, None)
    mixed = self.norm(out.to(packed.dtype).reshape(batch, seq, -1))
    gate = torch.sigmoid(self.output_gate(hidden_states))
    return self.out_proj(gate * mixed), state


def _step(dt: torch.Tensor, bias: torch.Tensor | None, *, softly: bool) -> torch.Tensor:
    """The width of each token's step in time."""
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    return softplus(dt) if softly else dt


_OURS: Mapping[str, Callable[..., Any]] = {
    "torch_chunk_gated_delta_rule": _gated_delta, "chunk_kimi_delta_attention": _gated_delta,
    "mamba2_chunk_scan": _mamba2_scan, "mamba_selective_scan": _mamba_scan,
}  # fmt: skip
"""By the names that the library's modeling files have for them."""
_FORWARDS: Mapping[str, Callable[..., Any]] = {"MiniMaxLightningAttention": _lightning}
"""By the names of the library's classes; without a cache."""
