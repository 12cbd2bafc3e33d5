"""How FX graphs write an op: ATen calls decoded into the vocabulary, and built from it.

A decoder turns a node's arguments into ``(operands, attributes)``; it returns ``None`` where this
use of the ATen op means more than the vocabulary says, and the node is then ``native``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten

Reading = tuple[tuple[Any, ...], dict[str, Any]]
Decode = Callable[[Node], Reading | None]
Build = Callable[[Graph, Sequence[Any], Mapping[str, Any]], Node]


@dataclass(frozen=True, slots=True)
class Decoder:
    """How calls of some targets are read."""

    decode: Decode
    targets: tuple[Any, ...]
    partial: bool = False
    """Whether ``decode`` may answer ``None``."""


@dataclass(frozen=True, slots=True)
class AtenForm:
    """The calls that mean an op, and the call that is built for it."""

    build: Build
    """Inserts nodes at the graph's cursor; returns the one that is the op's result."""
    decoders: tuple[Decoder, ...] = ()


def always(decode: Decode, *targets: Any) -> Decoder:
    """A decoder that reads every call of the targets."""
    return Decoder(decode, targets)


def sometimes(decode: Decode, *targets: Any) -> Decoder:
    """A decoder that leaves some calls of the targets native."""
    return Decoder(decode, targets, partial=True)


# --- what decoders look at ------------------------------------------------------------------------


def rank_of(node: Any) -> int | None:
    """Rank of the tensor that a node makes, if its type is known."""
    val = node.meta.get("val") if isinstance(node, Node) else None
    return val.dim() if isinstance(val, torch.Tensor) else None


def dtype_of(node: Any) -> torch.dtype | None:
    val = node.meta.get("val") if isinstance(node, Node) else None
    return val.dtype if isinstance(val, torch.Tensor) else None


def is_integral(operand: Any) -> bool:
    """Whether an operand is a whole number or a tensor of them."""
    if not isinstance(operand, Node):
        return isinstance(operand, int)
    val = operand.meta.get("val")
    return isinstance(val, torch.Tensor) and not val.is_floating_point() and not val.is_complex()


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    """An argument by its place or its name."""
    if index < len(node.args):
        return node.args[index]
    return node.kwargs.get(name, default)


def strip(operands: Sequence[Any]) -> tuple[Any, ...]:
    """Operands without the absent ones at the end."""
    end = len(operands)
    while end and operands[end - 1] is None:
        end -= 1
    return tuple(operands[:end])


def from_the_left(node: Node, dims: Any) -> tuple[int, ...]:
    """Dimensions of the first argument, negative ones counted from its end where its rank is
    known."""
    rank = rank_of(node.args[0])
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    return tuple(d % rank if rank else d for d in dims)


# --- decoders that several ops share --------------------------------------------------------------


def plain(node: Node) -> Reading | None:
    """All arguments are operands."""
    return strip(node.args), {}


def first(node: Node) -> Reading | None:
    """The first argument is the operand; the others say nothing of what is computed."""
    return node.args[:1], {}


def binary(node: Node) -> Reading | None:
    """Two operands, and no factor for the second."""
    if node.kwargs.get("alpha", 1) != 1 or len(node.args) != 2:
        return None
    return node.args, {}


def boolean(node: Node) -> Reading | None:
    """A bitwise op on booleans is a logical one."""
    truths = all(isinstance(a, bool) or dtype_of(a) == torch.bool for a in node.args)
    return (node.args, {}) if truths else None


def one_dim(node: Node) -> Reading | None:
    # _softmax's third argument asks for a wider result of half-precision input.
    if argument(node, 2, "dtype") not in (None, False, dtype_of(node.args[0])):
        return None
    return node.args[:1], {"dim": from_the_left(node, argument(node, 1, "dim"))[0]}


def shaped(node: Node) -> Reading | None:
    """``f(x, [sizes])``: each size is an operand."""
    return (node.args[0], *node.args[1]), {}  # type: ignore[misc]


def indexed(node: Node) -> Reading | None:
    """``f(x, dim, index)``."""
    return (node.args[0], node.args[2]), {"dim": from_the_left(node, node.args[1])[0]}


# --- builders that several ops share --------------------------------------------------------------


def call(
    graph: Graph, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> Node:
    """Insert a call node, named after its op.

    Its arguments are set after it is made: FX walks those that it is made with through pytree, in
    search of raw symbolic numbers, and that takes more time than all the rest of the node.
    """
    node = graph.call_function(target, name=getattr(target, "_opname", target.__name__))
    node.args = args
    if kwargs:
        node.kwargs = dict(kwargs)
    return node


def calls(target: Any, *order: str) -> Build:
    """A builder that passes the operands and then the named attributes positionally."""

    def build(graph: Graph, operands: Sequence[Any], attrs: Mapping[str, Any]) -> Node:
        rest = [list(v) if isinstance(v, tuple) else v for v in (attrs[name] for name in order)]
        return call(graph, target, (*operands, *rest))

    return build


def tensor_or_scalar(overloads: Any) -> Build:
    """A builder of a binary op with an overload for a second operand that is a number."""

    def build(graph: Graph, operands: Sequence[Any], attrs: Mapping[str, Any]) -> Node:
        a, b = operands
        if not isinstance(a, Node):
            a, b = call(graph, aten.full_like.default, (b, a)), b
        target = overloads.Tensor if isinstance(b, Node) else overloads.Scalar
        return call(graph, target, (a, b))

    return build


def indexed_call(target: Any) -> Build:
    """The builder of ``f(x, dim, index)``."""

    def build(graph: Graph, operands: Sequence[Any], attrs: Mapping[str, Any]) -> Node:
        return call(graph, target, (operands[0], attrs["dim"], operands[1]))

    return build
