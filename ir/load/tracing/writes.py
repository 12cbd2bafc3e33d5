"""Writes that nothing sees but through their result, as the ops that make a new tensor.

``scores += bias`` writes to what a product has just made. Nobody else has that storage, so that it
is ``scores + bias`` all the same.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

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
}  # fmt: skip
"""Ops that write to their first argument and return it, and the ones that leave it as it is."""
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_NEW = frozenset({
    aten.linear.default, aten.matmul.default, aten.layer_norm.default, aten.softmax.int,
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.batch_norm.default,
})  # fmt: skip
"""Composite ops that make what they return. Of others, ``einsum`` for one, no schema says so."""
_UNSAFE = frozenset({
    aten._unsafe_view.default, aten.unsafe_split.Tensor, aten.unsafe_split_with_sizes.default,
    aten.lift.default,
})  # fmt: skip
"""Views whose schema says that they make what they return."""


class Writes:
    """The writes of a graph, by the order that it has before any is settled."""

    def __init__(self, graph: Graph) -> None:
        self._places = {node: place for place, node in enumerate(graph.nodes)}
        self._names: dict[Node, list[Node]] = {}
        """By each name of a tensor that is written to, all of them: what made it, and each write
        that returns it. A copied block writes to the name that it was called with, so that a write
        may go by another name than the one before."""
        for node in graph.nodes:
            if node.target in WRITES:
                written = node.args[0]
                names = self._names[node] = self._names.setdefault(written, [written])
                names.append(node)
        self._viewed: dict[Node, int] = {}

    def unseen(self, node: Node) -> bool:
        """Whether ``node`` writes to a tensor that was made for it: no input, no weight, no view,
        and none that has a view from before."""
        if node.target not in WRITES:
            return False
        made = self._names[node][0]
        if node.target in _ARITHMETIC and not _keeps_dtype(node):
            return False
        return _makes_new(made) and self._places[node] < self._first_view(made)

    def _first_view(self, made: Node) -> int:
        """The place of the first node that may share the storage of ``made`` by no name of it."""
        if made not in self._viewed:
            users = {user for name in self._names[made] for user in name.users}
            views = [self._places[user] for user in users if not _shares_nothing(user)]
            self._viewed[made] = min(views, default=len(self._places))
        return self._viewed[made]

    def settle(self, node: Node) -> None:
        """add_(x, y) => add(x, y), which is x for all that follows"""
        graph, place, written = node.graph, self._places[node], node.args[0]
        assert isinstance(written, Node)
        with graph.inserting_before(node):
            new = graph.call_function(WRITES[node.target], node.args, node.kwargs)  # type: ignore[index]
        new.meta = dict(node.meta)
        # A node without a place stands for one that was settled, so that it comes before.
        written.replace_all_uses_with(new, lambda user: self._places.get(user, -1) > place)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _shares_nothing(user: Node) -> bool:
    """Whether what a node returns shares nothing with what it takes, but for a name of it."""
    return user.target in WRITES or not _is_tensor(user) or _makes_new(user)


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


def _keeps_dtype(node: Node) -> bool:
    """Whether arithmetic on a node's arguments has the dtype of the first one."""
    values: list[Any] = [a.meta.get("val") if isinstance(a, Node) else a for a in node.args[:2]]
    return isinstance(values[0], torch.Tensor) and torch.result_type(*values) == values[0].dtype
