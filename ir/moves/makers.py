"""What the features of a value are proportional to: constants further up, one entry a feature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import Refusal
from ..core.view import Node, Value, View, is_value
from ..structure.recognize import Attention, Structure
from ..structure.weights import readers

NORMS = frozenset({"rms_norm", "layer_norm"})
_HEADS_OUT = (0, 2, 1, 3)
"""From ``[batch, tokens, heads, size]`` to ``[batch, heads, tokens, size]``, and back."""
_PASSING = frozenset({"transpose", "reshape", "expand", "unsqueeze", "concat", "cast", "identity"})
"""What lies between an attention's values and the linear that makes them."""


def keeps_features(view: View, node: Node) -> bool:
    op = view.op(node)
    if op in ("cast", "identity"):
        return True
    if op != "reshape":
        return False
    before, after = (view.type(v).shape for v in (view.tensor(node), view.results(node)[0]))
    if not before or not after:
        return False
    return isinstance(after[-1], int) and before[-1] == after[-1]


def check_own(view: View, weight: Value, node: Node, name: str) -> None:
    """Whether a constant is floats that nothing but one node reads, in no cast."""
    handle = view.weight(weight)
    if handle is None or not handle.dtype.is_floating_point:
        raise Refusal(f"the weight of {name} is not a floating-point constant")
    if readers(view, weight) != [node]:
        raise Refusal(f"the weight of {name} is read by others too")
    if view.users(weight) != (node,):
        raise Refusal(f"the weight of {name} is stored in another dtype than it is read in")


