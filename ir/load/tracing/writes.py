"""Writes to tensors that the graph has made, as the ops that make a new tensor.

``scores += bias`` writes to what a product has just made. Nobody else has that storage, so that it
is ``scores + bias`` all the same; and what other views of it show follows from their ops.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from .written_views import View, expansion, filled, view_of

aten = torch.ops.aten

_ARITHMETIC = {
    aten.add_.Tensor: aten.add.Tensor, aten.add_.Scalar: aten.add.Scalar,
    aten.sub_.Tensor: aten.sub.Tensor, aten.sub_.Scalar: aten.sub.Scalar,
    aten.mul_.Tensor: aten.mul.Tensor, aten.mul_.Scalar: aten.mul.Scalar,
    aten.div_.Tensor: aten.div.Tensor, aten.div_.Scalar: aten.div.Scalar,
}  # fmt: skip
"""Ops that may make a dtype wider than that of the tensor they write to."""
WRITES = _ARITHMETIC | {
    aten.masked_fill_.Scalar: aten.masked_fill.Scalar,
    aten.masked_fill_.Tensor: aten.masked_fill.Tensor,
    aten.scatter_.value: aten.scatter.value, aten.scatter_.src: aten.scatter.src,
    aten.index_put_.default: aten.index_put.default,
    aten.relu_.default: aten.relu.default, aten.silu_.default: aten.silu.default,
    aten.hardtanh_.default: aten.hardtanh.default, aten.sigmoid_.default: aten.sigmoid.default,
    aten.hardswish_.default: aten.hardswish.default, aten.tanh_.default: aten.tanh.default,
    aten.leaky_relu_.default: aten.leaky_relu.default, aten.clamp_.default: aten.clamp.default,
    aten.hardsigmoid_.default: aten.hardsigmoid.default, aten.elu_.default: aten.elu.default,
    aten.copy_.default: aten.copy.default, aten.zero_.default: aten.zeros_like.default,
    aten.fill_.Scalar: aten.fill.Scalar, aten.fill_.Tensor: aten.fill.Tensor,
}  # fmt: skip
"""Ops that write to their first argument and return it, and the ones that leave it as it is."""
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_NEW = frozenset({
    aten.linear.default, aten.matmul.default, aten.layer_norm.default, aten.softmax.int,
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.batch_norm.default,
    aten.where.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf,
})  # fmt: skip
"""Composite ops that make what they return. Of others, ``einsum`` for one, no schema says so."""
_UNSAFE = frozenset({
    aten._unsafe_view.default, aten.unsafe_split.Tensor, aten.unsafe_split_with_sizes.default,
    aten.lift.default,
})  # fmt: skip
"""Views whose schema says that they make what they return."""


class Writes:
    """The writes of a graph, and all names and views of what they write to.

    They are found before any is settled. A write through a view writes to what it is a view of, and
    to what all other views of it show. A copied block writes to the name that it was called with:
    a write may go by another name than the one before.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._views: dict[Node, View] = {}
        self._names: dict[Node, Node] = {}
        """What a write returns, and the name that it wrote to."""
        self._written: set[Node] = set()
        """What was made and is written to."""
        self._places = {node: place for place, node in enumerate(graph.nodes)}
        for node in graph.nodes:
            if node.target in WRITES:
                self._names[node] = node.args[0]
                self._written.add(self._made(node))
            elif (view := view_of(node)) is not None:
                self._views[node] = view
        self._unclear = self._first_unclear()

    def _named(self, node: Node) -> Node:
        while node in self._names:
            node = self._names[node]
        return node

    def _path(self, node: Node) -> list[Node]:
        """The views from a name to what was made, that last."""
        path = [self._named(node)]
        while path[-1] in self._views:
            path.append(self._named(self._views[path[-1]].of))
        return path

    def _made(self, node: Node) -> Node:
        return self._path(node)[-1]

    def _first_unclear(self) -> dict[Node, int]:
        """By what was made and is written to, the place of the first node that may show its storage
        under a name that is not known here."""
        first: dict[Node, int] = {}
        for node in self._graph.nodes if self._written else ():
            if node.target in WRITES or node in self._views or node.op == "output":
                continue
            if self._in_pieces(node):
                continue
            if _is_tensor(node) and not _makes_new(node):
                for made in map(self._made, node.all_input_nodes):
                    first.setdefault(made, self._places[node])
        return first

    def _in_pieces(self, node: Node) -> bool:
        """Whether a node returns views alone each of which is known."""
        pieces = [user.target is operator.getitem and self._views.get(user) for user in node.users]
        return bool(pieces) and all(pieces)

    def settled(self, node: Node) -> bool:
        """Whether ``settle`` knows what ``node`` writes: to a tensor that was made for it, no input
        and no weight, through views that can be undone, all of whose names are known."""
        if node.target not in WRITES:
            return False
        *views, made = self._path(node)
        if node.target in _ARITHMETIC and not _keeps_dtype(node):
            return False
        if node.target is aten.copy_.default and not _same_device(node):
            return False
        return (
            _makes_new(made)
            and self._places[node] < self._unclear.get(made, len(self._places))
            and all(self._views[view].back is not None for view in views)
        )

    def settle(self) -> None:
        """add_(x, y) => add(x, y), which is x for all that follows

        What is written to a view goes into what it is a view of (``slice_scatter``), and each other
        view that is read later is taken anew. Parts that fill a tensor are joined.
        """
        if self._written:
            _Settling(self._graph, self._path, self._views, self._written).run()


