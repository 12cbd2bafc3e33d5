"""Patterns over the vocabulary, and how one is matched at a node.

A pattern is a tree of ops over variables. The same pattern object used twice must match the same
node; a variable used twice must bind the same operand. Operands of commutative ops are tried in
both orders. A number in a pattern matches a Python number or a constant of one element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import Refusal
from .types import Type
from .view import NATIVE, Node, Operand, Value, View
from .vocab import is_known, spec
from .weights import Weight


@dataclass(frozen=True, slots=True, eq=False)
class Var:
    """Binds any operand under a name."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Op:
    """Matches a node of one op. ``rest`` lets further operands be whatever they are."""

    op: str
    operands: tuple[Any, ...]
    attrs: Mapping[str, Any]
    native: bool = False
    rest: bool = False
    commutative: bool = False
    depth: int = field(default=0)


@dataclass(frozen=True, slots=True, eq=False)
class OneOf:
    """Matches the first of several patterns that fits."""

    choices: tuple[Any, ...]


class PatternBuilder:
    """``p.mul(x, p.rsqrt(y))`` makes the pattern; see ``rule.Rule.pattern``."""

    def __getattr__(self, op: str) -> Callable[..., Op]:
        if op.startswith("__"):
            raise AttributeError(op)
        if not is_known(op):
            raise AttributeError(f"the vocabulary has no op {op!r}")

        def make(*operands: Any, rest: bool = False, **attrs: Any) -> Op:
            commutative = spec(op).commutative and len(operands) == 2
            return _op(op, operands, attrs, rest=rest, commutative=commutative)

        return make

    def native(self, op: str, *operands: Any, rest: bool = False, **attrs: Any) -> Op:
        """A node that the vocabulary does not cover, by its native name (``Gemm``)."""
        return _op(op, operands, attrs, native=True, rest=rest)

    def one_of(self, *choices: Any) -> OneOf:
        return OneOf(choices)


def _op(op: str, operands: tuple[Any, ...], attrs: Mapping[str, Any], **flags: bool) -> Op:
    depth = 1 + max((pattern_depth(o) for o in operands), default=0)
    return Op(op, operands, dict(attrs), depth=depth, **flags)


def pattern_depth(pattern: Any) -> int:
    if isinstance(pattern, Op):
        return pattern.depth
    if isinstance(pattern, OneOf):
        return max(pattern_depth(c) for c in pattern.choices)
    return 0


class Match:
    """What a pattern bound at a root node, with the questions that ``where`` asks of it."""

    __slots__ = ("_nodes", "_trail", "bindings", "root", "view")

    def __init__(self, view: View, root: Node) -> None:
        self.view = view
        self.root = root
        self.bindings: dict[str, Operand] = {}
        self._nodes: dict[Op, Node] = {}
        self._trail: list[tuple[dict[Any, Any], Any]] = []

    @property
    def nodes(self) -> list[Node]:
        """The matched nodes, root first."""
        return list(dict.fromkeys(self._nodes.values()))

    def __getitem__(self, name: str) -> Operand:
        return self.bindings[name]

    def refuse(self, reason: str) -> None:
        """Refuse the match. Raises ``Refusal``."""
        raise Refusal(reason, self.root)

    def scalar(self, name: str) -> float:
        """The number that a variable is bound to; refuses where it is none."""
        number = self.view.number(self.bindings[name])
        if number is None:
            raise Refusal(f"{name} is not a constant number", self.root)
        return float(number)

    def weight(self, name: str) -> Weight:
        """The weight that a variable is bound to; refuses where it is computed."""
        weight = self.view.weight(self.bindings[name])
        if weight is None:
            raise Refusal(f"{name} is not a constant", self.root)
        return weight

    def value(self, name: str) -> Value:
        """The tensor value a variable is bound to; refuses on a Python number."""
        operand = self.bindings[name]
        if operand is None or isinstance(operand, int | float):
            raise Refusal(f"{name} is a number, a tensor is needed", self.root)
        return operand

    def type(self, name: str) -> Type:
        return self.view.type(self.value(name))

    def last_dim(self, name: str) -> int:
        """The size of a value's last dimension; refuses where it is not a number."""
        shape = self.type(name).shape
        if not shape or not isinstance(shape[-1], int):
            raise Refusal(f"the last dimension of {name} is not known", self.root)
        return shape[-1]

    def same_last_dim(self, a: str, b: str) -> None:
        if self.last_dim(a) != self.last_dim(b):
            raise Refusal(
                f"{a} and {b} end in dimensions {self.last_dim(a)} and {self.last_dim(b)}", self.root
            )

    # --- matching ----------------------------------------------------------------------------

    def mark(self) -> int:
        return len(self._trail)

    def undo(self, mark: int) -> None:
        while len(self._trail) > mark:
            table, key = self._trail.pop()
            del table[key]

    def bind(self, table: dict[Any, Any], key: Any, value: Any) -> None:
        table[key] = value
        self._trail.append((table, key))


