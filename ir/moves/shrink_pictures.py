"""The move *shrink* inside a vision tower: fewer rows stand for a picture's tokens from there on.

A tower's tokens are a number in its shapes, not a symbol as a prompt's are: so their axis is
followed, op by op, through attention and all that is computed for each token alone. What needs
every token in its place (a reader of patches, a projector, a pool) is given them back: each of them
the row that stands for it.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..core.errors import Refusal
from ..core.types import Dim
from ..core.view import Node, Operand, Value, View, is_value
from ..vocab import traits
from ..vocab.builder import Builder
from .upstream import upstream

_ELEMENTWISE = frozenset({
    "add", "sub", "mul", "div", "pow", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge",
    "logical_and", "logical_or", "logical_not", "neg", "abs", "sqrt", "rsqrt", "reciprocal", "exp",
    "log", "erf", "sin", "cos", "floor", "isnan", "identity", "clamp", "cast", "where", "relu",
    "tanh", "sigmoid", "silu", "gelu",
})  # fmt: skip
_BY_TOKEN = frozenset({"layer_norm", "rms_norm"})
"""Norms over the last dimension; with linears what is computed for each token alone."""


def shrink_pictures(
    view: View, value: Value, new: Value, home: Value, *, first: bool, rule: str, step: int = 0
) -> None:
    """Let ``new`` go on in the place of ``value``.

    ``value`` is the residual stream of a vision tower, ``[pictures, tokens, width]`` with a fixed
    number of tokens, and ``new`` ``[pictures, fewer, width]``; ``home``, ``[pictures, tokens]`` in
    i64, says which row of ``new`` stands for each token: its own, or that which it was merged into.
    Both are computed from nothing behind ``value``. With ``first`` the first token (a CLS token)
    stays the first row.

    A later cut behind this one composes with it: tokens are given back once. Masks that hide
    nothing leave the attention behind the cut.

    Raises ``Refusal`` where the tokens are no fixed number, where attention hides some of them, and
    where the stream meets what was computed for each of the old tokens (a tower with windows).
    """
    with view.made_by(rule, step), view.one_edit():
        _Cut(view, value, new, home, first).apply()


class _Cut:
    def __init__(self, view: View, value: Value, new: Value, home: Value, first: bool) -> None:
        shapes = [view.type(v).shape or () for v in (value, new)]
        if any(len(s) != 3 or not isinstance(s[1], int) for s in shapes):
            raise Refusal(
                f"the tower's stream is {view.type(value)}: [pictures, tokens, width] with a fixed "
                "number of tokens is needed"
            )
        self.view, self.home, self.first = view, home, first
        self.tokens, self.left = int(shapes[0][1]), int(shapes[1][1])
        self.new: dict[Value, Value] = {value: new}
        """What goes on in the place of each value behind the cut that has a token axis."""
        self.axis: dict[Value, int] = {value: 1}
        self.whole: dict[Value, Value] = {}
        """The same with all tokens in their places."""
        self.before = upstream(view, new, home)
        self.replaced: list[Node] = []

    def apply(self) -> None:
        """Follow the token axis through the nodes behind the cut, in their order."""
        for node in list(self.view.nodes()):
            if node in self.before or not any(v in self.axis for v in self.view.arguments(node)):
                continue
            axis = self._axis_behind(node)
            if axis is None:
                self._give_back(node)
            else:
                self._go_on(node, axis)
        self._return_whole()
        for node in self.replaced:
            self.view.erase_dead(node)

    # --- which axis of a result holds the tokens ------------------------------------------------

    def _axis_behind(self, node: Node) -> int | None:
        """The token axis of a node's result where it can do with fewer tokens; ``None``: it needs
        all of them."""
        view = self.view
        read = view.read(node)
        if read is None:
            return None
        op, operands, attrs = read
        if op == "sdpa":
            return self._attention(node, operands)
        if op in _ELEMENTWISE:
            return self._elementwise(node, operands)
        first = operands[0] if operands else None
        if not is_value(first) or first not in self.axis:
            return None
        axis, rank = self.axis[first], view.type(first).rank or 0
        if traits(op).is_linear or (op in _BY_TOKEN and attrs.get("dims", 1) == 1):
            return axis if axis < rank - 1 else None
        if op == "transpose":
            perm: Sequence[int] = attrs["perm"]
            return perm.index(axis)
        if op == "reshape":
            return self._reshaped(first, view.results(node)[0])
        if op in ("softmax", "split", "slice"):
            return axis if attrs["dim"] != axis else None
        if op == "squeeze":
            return axis - sum(int(dim < axis) for dim in attrs["dims"])
        return None

    def _attention(self, node: Node, operands: Sequence[Operand]) -> int | None:
        rank = self.view.type(self.view.results(node)[0]).rank or 0
        axes = [self.axis.get(o) if is_value(o) else None for o in operands[:3]]
        if axes != [rank - 2] * 3:
            return None
        masks = [o for o in operands[3:] if is_value(o)]
        if self.view.attrs(node)["causal"] or not all(hides_nothing(self.view, m) for m in masks):
            raise Refusal("attention behind the cut hides tokens from each other", node)
        return rank - 2

    def _elementwise(self, node: Node, operands: Sequence[Operand]) -> int | None:
        view = self.view
        rank = view.type(view.results(node)[0]).rank or 0
        behind = {rank - (view.type(o).rank or 0) + self.axis[o] for o in operands
                  if is_value(o) and o in self.axis}  # fmt: skip
        if len(behind) != 1:
            return None
        (axis,) = behind
        for operand in operands:
            if not is_value(operand) or operand in self.axis:
                continue
            shape = view.type(operand).shape
            place = axis - rank + len(shape or ())
            if shape is None or (place >= 0 and shape[place] != 1):
                raise Refusal(
                    f"{view.name(node)} adds to the stream what is computed for each of the "
                    f"{self.tokens} tokens: a tower with windows, or with positions inside its "
                    "blocks, cannot go on with fewer",
                    node,
                )
        return axis

    def _reshaped(self, source: Value, result: Value) -> int | None:
        """The axis of ``result`` that is exactly the token axis of ``source``."""
        old, new = (self.view.type(v).shape for v in (source, result))
        if old is None or new is None:
            return None
        before, after = old[: self.axis[source]], old[self.axis[source] + 1 :]
        for axis, size in enumerate(new):
            halves = ((before, new[:axis]), (after, new[axis + 1 :]))
            if size == self.tokens and all(_same_elements(a, b) for a, b in halves):
                return axis
        return None

    # --- edits ------------------------------------------------------------------------------------

    def _go_on(self, node: Node, axis: int) -> None:
        view = self.view
        masked = view.op(node) == "sdpa" and len(view.operands(node)) > 3
        if masked or view.op(node) == "reshape":
            (old,) = view.results(node)
            anew = self._unmasked(node) if masked else self._reshape_anew(node, old, axis)
            self.new[old], self.axis[old] = anew, axis
            self.replaced.append(node)
            return
        for old in view.arguments(node):
            if old in self.axis:
                view.rewire(node, old, self.new[old])
        view.refresh_type(node)
        for result in view.results(node):
            self.new[result], self.axis[result] = result, axis

    def _reshape_anew(self, node: Node, result: Value, axis: int) -> Value:
        """Sizes are constants: that of the token axis is another one now."""
        view = self.view
        source, sizes = view.tensor(node), list(view.operands(node)[1:])
        old, shape = (view.type(v).shape or () for v in (source, result))
        for i, dim in enumerate(shape):
            if i == axis:
                sizes[i] = self.left
            elif isinstance(dim, str) and old[i : i + 1] == (dim,):
                sizes[i] = 0  # keeps it, and what it is called
        return Builder(view, view.after(node)).reshape(self.new[source], *sizes)

    def _unmasked(self, node: Node) -> Value:
        """Attention without a mask that hides nothing: it has the old number of tokens."""
        view, attrs = self.view, self.view.attrs(node)
        q, k, v = (self.new[view.tensor(node, i)] for i in range(3))
        b = Builder(view, view.after(node))
        return b.sdpa(q, k, v, scale=attrs["scale"], gqa=attrs["gqa"], softcap=attrs["softcap"])

    def _give_back(self, node: Node) -> None:
        view = self.view
        for old in [v for v in view.arguments(node) if v in self.axis]:
            if self._is_first(node, old):
                view.rewire(node, old, self.new[old])
            elif self._is_selection(node, old):
                b = Builder(view, node)
                index = b.token_select(self.home, view.tensor(node, 1))
                view.replace(view.results(node)[0], b.token_select(self.new[old], index))
                self.replaced.append(node)
            else:
                view.rewire(node, old, self._whole(old, node))

    def _is_first(self, node: Node, old: Value) -> bool:
        """Whether a node takes the CLS token alone."""
        view = self.view
        if not self.first or view.op(node) != "slice":
            return False
        _, start, end = view.operands(node)
        return view.attrs(node)["dim"] == self.axis[old] and (start, end) == (0, 1)

    def _is_selection(self, node: Node, old: Value) -> bool:
        """Whether a node gives back, or selects, tokens of an earlier cut."""
        view = self.view
        return view.op(node) == "token_select" and view.tensor(node) is old and self.axis[old] == 1

    def _whole(self, old: Value, before: Node) -> Value:
        """All tokens in their places; ``before`` is the first node that needs them."""
        view = self.view
        if self.axis[old] != 1:
            raise Refusal(f"{view.name(old)}: {view.type(old)} cannot be given all tokens back")
        if old not in self.whole:
            self.whole[old] = Builder(view, before).token_select(self.new[old], self.home)
        return self.whole[old]

    def _return_whole(self) -> None:
        view = self.view
        if not any(value in self.axis for value in view.outputs()):
            return
        end = view.after(list(view.nodes())[-1])
        named = zip(view.output_names(), view.outputs(), strict=True)
        view.set_outputs({n: self._whole(v, end) if v in self.axis else v for n, v in named})


def hides_nothing(view: View, mask: Value) -> bool:
    """Whether a mask is a constant, spread over rows, that lets every token see every other."""
    node = view.producer(mask)
    while node is not None and view.op(node) in ("expand", "unsqueeze", "reshape", "cast"):
        mask = view.tensor(node)
        node = view.producer(mask)
    weight = view.weight(mask)
    if weight is None:
        return False
    numbers = weight.read()
    return bool(numbers.all() if weight.dtype.itemsize == 1 else (numbers == 0).all())


def _same_elements(a: Sequence[Dim], b: Sequence[Dim]) -> bool:
    """Whether dimensions hold as many elements: the same names, and the same product of numbers."""

    def parts(dims: Sequence[Dim]) -> tuple[list[str], int]:
        product = 1
        for dim in dims:
            product *= dim if isinstance(dim, int) else 1
        return sorted(d for d in dims if isinstance(d, str)), product

    return parts(a) == parts(b)
