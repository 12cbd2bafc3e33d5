"""The moves that rotate: features of the residual stream, or of attention heads, in another basis.

*The stream*, ``h' = h Q`` with Q orthogonal: an RMS norm without weights commutes with it. So each
norm's weights go into the columns of the linears behind it, ``W diag(g) Q``, whose norm keeps ones;
what adds to the stream writes it rotated, ``Q^T W`` and ``Q^T b``, and the table's rows become
``E Q``. *Heads*: attention mixes tokens, never features, so the values of each head may be rotated
by R where they are made, and the columns that read them, ``W (I x R)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import Refusal
from ..core.view import Node, Value, View, is_value
from ..core.weights import Weight
from ..structure.recognize import Linear, Structure, last_tower
from ..structure.weights import readers
from ..vocab import traits
from .makers import check_own, keeps_features
from .rescale import Inlet, feature_readers, feature_root

Turned = Callable[[tuple[Weight, ...], str, Callable[..., Tensor]], Weight]
"""From constants, a word for what is done and what becomes of their numbers, to where the result is
kept."""


@dataclass(frozen=True)
class Reading:
    """A norm of the stream, and the linears that read it."""

    norm: Node
    weight: Value
    linears: tuple[Linear, ...]


@dataclass(frozen=True)
class Stream:
    """A residual stream that can be rotated."""

    width: int
    table: Value
    embedding: Node
    name: str
    """Of the embedding."""
    readings: tuple[Reading, ...]
    writers: tuple[Linear, ...]

    @property
    def tied(self) -> Linear | None:
        """The linear that holds the table, and will hold a matrix of its own."""
        heads = (x for r in self.readings for x in r.linears if x.weight is self.table)
        return next(heads, None)


def find_stream(view: View, structure: Structure) -> Stream:
    """The residual stream of the last tower. From shapes alone.

    Raises ``Refusal`` where something else than RMS norms, with linears behind them, reads it, and
    where something else than linears, and one table, writes it; ``BadInput`` where there is none.
    """
    return _Search(view, structure).stream(feature_root(view, last_tower(structure)[0].entry))


def rotate_stream(view: View, stream: Stream, basis: Tensor, turned: Turned) -> None:
    """Multiply the stream by ``basis`` ``[width, width]`` f64, orthogonal."""

    def columns(weight: Tensor, gain: Tensor) -> Tensor:
        return ((weight.double() * gain.double()) @ basis).to(weight.dtype)

    def rows(weight: Tensor) -> Tensor:
        return (basis.T @ weight.double()).to(weight.dtype)

    def last(weight: Tensor) -> Tensor:
        return (weight.double() @ basis).to(weight.dtype)

    tied = stream.tied
    table = turned((_constant(view, stream.table),), "last", last)
    for reading in stream.readings:
        gain = _constant(view, reading.weight)
        for linear in reading.linears:
            matrix = turned((_constant(view, linear.weight), gain), "columns", columns)
            if linear is tied:
                _untie(view, stream, linear, table, matrix)
            else:
                view.set_weight(linear.weight, matrix)
        view.set_weight(reading.weight, turned((gain,), "ones", torch.ones_like))
    for linear in stream.writers:
        view.set_weight(linear.weight, turned((_constant(view, linear.weight),), "rows", rows))
        if linear.bias is not None:
            view.set_weight(linear.bias, turned((_constant(view, linear.bias),), "rows", rows))
    if tied is None:
        view.set_weight(stream.table, table)


def _untie(view: View, stream: Stream, head: Linear, table: Weight, matrix: Weight) -> None:
    """The embedding and the head with a matrix each; the one after which the table is named keeps
    that name, so that both are called what they were."""
    if view.name(stream.table).removesuffix(".T") == f"{head.name}.weight":
        index = traits(view.op(stream.embedding)).table or 0
        own = view.add_weight(f"{stream.name}.weight", table)
        view.set_operand(stream.embedding, index, own)
        view.set_weight(stream.table, matrix)
    else:
        view.set_operand(head.node, 1, view.add_weight(f"{head.name}.weight", matrix))
        view.set_weight(stream.table, table)


def rotate_heads(view: View, inlet: Inlet, basis: Tensor, turned: Turned) -> None:
    """Rotate the values that an attention's output linear reads, head by head, by ``basis`` f64
    ``[head size, head size]``."""
    size = len(basis)
    rows = torch.tensor(sorted(set(inlet.rows.tolist())))

    def columns(weight: Tensor) -> Tensor:
        heads = weight.double().reshape(len(weight), -1, size)
        return (heads @ basis).flatten(1).to(weight.dtype)

    def values(weight: Tensor) -> Tensor:
        rotated = weight.clone()
        heads = weight[rows].double().reshape(-1, size, *weight.shape[1:])
        turn = torch.einsum("hd...,de->he...", heads, basis)
        rotated[rows] = turn.flatten(0, 1).to(weight.dtype)
        return rotated

    for linear in inlet.linears:
        view.set_weight(linear.weight, turned((_constant(view, linear.weight),), "heads", columns))
    for maker in inlet.makers:
        view.set_weight(maker, turned((_constant(view, maker),), "values", values))


def _constant(view: View, value: Value) -> Weight:
    weight = view.weight(value)
    assert weight is not None
    return weight


class _Search:
    """The values of the stream, from the first one on, and what touches them."""

    def __init__(self, view: View, structure: Structure) -> None:
        self.view = view
        self.names = {embedding.node: embedding.name for embedding in structure.embeddings}
        self.linears = {linear.node: linear for linear in structure.linears}
        self.values: dict[Value, None] = {}
        """In the order in which they were met."""
        self.additions: list[Node] = []
        self.norms: list[Node] = []

    def stream(self, start: Value) -> Stream:
        view = self.view
        embedding = view.producer(start)
        if embedding is None or embedding not in self.names:
            what = "an input of the graph" if embedding is None else view.op(embedding)
            raise Refusal(f"the residual stream starts at {what}, not at a table's rows")
        table = view.tensor(embedding, traits(view.op(embedding)).table or 0)
        handle = view.weight(table)
        if handle is None or not handle.dtype.is_floating_point:
            raise Refusal("the table that the residual stream starts from is not a constant")
        self._follow(start)
        readings = tuple(self._reading(norm, table) for norm in self.norms)
        writers = tuple(self._writer(o, a) for a in self.additions for o in self._others(a))
        mine = {x.node for r in readings for x in r.linears if x.weight is table}
        if set(readers(view, table)) != {embedding, *mine} or len(mine) > 1:
            raise Refusal("something else than the embedding and the head reads its table")
        return Stream(handle.shape[-1], table, embedding, self.names[embedding], readings, writers)

    def _follow(self, start: Value) -> None:
        view = self.view
        self.values[start] = None
        queue = [start]
        for value in queue:
            if view.is_output(value):
                raise Refusal(f"the residual stream ({view.name(value)}) is an output")
            for user in view.users(value):
                queue += self._used(user)

    def _used(self, user: Node) -> list[Value]:
        """Take in a node that reads the stream; the values of the stream that it makes."""
        view = self.view
        op = view.op(user)
        if op == "rms_norm":
            self.norms.append(user)
        elif op == "add" or keeps_features(view, user):
            result = view.result(user)
            if result not in self.values:
                self.values[result] = None
                self.additions += [user] if op == "add" else []
                return [result]
        elif op == "layer_norm":
            raise Refusal(
                f"a layer norm ({view.name(user)}) reads the residual stream: it subtracts the "
                "mean, which no rotation keeps"
            )
        elif not traits(op).shape_only:
            raise Refusal(f"{op} ({view.name(user)}) reads the residual stream")
        return []

    def _others(self, addition: Node) -> list[Value]:
        """What is added to the stream."""
        operands = self.view.operands(addition)
        if not all(is_value(operand) for operand in operands):
            raise Refusal(f"{self.view.name(addition)} adds a number to the residual stream")
        return [o for o in operands if is_value(o) and o not in self.values]

    def _reading(self, norm: Node, table: Value) -> Reading:
        view = self.view
        operands = view.operands(norm)
        weight = operands[1] if len(operands) > 1 else None
        if not is_value(weight):
            raise Refusal(f"the norm {view.name(norm)} has no weights")
        check_own(view, weight, norm, view.name(norm))
        linears = []
        for user in feature_readers(view, view.result(norm)):
            if user not in self.linears:
                raise Refusal(f"{view.op(user)} ({view.name(user)}) reads a norm of the stream")
            linear = self.linears[user]
            if linear.weight is not table:
                check_own(view, linear.weight, user, linear.name)
            linears.append(linear)
        return Reading(norm, weight, tuple(linears))

    def _writer(self, value: Value, reader: Node) -> Linear:
        view = self.view
        while True:
            if set(view.users(value)) != {reader} or view.is_output(value):
                raise Refusal(f"others than the stream read {view.name(value)}")
            node = view.producer(value)
            if node is not None and node in self.linears:
                break
            if node is None or not keeps_features(view, node):
                what = "an input" if node is None else f"{view.op(node)} ({view.name(node)})"
                raise Refusal(f"{what} is added to the residual stream, not a linear's result")
            value, reader = view.tensor(node), node
        linear = self.linears[node]
        for constant in (linear.weight, linear.bias):
            if constant is not None:
                check_own(view, constant, linear.node, linear.name)
        return linear


def heads_of(inlets: Sequence[Inlet], structure: Structure) -> list[tuple[Inlet, int]]:
    """The inputs that are the results of attentions, with the size of their heads."""
    sizes = {site.o: site.head_dim for site in structure.attentions}
    heads = []
    for inlet in inlets:
        size = sizes.get(inlet.names[0])
        if size and len(inlet.linears) == 1 and len(inlet.rows) % size == 0:
            heads.append((inlet, size))
    return heads
