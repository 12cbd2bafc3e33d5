"""Small helpers with which ops record their ONNX form on a tape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from onnx_ir.tape import Tape


def constant(tape: Tape, array: Any, dtype: Any = np.int64) -> ir.Value:
    """A small constant as a ``Constant`` node: it needs no name in the graph."""
    return tape.op("Constant", [], {"value": ir.tensor(np.asarray(array, dtype))})


def cast(tape: Tape, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """``value`` in another dtype; no node where it has that dtype."""
    if value.dtype == dtype:
        return value
    converted = tape.op("Cast", [value], {"to": dtype})
    converted.dtype = dtype
    return converted


def leading_sizes(tape: Tape, x: ir.Value) -> ir.Value:
    """Sizes of all dimensions but the last, of ``x`` or of an input of the graph whose dimensions
    are called the same: nodes all over a graph then share what they take there."""
    node = x.producer()
    graph = None if node is None else node.graph
    dims = None if x.shape is None else x.shape.dims[:-1]
    named = dims is not None and all(isinstance(d, int) or d.value is not None for d in dims)
    for value in graph.inputs if isinstance(graph, ir.Graph) and named else ():
        if value.shape is not None and value.shape.dims[: len(dims or ())] == dims:
            return tape.op("Shape", [value], {"start": 0, "end": len(dims or ())})
    return tape.op("Shape", [x], {"start": 0, "end": -1})


def derived(
    tape: Tape,
    name: str,
    make: Callable[[], ir.TensorProtocol],
    dtype: ir.DataType,
    shape: Sequence[int],
) -> ir.Value:
    """An initializer computed from others when it is written; one of that name is shared."""
    graph = tape.graph_like
    known = graph.initializers.get(name) if isinstance(graph, ir.Graph) else None
    known = known or next((v for v in tape.initializers if v.name == name), None)
    if known is not None:
        return known
    return tape.initializer(ir.LazyTensor(make, dtype, ir.Shape(shape), name=name))