class _Settling:
    """What tensors that are written to hold at a place of the graph."""

    def __init__(
        self, graph: Graph, path: Callable[[Node], list[Node]], views: Mapping[Node, View],
        written: set[Node],
    ) -> None:  # fmt: skip
        self._graph = graph
        self._path = path
        self._views = views
        self._version = dict.fromkeys(written, 0)
        self._latest: dict[Node, tuple[Node, int]] = {}
        """By name, the node that holds what it shows, and how many writes that has seen."""
        self._cut: dict[Node, int] = {}
        """How many writes have been seen by what is a view in several pieces."""
        self._own: set[Node] = set()
        """Nodes that may go where nothing reads them."""

    def run(self) -> None:
        for node in list(self._graph.nodes):
            path = self._path(node)
            name, made = path[0], path[-1]
            self._read(node)
            if made not in self._version:
                continue
            if node.target in WRITES:
                self._write(node, name)
            else:
                piece = node.target is operator.getitem and node in self._views
                seen = self._cut[node.all_input_nodes[0]] if piece else self._version[made]
                self._latest[node] = node, seen
            self._own.add(node)
        for node in reversed(list(self._graph.nodes)):
            if node in self._own and not node.users:
                self._graph.erase_node(node)

    def _read(self, node: Node) -> None:
        """Let ``node`` read values that hold at its place.

        All at once: of two names the value of one may be the other one's, of before a write.
        """
        values: dict[Node, Node] = {}
        for read in node.all_input_nodes:
            if (source := self._path(read)[-1]) in self._version:
                values[read] = self._value(read, node)
                self._cut[node] = self._version[source]
        if values:
            arguments = node.args, node.kwargs
            node.args, node.kwargs = map_arg(arguments, lambda read: values.get(read, read))

    def _value(self, name: Node, before: Node) -> Node:
        """The node that holds what ``name`` shows now."""
        path = self._path(name)
        node, seen = self._latest[path[0]]
        if seen == self._version[path[-1]]:
            return node
        # What was made is known by its latest value, so that this is a view.
        view, again = self._views[path[0]], self._value(path[1], before)
        if view.target is not None:
            again = self._add(before, view.target, (again, *view.args), path[0])
        self._latest[path[0]] = again, self._version[path[-1]]
        return again

    def _write(self, node: Node, name: Node) -> None:
        """``node`` writes to ``name``; it reads values that hold at its place."""
        path = self._path(name)
        before = [self._value(each, node) for each in path]
        value = self._result(node)
        self._version[path[-1]] += 1
        version = self._version[path[-1]]
        self._latest[name] = value, version
        for inner, outer, held in zip(path, path[1:], before[1:], strict=False):
            back = self._views[inner].back
            assert back is not None
            value = self._put_back(node, back(held, value), outer)
            self._latest[outer] = value, version

    def _result(self, node: Node) -> Node:
        """What a write leaves in the place that it writes to."""
        held, *rest = node.args
        assert isinstance(held, Node)
        if node.target is not aten.copy_.default:
            return self._add(node, WRITES[node.target], node.args, node, node.kwargs)  # type: ignore[index]
        source = rest[0]
        assert isinstance(source, Node)
        value, like = source.meta["val"], held.meta["val"]
        if value.dtype != like.dtype:
            dtype = {"dtype": like.dtype}
            source = self._add(node, aten._to_copy.default, (source,), node, dtype)
            source.meta["val"] = value.to(like.dtype)
        if str(value.shape) == str(like.shape):
            return source
        sizes = expansion(tuple(value.shape), tuple(like.shape))
        if sizes is None:
            return self._add(node, aten.expand_as.default, (source, held), held)
        return self._add(node, aten.expand.default, (source, sizes), held)

    def _put_back(self, node: Node, call: Node | tuple[Any, tuple[Any, ...]], like: Node) -> Node:
        if isinstance(call, Node):
            return call
        target, args = call
        parts = filled(target, args)
        if parts is not None:
            target, args = aten.cat.default, parts
        return self._add(node, target, args, like)

    def _add(
        self, before: Node, target: Any, args: tuple[Any, ...], like: Node,
        kwargs: Mapping[str, Any] | None = None,
    ) -> Node:  # fmt: skip
        """A node of the type of ``like``, in the module of ``before``."""
        with self._graph.inserting_before(before):
            new = self._graph.call_function(target, args, dict(kwargs or {}))
        new.meta = {**before.meta, "val": like.meta["val"]}
        self._own.add(new)
        return new


