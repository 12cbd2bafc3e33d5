"""The move *shrink*: of a token axis only chosen positions go on; what carries it follows.

The cut is a value of the residual stream. Behind it every value with the same symbolic dimension
has fewer positions: sizes are taken anew, masks and other chains of sizes and positions are made
again for the new length, per-token data that was computed before the cut is selected likewise.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from ..core.errors import Refusal
from ..core.types import UNKNOWN_DIM, mentions
from ..core.view import NATIVE, Node, Value, View
from ..structure.cache_slots import PAST_AXIS, SHIFT, is_past, present_of
from ..structure.pictured import PLACES_KEY
from ..vocab import END, traits
from ..vocab.builder import Builder
from .token_rows import select_tokens
from .upstream import upstream

Positions = Literal["kept", "renumbered"]


def shrink(
    view: View, value: Value, kept: Value, *, positions: Positions, rule: str, step: int = 0
) -> Value:
    """Let only the rows ``kept`` of ``value`` go on; what stands for it from there on.

    ``value`` is ``[rows, tokens, width]`` with a symbolic second dimension, ``kept`` i64
    ``[rows, count]``, ascending in each row and computed from nothing behind ``value``. With
    ``positions="kept"`` a token keeps the position that it had: rotary tables are selected. With
    ``"renumbered"`` positions are counted anew. Ascending order makes the ordinary causal mask of
    the new length right in both (a mask that encodes distances, as ALiBi does, counts anew too).
    Where tokens stand down and across (``PLACES_KEY``), all keep their places: one in an image is
    no count of what is before it.

    In a graph with a key-value cache, the slots of blocks behind the cut are shorter from then on
    (ragged, where blocks before it have slots too); a step that drops nothing goes through as it
    is. The padding mask that comes in covers the slots before the cut, or all where there are none
    before; its first columns stand for the shorter slots, which is right for padding on the left.

    Raises ``Refusal`` where the dimension is not symbolic or a value cannot follow.
    """
    cut = _Cut(view, value, kept, positions)
    with view.made_by(rule, step):
        with view.one_edit():
            new = cut.apply()
        cut.renew_types(new)
        return new


@dataclass
class _Cut:
    view: View
    value: Value
    kept: Value
    positions: Positions
    followed: dict[Value, Value] = field(default_factory=dict)
    renumbered: dict[Value, Value] = field(default_factory=dict)
    copies: list[Node] = field(default_factory=list)
    stood_in: dict[Value, Value] = field(default_factory=dict)
    """Caches of blocks before the cut, of which only sizes are read behind it."""
    held: set[str] = field(default_factory=set)
    """How long these are, as the graph's types say it."""

    def __post_init__(self) -> None:
        shape = self.view.type(self.value).shape
        if shape is None or len(shape) != 3:
            raise Refusal(f"{self.view.name(self.value)} is not [rows, tokens, width]")
        if not isinstance(shape[1], str) or shape[1] == UNKNOWN_DIM:
            raise Refusal(
                f"the number of tokens of {self.view.name(self.value)} is fixed ({shape[1]}): "
                "trace the model with a dynamic sequence"
            )
        self.dim = shape[1]
        if PLACES_KEY in self.view.metadata():
            self.positions = "kept"
        self.order = {node: place for place, node in enumerate(self.view.nodes())}
        self.behind, self.stream = self._flow()
        maker = self.view.producer(self.kept)
        if maker is None:
            raise Refusal("the kept positions must be computed in the graph")
        self.place = self.order[maker]
        self.anchor = self.view.after(maker)
        self.slots = self._slots()

    def _flow(self) -> tuple[list[Node], set[Value]]:
        """Nodes behind the cut in order, and their results; what ``kept`` is made of is before."""
        before = upstream(self.view, self.kept)
        flow: set[Value] = {self.value}
        nodes = []
        for node in self.order:
            if node in before or not flow.intersection(self.view.arguments(node)):
                continue
            nodes.append(node)
            flow.update(self.view.results(node))
        if not nodes and not self.view.is_output(self.value):
            raise Refusal(f"nothing reads {self.view.name(self.value)}")
        return nodes, flow

    def _slots(self) -> tuple[Value, Value] | None:
        """A cache of a block before the cut and one of a block behind it; twice the same where
        none is before. ``None`` where no block behind has a cache."""
        view = self.view
        pasts = [value for value in view.inputs() if is_past(view, value)]
        late = set(self.behind)
        behind = [v for v in pasts if any(u in late and view.op(u) == "concat"
                                          for u in view.users(v))]  # fmt: skip
        before = [v for v in pasts if v not in behind]
        if not behind:
            return None
        self.stood_in.update(dict.fromkeys(before, behind[0]))
        for value in before:
            dims = (view.type(value).shape or ())[PAST_AXIS : PAST_AXIS + 1]
            self.held.update(d for d in dims if isinstance(d, str) and d != UNKNOWN_DIM)
        return (before or behind)[0], behind[0]

    def apply(self) -> Value:
        new = self._select(self.value)
        self.followed[self.value] = new
        self._tell_shift()
        for node in self.behind:
            for old in self.view.arguments(node):
                if old in self.stream and old is not self.value:
                    continue
                followed = self.follow(old)
                if followed is not old:
                    self.view.rewire(node, old, followed)
        return new

    def _tell_shift(self) -> None:
        """What follows stands as it did: farther by what leaves, which no cache holds any more."""
        view, name = self.view, present_of(SHIFT)
        outputs = dict(zip(view.output_names(), view.outputs(), strict=True))
        if name not in outputs or self.slots is None or self.slots[0] is not self.slots[1]:
            return
        makers = {view.maker(outputs[name]), view.maker(self.kept)}
        b = Builder(view, view.after([node for node in view.nodes() if node in makers][-1]))
        left = b.sub(b.size(self.value, dim=1), b.size(self.kept, dim=1))
        view.set_outputs(outputs | {name: b.add(outputs[name], left)})

    def renew_types(self, new: Value) -> None:
        """Types behind the cut say the new dimension."""
        nodes = {*self.behind, *self.copies}
        shape = self.view.type(new).shape or ()
        changed = (node for node in list(self.view.nodes()) if node in nodes)
        self.view.renew_types(changed, self.dim, str(shape[1]))

    # --- one value ------------------------------------------------------------------------------

    def follow(self, value: Value) -> Value:
        """What stands for a value behind the cut; itself where it does not carry the dimension."""
        if value in self.stood_in:
            return self.stood_in[value]
        if value not in self.followed:
            self.followed[value] = self._follow(value, self.positions == "renumbered")
        return self.followed[value]

    def _anew(self, value: Value) -> Value:
        """As ``follow``, for what is made again: positions in it are counted anew, all of them, so
        that a mask's two axes agree."""
        if value in self.stood_in:
            return self.stood_in[value]
        if value not in self.renumbered:
            self.renumbered[value] = self._follow(value, True)
        return self.renumbered[value]

    def _follow(self, value: Value, renumber: bool) -> Value:
        view = self.view
        node = view.producer(value)
        if view.weight(value) is not None or not self._carries(value):
            return value
        shape = view.type(value).shape or ()
        exact = shape.count(self.dim)
        within = sum(self._mentions(d) for d in shape) - exact
        if node is None:
            return self._padding(value) if within else self._select(value) if exact else value
        if view.op(node) == "size" and view.type(view.tensor(node)).shape is not None:
            source = view.tensor(node)
            if (view.type(source).shape or ())[view.attrs(node)["dim"]] == self.dim:
                return Builder(view, self._after(node)).size(self.kept, dim=1)
        one = exact == 1 and not within
        # What an earlier cut selected is data too: its indices are not to be counted anew.
        is_data = view.op(node) == "token_select" or self._is_heavy(value)
        if one and (not renumber or is_data):
            return self._select(value)
        again = self._again(node, value)
        if again is value and exact + within:
            raise Refusal(f"{view.name(value)}: {view.type(value)} cannot follow the cut", node)
        return again

    def _padding(self, mask: Value) -> Value:
        """The padding mask ``[rows, past + tokens]`` for what is behind the cut."""
        view, b = self.view, Builder(self.view, self.anchor)
        if self.slots is None or view.type(mask).rank != 2:
            raise Refusal(f"the input {view.name(mask)}: {view.type(mask)} cannot follow")
        long, short = (b.size(past, dim=2) for past in self.slots)
        head = b.slice(mask, 0, short, dim=1)
        new = b.token_select(b.slice(mask, long, END, dim=1), self.kept)
        return b.concat(head, new, dim=1)

    def _again(self, node: Node, value: Value) -> Value:
        """A copy of the node that reads what followed."""
        view = self.view
        mapping = {v: self._anew(v) for v in view.arguments(node)}
        if all(old is new for old, new in mapping.items()):
            return value
        copies = view.clone(node, mapping, before=self._after(node))
        self.copies.append(view.maker(copies[0]))
        for old, new in zip(view.results(node), copies, strict=True):
            self.renumbered[old] = new
        return self.renumbered[value]

    def _select(self, value: Value) -> Value:
        """The kept rows of a value along its token axis."""
        view = self.view
        shape = view.type(value).shape or ()
        axes = [i for i, d in enumerate(shape) if d == self.dim]
        if len(axes) != 1:
            raise Refusal(f"{view.name(value)} has {len(axes)} token axes: one can be selected")
        node, (axis,) = view.producer(value), axes
        b = Builder(view, self.anchor if node is None else self._after(node))
        return select_tokens(b, value, self.kept, axis, by_row=self._has_rows(shape[0]))

    def _mentions(self, dim: int | str) -> bool:
        return isinstance(dim, str) and (mentions(dim, self.dim) or self._sums(dim))

    def _sums(self, dim: str) -> bool:
        """Whether the dimension, a difference behind an earlier cut, is among the terms of another
        sum: torch writes terms in an order of its own."""
        own = _terms(self.dim)
        return own.total() > 1 and own <= _terms(dim)

    # --- what a value is --------------------------------------------------------------------------

    def _carries(self, value: Value) -> bool:
        """Whether the dimension shows in a value's shape, or the value was computed from it."""
        stack, seen = [value], set()
        while stack:
            current = stack.pop()
            if current in seen or current is None or self.view.weight(current) is not None:
                continue
            seen.add(current)
            if any(map(self._mentions, self.view.type(current).shape or ())):
                return True
            if current in self.stood_in:
                return True
            node = self.view.producer(current)
            if node is None:
                continue
            if self._other_size(node):
                continue
            stack += self.view.arguments(node)
        return False

    def _other_size(self, node: Node) -> bool:
        """Whether a node takes the size of another dimension than the one that shrinks."""
        view = self.view
        if view.op(node) == "size":
            source, dim = view.tensor(node), view.attrs(node)["dim"]
            shape = view.type(source).shape
            return shape is not None and not self._moves(source, shape[dim : dim + 1], dim)
        if view.op(node) == NATIVE and view.native_op(node) == "Shape":
            source, part = view.arguments(node)[0], _shape_part(view, node)
            shape = view.type(source).shape
            if shape is None:
                return False
            taken = range(len(shape))[part]
            return not any(self._moves(source, shape[d : d + 1], d) for d in taken)
        return False

    def _is_size(self, node: Node) -> bool:
        """Whether only the shape of a node's operand is read: what is in it need not be made."""
        op = self.view.op(node)
        return traits(op).shape_only or (op == NATIVE and self.view.native_op(node) == "Shape")

    def _moves(self, source: Value, dims: tuple[int | str, ...], place: int) -> bool:
        """Whether a size is of the shrinking dimension, or of a cache that another stands for."""
        if any(map(self._mentions, dims)):
            return True
        if source in self.stood_in:
            return place == PAST_AXIS
        # Of a padding mask's columns, say, that stand for a cache.
        return self.view.producer(source) is not None and not self.held.isdisjoint(dims)

    def _is_heavy(self, value: Value) -> bool:
        """Whether making a value again would mean to run part of the model again."""
        stack, seen = [self.view.producer(value)], set()
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if traits(self.view.op(node)).heavy:
                return True
            # What an earlier cut selected is selected once more, not made again.
            if not self._is_size(node) and self.view.op(node) != "token_select":
                stack += [self.view.producer(v) for v in self.view.arguments(node)]
        return False

    def _has_rows(self, dim: int | str) -> bool:
        shape = self.view.type(self.value).shape or ()
        return dim == shape[0] and dim != 1

    def _after(self, node: Node) -> Node:
        """Where a node that reads ``node``'s followers can stand: after it and after ``kept``."""
        place = self.order.get(node)
        if place is None or place <= self.place:
            return self.anchor
        return self.view.after(node)


def _terms(dim: str) -> Counter[str]:
    """``a - (b - c) + d`` => ``+a``, ``-(b - c)``, ``+d``."""
    pieces, term, depth = [], "", 0
    for char in dim.replace(" ", ""):
        depth += (char == "(") - (char == ")")
        if char in "+-" and not depth:
            pieces.append(term)
            term = ""
        term += char
    terms = [t for t in (*pieces, term) if t]
    return Counter(t if t[0] in "+-" else f"+{t}" for t in terms)


def _shape_part(view: View, node: Node) -> slice:
    """Which dimensions ONNX's ``Shape`` takes the sizes of."""
    attrs = view.attrs(node)
    return slice(attrs.get("start"), attrs.get("end"))
