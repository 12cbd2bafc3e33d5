"""The logits of attention, taken apart: a product, its scale and cap, and what masks them.

c · tanh(q kᵀ · scale / c), added to, replaced by numbers and reshaped, in any order. The scale may
stand on q, on kᵀ, on both (its root each), on the product, or behind the masks (CodeGen).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..core.errors import Refusal
from ..core.view import Node, Value, View, is_value

NEVER = -1e30
"""What masked logits become must be below this to be as good as minus infinity."""
_REACH = 8
"""Nodes between a mask that is added and the product that it is added to, at most."""


@dataclass(frozen=True, slots=True)
class Step:
    """What is done to logits, one thing: added to, kept or filled by a condition, bounded below."""

    kind: str
    """``add``: ``value · number`` is added; ``keep`` and ``fill``: where ``value`` is false or true
    a logit becomes ``number``; ``least``: none is below ``number``."""
    value: Value | None
    number: float
    at: Value
    """The logits that it is done to."""


@dataclass(frozen=True, slots=True)
class Logits:
    q: Value
    kt: Value
    scale: float
    softcap: float | None
    steps: tuple[Step, ...]
    """From the product outwards."""
    forms: tuple[Value, ...]
    """What reshapes on the way give, from the product outwards."""


@dataclass
class _Reader:
    """The walk from a softmax down to the product; what was met comes outermost first."""

    view: View
    root: Node
    factor: float = 1.0
    cap: float | None = None
    steps: list[Step] = field(default_factory=list)
    forms: list[Value] = field(default_factory=list)

    def next(self, node: Node) -> Value:
        """The logits before one node. ``Refusal`` where it is not one that may stand there."""
        op = self.view.op(node)
        if op in ("mul", "div"):
            inner, factor = unscaled(self.view, self.view.results(node)[0])
            self.factor *= factor
            if inner is not self.view.results(node)[0]:
                return inner
        if op == "reshape":
            self.forms.append(self.view.results(node)[0])
            return self.view.tensor(node)
        if op == "tanh" and self.cap is None:
            if self.factor <= 0:
                raise Refusal(f"tanh times {self.factor:g} is not a cap of the logits", self.root)
            self.cap, self.factor = self.factor, 1.0
            return self.view.tensor(node)
        steps = {"add": self._add, "where": self._where, "maximum": self._bound}
        if op not in steps:
            raise Refusal(f"the softmax is of `{op}`, not of a product of matrices", self.root)
        step = steps[op](node)
        if self.cap is not None:
            raise Refusal("a mask within the cap of the logits is not read", self.root)
        self.steps.append(step)
        return step.at

    def _add(self, node: Node) -> Step:
        scores, mask = _scores_and_mask(self.view, node)
        if not 0 < self.factor <= 1:
            raise Refusal(f"masked logits are multiplied by {self.factor:g}", self.root)
        return Step("add", mask, self.factor, scores)

    def _where(self, node: Node) -> Step:
        condition, kept, other = self.view.operands(node)
        for kind, scores, fill in (("keep", kept, other), ("fill", other, kept)):
            number = self.view.number(fill)
            if is_value(condition) and is_value(scores) and number is not None:
                return Step(kind, condition, self._lowest(float(number)), scores)
        raise Refusal("where: masked logits are not replaced by a number", self.root)

    def _bound(self, node: Node) -> Step:
        a, b = self.view.operands(node)
        for scores, bound in ((a, b), (b, a)):
            number = self.view.number(bound)
            if is_value(scores) and number is not None:
                return Step("least", None, self._lowest(float(number)), scores)
        raise Refusal("the logits are bounded by another value", self.root)

    def _lowest(self, number: float) -> float:
        if number * self.factor > NEVER:
            message = f"masked logits become {number * self.factor:g}, which sdpa cannot express"
            raise Refusal(message, self.root)
        return number * self.factor


def read_logits(view: View, value: Value, root: Node) -> Logits:
    """Take logits apart. ``Refusal`` where they are none."""
    reader = _Reader(view, root)
    node = _only_for_this(view, value, root)
    while view.op(node) != "matmul":
        node = _only_for_this(view, reader.next(node), root)
    q, on_q = unscaled(view, view.tensor(node, 0))
    kt, on_k = unscaled(view, view.tensor(node, 1))
    scale = reader.factor * (reader.cap or 1.0) * on_q * on_k
    return Logits(q, kt, scale, reader.cap, tuple(reader.steps[::-1]), tuple(reader.forms[::-1]))


def _only_for_this(view: View, value: Value, root: Node) -> Node:
    node = view.producer(value)
    if node is None:
        raise Refusal("the softmax is of an input or a constant, not of a product", root)
    if len(view.users(value)) > 1 or view.is_output(value):
        raise Refusal(f"the logits {view.name(value)} are also used elsewhere", root)
    return node


def _scores_and_mask(view: View, node: Node) -> tuple[Value, Value]:
    a, b = view.operands(node)
    for scores, mask in ((a, b), (b, a)):
        if not is_value(scores) or not is_value(mask) or view.number(mask) is not None:
            continue
        if _holds_product(view, scores):
            return scores, mask
    raise Refusal("neither operand of the added mask is a product of matrices", node)


def _holds_product(view: View, scores: Value) -> bool:
    """Whether a product of matrices is among what a value is made of by sums, masks and numbers."""
    queue = [scores]
    for value in queue:
        node = view.producer(value)
        op = None if node is None or len(queue) > _REACH else view.op(node)
        if node is None or op is None:
            continue
        if op in ("matmul", "tanh"):
            return True
        if op == "reshape":
            queue.append(view.tensor(node))
        elif op in ("add", "mul", "div", "where", "maximum"):
            queue += [o for o in view.operands(node)[-2:] if is_value(o)]
    return False


def unscaled(view: View, value: Value) -> tuple[Value, float]:
    """A value without the number that it is multiplied or divided by, and that number."""
    node = view.producer(value)
    op = None if node is None else view.op(node)
    if node is None or op not in ("mul", "div"):
        return value, 1.0
    a, b = view.operands(node)
    number = view.number(b)
    if is_value(a) and number is not None and number != 0:
        return a, float(number) if op == "mul" else 1 / float(number)
    number = view.number(a) if op == "mul" else None
    return (b, float(number)) if is_value(b) and number is not None else (value, 1.0)


def usual_scale(view: View, logits: Logits) -> float:
    """The usual 1/√(head dim) to its last digit, where the graph's roots of it lost some."""
    width = (view.type(logits.q).shape or (1,))[-1]
    usual = 1 / math.sqrt(width) if isinstance(width, int) else logits.scale
    return usual if math.isclose(usual, logits.scale, rel_tol=1e-6) else logits.scale
