"""Whether nodes of an ONNX graph are the ones that an op of ours records as its own form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np
import onnx_ir

from ..core.view import Node, Operand, Value

Leaves = Mapping[onnx_ir.Value, onnx_ir.Value]
"""Recorded values to those of the graph that they stand for."""


def native_node(node: Node) -> onnx_ir.Node:
    """A node of an ONNX view as what it is."""
    return cast(onnx_ir.Node, node)


def as_node(node: onnx_ir.Node) -> Node:
    """The other way round: a native node as views take it."""
    return cast(Node, node)


def native_value(value: Operand) -> onnx_ir.Value:
    """A value of an ONNX view as what it is."""
    return cast(onnx_ir.Value, value)


def as_value(value: onnx_ir.Value) -> Value:
    """A native value as views take it."""
    return cast(Value, value)


def stand_in(value: onnx_ir.Value) -> onnx_ir.Value:
    """A value of the same type to record with: the graph's own would count the record as a use."""
    return onnx_ir.Value(name=value.name, type=value.type, shape=value.shape)


def same_form(
    value: onnx_ir.Value | None, recorded: onnx_ir.Value | None, leaves: Leaves
) -> bool:
    """Whether ``value`` is computed node by node as ``recorded`` is.

    Constants are compared by their numbers, and so are initializers that the op derives.
    """
    todo = [(value, recorded)]
    while todo:
        one, other = todo.pop()
        if other is None or one is None:
            if one is not other:
                return False
        elif other in leaves:
            if one is not leaves[other]:
                return False
        else:
            below = _operands(one, other)
            if below is None:
                return False
            todo += below
    return True


_Pairs = list[tuple[onnx_ir.Value | None, onnx_ir.Value | None]]


def _operands(value: onnx_ir.Value, recorded: onnx_ir.Value) -> _Pairs | None:
    """The operands of two nodes of one kind, in pairs; ``None`` where the two differ."""
    one, other = value.producer(), recorded.producer()
    if other is None:
        constant = recorded.const_value
        return [] if constant is not None and _same_numbers(value.const_value, constant) else None
    if (other.domain, other.op_type) == ("", "Constant"):
        constant = other.attributes["value"].value
        return [] if _same_numbers(value.const_value, constant) else None
    if one is None or (one.domain, one.op_type) != (other.domain, other.op_type):
        return None
    if value.index() != recorded.index() or len(one.inputs) != len(other.inputs):
        return None
    if {k: a.value for k, a in one.attributes.items()} != {
        k: a.value for k, a in other.attributes.items()
    }:
        return None
    return list(zip(one.inputs, other.inputs, strict=True))


def _same_numbers(actual: onnx_ir.TensorProtocol | None, expected: onnx_ir.TensorProtocol) -> bool:
    if actual is None or actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    return np.array_equal(actual.numpy(), expected.numpy())
