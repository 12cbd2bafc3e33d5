"""What each op of the vocabulary computes, on torch tensors: the meaning that all else is held to.

Half-precision reductions (norms, softmax attention) are taken in float32 and cast back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

add, sub, mul, pow = torch.add, torch.sub, torch.mul, torch.pow
neg, abs, sqrt, rsqrt = torch.neg, torch.abs, torch.sqrt, torch.rsqrt
reciprocal, exp, log, erf = torch.reciprocal, torch.exp, torch.log, torch.erf
tanh, sigmoid, sin, cos, floor = torch.tanh, torch.sigmoid, torch.sin, torch.cos, torch.floor
relu, silu, isnan = torch.relu, torch.nn.functional.silu, torch.isnan
eq, ne, lt, le, gt, ge = torch.eq, torch.ne, torch.lt, torch.le, torch.gt, torch.ge
logical_not, logical_and, logical_or = torch.logical_not, torch.logical_and, torch.logical_or
matmul, where = torch.matmul, torch.where


def _is_float(operand: Any) -> bool:
    return operand.is_floating_point() if isinstance(operand, Tensor) else type(operand) is float


def _pair(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(a, Tensor):
        a = torch.as_tensor(a, dtype=b.dtype)
    if not isinstance(b, Tensor):
        b = torch.as_tensor(b, dtype=a.dtype)
    return a, b


def div(a: Any, b: Any) -> Tensor:
    """Quotient; of integers it is truncated towards zero, as ONNX has it."""
    exact = _is_float(a) or _is_float(b)
    return torch.div(a, b, rounding_mode=None if exact else "trunc")


def maximum(a: Any, b: Any) -> Tensor:
    return torch.maximum(*_pair(a, b))


def minimum(a: Any, b: Any) -> Tensor:
    return torch.minimum(*_pair(a, b))


def identity(x: Tensor) -> Tensor:
    return x


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    return torch.nn.functional.gelu(x, approximate=approximate)


def clamp(x: Tensor, min: float | None = None, max: float | None = None) -> Tensor:
    return torch.clamp(x, min, max)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)


def mean(x: Tensor, dims: Sequence[int], keepdim: bool = False) -> Tensor:
    return x.mean(list(dims), keepdim=keepdim)


def sum(x: Tensor, dims: Sequence[int], keepdim: bool = False) -> Tensor:
    return x.sum(list(dims), keepdim=keepdim, dtype=x.dtype)


def amax(x: Tensor, dims: Sequence[int], keepdim: bool = False) -> Tensor:
    return x.amax(list(dims), keepdim=keepdim)


def amin(x: Tensor, dims: Sequence[int], keepdim: bool = False) -> Tensor:
    return x.amin(list(dims), keepdim=keepdim)


def softmax(x: Tensor, dim: int) -> Tensor:
    return torch.softmax(x, dim)


def cumsum(x: Tensor, dim: int) -> Tensor:
    return torch.cumsum(x, dim)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``; weight is [out, in]."""
    return torch.nn.functional.linear(x, weight, bias)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:
    """Cross-correlation of [N, C, *space] with weight [M, C/groups, *kernel]."""
    zeros = [0] * len(stride)
    return torch.convolution(
        x, weight, bias, list(stride), list(padding), list(dilation), False, zeros, groups
    )


