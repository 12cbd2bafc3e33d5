"""A model that holds one node of another alone, and what must come with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir

from .parts import captured, is_untyped_constant, subgraphs

_COMMON_OPSET = 25
"""The newest one that every ONNX Runtime that we run with knows, with casts for all dtypes."""


def node_model(
    model: onnx_ir.Model,
    node: onnx_ir.Node,
    inputs: Mapping[onnx_ir.Value, Any],
    constants: Sequence[Any] = (),
) -> Any:
    """A model that holds a node alone. ``inputs`` gives the type of each value that is an input."""
    import onnx

    proto = onnx_ir.serde.serialize_node(node)
    read = (v for v in (*node.inputs, *captured(node)) if v is not None)
    stored = [initializer(v) for v in dict.fromkeys(read) if is_untyped_constant(v)]
    infos = [onnx.helper.make_value_info(str(value.name), type_) for value, type_ in inputs.items()]
    outputs = [onnx.ValueInfoProto(name=name) for name in proto.output if name]
    graph = onnx.helper.make_graph([proto], "node", infos, outputs, [*stored, *constants])
    imports = {node.domain: 1, **model.graph.opset_imports}
    imports[""] = _least_opset(model, node)
    return onnx.helper.make_model(
        graph,
        ir_version=max(model.ir_version, 10),
        opset_imports=[onnx.helper.make_opsetid(d, v) for d, v in imports.items()],
        functions=[onnx_ir.serde.serialize_function(f) for f in _called(model, node)],
    )


def initializer(value: onnx_ir.Value) -> Any:
    """A constant as the initializer that it is."""
    assert value.const_value is not None
    tensor = onnx_ir.serde.serialize_tensor(value.const_value)
    tensor.name = str(value.name)
    return tensor


def _least_opset(model: onnx_ir.Model, node: onnx_ir.Node) -> int:
    """An opset in which a node means what it does in the model's, which the runtime may not know
    yet."""
    import onnx

    version = model.graph.opset_imports.get("", _COMMON_OPSET)
    nodes = [n for n in (node, *inner_nodes(model, node)) if n.domain == ""]
    since = [
        int(onnx.defs.get_schema(n.op_type, version).since_version)
        for n in nodes if onnx.defs.has(n.op_type)
    ]  # fmt: skip
    return min(version, max([_COMMON_OPSET, *since]))


def _called(model: onnx_ir.Model, node: onnx_ir.Node) -> list[onnx_ir.Function]:
    """The functions that a node calls, and those that they call."""
    functions: dict[Any, onnx_ir.Function] = {}
    todo = [node]
    while todo and model.functions:
        one = todo.pop()
        todo += [n for graph in subgraphs(one) for n in graph]
        key = one.op_identifier()
        if key in model.functions and key not in functions:
            functions[key] = model.functions[key]
            todo += list(functions[key])
    return list(functions.values())


def inner_nodes(model: onnx_ir.Model, node: onnx_ir.Node) -> Iterator[onnx_ir.Node]:
    """The nodes of a node's subgraphs, and those of the functions that it calls."""
    for one in (node, *(n for function in _called(model, node) for n in function)):
        yield from () if one is node else (one,)
        for graph in subgraphs(one):
            yield from graph
