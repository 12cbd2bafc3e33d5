"""Patterns over the vocabulary, and how one is matched at a node.

A pattern is a tree of ops over variables. The same pattern object used twice must match the same
node; a variable used twice must bind the same operand. Operands of commutative ops are tried in
both orders. A number in a pattern matches a Python number or a constant of one element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from ..core.errors import Refusal
from ..core.types import Type
from ..core.view import NATIVE, Node, Operand, Value, View
from ..core.weights import Weight
from ..vocab import check_known, spec


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
        check_known(op)

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


def inner_ops(pattern: Op) -> frozenset[str]:
    """The ops below the root of a pattern."""
    ops: set[str] = set()
    stack = list(pattern.operands)
    while stack:
        part = stack.pop()
        if isinstance(part, Op):
            ops.add(part.op)
            stack.extend(part.operands)
        elif isinstance(part, OneOf):
            stack.extend(part.choices)
    return frozenset(ops)


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

    # --- matching ----------------------------------------------------------------------------

    def undo(self, mark: int) -> None:
        while len(self._trail) > mark:
            table, key = self._trail.pop()
            del table[key]

    def bind(self, table: dict[Any, Any], key: Any, value: Any) -> None:
        table[key] = value
        self._trail.append((table, key))


_LEAK_DEPTH = 1 << 30
"""Deeper than any pattern: the whole of it fits, and yet the match is refused."""

_Todo: TypeAlias = "tuple[Any, Operand, int, Node, _Todo] | None"
"""What is still to be matched: pattern, operand, depth, the node that uses it, and the rest."""


class Matcher:
    """Matches one pattern and remembers why it failed at the deepest point it reached."""

    def __init__(self, pattern: Op) -> None:
        self.pattern = pattern
        self.reached = 0
        """How deep the last match that failed had come."""
        self.leak: Node | None = None
        """The node whose use of an intermediate was the only fault of the last match."""
        self._why: Callable[[View], Refusal] | None = None

    def match(self, view: View, root: Node) -> Match | None:
        """The match with ``root`` as the pattern's root, or ``None``; see ``refusal``."""
        self.reached, self._why, self.leak = -1, None, None
        match = Match(view, root)
        todo = self._enter(match, self.pattern, root, 0, None)
        if todo is False or not self._run(match, todo):
            return None
        return None if self._leaks(match) else match

    def refusal(self, view: View) -> Refusal:
        """Why the last ``match`` failed."""
        return Refusal("the pattern does not fit") if self._why is None else self._why(view)

    def _fail(self, depth: int, expected: str, actual: Any, node: Node) -> Literal[False]:
        if depth > self.reached:
            self.reached = depth
            self._why = lambda view: Refusal(
                f"expected {expected}, got {_describe(view, actual)} at depth {depth}", node, depth
            )
        return False

    def _run(self, m: Match, todo: _Todo) -> bool:
        """Match all that is to do. Only a choice recurs: it tries the rest with each way."""
        while todo is not None:
            pattern, operand, depth, user, todo = todo
            kind = type(pattern)
            if kind is Var:
                if not self._variable(m, pattern, operand, depth, user):
                    return False
            elif kind is Op:
                step = self._produced(m, pattern, operand, depth, user, todo)
                if step is False:
                    return False
                todo = step
            elif kind is OneOf:
                ways = [(choice, operand, depth, user, todo) for choice in pattern.choices]
                return self._any(m, ways)
            elif pattern is None:
                if operand is not None:
                    return self._fail(depth, "no operand", operand, user)
            elif not self._literal(m, pattern, operand, depth, user):
                return False
        return True

    def _any(self, m: Match, ways: Sequence[_Todo]) -> bool:
        for way in ways:
            mark = len(m._trail)
            if self._run(m, way):
                return True
            m.undo(mark)
        return False

    def _variable(self, m: Match, pattern: Var, operand: Operand, depth: int, user: Node) -> bool:
        bound = m.bindings.get(pattern.name, m)
        if bound is m:
            m.bind(m.bindings, pattern.name, operand)
            return True
        if bound is operand or (isinstance(bound, (int, float)) and bound == operand):
            return True
        return self._fail(depth, f"the same {pattern.name} as before", operand, user)

    def _literal(self, m: Match, number: Any, operand: Operand, depth: int, user: Node) -> bool:
        constant = m.view.number(operand)
        if constant is not None and math.isclose(constant, number, rel_tol=1e-6, abs_tol=0.0):
            return True
        return self._fail(depth, f"the number {number:g}", operand, user)

    def _produced(
        self, m: Match, pattern: Op, operand: Operand, depth: int, user: Node, rest: _Todo
    ) -> _Todo | Literal[False]:
        if operand is None or isinstance(operand, (int, float)):
            return self._fail(depth, f"`{pattern.op}`", operand, user)
        node = m.view.producer(operand)
        if node is None:
            return self._fail(depth, f"`{pattern.op}`", operand, user)
        same: object = node  # an FX node of one result is that result
        if same is not operand and m.view.results(node)[0] is not operand:
            return self._fail(depth, f"the first result of `{pattern.op}`", operand, user)
        return self._enter(m, pattern, node, depth, rest)

    def _enter(
        self, m: Match, pattern: Op, node: Node, depth: int, rest: _Todo
    ) -> _Todo | Literal[False]:
        """Match one node; what is then to do, ``False`` where it does not fit."""
        bound = m._nodes.get(pattern)
        if bound is not None:
            return rest if bound is node else self._fail(depth, "the same node", node, node)
        operands = self._operands(m.view, pattern, node, depth)
        if operands is None:
            return False
        m.bind(m._nodes, pattern, node)
        parts, below = pattern.operands, depth + 1
        if pattern.commutative:
            (p, q), (a, b) = parts, operands
            mark = len(m._trail)
            if self._run(m, (p, a, below, node, (q, b, below, node, rest))):
                return None
            m.undo(mark)
            return (p, b, below, node, (q, a, below, node, rest))
        for part, operand in zip(reversed(parts), reversed(operands[: len(parts)]), strict=True):
            rest = (part, operand, below, node, rest)
        return rest

    def _operands(
        self, view: View, pattern: Op, node: Node, depth: int
    ) -> tuple[Operand, ...] | None:
        """The node's operands, if its op, their number and its attributes fit."""
        if pattern.native:
            if view.op(node) != NATIVE or view.native_op(node) != pattern.op:
                self._fail(depth, f"`{pattern.op}`", node, node)
                return None
            operands, attrs = view.operands(node), view.attrs(node) if pattern.attrs else {}
        else:
            reading = view.read(node)
            if reading is None or reading[0] != pattern.op:
                self._fail(depth, f"`{pattern.op}`", node, node)
                return None
            operands, attrs = reading[1], reading[2]
        count = len(pattern.operands)
        if len(operands) != count and not (pattern.rest and len(operands) > count):
            self._fail(depth, f"`{pattern.op}` of {count} operands", node, node)
            return None
        if pattern.attrs and not self._attrs(view, pattern, node, operands, attrs, depth):
            return None
        return operands

    def _attrs(
        self, view: View, pattern: Op, node: Node, operands: Any, attrs: Any, depth: int
    ) -> bool:
        for name, setting in pattern.attrs.items():
            value = attrs.get(name)
            if callable(setting):
                fits = bool(setting(value))
            else:
                fits = value == _from_the_left(view, setting, operands)
            if not fits:
                shown = getattr(setting, "__name__", setting)
                return self._fail(depth, f"`{pattern.op}` with {name}={shown}", _Text(value), node)
        return True

    def _leaks(self, m: Match) -> bool:
        """Whether something outside the match uses an intermediate, which therefore cannot go."""
        view, root, nodes = m.view, m.root, m._nodes.values()
        for node in nodes:
            if node is root:
                continue
            for value in view.results(node):
                for user in view.users(value):
                    if user not in nodes:
                        self.leak = user
                        return self._refuse_leak(root, value, user)
                if view.is_output(value):
                    return self._refuse_leak(root, value, None)
        return False

    def _refuse_leak(self, root: Node, value: Value, user: Node | None) -> Literal[True]:
        def why(view: View) -> Refusal:
            name = view.name(value)
            if user is None:
                return Refusal(f"the intermediate {name} is an output of the graph", root)
            return Refusal(f"the intermediate {name} is also used by {view.name(user)}", root)

        self.reached, self._why = _LEAK_DEPTH, why
        return True


@dataclass(frozen=True, slots=True)
class _Text:
    """Something that describes itself in a refusal."""

    value: Any


def _from_the_left(view: View, setting: Any, operands: Any) -> Any:
    """Negative dimensions in a pattern count from the end of the first operand."""
    negative = (isinstance(setting, int) and setting < 0) or (
        isinstance(setting, tuple) and any(isinstance(d, int) and d < 0 for d in setting)
    )
    if not negative or not operands or isinstance(operands[0], int | float | None):
        return setting
    rank = view.type(operands[0]).rank
    if rank is None:
        return setting
    if isinstance(setting, int):
        return setting + rank
    return tuple(d % rank for d in setting)


def _describe(view: View, operand: Any) -> str:
    if operand is None:
        return "nothing"
    if isinstance(operand, _Text):
        return str(operand.value)
    if isinstance(operand, int | float):
        return f"the number {operand:g}"
    if view.kind == "onnx" and hasattr(operand, "op_type"):
        node = operand
    elif view.weight(operand) is not None:
        return f"the constant {view.name(operand)}"
    else:
        node = view.producer(operand)
    if node is None:
        return f"the input {view.name(operand)}"
    op = view.op(node)
    return f"`{view.native_op(node) if op == NATIVE else op}`"
