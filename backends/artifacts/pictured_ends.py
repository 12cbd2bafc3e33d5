"""A part of a graph: what leads from some of its values to others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ...ir.core.types import Dim
from ...ir.core.view import Node, Value, View
from ...ir.rewrite.cleanup import clean
from ...ir.vocab.builder import Builder


def inputs_of(view: View) -> dict[str, Value]:
    return dict(zip(view.input_names(), view.inputs(), strict=True))


def only(view: View, inputs: Mapping[str, Value], outputs: Mapping[str, Value]) -> View:
    """Only what leads from these inputs to these outputs."""
    view.set_outputs(outputs)
    clean(view)
    for value in inputs_of(view).values():
        if value not in inputs.values():
            _measure_others(view, value, [*inputs.values()])
    clean(view)
    view.set_inputs(inputs)
    return view


def _measure_others(view: View, left_out: Value, inputs: Sequence[Value]) -> None:
    """Take sizes of an input that leaves from one that has the same dimension."""
    dims: dict[Dim, tuple[Value, int]] = {
        dim: (value, axis) for value in reversed(inputs)
        for axis, dim in enumerate(view.type(value).shape or ()) if isinstance(dim, str)
    }  # fmt: skip
    shape = view.type(left_out).shape or ()
    for user, axis in sizes_of(view, left_out):
        if shape[axis] in dims:
            value, other = dims[shape[axis]]
            stand_for(view, user, Builder(view, user).size(value, dim=other))


def sizes_of(view: View, value: Value) -> Iterator[tuple[Node, int]]:
    """Nodes that take the size of one axis, and which; ONNX's ``Shape`` of one among them."""
    rank = view.type(value).rank or 0
    for user in view.users(value):
        attrs = view.attrs(user)
        if view.op(user) == "size":
            yield user, attrs["dim"]
        elif view.native_op(user) == "Shape":
            axes = range(rank)[attrs.get("start") : attrs.get("end")]
            if len(axes) == 1:
                yield user, axes[0]


def stand_for(view: View, node: Node, size: Value) -> None:
    """Let what reads a size read another one, as ``i64[1]`` where it is."""
    old = view.result(node)
    if view.type(old).rank:
        size = Builder(view, view.after(view.maker(size))).reshape(size, 1)
    view.replace(old, size)
