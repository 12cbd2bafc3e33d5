"""``FxEditor``: how a view builds, replaces and removes nodes of an FX graph."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch.fx.node import Node as FxNode

from ..core.errors import InvalidGraph, Refusal
from ..core.types import Type, agree
from ..core.view import Attr
from ..core.weights import Weight
from ..vocab import check_arity, complete_attrs, spec
from ..vocab.fx import call
from .read import GETITEM, FxReader, Operand


class FxEditor(FxReader):
    """The editing half of ``fx.FxView``."""

    def build(
        self,
        op: str,
        operands: Sequence[Operand],
        attrs: Mapping[str, Attr] | None = None,
        *,
        before: FxNode,
        name: str | None = None,
        like: FxNode | None = None,
    ) -> FxNode:
        full = complete_attrs(op, attrs)
        check_arity(op, operands, before)
        for operand in operands:
            # Readers and builders look at the ranks of operands.
            if isinstance(operand, FxNode) and operand.meta.get("val") is None:
                self._refresh(operand)
        first = before.prev
        self.edits += 1
        with self.graph.inserting_before(before):
            node = spec(op).build_fx(self.graph, operands, full)
            if name is not None:
                node._rename(name)
            for part in _between(first, before):
                self._adopt(part, before)
            try:
                return self._typed(op, node, like, before)
            except Refusal:
                while before.prev is not first:
                    self.graph.erase_node(before.prev)
                raise
            finally:
                if self.journal is not None:
                    inserted = _between(first, before)
                    self.journal.extend(n for n in inserted if n.target is not GETITEM)

    def _typed(self, op: str, node: FxNode, like: FxNode | None, before: FxNode) -> FxNode:
        """Type what must be typed at once: parts of a form, and several results."""
        if node.prev in node.all_input_nodes and node.prev.meta.get("val") is None:
            self._refresh(node.prev)
        if like is not None and like.meta.get("val") is not None:
            node.meta["val"] = like.meta["val"]
            return node
        # The types of several results are needed at once, to make the ``getitem`` nodes.
        if not spec(op).multi_result or not isinstance(self._refresh(node), (tuple, list)):
            return node
        items = [call(self.graph, GETITEM, (node, i)) for i in range(len(node.meta["val"]))]
        for item in items:
            self._adopt(item, before)
        return items[0]

    def retype(self, value: FxNode, like: FxNode) -> None:
        if value.meta.get("val") is not None:
            return
        declared = like.meta.get("val")
        if isinstance(declared, torch.Tensor):
            self._check_fit(value, self.type(like))
        value.meta["val"] = declared

    def _check_fit(self, node: FxNode, declared: Type) -> None:
        """Refuse a node whose operands, as far as they are typed, contradict its declared type."""
        reading = self.read(node)
        if reading is None or any(
            isinstance(o, FxNode) and o.meta.get("val") is None for o in reading[1]
        ):
            return
        op, operands, attrs = reading
        types = [self.type(o) if isinstance(o, FxNode) else o for o in operands]
        try:
            inferred = spec(op).infer(types, attrs)[0]
        except (ValueError, IndexError) as error:
            raise Refusal(f"{op} does not fit its operands: {error}", node) from None
        if not agree(inferred, declared):
            raise Refusal(f"the replacement is {inferred}, {declared} is needed", node)

    def rewire(self, node: FxNode, old: FxNode, new: FxNode) -> None:
        self.edits += 1
        node.replace_input_with(old, new)
        if not self._same_type(old, new):
            self.refresh_types([node])

    def clone(
        self, node: FxNode, values: Mapping[FxNode, FxNode], *, before: FxNode
    ) -> tuple[FxNode, ...]:
        mapping: dict[FxNode, FxNode] = {}
        self.edits += 1
        with self.graph.inserting_before(before):
            for old in dict.fromkeys((node, *self.results(node))):
                new = self.graph.node_copy(
                    old, lambda n: mapping.get(n) or values.get(n) or n
                )
                new.meta = dict(old.meta)
                if self.origin is not None:
                    new.meta["graphwright"] = self.origin
                mapping[old] = new
        if self.journal is not None:
            self.journal.append(mapping[node])
        return tuple(mapping[value] for value in self.results(node))

    def _adopt(self, node: FxNode, near: FxNode) -> None:
        stack = near.meta.get("nn_module_stack")
        meta = node.meta
        if stack is not None:
            meta.setdefault("nn_module_stack", stack)
        if self.origin is not None:
            meta["graphwright"] = self.origin

    def add_weight(self, name: str, weight: Weight) -> FxNode:
        shared = self._by_key.get(weight.key)
        # A key may be an address, and what was stored there may be gone by now.
        if shared is not None and self._weights[shared.meta["weight"]].key == weight.key:
            return shared
        self.edits += 1
        unique = name
        count = 1
        while unique in self._weights:
            unique = f"{name}_{count}"
            count += 1
        place = self._first_input()
        following = next(iter(self.graph.nodes))
        if place:
            following = self._placeholders[place - 1].next
        with self.graph.inserting_before(following):
            node = self.graph.placeholder(re.sub(r"\W", "_", f"w_{unique}"))
        with self._fake_mode():
            node.meta["val"] = torch.empty(weight.shape, dtype=weight.dtype)
        node.meta["weight"] = unique
        self._weights[unique] = weight
        self._by_key[weight.key] = node
        self._placeholders.insert(place, node)
        return node

    def _first_input(self) -> int:
        """The place of the first input among the placeholders: behind the weights, as a rule."""
        place = len(self._weights)
        known = self._placeholders
        before, behind = known[place - 1 : place], known[place : place + 1]
        if all("weight" in n.meta for n in before) and all("weight" not in n.meta for n in behind):
            return place
        inputs = (i for i, n in enumerate(known) if "weight" not in n.meta)
        return next(inputs, len(known))

    def replace(self, old: FxNode, new: FxNode) -> None:
        self.edits += 1
        maker = self.producer(new)
        users = [user for user in old.users if user is not maker]
        for user in users:
            user.replace_input_with(old, new)
        if not self._same_type(old, new):
            self.refresh_types(u for u in users if u.op == "call_function")

    def _same_type(self, old: FxNode, new: FxNode) -> bool:
        before = old.meta.get("val")
        if before is None or before is new.meta.get("val"):
            return True
        return agree(self.type(old), self.type(new))

    def refresh_type(self, node: FxNode) -> bool:
        before = [self.type(value) for value in self.results(node)]
        items = [u for u in node.users if u.target is GETITEM]
        for stale in (node, *items):
            stale.meta["val"] = None
            self._refresh(stale)
        after = [self.type(value) for value in self.results(node)]
        return not all(agree(a, b) for a, b in zip(before, after, strict=True))

    def name_dim(self, value: FxNode, axis: int, name: str) -> None:
        """A dimension that is a symbol has a name; one that the example made a number becomes a
        symbol of its own."""
        known = value.meta["val"] if value.meta.get("val") is not None else self._refresh(value)
        if not isinstance(known.shape[axis], int):
            return
        mode = self._fake_mode()
        size = self.dims.symbol(known.shape[axis], name, mode.shape_env, value.name)
        shape = [size if i == axis else d for i, d in enumerate(known.shape)]
        with mode:
            value.meta["val"] = torch.empty(shape, dtype=known.dtype)

    def renew_types(self, nodes: Iterable[FxNode], old: str, new: str) -> None:
        for node in nodes:
            try:
                self.refresh_type(node)
            except Refusal as refusal:
                raise InvalidGraph(f"{node.name}: {refusal.reason}") from None

    def set_operand(self, node: FxNode, index: int, operand: Operand) -> None:
        self.edits += 1
        reading = self.read(node)
        if reading is None:
            if not isinstance(operand, FxNode):
                raise Refusal(f"{node.name}: the inputs of a native node are tensors", node)
            node.replace_input_with(node.all_input_nodes[index], operand)
            old: Operand = None
        else:
            op, operands, attrs = reading
            old = operands[index]
            changed = [operand if i == index else o for i, o in enumerate(operands)]
            with self.graph.inserting_before(node):
                written = spec(op).build_fx(self.graph, changed, attrs)
            node.target, node.args, node.kwargs = written.target, written.args, written.kwargs
            self.graph.erase_node(written)
        values = (v for v in (old, operand) if isinstance(v, FxNode))
        if len(pair := tuple(values)) < 2 or not self._same_type(*pair):
            self.refresh_types([node])

    def erase(self, node: FxNode) -> None:
        self.edits += 1
        for item in [u for u in node.users if u.target is GETITEM and not u.users]:
            self.graph.erase_node(item)
        if node.users:
            users = ", ".join(u.name for u in node.users)
            raise InvalidGraph(f"{node.name} is still used by {users}")
        self.graph.erase_node(node)

    def erase_dead(self, node: FxNode) -> list[FxNode]:
        erased: list[FxNode] = []
        stack = [node]
        while stack:
            current = stack.pop()
            items = [u for u in current.users if u.target is GETITEM and not u.users]
            if len(items) < len(current.users):
                continue
            producers = current.all_input_nodes
            for item in items:
                self.graph.erase_node(item)
            self.graph.erase_node(current)
            self.edits += 1
            erased.append(current)
            for value in producers:
                maker = None if value.users else self.producer(value)
                if maker is not None and maker not in stack:
                    stack.append(maker)
        return erased

    def set_weight(self, value: FxNode, weight: Weight) -> None:
        old = self._weights[value.meta["weight"]]
        if (old.shape, old.dtype) != (weight.shape, weight.dtype):
            raise InvalidGraph(f"{self.name(value)}: {weight} cannot stand for {old}")
        self.edits += 1
        self._weights[value.meta["weight"]] = weight

    def resize_weight(self, value: FxNode, weight: Weight) -> None:
        self.edits += 1
        with self._fake_mode():
            value.meta["val"] = torch.empty(weight.shape, dtype=weight.dtype)
        self._weights[value.meta["weight"]] = weight
        self._by_key[weight.key] = value
        self.refresh_types(list(value.users))

    def drop_unused_weights(self) -> int:
        dead = [n for n in self._placeholders if "weight" in n.meta and not n.users]
        for node in dead:
            del self._weights[node.meta["weight"]]
            self.graph.erase_node(node)
        self.edits += len(dead)
        gone = set(dead)
        self._placeholders = [n for n in self._placeholders if n not in gone]
        self._by_key = {k: n for k, n in self._by_key.items() if n not in gone}
        return len(dead)

    def add_input(self, name: str, like: FxNode) -> FxNode:
        self.edits += 1
        with self.graph.inserting_after(self._placeholders[-1]):
            node = self.graph.placeholder(re.sub(r"\W", "_", name))
        node.meta["val"] = like.meta.get("val")
        self._placeholders.append(node)
        self._names = ((*self._names[0], name), self._names[1])
        return node

    def set_inputs(self, named: Mapping[str, FxNode]) -> None:
        self.edits += 1
        nodes = list(named.values())
        gone = set(self.inputs()) - set(nodes)
        for node in gone:
            if node.users:
                raise InvalidGraph(f"the input {node.name} is still used")
        for node in gone:
            self.graph.erase_node(node)
        weights = [n for n in self._placeholders if "weight" in n.meta]
        self._placeholders = [*weights, *nodes]
        for before, node in zip(self._placeholders, self._placeholders[1:], strict=False):
            before.append(node)
        self._names = (tuple(named), self._names[1])

    def set_outputs(self, named: Mapping[str, FxNode]) -> None:
        self.edits += 1
        self._output.args = (tuple(named.values()),)
        self._names = (self._names[0], tuple(named))

    def after(self, node: FxNode) -> FxNode:
        place = node.next
        while place.target is GETITEM and place.args[0] is node:
            place = place.next
        return place


def _between(first: FxNode, last: FxNode) -> Iterator[FxNode]:
    node = first.next
    while node is not last:
        yield node
        node = node.next
