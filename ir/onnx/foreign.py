"""Shapes that other tools have stored, and what of them is worth keeping."""

from __future__ import annotations

import re
from collections.abc import Iterable

import onnx_ir

from ..core.types import Dim

MADE_UP = "unk__"
"""How the names begin that onnx's own inference makes up."""
_NAME = re.compile(r"[A-Za-z_]\w*(?![\w(])")


def forget_foreign_dims(graph: onnx_ir.Graph) -> None:
    """Open the dimensions inside a graph whose names no input has, in place.

    Shape inference of other tools makes a name up (``unk__26``) for each size that it cannot
    follow, and a name that is there is never inferred better. Numbers, names of the inputs and sums
    of those stay; the outputs are part of the model's face, and stay as they are.
    """
    known = {name for value in graph.inputs for name in names_of(_dims(value))}
    for value in (value for node in graph for value in node.outputs):
        if value.shape is None or value.is_graph_output():
            continue
        dims = _dims(value)
        own_dims = [None if is_foreign(dim, known) else dim for dim in dims]
        if own_dims != dims:
            value.shape = onnx_ir.Shape(own_dims)


def _dims(value: onnx_ir.Value) -> list[Dim]:
    dims = () if value.shape is None else value.shape.dims
    return [dim if isinstance(dim, int) else str(dim.value) for dim in dims]


def names_of(dims: Iterable[Dim]) -> set[str]:
    """The names in dimensions: of ``past + 1`` it is ``past``."""
    return {name for dim in dims if isinstance(dim, str) for name in _NAME.findall(dim)}


def is_foreign(dim: Dim, known: set[str]) -> bool:
    """Whether a dimension has a name that is not ``known``."""
    return isinstance(dim, str) and not names_of([dim]) <= known
