"""A rewrite rule: ``pattern`` / ``where`` / ``replace``, without state."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..core.errors import Refusal
from ..core.view import Attr, Node, Operand, Value, View
from ..vocab.builder import Builder
from .pattern import Match, Matcher, Op, PatternBuilder, Var


class Rule:
    """Base of a rule; the first line of its docstring is its equation, ``a => b``.

    The parameters of ``pattern`` after ``p`` name the variables; ``replace`` gets them by name.
    """

    name: ClassVar[str]
    exact: ClassVar[bool] = True

    def pattern(self, p: PatternBuilder, *variables: Any) -> Op:
        """The pattern, built from ``p`` and the variables."""
        raise TypeError(f"{type(self).__name__} declares no pattern")

    def where(self, match: Match) -> None:
        """Refuse a match (``match.refuse``) that the pattern alone cannot tell apart."""

    def replace(self, build: Build, *_: Any, **bindings: Any) -> Value | Sequence[Value]:
        """Build what stands for the root's result (or results); the bindings come by name."""
        raise TypeError(f"{type(self).__name__} declares no replacement")

    def matcher(self) -> Matcher:
        """A fresh matcher of the rule's pattern."""
        names = list(inspect.signature(self.pattern).parameters)[1:]
        return Matcher(self.pattern(PatternBuilder(), *(Var(name) for name in names)))


class Build(Builder):
    """Builds a rule's replacement before the matched root: ``build.add(x, y)``."""

    def __init__(self, view: View, match: Match) -> None:
        super().__init__(view, match.root)
        self.match = match
        self.values: list[Value] = []

    def build(
        self, op: str, *operands: Operand, like: Value | None = None, name: str | None = None,
        **attrs: Attr,
    ) -> Value:  # fmt: skip
        value = super().build(op, *operands, like=like, name=name, **attrs)
        self.values.append(value)
        return value


@dataclass(frozen=True, slots=True)
class Applied:
    """What a rewrite changed: nodes made, nodes whose operands are now others, nodes gone."""

    new: list[Node]
    users: list[Node]
    gone: list[Node]


def apply(view: View, rule: Rule, match: Match) -> Applied:
    """Replace a match.

    Raises ``Refusal`` where ``where`` refuses or the replacement does not fit; the graph is then
    as it was.
    """
    rule.where(match)
    build = Build(view, match)
    old = view.results(match.root)
    nodes: list[Node] = []
    view.journal = nodes
    try:
        replaced = rule.replace(build, **match.bindings)
        new = tuple(replaced) if isinstance(replaced, (tuple, list)) else (replaced,)
        if len(old) != len(new):
            raise Refusal(f"{rule.name} gives {len(new)} values for {len(old)}", match.root)
        _settle_types(view, build.values, old, new)
    except Refusal:
        for node in reversed(nodes):
            view.erase(node)
        raise
    finally:
        view.journal = None
    users: list[Node] = []
    for before, after in zip(old, new, strict=True):
        users += view.users(before)
        view.replace(before, after)
    return Applied(nodes, users, view.erase_dead(match.root))


def _settle_types(
    view: View, values: list[Value], old: Sequence[Value], new: Sequence[Value]
) -> None:
    for value in values:
        if not any(value is result for result in new):
            view.type(value)
    for before, after in zip(old, new, strict=True):
        if any(after is value for value in values):
            view.retype(after, before)
