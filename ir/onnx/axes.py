"""Names of axes as the ecosystem writes them: ``batch_size``, ``total_sequence_length``.

The words are those of Optimum's and onnxruntime-genai's exports. That a text with its past is as
long as both together has a name of its own there, so the model's metadata keeps the sum.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import onnx_ir

from ..core.size_bounds import rename_sizes

AXES = {
    "batch": "batch_size", "seq": "sequence_length", "past": "past_sequence_length",
    "encoder_seq": "encoder_sequence_length",
}  # fmt: skip
"""By the names that our own loaders give."""
OURS = frozenset({"hf", "zoo", "gguf"})
"""Kinds of sources whose axes our loaders have named; others keep the names that they came with."""
TOTAL, TOTAL_KEY = "total_sequence_length", "graphwright.total_sequence_length"
"""An axis, and the metadata that says what it is the sum of."""
_SUM = "past_sequence_length + sequence_length"
_WORD = re.compile(r"[A-Za-z_]\w*")


def name_axes(model: onnx_ir.Model) -> None:
    """Rename the axes of all values in place, those inside the graph as its inputs and outputs."""
    _rename(model, _named)
    rename_sizes(model.metadata_props, _named)
    if any(_SUM in _texts(value) for value in (*model.graph.inputs, *model.graph.outputs)):
        _rename(model, lambda dim: TOTAL if dim == _SUM else dim)
        model.metadata_props[TOTAL_KEY] = _SUM


def open_sums(model: onnx_ir.Model) -> None:
    """Write the total length as the sum that it is, in place: sizes are computed of its parts."""
    total = model.metadata_props.get(TOTAL_KEY)
    if total is not None:
        _rename(model, lambda dim: total if dim == TOTAL else dim)


def _named(dim: str) -> str:
    return _WORD.sub(lambda word: AXES.get(word[0], word[0]), dim)


def _rename(model: onnx_ir.Model, name: Callable[[str], str]) -> None:
    for value in _values(model):
        texts = _texts(value)
        if value.shape is None or not any(texts):
            continue
        dims = [name(text) if text else dim for dim, text in zip(value.shape, texts, strict=True)]
        value.shape = onnx_ir.Shape(dims)


def _texts(value: onnx_ir.Value) -> list[str]:
    """The names and expressions of a value's dimensions; empty for numbers and what is unknown."""
    dims = () if value.shape is None else value.shape
    return ["" if isinstance(dim, int) else dim.value or "" for dim in dims]


def _values(model: onnx_ir.Model) -> Iterator[onnx_ir.Value]:
    for graph in model.graphs():
        yield from graph.inputs
        for node in graph:
            yield from node.outputs
