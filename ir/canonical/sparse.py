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
from ..core.view import Node, Operand, Value, View
from ..core.weights import ComputedWeight, Weight
from ..onnx.forms import same_form, stand_in
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
        if _found(match) is None:
            match.refuse("the sums are not those of outlier weights")

    def replace(self, build: Build, **bound: Operand) -> Value:
        view, path = build.view, _found(build.match)
        assert path is not None
        stem = view.name(path.cols).removesuffix(SUFFIX).removesuffix("cols")
        parts = [view.add_weight(stem + name, w) for name, w in path.weights(view).items()]
        return build.sparse_linear(path.x, *parts, out_features=path.outputs)


@dataclass(frozen=True)
class _Path:
    """The values that a written side path is made from."""

    x: Value
    cols: Value
    values: Value
    place: npt.NDArray[np.int64]
    shapes: tuple[tuple[int, int], ...]
    cols_held: Weight
    values_held: Weight

    @property
    def outputs(self) -> int:
        return len(self.place)

    def weights(self, view: View) -> dict[str, Weight]:
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


def _found(match: Match) -> _Path | None:
    """The side path that a match is, where it is written exactly as ``sparse_linear`` does it."""
    view = match.view
    place, path = view.weight(match["place"]), None
    if place is not None and place.dtype == torch.int32:
        path = _read(view, match["sums"], place.read().numpy().astype(np.int64))
    if path is None:
        return None
    leaf, tape = stand_in(path.x), Tape()
    stored = [
        onnx_ir.Value(name=name, const_value=tensor_of(weight, name))
        for name, weight in path.weights(view).items()
    ]
    wanted = SPARSE_LINEAR.record(tape, [leaf, *stored], {"out_features": path.outputs})
    (result,) = view.results(match.root)
    return path if same_form(result, wanted, {leaf: path.x}) else None


def _read(view: View, sums: Value, place: npt.NDArray[np.int64]) -> _Path | None:
    pad = view.producer(sums)
    joined = pad.inputs[0] if pad is not None and pad.op_type == "Pad" else None
    node = None if joined is None else view.producer(joined)
    if node is None:
        return None
    parts = list(node.inputs) if node.op_type == "Concat" else [joined]
    product = _first(view, joined, "Mul")
    if product is None:
        return None
    gather, column = (view.producer(v) for v in product.inputs)
    if gather is None or column is None or gather.op_type != "Gather":
        return None
    cols, values = _behind_cast(view, gather.inputs[1]), _behind_cast(view, column.inputs[0])
    flat = _first(view, gather.inputs[0], "Reshape")
    cols_held, values_held = view.weight(cols), view.weight(values)
    if flat is None or cols_held is None or values_held is None:
        return None
    shapes = _shapes(view, parts, cols_held.numel)
    if shapes is None or sum(n for n, _ in shapes) > len(place):
        return None
    return _Path(flat.inputs[0], cols, values, place, shapes, cols_held, values_held)


def _first(view: View, value: Value, op_type: str) -> Node | None:
    """The nearest node of a kind on the way back through first operands."""
    node = view.producer(value)
    while node is not None and node.op_type != op_type:
        node = view.producer(node.inputs[0]) if node.inputs else None
    return node


def _behind_cast(view: View, value: Value) -> Value:
    node = view.producer(value)
    return node.inputs[0] if node is not None and node.op_type == "Cast" else value


def _shapes(view: View, parts: list[Value], slots: int) -> tuple[tuple[int, int], ...] | None:
    """Rows and entries a row of each bucket; the one whose rows have one entry is not summed."""
    shapes: list[tuple[int, int] | None] = []
    for part in parts:
        node = view.producer(part)
        if node is None or node.op_type != "ReduceSum":
            shapes.append(None)
            continue
        block = view.producer(node.inputs[0])
        target = None if block is None else view.weight(block.inputs[1])
        if target is None or target.shape != (3,):
            return None
        count, width, _ = target.read().tolist()
        shapes.append((count, width))
    if shapes.count(None) > 1:
        return None
    rest = slots - sum(n * w for n, w in filter(None, shapes))
    found = tuple((rest, 1) if shape is None else shape for shape in shapes)
    return found if sum(n * w for n, w in found) == slots else None


RULES: tuple[type[Rule], ...] = (FuseSparse,)
