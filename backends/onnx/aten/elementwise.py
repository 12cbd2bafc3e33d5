"""Elementwise ops."""

from __future__ import annotations

from typing import Any

import torch
from onnx_ir import Value

from ....ir.core.errors import Refusal
from ....ir.onnx.parts import Operand
from .emit import Emit, Form, aten
from .sizes import floordiv, mod

OF_BOOLS = {
    "mul": "logical_and", "add": "logical_or", "minimum": "logical_and", "maximum": "logical_or",
}  # fmt: skip
"""What these ops are on truth values, which ONNX's take none of."""


def _promoted(op: str) -> Form:
    """An op of the vocabulary on operands in the dtype of the result."""

    def form(e: Emit, a: Operand, b: Operand) -> Value:
        fitting = OF_BOOLS.get(op, op) if e.dtype == torch.bool else op
        return e.build(fitting, *(e.cast_to(x, e.dtype) for x in (a, b)))

    return form


def _scaled_sum(op: str) -> Form:
    """add(a, b, alpha) => add(a, alpha b)"""

    def form(e: Emit, a: Operand, b: Operand, alpha: float = 1) -> Value:
        a, b = (e.cast_to(x, e.dtype) for x in (a, b))
        assert b is not None
        scaled = e.mul(b, alpha) if isinstance(b, Value) else b * alpha
        return e.build(op, a, scaled)

    return form


def _rsub(e: Emit, a: Value, b: Operand, alpha: Operand = 1) -> Value:
    if alpha != 1:
        raise Refusal(f"rsub with alpha={alpha}", e.node)
    return e.sub(e.cast_to(b, e.dtype), e.cast_to(a, e.dtype))


def _div(e: Emit, a: Operand, b: Operand, rounding_mode: str | None = None) -> Operand:
    if rounding_mode == "trunc" and e.dtype.is_floating_point:
        raise Refusal("division of floats that rounds towards zero", e.node)
    a, b = (e.cast_to(x, e.dtype) for x in (a, b))
    if rounding_mode == "floor" and not e.dtype.is_floating_point:
        return floordiv(e, a, b)
    quotient = e.div(a, b)
    return e.floor(quotient) if rounding_mode == "floor" else quotient


def _floor_divide(e: Emit, a: Operand, b: Operand) -> Operand:
    return _div(e, a, b, "floor")


def _remainder(e: Emit, a: Operand, b: Operand) -> Value:
    """The remainder with the sign of the divisor, as torch has it: exact, and ``a`` by infinity."""
    a, b = (e.cast_to(x, e.dtype) for x in (a, b))
    if not e.dtype.is_floating_point:
        return mod(e, a, b)
    rest = e.native("Mod", [e.number(x, e.dtype) for x in (a, b)], {"fmod": 1})
    if isinstance(b, int | float):
        beyond = e.lt(rest, 0.0) if b > 0 else e.gt(rest, 0.0)
    else:
        beyond = e.logical_and(e.ne(rest, 0.0), e.ne(e.lt(rest, 0.0), e.lt(b, 0.0)))
    return e.where(beyond, e.add(rest, b), rest)


def _same(op_type: str, **attrs: Any) -> Form:
    """An ONNX op that does what the ATen op does, on tensors of the result's dtype."""
    return lambda e, *xs: e.native(op_type, [e.cast_to(x, e.dtype) for x in xs], attrs)


def _rounded(op_type: str) -> Form:
    """A rounding, which leaves whole numbers; ONNX's takes floats only."""

    def form(e: Emit, x: Value) -> Value:
        return e.native(op_type, [x]) if e.dtype.is_floating_point else x

    return form


def _xor(e: Emit, a: Value, b: Value) -> Value:
    if e.dtype != torch.bool:
        return e.native("BitwiseXor", [e.cast_to(x, e.dtype) for x in (a, b)])
    return e.native("Xor", [e.cast_to(x, torch.bool) for x in (a, b)])


def _masked_fill(e: Emit, x: Value, mask: Value, number: Operand) -> Value:
    return e.where(mask, e.number(number, e.dtype), e.cast_to(x, e.dtype))


def _leaky_relu(e: Emit, x: Value, slope: float = 0.01) -> Value:
    return e.native("LeakyRelu", [x], {"alpha": float(slope)})


def _elu(e: Emit, x: Value, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Value:
    if (scale, input_scale) != (1, 1):
        raise Refusal("elu with scales", e.node)
    return e.native("Elu", [x], {"alpha": float(alpha)})


def _softplus(e: Emit, x: Value, beta: float = 1, threshold: float = 20) -> Value:
    """Above the threshold torch gives ``x``, which is 2e-9 less at 20."""
    if threshold != 20:
        raise Refusal(f"softplus with threshold={threshold}", e.node)
    if beta == 1:
        return e.native("Softplus", [x])
    return e.div(e.native("Softplus", [e.mul(x, float(beta))]), float(beta))


def _clamp(e: Emit, x: Value, low: Value | None = None, high: Value | None = None) -> Value:
    """clamp(x, low, high) => minimum(maximum(x, low), high)"""
    value = e.cast_to(x, e.dtype)
    value = value if low is None else e.maximum(value, e.cast_to(low, e.dtype))
    return value if high is None else e.minimum(value, e.cast_to(high, e.dtype))


def _hardtanh(e: Emit, x: Value, low: float = -1, high: float = 1) -> Value:
    return e.clamp(x, min=low, max=high)


def _type_as(e: Emit, x: Value, y: Value) -> Operand:
    return e.cast_to(x, e.dtype)


def _softmax(e: Emit, x: Value, dim: int, *_: Any) -> Value:
    return e.softmax(e.cast_to(x, e.dtype), dim=dim % max(e.rank(x), 1))


def _log_softmax(e: Emit, x: Value, dim: int, *_: Any) -> Value:
    return e.native("LogSoftmax", [e.cast_to(x, e.dtype)], {"axis": dim})


FORMS: dict[Any, Form] = {
    aten.min.other: _promoted("minimum"),
    aten.max.other: _promoted("maximum"),
    aten.add.Tensor: _scaled_sum("add"),
    aten.add.Scalar: _scaled_sum("add"),
    aten.sub.Tensor: _scaled_sum("sub"),
    aten.sub.Scalar: _scaled_sum("sub"),
    aten.rsub.Scalar: _rsub,
    aten.rsub.Tensor: _rsub,
    aten.div.Tensor: _div,
    aten.div.Scalar: _div,
    aten.div.Tensor_mode: _div,
    aten.div.Scalar_mode: _div,
    aten.floor_divide.default: _floor_divide,
    aten.remainder.Scalar: _remainder,
    aten.remainder.Tensor: _remainder,
    aten.masked_fill.Scalar: _masked_fill,
    aten.masked_fill.Tensor: _masked_fill,
    aten.ceil.default: _rounded("Ceil"),
    aten.round.default: _rounded("Round"),
    aten.sign.default: _same("Sign"),
    aten.tan.default: _same("Tan"),
    aten.logical_xor.default: _xor,
    aten.bitwise_xor.Tensor: _xor,
    aten.__xor__.Tensor: _xor,
    aten.leaky_relu.default: _leaky_relu,
    aten.elu.default: _elu,
    aten.softplus.default: _softplus,
    aten.clamp.Tensor: _clamp,
    aten.hardtanh.default: _hardtanh,
    aten.type_as.default: _type_as,
    aten.softmax.int: _softmax,
    aten.log_softmax.int: _log_softmax,
    aten._log_softmax.default: _log_softmax,
}
