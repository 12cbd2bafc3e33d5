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
_WRITES = _ARITHMETIC | {
    aten.masked_fill_.Scalar: aten.masked_fill.Scalar,
    aten.masked_fill_.Tensor: aten.masked_fill.Tensor,
    aten.scatter_.value: aten.scatter.value, aten.scatter_.src: aten.scatter.src,
    aten.index_put_.default: aten.index_put.default,
    aten.relu_.default: aten.relu.default, aten.silu_.default: aten.silu.default,
}  # fmt: skip
"""Ops that write to their first argument and return it, and the ones that leave it as it is."""
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_NEW = frozenset({
    aten.linear.default, aten.matmul.default, aten.layer_norm.default, aten.softmax.int,
})  # fmt: skip
"""Composite ops that make what they return. Of others, ``einsum`` for one, no schema says so."""


class Writes:
    """The writes of a graph, by the order that it has before any is settled."""

    def __init__(self, graph: Graph) -> None:
        self._places = {node: place for place, node in enumerate(graph.nodes)}
        self._unseen: dict[Node, bool] = {}

    def unseen(self, node: Node) -> bool:
        """Whether ``node`` writes to a tensor that was made for it: no input, no weight, no view,
        and none that has a view from before."""
        if node not in self._unseen:
            self._unseen[node] = node.target in _WRITES and self._of_its_own(node)
        return self._unseen[node]

    def _of_its_own(self, node: Node) -> bool:
        target = node.args[0]
        if not isinstance(target, Node) or not self._makes_new(target):
            return False
        if node.target in _ARITHMETIC and not _keeps_dtype(node):
            return False
        names = [target]
        while names[-1].target in _WRITES:  # what is written to goes by the name of each write
            names.append(names[-1].args[0])  # type: ignore[arg-type]
        users = {user for name in names for user in name.users}
        place = self._places[node]
        return all(self._makes_new(user) for user in users if self._places[user] < place)

    def _makes_new(self, node: Node) -> bool:
        """Whether what a node returns shares nothing with what it takes."""
        if node.target in _WRITES:
            return self.unseen(node)
        return _makes_new(node)

    def settle(self, node: Node) -> None:
        """add_(x, y) => add(x, y), which is x for all that follows"""
        graph, place, written = node.graph, self._places[node], node.args[0]
        assert isinstance(written, Node)
        with graph.inserting_before(node):
            new = graph.call_function(_WRITES[node.target], node.args, node.kwargs)  # type: ignore[index]
        new.meta = dict(node.meta)
        # A node without a place stands for one that was settled, so that it comes before.
        written.replace_all_uses_with(new, lambda user: self._places.get(user, -1) > place)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _makes_new(node: Node) -> bool:
    target = node.target
    if target is operator.getitem and isinstance(node.args[0], Node):
        several = node.args[0]
        alone = sum(user.args[1] == node.args[1] for user in several.users) == 1
        return alone and _makes_new(several)
    if not isinstance(target, torch._ops.OpOverload):
        return False
    schema = target._schema
    if torch.Tag.maybe_aliasing_or_mutating in target.tags or schema.is_mutable:
        return False
    if any(argument.alias_info is not None for argument in schema.arguments):
        return False
    return target in _NEW or not is_composite(target)


def is_composite(target: torch._ops.OpOverload) -> bool:
    """Whether an op is written in others, so that its schema may not tell what it returns."""
    name = target._schema.name, target._schema.overload_name
    return torch._C._dispatch_has_kernel_for_dispatch_key(".".join(filter(None, name)), _COMPOSITE)


def _keeps_dtype(node: Node) -> bool:
    """Whether arithmetic on a node's arguments has the dtype of the first one."""
    values: list[Any] = [a.meta.get("val") if isinstance(a, Node) else a for a in node.args[:2]]
    return isinstance(values[0], torch.Tensor) and torch.result_type(*values) == values[0].dtype
