"""A model's functions are written out where they are called."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import onnx_ir
from onnx_ir.passes.common import InlinePass

from ..core.errors import BadInput

MOST_NODES = 1 << 18
"""Five times as many as the largest models that people have; functions that call each other reach
billions in a few lines."""


def inline_functions(model: onnx_ir.Model, where: str) -> None:
    """Put the nodes of each function in the place of its calls, in place.

    The nodes are counted first. Raises ``BadInput`` where there are more than ``MOST_NODES``, where
    functions call each other in a circle, and where a function is of another opset than the model.
    """
    if not model.functions:
        return
    count = _predicted(model, where)
    if count > MOST_NODES:
        raise BadInput(
            f"{where}: its functions, written out, are {count:,} nodes; up to {MOST_NODES:,} are "
            "read"
        )
    try:
        InlinePass()(model)
    except (onnx_ir.passes.PassError, ValueError) as error:
        cause = error.__cause__ or error
        raise BadInput(f"{where}: its functions cannot be written out: {cause}") from error
    model.functions.clear()


def _predicted(model: onnx_ir.Model, where: str) -> int:
    """How many nodes the graph has when every call is replaced."""
    functions = model.functions
    calls = {
        name: [n.op_identifier() for n in f.all_nodes() if n.op_identifier() in functions]
        for name, f in functions.items()
    }
    try:
        order = tuple(TopologicalSorter(calls).static_order())
    except CycleError as error:
        names = " -> ".join(name for _, name, _ in error.args[1])
        raise BadInput(f"{where}: these functions call each other: {names}") from None
    sizes: dict[onnx_ir.OperatorIdentifier, int] = {}
    for name in order:
        inner = sum(1 for _ in functions[name].all_nodes())
        sizes[name] = inner + sum(sizes[called] for called in calls[name])
    return sum(1 + sizes.get(node.op_identifier(), 0) for node in model.graph.all_nodes())