def embedding(weight: Tensor, ids: Tensor) -> Tensor:
    """Rows of ``weight`` along its first dimension; negative ids count from the end."""
    ids = torch.where(ids < 0, ids + weight.shape[0], ids)
    return torch.nn.functional.embedding(ids, weight)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    dims: int = 1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise over the last ``dims`` dimensions with the biased variance (arXiv 1607.06450)."""
    return torch.nn.functional.layer_norm(x, x.shape[-dims:], weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """``x / sqrt(mean(x²) + eps) * weight`` over the last dimension (arXiv 1910.07467)."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return normed if weight is None else weight * normed


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    gqa: bool = False,
    softcap: float | None = None,
) -> Tensor:
    """``softmax(q kᵀ scale + mask) v`` on [..., tokens, head dim]; a fully masked row gives 0.

    ``mask`` is boolean (True attends) or added to the logits. ``scale`` None means 1/√(head dim).
    With ``gqa`` each key/value head serves a run of query heads (arXiv 2305.13245). With
    ``softcap`` c the logits are ``c tanh(q kᵀ scale / c) + mask`` (Gemma 2, arXiv 2408.00118).
    """
    if gqa:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
        v = v.repeat_interleave(q.shape[-3] // v.shape[-3], -3)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    logits = torch.matmul(q, k.transpose(-1, -2)).float() * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if causal:
        rows = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device)
        logits = logits.masked_fill(~rows.tril(), -math.inf)
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, -math.inf)
    elif mask is not None:
        logits = logits + mask
    weights = torch.softmax(logits, -1)
    weights = torch.where(torch.isnan(weights), torch.zeros_like(weights), weights)
    return torch.matmul(weights.to(v.dtype), v)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, the half-split form: ``x cos + [-x₂, x₁] sin`` (2104.09864)."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def reshape(x: Tensor, *shape: Any) -> Tensor:
    return x.reshape(_sizes(shape))


def expand(x: Tensor, *shape: Any) -> Tensor:
    """Broadcast to a shape; -1 keeps a dimension, and so does 1 (ONNX's rule)."""
    sizes = _sizes(shape)
    offset = len(sizes) - x.dim()
    kept = [
        x.shape[i - offset] if i >= offset and s in (-1, 1) else s for i, s in enumerate(sizes)
    ]
    return x.expand(kept)


def _sizes(shape: Sequence[Any]) -> list[int]:
    if len(shape) == 1 and isinstance(shape[0], Tensor) and shape[0].dim() == 1:
        return [int(s) for s in shape[0]]
    return [int(s) for s in shape]


def transpose(x: Tensor, perm: Sequence[int]) -> Tensor:
    return x.permute(list(perm))


def unsqueeze(x: Tensor, dims: Sequence[int]) -> Tensor:
    rank = x.dim() + len(dims)
    for dim in sorted(d % rank for d in dims):
        x = x.unsqueeze(dim)
    return x


def squeeze(x: Tensor, dims: Sequence[int]) -> Tensor:
    return x.squeeze(tuple(dims))


def concat(*xs: Tensor, dim: int) -> Tensor:
    return torch.cat(xs, dim)


def slice(x: Tensor, start: Any, end: Any, *, dim: int, step: int = 1) -> Tensor:
    size = x.shape[dim]
    start, end, step = int(start), int(end), int(step)
    end = end if step > 0 else _down(end, size)
    index = range(size)[start:end:step]
    return x.index_select(dim, torch.tensor(list(index), dtype=torch.int64, device=x.device))


def _down(end: int, size: int) -> int | None:
    return None if end < -size else end


def gather(x: Tensor, index: Tensor, dim: int) -> Tensor:
    return x.gather(dim, torch.where(index < 0, index + x.shape[dim], index))


def index_select(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Slices of ``x`` along ``dim``; the index may have any rank (ONNX's Gather)."""
    dim = dim % x.dim()
    index = torch.where(index < 0, index + x.shape[dim], index)
    flat = x.index_select(dim, index.reshape(-1))
    return flat.reshape((*x.shape[:dim], *index.shape, *x.shape[dim + 1 :]))


def split(x: Tensor, sizes: Sequence[int], dim: int) -> tuple[Tensor, ...]:
    return torch.split(x, list(sizes), dim)


def topk(
    x: Tensor,
    k: int,
    dim: int = -1,
    largest: bool = True,
    sorted: bool = True,
) -> tuple[Tensor, Tensor]:
    values, indices = torch.topk(x, k, dim, largest, sorted)
    return values, indices


def arange(start: Any, end: Any, step: Any, dtype: torch.dtype) -> Tensor:
    return torch.arange(*(x.item() if isinstance(x, Tensor) else x for x in (start, end, step)),
                        dtype=dtype)


def size(x: Tensor, dim: int) -> int:
    return x.shape[dim]
