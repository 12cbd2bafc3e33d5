"""``ir.run.unrounded`` of an ONNX file, whose weights stay where they lie."""

from __future__ import annotations

from pathlib import Path

LEVEL = "accuracy_level"


def unrounded_file(path: Path) -> bytes:
    """The model of a file, ``accuracy_level`` 0 at every node of its own.

    Nodes in bodies keep theirs: ONNX Runtime runs them for the graph, too.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == LEVEL:
                attribute.i = 0
    return bytes(model.SerializeToString())


def may_be_fused(model: bytes) -> bool:
    """Whether the runtime makes products of codes itself where it optimises a model: it gives them
    ``accuracy_level`` 4, and rounds their activations wherever it repacks their weights."""
    import onnx

    nodes = onnx.load_model_from_string(model).graph.node
    return any(node.op_type == "DequantizeLinear" for node in nodes)