@dataclass(frozen=True)
class Makers:
    """From a value up to the constants that its features are proportional to."""

    view: View
    structure: Structure

    def of(self, value: Value, size: int) -> tuple[tuple[Value, ...], Tensor]:
        view = self.view
        node = view.producer(value)
        if node is None:
            raise Refusal("its input comes from outside of the graph")
        op = view.op(node)
        if keeps_features(view, node) or op == "relu":
            return self._alone(view.tensor(node), size, node)
        if op in NORMS:
            return self._constants(node, first=1), torch.arange(size)
        if op == "linear":
            return self._constants(node, first=1), torch.arange(size)
        if op in ("slice", "split"):
            return self._cut(value, node, size)
        if op == "mul":
            return self._product(node, size)
        if op == "reshape":
            return self._heads(node, size)
        raise Refusal(f"{op} ({view.name(node)}) lies between its input and what makes it")

    def _constants(self, node: Node, first: int) -> tuple[Value, ...]:
        """The weight and bias of a norm or a linear; both are scaled alike."""
        view = self.view
        constants = [operand for operand in view.operands(node)[first:] if is_value(operand)]
        if not constants:
            raise Refusal(f"{view.name(node)}, which makes its input, has no weight")
        for operand in constants:
            check_own(view, operand, node, view.name(node))
        return tuple(constants)

    def _alone(self, value: Value, size: int, reader: Node) -> tuple[tuple[Value, ...], Tensor]:
        """Further up, as long as nothing else reads the value."""
        view = self.view
        others = [user for user in view.users(value) if user != reader]
        if others or view.is_output(value):
            name = view.name(others[0]) if others else "the graph's output"
            raise Refusal(f"{name} reads {view.name(value)}, which makes its input, too")
        return self.of(value, size)

    def _product(self, node: Node, size: int) -> tuple[tuple[Value, ...], Tensor]:
        """By one factor of a product: the first that can be told."""
        reasons = []
        for operand in self.view.operands(node):
            if not is_value(operand) or self.view.weight(operand) is not None:
                continue
            if (self.view.type(operand).shape or (None,))[-1] != size:
                continue
            try:
                return self._alone(operand, size, node)
            except Refusal as refusal:
                reasons.append(str(refusal))
        raise Refusal(reasons[-1] if reasons else f"{self.view.name(node)} has no factor to scale")

    def _cut(self, value: Value, node: Node, size: int) -> tuple[tuple[Value, ...], Tensor]:
        """A run of the features of something wider, of which others read other runs."""
        view, whole = self.view, self.view.tensor(node)
        shape = view.type(whole).shape
        if shape is None or not isinstance(shape[-1], int):
            raise Refusal(f"{view.name(node)} cuts features of a number that is not known")
        if view.is_output(whole):
            raise Refusal(f"{view.name(whole)}, which makes its input, is an output")
        start = _start(view, value, node, shape[-1])
        for user in view.users(whole):
            for other in view.results(user):
                if other is value:
                    continue
                first = _start(view, other, user, shape[-1])
                width = (view.type(other).shape or (0,))[-1]
                apart = isinstance(width, int) and (
                    first + width <= start or start + size <= first
                )
                if not apart:
                    raise Refusal(f"{view.name(other)} reads the features of its input too")
        makers, rows = self.of(whole, shape[-1])
        return makers, rows[start : start + size]

    def _heads(self, node: Node, size: int) -> tuple[tuple[Value, ...], Tensor]:
        """Heads side by side, out of an attention: its values, each head as often as it is read."""
        view = self.view
        turned = view.producer(view.tensor(node))
        attention = None if turned is None else view.producer(view.tensor(turned))
        by_node = {site.node: site for site in self.structure.attentions}
        if (
            turned is None or attention is None or attention not in by_node
            or view.op(turned) != "transpose" or tuple(view.attrs(turned)["perm"]) != _HEADS_OUT
        ):  # fmt: skip
            raise Refusal(f"reshape ({view.name(node)}) lies between its input and what makes it")
        site = by_node[attention]
        for value in (view.tensor(node), view.tensor(turned)):
            if len(view.users(value)) > 1 or view.is_output(value):
                raise Refusal(f"others read {view.name(value)}, which makes its input, too")
        heads, shared, width = site.heads, site.kv_heads, site.head_dim
        if not heads or not shared or not width or heads * width != size or heads % shared:
            raise Refusal("how many heads its values have is not known")
        weights, rows = self._values(site, shared * width, width)
        each = torch.arange(heads) // (heads // shared)
        features = (each.unsqueeze(1) * width + torch.arange(width)).flatten()
        return weights, rows[features]

    def _values(
        self, site: Attention, size: int, width: int
    ) -> tuple[tuple[Value, ...], Tensor]:
        """Up from an attention's values to where their heads lie side by side."""
        view, value, reader = self.view, self.view.tensor(site.node, 2), site.node
        past = site.cache.past[1] if site.cache else None
        present = site.cache.present[1] if site.cache else None
        while True:
            cached = value is present
            if any(user != reader for user in view.users(value)) or (
                view.is_output(value) and not cached
            ):
                raise Refusal(f"others read the values {view.name(value)} too")
            node = view.producer(value)
            op = "" if node is None else view.op(node)
            if node is None or op not in _PASSING:
                raise Refusal(f"{op or 'an input'} lies between its values and what makes them")
            reader = node
            if op == "transpose":
                break
            if op == "reshape" and not keeps_features(view, node):
                raise Refusal(f"{view.name(node)} lays its values out anew")
            if op == "unsqueeze" and tuple(view.attrs(node)["dims"]) != (2,):
                raise Refusal("its values are repeated in an order that is not known")
            inputs = [o for o in view.operands(node) if is_value(o) and o is not past]
            if op == "concat" and len(inputs) != 1:
                raise Refusal("its values are joined with others")
            value = inputs[0] if op == "concat" else view.tensor(node)
        split = view.tensor(node)
        shape, maker = view.type(split).shape, view.producer(split)
        if (
            tuple(view.attrs(node)["perm"]) != _HEADS_OUT or shape is None or maker is None
            or view.op(maker) != "reshape" or size % width or shape[-2:] != (size // width, width)
        ):  # fmt: skip
            raise Refusal("its values do not lie head by head")
        if view.users(split) != (node,):
            raise Refusal(f"others read the values {view.name(split)} too")
        whole = view.tensor(maker)
        if (view.type(whole).shape or (None,))[-1] != size:
            raise Refusal("its values do not lie head by head")
        return self._alone(whole, size, maker)


def _start(view: View, value: Value, node: Node, width: int) -> int:
    """The first feature of a cut along the last dimension. Raises ``Refusal`` for another."""
    op, attrs = view.op(node), view.attrs(node)
    rank = view.type(view.tensor(node)).rank
    if op not in ("slice", "split") or rank is None or attrs["dim"] != rank - 1:
        raise Refusal(f"{op} ({view.name(node)}) reads what makes its input too")
    if op == "split":
        return int(sum(attrs["sizes"][: view.results(node).index(value)]))
    start = view.operands(node)[1]
    if not isinstance(start, int) or attrs.get("step", 1) != 1:
        raise Refusal(f"where {view.name(node)} cuts is not known")
    return start if start >= 0 else start + width
