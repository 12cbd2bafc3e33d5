"""Sizes, and tensors filled with a number."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from onnx_ir import Value
from torch.fx.node import Node as FxNode

from ....ir.onnx.parts import Operand
from .emit import Emit, Form, aten


def floordiv(e: Emit, a: Operand, b: Operand) -> Operand:
    """a // b of whole numbers: exact division of what is left after the remainder goes."""
    return e.div(e.sub(a, mod(e, a, b)), b)


def mod(e: Emit, a: Operand, b: Operand) -> Value:
    """The remainder with the sign of the divisor, as Python and ONNX's integer Mod have it."""
    like = a if isinstance(a, Value) else b
    assert isinstance(like, Value)  # what takes two numbers is not in the graph
    pair = [e.number(item, e.view.type(like).dtype or torch.int64) for item in (a, b)]
    return e.native("Mod", pair, type_=e.view.type(like))


def _divided(e: Emit, a: Operand, b: Operand) -> Operand:
    """a // b, by a plain division where neither can be negative."""
    signs = [is_never_negative(arg) for arg in e.node.args]
    return e.div(a, b) if all(signs) else floordiv(e, a, b)


def is_never_negative(arg: Any) -> bool:
    """Whether an argument of an FX node is a number or a size that is known to be 0 or above."""
    value = arg.meta.get("val") if isinstance(arg, FxNode) else arg
    if isinstance(value, torch.SymInt):
        return bool(value.node.expr.is_nonnegative)
    return isinstance(value, int) and value >= 0


def _item(e: Emit, x: Value) -> Value:
    """The only number of a tensor: of whole numbers as a size, of floats in their dtype."""
    dtype = e.view.type(x).dtype
    is_float = dtype is not None and dtype.is_floating_point
    return e.reshape(x if is_float else e.cast_to(x, torch.int64))


def _filled(e: Emit, sizes: Sequence[Operand], number: Operand) -> Value:
    value = e.number(number, e.dtype)
    return e.expand(value, *sizes) if sizes else value


def _full(e: Emit, sizes: Sequence[Operand], number: Operand, *_: Any) -> Value:
    return _filled(e, sizes, number)


def _constant(number: float) -> Form:
    return lambda e, sizes, *_: _filled(e, sizes, number)


def _new(number: float) -> Form:
    return lambda e, x, sizes, *_: _filled(e, sizes, number)


def _new_full(e: Emit, x: Value, sizes: Sequence[Operand], number: Operand, *_: Any) -> Value:
    return _filled(e, sizes, number)


def _like(number: float) -> Form:
    return lambda e, x, *_: _filled(e, e.dims(x), number)


def _full_like(e: Emit, x: Value, number: Operand, *_: Any) -> Value:
    return _filled(e, e.dims(x), number)


def _scalar_tensor(e: Emit, number: Operand, *_: Any) -> Value:
    return e.number(number, e.dtype)


FORMS: dict[Any, Form] = {
    operator.add: lambda e, a, b: e.add(a, b),
    operator.sub: lambda e, a, b: e.sub(a, b),
    operator.mul: lambda e, a, b: e.mul(a, b),
    operator.neg: lambda e, a: e.neg(a),
    operator.floordiv: _divided,
    operator.mod: mod,
    torch.sym_max: lambda e, a, b: e.maximum(a, b),
    torch.sym_min: lambda e, a, b: e.minimum(a, b),
    aten._local_scalar_dense.default: _item,
    aten.item.default: _item,
    aten.zeros.default: _constant(0),
    aten.ones.default: _constant(1),
    aten.full.default: _full,
    aten.new_zeros.default: _new(0),
    aten.new_ones.default: _new(1),
    aten.new_full.default: _new_full,
    aten.zeros_like.default: _like(0),
    aten.ones_like.default: _like(1),
    aten.full_like.default: _full_like,
    aten.scalar_tensor.default: _scalar_tensor,
}