def _is_tensor(node: Node) -> bool:
    """Whether a node returns a tensor or several, not a size."""
    return not isinstance(node.meta.get("val"), int | torch.SymInt)


def _makes_new(node: Node) -> bool:
    """Whether a node makes what it returns, and nothing else has that."""
    target = node.target
    if target is operator.getitem and isinstance(node.args[0], Node):
        several = node.args[0]
        alone = sum(user.args[1] == node.args[1] for user in several.users) == 1
        return alone and _makes_new(several)
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target in _NEW:
        return True
    schema = target._schema
    if torch.Tag.maybe_aliasing_or_mutating in target.tags or schema.is_mutable:
        return False
    if any(argument.alias_info is not None for argument in schema.arguments):
        return False
    return target not in _UNSAFE and not is_composite(target)


def is_composite(target: torch._ops.OpOverload) -> bool:
    """Whether an op is written in others, so that its schema may not tell what it returns."""
    name = target._schema.name, target._schema.overload_name
    return torch._C._dispatch_has_kernel_for_dispatch_key(".".join(filter(None, name)), _COMPOSITE)


def _same_device(node: Node) -> bool:
    """Whether a copy stays on the device of what it writes to."""
    values: list[Any] = [a.meta.get("val") if isinstance(a, Node) else None for a in node.args[:2]]
    return all(isinstance(value, torch.Tensor) for value in values) and (
        values[0].device == values[1].device
    )


def _keeps_dtype(node: Node) -> bool:
    """Whether arithmetic on a node's arguments has the dtype of the first one."""
    values: list[Any] = [a.meta.get("val") if isinstance(a, Node) else a for a in node.args[:2]]
    return isinstance(values[0], torch.Tensor) and torch.result_type(*values) == values[0].dtype
