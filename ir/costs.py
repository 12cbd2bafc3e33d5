"""What a graph costs: multiply-accumulates and weight bytes."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import torch

from .view import Node, View

MAC_CONVENTION = "MACs of linears, matmuls, attention and convolutions; 1 MAC = 2 FLOP"


def node_macs(view: View, node: Node, given: list[Any], results: tuple[Any, ...]) -> int:
    """Multiply-accumulates of one node, from the tensors that it ran on."""
    op = view.op(node)
    if op not in _COUNTED:
        return 0
    tensors = dict(zip(view.arguments(node), given, strict=True))
    operands = [tensors.get(o) if _is_value(o) else o for o in view.operands(node)]
    out = results[0]
    return _COUNTED[op](operands, out)


def _is_value(operand: Any) -> bool:
    return operand is not None and not isinstance(operand, int | float | bool)


def _linear(operands: list[Any], out: torch.Tensor) -> int:
    entries: int = out.numel()
    return entries * int(operands[0].shape[-1])


def _sdpa(operands: list[Any], out: torch.Tensor) -> int:
    q, k = operands[0], operands[1]
    logits: int = q.numel() // int(q.shape[-1]) * int(k.shape[-2])
    return logits * (int(q.shape[-1]) + int(out.shape[-1]))


def _conv(operands: list[Any], out: torch.Tensor) -> int:
    kernel: int = math.prod(operands[1].shape[1:])
    return int(out.numel()) * kernel


def _sparse(operands: list[Any], out: torch.Tensor) -> int:
    x, rows = operands[0], operands[1]
    entries: int = rows.numel()
    return int(x.numel()) // int(x.shape[-1]) * entries


_COUNTED = {
    "linear": _linear,
    "linear_nbit": _linear,
    "matmul": _linear,
    "sdpa": _sdpa,
    "conv": _conv,
    "sparse_linear": _sparse,
}


def weight_bytes(view: View) -> int:
    """Bytes of all weights and constants of the graph, shared ones once."""
    seen: dict[Hashable, int] = {w.key: w.nbytes for w in view.weights().values()}
    return sum(seen.values())
