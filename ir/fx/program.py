"""Between a ``torch.export`` program and an FX graph: what a view takes over, and the way back."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ConstantArgument,
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
from torch.utils import _pytree as pytree

from ..core.errors import BadInput, InvalidGraph
from ..core.types import UNKNOWN
from ..core.weights import MemoryWeight, Weight
from .read import FxReader


def to_program(view: FxReader) -> ExportedProgram:
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
    inputs: list[InputSpec] = []
    state: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        name = node.meta.get("weight")
        if name is None:
            inputs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None))
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
        for value in results
    ]
    return ExportedProgram(
        root=GraphModule({}, graph),
        graph=graph,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict=state,
        range_constraints=dict(original.range_constraints),
        module_call_graph=_calls(original, len(view.inputs()), view.output_names()),
        example_inputs=None,
        constants=constants,
    )


def _calls(
    original: ExportedProgram, inputs: int, outputs: tuple[str, ...]
) -> list[ModuleCallEntry]:
    """The original's calling convention; where inputs or outputs have left or come, a plain one."""
    calls = list(original.module_call_graph)
    signature = calls[0].signature
    leaves = (signature.in_spec.num_leaves, signature.out_spec.num_leaves)
    if leaves == (inputs, len(outputs)):
        return calls
    in_spec = pytree.tree_structure(((0,) * inputs, {}))
    out_spec = pytree.tree_structure(dict.fromkeys(outputs, 0))
    plain = ModuleCallSignature([], [], in_spec, out_spec)
    return [ModuleCallEntry("", plain)]


def to_module(view: FxReader) -> torch.nn.Module:
    """A module that runs the graph; its weights are read into memory."""
    root = torch.nn.Module()
    graph = Graph()
    mapping: dict[FxNode, FxNode] = {}
    for index, (node, name) in enumerate(
        (n, n.meta["weight"]) for n in view.graph.nodes if "weight" in n.meta
    ):
        root.register_buffer(f"w{index}", view.weights()[name].read())
        mapping[node] = graph.get_attr(f"w{index}")
    for node in view.inputs():
        mapping[node] = graph.placeholder(node.name)
    graph.output(graph.graph_copy(view.graph, mapping))
    return GraphModule(root, graph)


def program_weight(program: ExportedProgram, target: str) -> Weight:
    """The handle of a parameter that the program holds; ``BadInput`` where it holds no numbers."""
    tensor = program.state_dict.get(target)
    if tensor is None:
        tensor = program.constants[target]
    if isinstance(tensor, torch._subclasses.FakeTensor) or tensor.device.type == "meta":
        raise BadInput(f"the weight {target} has no data: give its handle in `weights`")
    return MemoryWeight(tensor)


def refuse_mutation(program: ExportedProgram) -> None:
    """Raise ``BadInput`` where the program writes to its inputs, its buffers or in place."""
    for spec_ in program.graph_signature.output_specs:
        if spec_.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION):
            raise BadInput(
                f"the model writes to {spec_.target!r} while it runs; only functional graphs are "
                "rewritten. Return the new value as an output instead"
            )
    for node in program.graph.nodes:
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            raise BadInput(
                f"{node.name}: {target} works in place; only functional graphs are rewritten. "
                "Call run_decompositions({}) on the exported program first"
            )


def input_names(program: ExportedProgram) -> tuple[str, ...]:
    """Names of the inputs. Raises ``BadInput`` where one is a plain number."""
    names = []
    for spec_ in program.graph_signature.input_specs:
        if spec_.kind != InputKind.USER_INPUT:
            continue
        if isinstance(spec_.arg, ConstantArgument | SymIntArgument):
            raise BadInput(f"the input {spec_.arg.name} is not a tensor: bind it before tracing")
        names.append(spec_.arg.name)
    return tuple(names)


def output_names(program: ExportedProgram) -> tuple[str, ...]:
    """Keys of a dictionary that the model returns, else ``output`` or ``output_0`` and so on."""
    specs = program.graph_signature.output_specs
    out_spec = program.module_call_graph[0].signature.out_spec
    keys = out_spec.context if out_spec.type in (dict,) else None
    if isinstance(keys, list) and len(keys) == len(specs):
        return tuple(str(k) for k in keys)
    if len(specs) == 1:
        return ("output",)
    return tuple(f"output_{i}" for i in range(len(specs)))
