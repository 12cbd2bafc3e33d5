"""How ONNX graphs write an op: nodes decoded into the vocabulary, built from it, and lowered.

A decoder turns a node into ``(operands, attributes)``, or ``None`` where this use means more than
the vocabulary says (a shape that is not a constant, an exotic attribute): the node is then native.
Ops without an ONNX counterpart live in the domain ``graphwright`` until they are lowered to stock
ops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import onnx_ir

DOMAIN = "graphwright"
"""The domain of vocabulary ops that stock ONNX lacks."""
MICROSOFT = "com.microsoft"
"""The domain of the ops that ONNX Runtime adds."""

Reading = tuple[tuple[Any, ...], dict[str, Any]]
Decode = Callable[[onnx_ir.Node], Reading | None]


class Emitter(Protocol):
    """What a builder uses to add nodes: see ``onnx.OnnxView``."""

    def emit(
        self, op_type: str, inputs: Sequence[Any], attrs: Mapping[str, Any] | None = None,
        *, domain: str = "", outputs: int = 1,
    ) -> onnx_ir.Node:
        """Insert one native node."""  # fmt: skip

    def integers(self, values: Sequence[int]) -> onnx_ir.Value:
        """A 1-D int64 constant."""

    def scalar(self, number: Any, like: onnx_ir.Value | None) -> onnx_ir.Value:
        """A constant without dimensions, of the dtype of ``like``."""


Build = Callable[[Emitter, Sequence[Any], Mapping[str, Any]], onnx_ir.Node]


class Lowering(Protocol):
    """A node to be lowered, and a builder before it, ``e.mul(x, 0.5)``: see ``onnx.lower``."""

    view: Any
    """The ``OnnxView`` that the node is of."""
    node: onnx_ir.Node
    operands: tuple[Any, ...]
    attrs: Mapping[str, Any]

    def __getattr__(self, op: str) -> Callable[..., onnx_ir.Value]:
        """Insert an op of the vocabulary."""


Lower = Callable[[Lowering], onnx_ir.Value]


@dataclass(frozen=True, slots=True)
class Decoder:
    """How nodes of some op types are read."""

    decode: Decode
    op_types: tuple[str, ...]
    partial: bool = False
    """Whether ``decode`` may answer ``None``; those that may are asked before those that do not."""
    domain: str = ""


@dataclass(frozen=True, slots=True)
class OnnxForm:
    """The nodes that mean an op, the node that is built for it, and stock ops that compute it."""

    build: Build | None = None
    """Emits the op's nodes and returns the last one; where it is absent the op is emitted in the
    domain ``graphwright``."""
    decoders: tuple[Decoder, ...] = ()
    lower: Lower | None = None
    """Spells a node of the domain ``graphwright`` out in ops of the vocabulary or of ONNX."""
    forms: Mapping[str, Lower] = field(default_factory=dict)
    """Other ways to spell it, by the names by which a target asks for them: see ``targets``."""


def always(decode: Decode, *op_types: str) -> Decoder:
    """A decoder that reads every node of the op types."""
    return Decoder(decode, op_types)


def sometimes(decode: Decode, *op_types: str) -> Decoder:
    """A decoder that leaves some nodes of the op types native, or to another decoder."""
    return Decoder(decode, op_types, partial=True)


# --- what decoders look at ------------------------------------------------------------------------


def constant(value: onnx_ir.Value | None) -> np.ndarray[Any, Any] | None:
    """The numbers of a small constant, or ``None``."""
    if value is None or value.const_value is None or value.const_value.size > 1024:
        return None
    if value.is_graph_input():  # a default, instead of which a caller may give other numbers
        return None
    return value.const_value.numpy()


def integers_of(value: onnx_ir.Value | None) -> tuple[int, ...] | None:
    """The numbers of a small constant of integers, or ``None``."""
    array = constant(value)
    if array is None or array.dtype.kind not in "iu":
        return None
    return tuple(int(v) for v in array.reshape(-1))


def attribute(node: onnx_ir.Node, name: str, default: Any = None) -> Any:
    attr = node.attributes.get(name)
    return default if attr is None else attr.value


def rank_of(value: Any) -> int | None:
    """Rank of a value, if it is known."""
    shape = value.shape if isinstance(value, onnx_ir.Value) else None
    return None if shape is None else len(shape)


def input_of(node: onnx_ir.Node, index: int) -> onnx_ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def from_the_left(dims: Sequence[int], rank: int | None) -> tuple[int, ...]:
    """Dimensions, negative ones counted from the end where the rank is known.

    ``ValueError`` for one that is not there.
    """
    if not rank:
        return tuple(dims)
    for d in dims:
        if not -rank <= d < rank:
            raise ValueError(f"a tensor of {rank} dimensions has no dimension {d}")
    return tuple(d % rank for d in dims)


# --- decoders that several ops share --------------------------------------------------------------


def plain(node: onnx_ir.Node) -> Reading | None:
    """All inputs are operands."""
    inputs = list(node.inputs)
    while inputs and inputs[-1] is None:
        inputs.pop()
    return tuple(inputs), {}


def on_axis(default: int | None = None) -> Decode:
    """All inputs are operands; ``axis`` is the attribute ``dim``."""

    def decode(node: onnx_ir.Node) -> Reading | None:
        axis = attribute(node, "axis", default)
        return tuple(node.inputs), {"dim": from_the_left((axis,), rank_of(node.inputs[0]))[0]}

    return decode


def shaped(node: onnx_ir.Node) -> Reading | None:
    """``f(x, sizes)``: each size is an operand where the sizes are constant."""
    sizes = integers_of(node.inputs[1])
    if sizes is None or 0 in sizes:
        return tuple(node.inputs), {}
    return (node.inputs[0], *sizes), {}


# --- builders that several ops share --------------------------------------------------------------


def same(op_type: str) -> Build:
    """The builder of an op that has the operands of ONNX's."""

    def build(b: Emitter, operands: Sequence[Any], attrs: Mapping[str, Any]) -> onnx_ir.Node:
        like = next((o for o in operands if isinstance(o, onnx_ir.Value)), None)
        return b.emit(op_type, as_values(b, operands, like))

    return build


