"""One node of an FX graph as ONNX by ``torch.onnx``: exported alone, and put into the graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir
import torch
from onnx_ir import Value
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymIntArgument,
    TensorArgument,
)
from torch.fx import Graph, GraphModule
from torch.fx.node import Node as FxNode
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from ...ir.core.errors import BadInput
from ...ir.fx.read import GETITEM, item_index
from ...ir.fx.view import FxView
from ...ir.onnx.parts import set_type
from .aten import Emit
from .torch_onnx import to_onnx


def export_node(
    emit: Emit, view: FxView, values: Mapping[FxNode, Value], known: dict[str, onnx_ir.Model]
) -> Any:
    """What stands for ``emit.node``: a value, or a tuple where it has several results.

    ``known`` holds what was exported before: nodes that differ in their tensors alone share it.
    Raises ``BadInput`` where ``torch.onnx`` fails on the node, ``NoForm`` where it does not know
    the op.
    """
    node = emit.node
    key = _key(view, node)
    if key not in known:
        known[key] = _exported(view, node)
    graph = known[key].clone().graph
    results = list(graph.outputs)
    inputs = dict(zip(graph.inputs, (values[n] for n in node.all_input_nodes), strict=True))
    constants, nodes = list(graph.initializers.values()), list(graph)
    graph.outputs.clear()
    for value, ours in inputs.items():
        value.replace_all_uses_with(ours)
    graph.initializers.clear()
    graph.remove(nodes)
    emit.view.adopt(constants)
    emit.view.splice(nodes, before=emit.before)
    outputs = tuple(inputs.get(result, result) for result in results)
    if not isinstance(node.meta.get("val"), tuple | list):
        set_type(outputs[0], emit.result)
        return outputs[0]
    for item in view.results(node):
        set_type(outputs[item_index(item)], view.type(item))
    return outputs


def _key(view: FxView, node: FxNode) -> str:
    names = {n: f"{i}: {view.type(n)}" for i, n in enumerate(node.all_input_nodes)}
    return f"{node.target} {map_arg((node.args, node.kwargs), names.__getitem__)}"


def _exported(view: FxView, node: FxNode) -> onnx_ir.Model:
    graph = Graph()
    mapping: dict[FxNode, FxNode] = {}
    inputs, names = [], []
    for source in node.all_input_nodes:
        placeholder = mapping[source] = graph.placeholder(source.name)
        value = placeholder.meta["val"] = source.meta["val"]
        kind = TensorArgument if isinstance(value, torch.Tensor) else SymIntArgument
        inputs.append(InputSpec(InputKind.USER_INPUT, kind(placeholder.name), None))
        names.append(placeholder.name)
    copied = graph.node_copy(node, mapping.__getitem__)
    results = [copied]
    if isinstance(node.meta["val"], tuple | list):
        results = [graph.call_function(GETITEM, (copied, i)) for i in range(len(node.meta["val"]))]
        for result, value in zip(results, node.meta["val"], strict=True):
            result.meta["val"] = value
    if not all(isinstance(r.meta["val"], torch.Tensor) for r in results):
        raise BadInput(f"{node.name} computes a size, which is exported with the whole graph only")
    graph.output(tuple(results))
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(r.name), None) for r in results]
    in_spec = pytree.tree_structure(((0,) * len(inputs), {}))
    out_spec = pytree.tree_structure((0,) * len(results))
    ranges = {} if view.program is None else dict(view.program.range_constraints)
    program = ExportedProgram(
        root=GraphModule({}, graph), graph=graph,
        graph_signature=ExportGraphSignature(inputs, outputs), state_dict={},
        range_constraints=ranges,
        module_call_graph=[ModuleCallEntry("", ModuleCallSignature([], [], in_spec, out_spec))],
        example_inputs=None, constants={},
    )  # fmt: skip
    model = to_onnx(program, {}, names, [r.name for r in results], view.symbols)
    if model.functions:
        raise BadInput(f"{node.name} becomes a function of ONNX, which is not taken apart")
    return model
