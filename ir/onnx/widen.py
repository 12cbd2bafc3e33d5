"""bfloat16 as float32, for a runtime that has no kernels for bfloat16."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir

from ..core.tensors import tensor_of
from ..core.types import DTYPES
from ..core.weights import CastWeight
from .parts import set_dtype
from .view import OnnxView

_NARROW, _WIDE = onnx_ir.DataType.BFLOAT16, onnx_ir.DataType.FLOAT
_DTYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_dtype"})
"""Attributes by which native ops and ours name a dtype."""


def widen(view: OnnxView) -> int:
    """Compute in float32 what the graph computes in bfloat16, in place; the number of values.

    Inputs, outputs and weights become float32 with it. Every bfloat16 number is one, so weights
    keep their values, and results are nearer to the exact ones. ONNX Runtime 1.31.1 has no
    bfloat16 MatMul on the CPU, and most published checkpoints are bfloat16.
    """
    count = 0
    for graph in view.model.graphs():
        made = (value for node in graph for value in node.outputs)
        for value in itertools.chain(graph.inputs, graph.initializers.values(), made):
            count += _widen_value(view, value)
        for node in graph:
            _widen_attributes(node)
    return count


def _widen_value(view: OnnxView, value: onnx_ir.Value) -> bool:
    tensor = value.const_value
    stored = tensor is not None and tensor.dtype == _NARROW
    if stored:
        weight = view.weight(value)
        assert weight is not None
        value.const_value = tensor_of(CastWeight(weight, DTYPES["f32"]), str(value.name))
    if stored or value.dtype == _NARROW:
        set_dtype(value, _WIDE)
        return True
    return False


def _widen_attributes(node: onnx_ir.Node) -> None:
    for name, attr in list(node.attributes.items()):
        if attr.type == onnx_ir.AttributeType.TENSOR and attr.value.dtype == _NARROW:
            wide = onnx_ir.Tensor(attr.value.numpy().astype(np.float32))
            node.attributes[name] = onnx_ir.AttrTensor(name, wide)
        elif name in _DTYPE_ATTRIBUTES and attr.value == _NARROW:
            node.attributes[name] = onnx_ir.AttrInt64(name, int(_WIDE))