def as_values(
    b: Emitter, operands: Sequence[Any], like: onnx_ir.Value | None
) -> list[onnx_ir.Value | None]:
    """Operands, numbers among them as constants of the dtype of ``like``."""
    return [o if isinstance(o, onnx_ir.Value) else b.scalar(o, like) for o in operands]


def with_attrs(op_type: str, **renamed: str) -> Build:
    """A builder that renames attributes (``axis="dim"``) and passes the operands on."""

    def build(b: Emitter, operands: Sequence[Any], attrs: Mapping[str, Any]) -> onnx_ir.Node:
        return b.emit(op_type, operands, {native: attrs[ours] for native, ours in renamed.items()})

    return build


def with_axes(op_type: str) -> Build:
    """A builder that gives ``dims`` as an input, and ``keepdim`` where the op has it."""

    def build(b: Emitter, operands: Sequence[Any], attrs: Mapping[str, Any]) -> onnx_ir.Node:
        extra = {"keepdims": int(attrs["keepdim"])} if "keepdim" in attrs else {}
        return b.emit(op_type, [*operands, b.integers(attrs["dims"])], extra)

    return build


def vector(b: Emitter, items: Sequence[Any]) -> onnx_ir.Value:
    """A 1-D int64 value out of numbers and scalar values."""
    if all(isinstance(i, int) for i in items):
        return b.integers(items)
    parts = [
        b.integers([item])
        if isinstance(item, int)
        else b.emit("Reshape", [item, b.integers([1])]).outputs[0]
        for item in items
    ]
    return b.emit("Concat", parts, {"axis": 0}).outputs[0]