class Matcher:
    """Matches one pattern and remembers why it failed at the deepest point it reached."""

    def __init__(self, pattern: Op) -> None:
        self.pattern = pattern
        self.deepest: tuple[int, str, Any, Any] | None = None

    def match(self, view: View, root: Node) -> Match | None:
        """The match with ``root`` as the pattern's root, or ``None``; see ``refusal``."""
        self.deepest = None
        found = Match(view, root)
        if not self._node(found, self.pattern, root, 0):
            return None
        leak = _leak(found)
        if leak is not None:
            self.deepest = (1 << 30, leak, None, root)
            return None
        return found

    def refusal(self, view: View) -> Refusal:
        """Why the last ``match`` failed."""
        if self.deepest is None:
            return Refusal("the pattern does not fit")
        depth, expected, got, node = self.deepest
        if got is None:
            return Refusal(expected, node, depth)
        return Refusal(f"expected {expected}, got {_describe(view, got)} at depth {depth}", node, depth)

    def _fail(self, depth: int, expected: str, got: Any, node: Any) -> bool:
        if self.deepest is None or depth > self.deepest[0]:
            self.deepest = (depth, expected, got, node)
        return False

    def _operand(self, m: Match, pattern: Any, operand: Operand, depth: int, user: Node) -> bool:
        if isinstance(pattern, Var):
            return self._variable(m, pattern, operand, depth, user)
        if isinstance(pattern, Op):
            return self._produced(m, pattern, operand, depth, user)
        if isinstance(pattern, OneOf):
            return self._choice(m, pattern, operand, depth, user)
        if pattern is None:
            return operand is None or self._fail(depth, "no operand", operand, user)
        return self._literal(m, pattern, operand, depth, user)

    def _variable(self, m: Match, pattern: Var, operand: Operand, depth: int, user: Node) -> bool:
        bound = m.bindings.get(pattern.name, m)
        if bound is m:
            m.bind(m.bindings, pattern.name, operand)
            return True
        if bound is operand or (isinstance(bound, int | float) and bound == operand):
            return True
        return self._fail(depth, f"the same {pattern.name} as before", operand, user)

    def _literal(self, m: Match, number: Any, operand: Operand, depth: int, user: Node) -> bool:
        found = m.view.number(operand)
        if found is not None and math.isclose(found, number, rel_tol=1e-6, abs_tol=0.0):
            return True
        return self._fail(depth, f"the number {number:g}", operand, user)

    def _choice(self, m: Match, pattern: OneOf, operand: Operand, depth: int, user: Node) -> bool:
        for choice in pattern.choices:
            mark = m.mark()
            if self._operand(m, choice, operand, depth, user):
                return True
            m.undo(mark)
        return False

    def _produced(self, m: Match, pattern: Op, operand: Operand, depth: int, user: Node) -> bool:
        if operand is None or isinstance(operand, int | float):
            return self._fail(depth, f"`{pattern.op}`", operand, user)
        node = m.view.producer(operand)
        if node is None:
            return self._fail(depth, f"`{pattern.op}`", operand, user)
        if m.view.results(node)[0] is not operand:
            return self._fail(depth, f"the first result of `{pattern.op}`", operand, user)
        return self._node(m, pattern, node, depth)

    def _node(self, m: Match, pattern: Op, node: Node, depth: int) -> bool:
        view = m.view
        bound = m._nodes.get(pattern)
        if bound is not None:
            return bound is node or self._fail(depth, "the same node as before", node, node)
        op = view.op(node)
        if pattern.native:
            if op != NATIVE or view.native_op(node) != pattern.op:
                return self._fail(depth, f"`{pattern.op}`", node, node)
        elif op != pattern.op:
            return self._fail(depth, f"`{pattern.op}`", node, node)
        operands = view.operands(node)
        if len(operands) < len(pattern.operands) or (
            len(operands) > len(pattern.operands) and not pattern.rest
        ):
            expected = f"`{pattern.op}` of {len(pattern.operands)} operands"
            return self._fail(depth, expected, node, node)
        if pattern.attrs and not self._attrs(view, pattern, node, operands, depth):
            return False
        m.bind(m._nodes, pattern, node)
        mark = m.mark()
        if self._all(m, pattern.operands, operands, depth, node):
            return True
        if not pattern.commutative:
            return False
        m.undo(mark)
        return self._all(m, pattern.operands, operands[1::-1], depth, node)

    def _all(self, m: Match, patterns: Any, operands: Any, depth: int, node: Node) -> bool:
        for pattern, operand in zip(patterns, operands, strict=False):
            if not self._operand(m, pattern, operand, depth + 1, node):
                return False
        return True

    def _attrs(self, view: View, pattern: Op, node: Node, operands: Any, depth: int) -> bool:
        found = view.attrs(node)
        for name, wanted in pattern.attrs.items():
            value = found.get(name)
            if callable(wanted):
                fits = bool(wanted(value))
            else:
                fits = value == _from_the_left(view, wanted, operands)
            if not fits:
                shown = getattr(wanted, "__name__", wanted)
                return self._fail(depth, f"`{pattern.op}` with {name}={shown}, not {value}", None, node)
        return True


