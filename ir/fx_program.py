"""From an edited FX graph back to a ``torch.export`` program."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, GraphModule
from torch.fx.node import Node as FxNode

from .errors import InvalidGraph
from .types import UNKNOWN

if TYPE_CHECKING:
    from .fx import FxView


def to_program(view: FxView) -> ExportedProgram:
    """A program of the graph as it now is. Its weights are fake tensors under their names.

    Weights that the original export did not have become buffers.
    """
    graph = Graph()
    mapping: dict[FxNode, FxNode] = {}
    graph.output(graph.graph_copy(view.graph, mapping))
    for node in view.graph.nodes:
        if node.op == "call_function" and view.type(node) is UNKNOWN:
            continue
        if "val" in node.meta and node in mapping:
            mapping[node].meta["val"] = node.meta["val"]
    original = view.program
    if original is None:
        raise InvalidGraph("a graph that was parsed from text has no calling convention to export")
    known = {s.target: s for s in original.graph_signature.input_specs if s.target is not None}
    user = iter(s for s in original.graph_signature.input_specs if s.kind == InputKind.USER_INPUT)
    inputs: list[InputSpec] = []
    state: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        name = node.meta.get("weight")
        if name is None:
            spec = next(user)
            inputs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), spec.target))
            continue
        old = known.get(name)
        kind = InputKind.BUFFER if old is None else old.kind
        persistent = (True if old is None else old.persistent) if kind == InputKind.BUFFER else None
        inputs.append(InputSpec(kind, TensorArgument(node.name), name, persistent))
        value = node.meta["val"]
        if kind == InputKind.PARAMETER:
            value = torch.nn.Parameter(value, requires_grad=False)
        stored = constants if kind == InputKind.CONSTANT_TENSOR or persistent is False else state
        stored[name] = value
    results = next(n for n in reversed(graph.nodes) if n.op == "output").args[0]
    outputs = [
        OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(value.name), None)
        for value in results  # type: ignore[union-attr]
    ]
    return ExportedProgram(
        root=GraphModule({}, graph),
        graph=graph,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict=state,
        range_constraints=dict(original.range_constraints),
        module_call_graph=list(original.module_call_graph),
        example_inputs=original.example_inputs,
        constants=constants,
    )
