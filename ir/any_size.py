"""Models of any size: stacked weights whose blocks a file holds in one order, and cutting it short.

A block is some initializers named ``bitstack.PLACE.PART``; a ``Concat`` joins the blocks of a site.
The data file holds all other tensors first and then the blocks by their places, so that the
model of a smaller size needs its beginning only.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir

from .errors import BadInput

_BLOCK = re.compile(r"bitstack\.(\d{6,})\.")


def block_name(place: int, part: str) -> str:
    """The initializer of one part of the block that comes at ``place`` of the order."""
    return f"bitstack.{place:06d}.{part}"


def place_of(name: str | None) -> int | None:
    """The place in the order of the block that an initializer belongs to, if it does."""
    found = _BLOCK.match(name or "")
    return int(found[1]) if found else None


def in_file_order(values: Iterable[onnx_ir.Value]) -> list[onnx_ir.Value]:
    """Initializers as a data file holds them: blocks last, by their places."""
    return sorted(values, key=lambda v: -1 if (p := place_of(v.name)) is None else p)


@dataclass(frozen=True)
class _Sizes:
    """What a model's files take with the blocks up to a place, for each place that can be last."""

    places: tuple[int, ...]
    totals: tuple[int, ...]


def sizes(path: Path) -> tuple[int, ...]:
    """Every size in bytes that the model of an ``.onnx`` file can be loaded in, ascending.

    Raises ``BadInput`` where its weights are not stacked.
    """
    from .load_onnx import read_model

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
    for node in _joins(model):
        kept = [v for v in node.inputs if v is not None and _place(v) <= last]
        node.resize_inputs(len(kept))
    forget_types(model)
    initializers = model.graph.initializers
    for value in [v for v in initializers.values() if (place_of(v.name) or 0) > last]:
        del initializers[str(value.name)]


def forget_types(model: onnx_ir.Model) -> None:
    """Leave out the types of what is computed from blocks until they are summed.

    They depend on the number of blocks, and would make the file of a smaller size larger.
    """
    reached = [value for node in _joins(model) for value in node.outputs]
    while reached:
        value = reached.pop()
        value.shape = value.type = None
        for user in value.consumers():
            if user.op_type != "ReduceSum":
                reached.extend(user.outputs)


def _sizes(model: onnx_ir.Model, path: Path) -> _Sizes:
    values = in_file_order(model.graph.initializers.values())
    joins = _joins(model)
    if not joins:
        raise BadInput(
            f"{path}: its weights are not stacked, and it has one size; the pass bitstack makes a "
            "model of any size"
        )
    least = max(min(_place(v) for v in node.inputs if v is not None) for node in joins)
    ends = itertools.accumulate((_end(v) for v in values), max)
    reach = {_place(v): end for v, end in zip(values, ends, strict=True)}
    places = tuple(p for p in sorted(reach) if p >= least)
    graph = path.stat().st_size
    return _Sizes(places, tuple(graph + reach[p] for p in places))


def _joins(model: onnx_ir.Model) -> list[onnx_ir.Node]:
    return [
        node
        for node in model.graph
        if node.op_type == "Concat" and all(v and place_of(v.name) is not None for v in node.inputs)
    ]


def _place(value: onnx_ir.Value) -> int:
    place = place_of(value.name)
    return -1 if place is None else place


def _end(value: onnx_ir.Value) -> int:
    """Where a tensor ends in the data file; 0 for one inside the model's own file."""
    tensor = value.const_value
    if not isinstance(tensor, onnx_ir.ExternalTensor):
        return 0
    return (tensor.offset or 0) + tensor.nbytes