def _from_the_left(view: View, wanted: Any, operands: Any) -> Any:
    """Negative dimensions in a pattern count from the end of the first operand."""
    negative = (isinstance(wanted, int) and wanted < 0) or (
        isinstance(wanted, tuple) and any(isinstance(d, int) and d < 0 for d in wanted)
    )
    if not negative or not operands or isinstance(operands[0], int | float | None):
        return wanted
    rank = view.type(operands[0]).rank
    if rank is None:
        return wanted
    if isinstance(wanted, int):
        return wanted + rank
    return tuple(d % rank for d in wanted)


def _leak(m: Match) -> str | None:
    """Why an intermediate value cannot go: something outside the match uses it."""
    nodes = set(m._nodes.values())
    view = m.view
    for node in nodes:
        if node is m.root:
            continue
        for value in view.results(node):
            if view.is_output(value):
                return f"the intermediate {view.name(value)} is an output of the graph"
            for user in view.users(value):
                if user not in nodes:
                    return f"the intermediate {view.name(value)} is also used by {view.name(user)}"
    return None


def _describe(view: View, got: Any) -> str:
    if got is None:
        return "nothing"
    if isinstance(got, int | float):
        return f"the number {got:g}"
    weight = view.weight(got) if not _is_node(view, got) else None
    if weight is not None:
        return f"the constant {view.name(got)}"
    node = got if _is_node(view, got) else view.producer(got)
    if node is None:
        return f"the input {view.name(got)}"
    op = view.op(node)
    return f"`{view.native_op(node) if op == NATIVE else op}`"


def _is_node(view: View, item: Any) -> bool:
    if view.kind == "onnx":
        return hasattr(item, "op_type")
    return bool(getattr(item, "op", None) == "call_function")
