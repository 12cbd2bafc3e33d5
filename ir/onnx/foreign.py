"""Shapes that other tools have stored, and what of them is worth keeping."""

from __future__ import annotations

import re

import onnx_ir

_NAME = re.compile(r"[A-Za-z_]\w*(?![\w(])")


def forget_foreign_dims(graph: onnx_ir.Graph) -> None:
    """Open the dimensions inside a graph whose names no input has, in place.

    Shape inference of other tools makes a name up (``unk__26``) for each size that it cannot
    follow, and a name that is there is never inferred better. Numbers, names of the inputs and sums
    of those stay; the outputs are part of the model's face, and stay as they are.
    """
    known = {name for value in graph.inputs for name in _names(value)}
    for value in (value for node in graph for value in node.outputs):
        if value.shape is None or value.is_graph_output():
            continue
        dims = list(value.shape.dims)
        kept = [None if _is_foreign(dim, known) else dim for dim in dims]
        if kept != dims:
            value.shape = onnx_ir.Shape(kept)


def _names(value: onnx_ir.Value) -> set[str]:
    dims = () if value.shape is None else value.shape.dims
    return {name for dim in dims if not isinstance(dim, int) for name in _NAME.findall(str(dim))}


def _is_foreign(dim: int | onnx_ir.SymbolicDim, known: set[str]) -> bool:
    return not isinstance(dim, int) and not set(_NAME.findall(str(dim.value))) <= known
