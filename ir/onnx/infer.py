"""Types that onnx's own inference leaves out: behind contrib ops, and ops of other domains."""

from __future__ import annotations

import onnx_ir

from ..core.errors import Refusal
from .edit import OnnxEditor
from .node_session import declared_outputs
from .parts import set_dtype


def infer_unknown(view: OnnxEditor) -> bool:
    """Type the values that have no dtype or no rank, in one pass along the graph; whether any was.

    A node of the vocabulary has its type rule. Of any other ONNX Runtime is asked, which infers the
    types of its own ops: a session of one node without weights, 0.2 ms.
    """
    changed = False
    for node in view.nodes():
        if not all(_is_typed(value) for value in node.outputs):
            changed |= _infer_node(view, node)
    return changed


def _is_typed(value: onnx_ir.Value) -> bool:
    return not value.name or (value.dtype is not None and value.shape is not None)


def _infer_node(view: OnnxEditor, node: onnx_ir.Node) -> bool:
    if view.read(node) is not None:
        try:
            return view.refresh_type(node)
        except Refusal:
            return False  # the check of the graph's structure says so, with the node's name
    found = declared_outputs(view.model, node)
    named = (value for value in node.outputs if value.name)
    declared = [_declare(value, *one) for value, one in zip(named, found, strict=False)]
    return any(declared)


def _declare(
    value: onnx_ir.Value, dtype: onnx_ir.DataType | None, shape: onnx_ir.Shape | None
) -> bool:
    if dtype is None or _is_typed(value):
        return False
    known = (value.dtype, value.shape)
    set_dtype(value, dtype)
    value.shape = shape if value.shape is None else value.shape
    return known != (value.dtype, value.shape)
