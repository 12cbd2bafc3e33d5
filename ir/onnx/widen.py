"""A half type as float32, for a runtime that has no kernels for it, or to see what it hides."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir

from ..core.tensors import tensor_of
from ..core.types import DTYPES
from ..core.weights import CastWeight
from ..vocab.onnx import DOMAIN
from .builder import OnnxBuilder
from .parts import Place, set_dtype
from .view import OnnxView

_WIDE = onnx_ir.DataType.FLOAT
_DTYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_dtype"})
"""Attributes by which native ops and ours name a dtype."""
CAST_BYTES = 1 << 12
"""Larger weights keep their width in the file and are cast in the graph. The runtime folds
the cast when it loads: 0.8 s for a table of 151,936 x 896, where twice the bytes take 0.5 s."""


def widen(view: OnnxView, half: onnx_ir.DataType = onnx_ir.DataType.BFLOAT16) -> int:
    """Compute in float32 what the graph computes in ``half``, in place; the number of values.

    Inputs and outputs become float32 with it, and weights: small ones as they are stored, others by
    a cast. Every bfloat16 number is one of float32, so weights keep their values, and results are
    nearer to the exact ones. ONNX Runtime 1.31.1 has no bfloat16 MatMul on the CPU, and most
    published checkpoints are bfloat16.
    """
    narrow = [v for v in view.model.graph.initializers.values() if _stays_narrow(v, half)]
    kept = {value for weight in narrow for value in _cast_behind(view, weight)}
    count = 0
    for graph in view.model.graphs():
        outputs = (value for node in graph for value in node.outputs)
        for value in itertools.chain(graph.inputs, graph.initializers.values(), outputs):
            count += value not in kept and _widen_value(view, value, half)
        for node in graph:
            _widen_attributes(node, half)
    return count


def _stays_narrow(weight: onnx_ir.Value, half: onnx_ir.DataType) -> bool:
    tensor = weight.const_value
    if tensor is None or tensor.dtype != half or tensor.nbytes <= CAST_BYTES:
        return False
    # Ops of ours write their own operands out, and may want to see the tensor itself.
    ours = any(node.domain == DOMAIN and node.op_type != "linear" for node, _ in weight.uses())
    return not ours and not weight.is_graph_output() and not weight.is_graph_input()


def _cast_behind(view: OnnxView, weight: onnx_ir.Value) -> list[onnx_ir.Value]:
    """Cast a weight for those who use it, but rows that are gathered from it only then; what stays
    as it is."""
    uses = list(weight.uses())
    gathers = [node for node, index in uses if (node.op_type, node.domain, index) == _GATHERED]
    others = [(node, index) for node, index in uses if node not in gathers]
    if others:
        wide = _cast(view, weight, next(iter(view.nodes())))
        for node, index in others:
            node.replace_input_with(index, wide)
    rows = [node.outputs[0] for node in gathers]
    for row, node in zip(rows, gathers, strict=True):
        view.replace(row, _cast(view, row, view.after(node)))
    return [weight, *rows]


_GATHERED = ("Gather", "", 0)


def _cast(view: OnnxView, value: onnx_ir.Value, before: Place) -> onnx_ir.Value:
    return OnnxBuilder(view, before).cast(value, dtype=DTYPES["f32"])


def _widen_value(view: OnnxView, value: onnx_ir.Value, half: onnx_ir.DataType) -> bool:
    tensor = value.const_value
    stored = tensor is not None and tensor.dtype == half
    if stored:
        weight = view.weight(value)
        assert weight is not None
        value.const_value = tensor_of(CastWeight(weight, DTYPES["f32"]), str(value.name))
    if stored or value.dtype == half:
        set_dtype(value, _WIDE)
        return True
    return False


def _widen_attributes(node: onnx_ir.Node, half: onnx_ir.DataType) -> None:
    for name, attr in list(node.attributes.items()):
        if attr.type == onnx_ir.AttributeType.TENSOR and attr.value.dtype == half:
            wide = onnx_ir.Tensor(attr.value.numpy().astype(np.float32))
            node.attributes[name] = onnx_ir.AttrTensor(name, wide)
        elif name in _DTYPE_ATTRIBUTES and attr.value == half:
            node.attributes[name] = onnx_ir.AttrInt64(name, int(_WIDE))
