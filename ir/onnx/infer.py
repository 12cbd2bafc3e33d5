"""Types that onnx's own inference leaves out: behind contrib ops, and ops of other domains."""

from __future__ import annotations

import onnx_ir

from ..core.errors import Refusal
from .edit import OnnxEditor
from .node_session import declared_outputs
from .parts import is_no_tensor, own_graphs, set_dtype


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


_SEQUENCES = frozenset({
    "SequenceEmpty", "SequenceConstruct", "SequenceInsert", "SequenceErase", "SequenceMap",
    "SplitToSequence", "Optional",
})  # fmt: skip
"""Ops whose results are no tensors."""


def untyped_sequences(graph: onnx_ir.Graph) -> set[onnx_ir.Value]:
    """The values, also of graphs inside, that are sequences or optional and bear no type.

    onnx-ir's inference gives them that of their elements, which makes the graph invalid; without
    a type they are what runtimes infer.
    """
    sequences: set[onnx_ir.Value] = set()
    _add_sequences(graph, sequences)
    return sequences


def _add_sequences(graph: onnx_ir.Graph, sequences: set[onnx_ir.Value]) -> None:
    for node in graph:
        for inner in own_graphs(node):
            _add_sequences(inner, sequences)
        for value in node.outputs:
            if value.type is None and _is_sequence(node, value.index() or 0, sequences):
                sequences.add(value)


def _is_sequence(node: onnx_ir.Node, index: int, known: set[onnx_ir.Value]) -> bool:
    if node.domain != "":
        return False
    if node.op_type in _SEQUENCES:
        return True
    sources: list[onnx_ir.Value | None] = []
    if node.op_type in ("Identity", "OptionalGetElement"):
        sources = [node.inputs[0]]
    elif node.op_type == "If":
        sources = [node.attributes[name].value.outputs[index] for name in _BRANCHES]
    elif node.op_type == "Loop":  # its body gives the condition first
        sources = list(node.attributes["body"].value.outputs[index + 1 : index + 2])
    return any(v is not None and (v in known or is_no_tensor(v)) for v in sources)


_BRANCHES = ("then_branch", "else_branch")


def _is_typed(value: onnx_ir.Value) -> bool:
    return not value.name or (value.dtype is not None and value.shape is not None)


def _infer_node(view: OnnxEditor, node: onnx_ir.Node) -> bool:
    if view.read(node) is not None:
        try:
            return view.refresh_type(node)
        except Refusal:
            return False  # the check of the graph's structure says so, with the node's name
    outputs = declared_outputs(view.model, node)
    named = (value for value in node.outputs if value.name)
    declared = [_declare(value, *one) for value, one in zip(named, outputs, strict=False)]
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
