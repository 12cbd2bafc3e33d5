"""Lowering: an ONNX graph in the vocabulary becomes one of stock ONNX (and ``com.microsoft``) ops.

Each op of the domain ``graphwright`` is written out in ops that ONNX Runtime has kernels for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from onnx_ir.tape import Tape

from ..core.errors import InvalidGraph
from ..core.view import Node, Origin, Value
from ..core.weights import ComputedWeight
from .table import DOMAIN
from .view import OnnxView

Lowering = Callable[["_Emit"], Value]


class _Emit:
    """The node being lowered and a short way to build before it."""

    def __init__(self, view: OnnxView, node: Node) -> None:
        self.view = view
        self.node = node
        self.operands = view.operands(node)
        self.attrs = view.attrs(node)

    def __getattr__(self, op: str) -> Callable[..., Value]:
        def build(*operands: Any, **attrs: Any) -> Value:
            return self.view.build(op, operands, attrs, before=self.node)

        return build


def _linear(e: _Emit) -> Value:
    """linear(x, w, b) => add(matmul(x, wᵀ), b), the transposition taken on the lazy handle."""
    x, weight, *bias = e.operands
    handle = e.view.weight(weight)
    if handle is None:
        transposed = e.transpose(weight, perm=(1, 0))
    else:
        transposed = e.view.add_weight(_transposed_name(e.view.name(weight)), handle.transposed())
    product = e.matmul(x, transposed)
    return e.add(product, bias[0]) if bias and bias[0] is not None else product


def _transposed_name(name: str) -> str:
    return name[:-2] if name.endswith(".T") else f"{name}.T"


def _rms_norm(e: _Emit) -> Value:
    """rms_norm(x, w) => x · reciprocal(sqrt(mean(x²) + eps)) · w, in float32 for half types."""
    x, *weight = e.operands
    type_ = e.view.type(x)
    half = type_.dtype in (torch.float16, torch.bfloat16)
    wide = e.cast(x, dtype=torch.float32) if half else x
    mean = e.mean(e.pow(wide, 2.0), dims=(-1,), keepdim=True)
    normed = e.mul(wide, e.reciprocal(e.sqrt(e.add(mean, float(e.attrs["eps"])))))
    if half:
        assert type_.dtype is not None
        normed = e.cast(normed, dtype=type_.dtype)
    return e.mul(weight[0], normed) if weight and weight[0] is not None else normed


def _layer_norm(e: _Emit) -> Value:
    """layer_norm(x) without a weight => layer_norm with a weight of ones."""
    x = e.operands[0]
    type_ = e.view.type(x)
    dims = e.attrs["dims"]
    shape = tuple((type_.shape or ())[-dims:])
    if type_.dtype is None or not all(isinstance(d, int) for d in shape):
        raise InvalidGraph(f"{e.view.name(e.node)}: layer_norm over dimensions of unknown size")
    sizes = tuple(int(d) for d in shape)
    dtype = type_.dtype
    key = ("ones", sizes, dtype)
    ones = ComputedWeight(lambda: torch.ones(sizes, dtype=dtype), sizes, dtype, key)
    weight = e.view.add_weight("ones", ones)
    return e.layer_norm(x, weight, *e.operands[2:], dims=dims, eps=e.attrs["eps"])


def _rsqrt(e: _Emit) -> Value:
    """rsqrt(x) => reciprocal(sqrt(x))"""
    return e.reciprocal(e.sqrt(e.operands[0]))


def _silu(e: _Emit) -> Value:
    """silu(x) => mul(x, sigmoid(x))"""
    return e.mul(e.operands[0], e.sigmoid(e.operands[0]))


def _gelu(e: _Emit) -> Value:
    """gelu(x) => 0.5 x (1 + erf(x/√2)), or the tanh form (opsets before 20 have no Gelu)."""
    x = e.operands[0]
    if e.attrs["approximate"] == "tanh":
        inner = e.add(x, e.mul(e.pow(x, 3.0), 0.044715))
        gate = e.tanh(e.mul(inner, math.sqrt(2 / math.pi)))
    else:
        gate = e.erf(e.mul(x, math.sqrt(0.5)))
    return e.mul(e.mul(x, 0.5), e.add(gate, 1.0))


def _size(e: _Emit) -> Value:
    """size(x, d) => squeeze(Shape(x, start=d, end=d+1))"""
    dim = e.attrs["dim"]
    e.view.at(e.node)
    shape = e.view.emit("Shape", [e.operands[0]], {"start": dim, "end": dim + 1}).outputs[0]
    return e.view.emit("Squeeze", [shape, e.view.integers([0])]).outputs[0]


_LOWERINGS: dict[str, Lowering] = {
    "linear": _linear,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "rsqrt": _rsqrt,
    "silu": _silu,
    "gelu": _gelu,
    "size": _size,
}


def lower(view: OnnxView) -> int:
    """Expand every node of the domain ``graphwright``, in place; the number of nodes lowered.

    Raises ``InvalidGraph`` where an op has no form that stock ONNX Runtime runs.
    """
    count = 0
    previous = view.origin
    for node in [n for n in view.nodes() if n.domain == DOMAIN]:
        op = view.op(node)
        view.origin = Origin(f"lower-{op.replace('_', '-')}")
        emit = _Emit(view, node)
        made = _LOWERINGS[op](emit) if op in _LOWERINGS else _own(emit, op)
        old = node.outputs[0]
        view.retype(made, old)
        view.replace(old, made)
        view.erase_dead(node)
        count += 1
    view.origin = previous
    view.drop_unused_weights()
    view.model.graph.opset_imports.pop(DOMAIN, None)
    return count


def _own(emit: _Emit, op: str) -> Value:
    """Splice in the nodes that the op's own declaration records."""
    from ..ops import OWN_OPS

    if op not in OWN_OPS:
        raise InvalidGraph(f"{emit.view.name(emit.node)}: {op} has no ONNX form")
    declared = OWN_OPS[op]
    tape = Tape()
    padded = [*emit.operands, *[None] * (len(declared.operands) - len(emit.operands))]
    result = declared.onnx(tape, padded, emit.attrs)
    emit.view.adopt(tape.initializers)
    emit.view.splice(tape.nodes, before=emit.node)
    return result
