"""Side paths of outlier weights, as ``sparse_linear`` writes them for ONNX, become the op again.

reshape(transpose(index_select(row sums of mul(xᵀ[cols], values), place))) => sparse_linear(x, ...)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir
import torch
from onnx_ir.tape import Tape

from ..core.tensors import tensor_of
from ..core.view import Operand, Value
from ..core.weights import ComputedWeight, Weight
from ..onnx.forms import native_node, native_value, same_form, stand_in
from ..onnx.view import OnnxView, native_view
from ..ops.sparse_linear import SPARSE_LINEAR, entries, index_dtype
from ..rewrite.pattern import Match
from ..rewrite.rule import Build, Rule

SUFFIX = ".by_row_length"


class FuseSparse(Rule):
    """reshape(transpose(index_select(sums, place)), to) => sparse_linear(x, rows, cols, values)"""

    name = "fuse-sparse"

    def pattern(self, p: Any, sums: Any, place: Any, to: Any) -> Any:
        return p.reshape(p.transpose(p.index_select(sums, place, dim=0), perm=(1, 0)), to)

    def where(self, match: Match) -> None:
        if _side_path(match) is None:
            match.refuse("the sums are not those of outlier weights")

    def replace(self, build: Build, **bound: Operand) -> Value:
        view, path = native_view(build.view), _side_path(build.match)
        assert path is not None
        stem = view.name(path.cols).removesuffix(SUFFIX).removesuffix("cols")
        parts = [build.view.add_weight(stem + name, w) for name, w in path.weights().items()]
        return build.sparse_linear(Value(path.x), *parts, out_features=path.outputs)


@dataclass(frozen=True)
class _Path:
    """The values that a written side path is made from."""

    x: onnx_ir.Value
    cols: onnx_ir.Value
    values: onnx_ir.Value
    place: npt.NDArray[np.int64]
    shapes: tuple[tuple[int, int], ...]
    cols_held: Weight
    values_held: Weight

    @property
    def outputs(self) -> int:
        return len(self.place)

    def weights(self) -> dict[str, Weight]:
        """Rows, columns and values of the entries, each made when it is read."""
        count, width = len(self.places[0]), index_dtype(self.outputs)
        key = (self.cols_held.key, self.values_held.key, self.shapes)

        def picked(held: Weight) -> torch.Tensor:
            return torch.from_numpy(held.read().numpy()[self.places[1]])

        return {
            "rows": ComputedWeight(
                lambda: torch.from_numpy(self.places[0]).to(width), (count,), width, ("rows", key)
            ),
            "cols": ComputedWeight(
                lambda: picked(self.cols_held), (count,), self.cols_held.dtype, ("cols", key)
            ),
            "values": ComputedWeight(
                lambda: picked(self.values_held), (count,), self.values_held.dtype, ("values", key)
            ),
        }

    @cached_property
    def places(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The row and the slot of each entry."""
        return entries(self.place, self.shapes, self.cols_held.read().numpy())


def _side_path(match: Match) -> _Path | None:
    """The side path that a match is, where it is written exactly as ``sparse_linear`` does it."""
    view = native_view(match.view)
    place, path = match.view.weight(match["place"]), None
    if place is not None and place.dtype == torch.int32:
        sums = native_value(match["sums"])
        path = _read(view, sums, place.read().numpy().astype(np.int64))
    if path is None:
        return None
    leaf, tape = stand_in(path.x), Tape()
    stored = [
        onnx_ir.Value(name=name, const_value=tensor_of(weight, name))
        for name, weight in path.weights().items()
    ]
    recorded = SPARSE_LINEAR.record(tape, [leaf, *stored], {"out_features": path.outputs})
    (result,) = native_node(match.root).outputs
    return path if same_form(result, recorded, {leaf: path.x}) else None


def _read(
    view: OnnxView, sums: onnx_ir.Value, place: npt.NDArray[np.int64]
) -> _Path | None:
    pad = sums.producer()
    joined = _inputs(pad)[0] if pad is not None and pad.op_type == "Pad" else None
    node = None if joined is None else joined.producer()
    if joined is None or node is None:
        return None
    parts = _inputs(node) if node.op_type == "Concat" else [joined]
    product = _first(joined, "Mul")
    if product is None:
        return None
    gather, column = (v.producer() for v in _inputs(product))
    if gather is None or column is None or gather.op_type != "Gather":
        return None
    table, picked = _inputs(gather)
    cols, values = _behind_cast(picked), _behind_cast(_inputs(column)[0])
    flat = _first(table, "Reshape")
    cols_held, values_held = view.weight(cols), view.weight(values)
    if flat is None or cols_held is None or values_held is None:
        return None
    shapes = _shapes(view, parts, cols_held.numel)
    if shapes is None or sum(n for n, _ in shapes) > len(place):
        return None
    return _Path(_inputs(flat)[0], cols, values, place, shapes, cols_held, values_held)


def _inputs(node: onnx_ir.Node) -> list[onnx_ir.Value]:
    return [value for value in node.inputs if value is not None]


def _first(value: onnx_ir.Value, op_type: str) -> onnx_ir.Node | None:
    """The nearest node of a kind on the way back through first operands."""
    node = value.producer()
    while node is not None and node.op_type != op_type:
        inputs = _inputs(node)
        node = inputs[0].producer() if inputs else None
    return node


def _behind_cast(value: onnx_ir.Value) -> onnx_ir.Value:
    node = value.producer()
    return _inputs(node)[0] if node is not None and node.op_type == "Cast" else value


def _shapes(
    view: OnnxView, parts: list[onnx_ir.Value], slots: int
) -> tuple[tuple[int, int], ...] | None:
    """Rows and entries a row of each bucket; the one whose rows have one entry is not summed."""
    shapes: list[tuple[int, int] | None] = []
    for part in parts:
        node = part.producer()
        if node is None or node.op_type != "ReduceSum":
            shapes.append(None)
            continue
        block = _inputs(node)[0].producer()
        target = None if block is None else view.weight(_inputs(block)[1])
        if target is None or target.shape != (3,):
            return None
        count, width, _ = target.read().tolist()
        shapes.append((count, width))
    if shapes.count(None) > 1:
        return None
    rest = slots - sum(n * w for n, w in filter(None, shapes))
    complete = tuple((rest, 1) if shape is None else shape for shape in shapes)
    return complete if sum(n * w for n, w in complete) == slots else None


RULES: tuple[type[Rule], ...] = (FuseSparse,)
