"""Models of any size: every size that a file of stacked weights has, and cutting it short."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import onnx_ir

from ..core.errors import BadInput
from ..ops.bitstack_blocks import forget_types, in_file_order, joins, place_of
from .onnx_proto import read_model


@dataclass(frozen=True)
class _Sizes:
    """What a model's files take with the blocks up to a place, for each place that can be last."""

    places: tuple[int, ...]
    totals: tuple[int, ...]


def possible_sizes(path: Path) -> tuple[int, ...]:
    """Every size in bytes that the model of an ``.onnx`` file can be loaded in, ascending.

    Raises ``BadInput`` where its weights are not stacked.
    """
    return _sizes(read_model(path), path).totals


def cut(model: onnx_ir.Model, path: Path, max_bytes: int) -> None:
    """Take blocks off the end of the order until the files take at most ``max_bytes``.

    ``model`` was read from ``path``; its external data is not touched, and may end where the blocks
    that stay do. Raises ``BadInput`` where its weights are not stacked, and where one block for
    each weight is too much already: it says how little will do.
    """
    known = _sizes(model, path)
    fitting = [p for p, total in zip(known.places, known.totals, strict=True) if total <= max_bytes]
    if not fitting:
        raise BadInput(
            f"{path}: max_bytes={max_bytes} is too small: with one block for each stacked weight "
            f"it takes {known.totals[0]} bytes"
        )
    last = fitting[-1]
    for node in joins(model):
        inputs = [v for v in node.inputs if v is not None and _place(v) <= last]
        node.resize_inputs(len(inputs))
    forget_types(model)
    initializers = model.graph.initializers
    for value in [v for v in initializers.values() if (place_of(v.name) or 0) > last]:
        del initializers[str(value.name)]


def _sizes(model: onnx_ir.Model, path: Path) -> _Sizes:
    values = in_file_order(model.graph.initializers.values())
    sites = joins(model)
    if not sites:
        raise BadInput(
            f"{path}: its weights are not stacked, and it has one size; the pass bitstack makes a "
            "model of any size"
        )
    least = max(min(_place(v) for v in node.inputs if v is not None) for node in sites)
    ends = itertools.accumulate((_end(v) for v in values), max)
    reach = {_place(v): end for v, end in zip(values, ends, strict=True)}
    places = tuple(p for p in sorted(reach) if p >= least)
    graph = path.stat().st_size
    return _Sizes(places, tuple(graph + reach[p] for p in places))


def _place(value: onnx_ir.Value) -> int:
    place = place_of(value.name)
    return -1 if place is None else place


def _end(value: onnx_ir.Value) -> int:
    """Where a tensor ends in the data file; 0 for one inside the model's own file."""
    tensor = value.const_value
    if not isinstance(tensor, onnx_ir.ExternalTensor):
        return 0
    return (tensor.offset or 0) + tensor.nbytes
