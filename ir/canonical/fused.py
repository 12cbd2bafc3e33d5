"""Fused ops of other tools are expanded into the vocabulary, so that passes see what is in them.

``onnxruntime.transformers.optimizer``, the model builder of onnxruntime-genai and exporters of
opset 23 write whole layers as one node. Each rule here expands one of these nodes, exactly. Types
are inferred on the way, since onnx's own inference does not know Microsoft's ops.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

from ..core.errors import Refusal
from ..core.view import NATIVE, Node, Origin, Value, View
from ..onnx.forms import as_value, native_node
from ..rewrite.driver import RewriteReport
from ..rewrite.pattern import Match
from ..rewrite.rule import Build, Rule, apply
from .open_types import OpenTypes

logger = logging.getLogger(__name__)

MICROSOFT = "com.microsoft::"


class Fused(Rule):
    """Base of the rules that expand one node: ``op`` is its native name."""

    op: ClassVar[str]

    def pattern(self, p: Any) -> Any:
        return p.native(self.op, rest=True)

    def where(self, match: Match) -> None:
        self.check(Inputs(match.view, match.root))

    def check(self, node: Inputs) -> None:
        """Refuse the forms that are not covered."""

    def replace(self, build: Build, **_: Any) -> Sequence[Value]:
        node = Inputs(build.view, build.match.root)
        return node.results(self.expand(build, node))

    def expand(self, b: Build, node: Inputs) -> Sequence[Value | None]:
        """The node's results in order; those that are not computed may be left out."""
        raise TypeError(f"{type(self).__name__} expands nothing")


class Inputs:
    """A native node: its inputs by their places, absent ones being ``None``, and its attributes."""

    def __init__(self, view: View, node: Node) -> None:
        self.view, self.node = view, node
        self._native = native_node(node)
        self._attrs = view.attrs(node)

    def __getitem__(self, index: int) -> Value | None:
        inputs = self._native.inputs
        value = inputs[index] if index < len(inputs) else None
        return None if value is None else as_value(value)

    def need(self, index: int) -> Value:
        """An input that must be there."""
        value = self[index]
        if value is None:
            raise self.refuse(f"its input {index} is absent")
        return value

    def attr(self, name: str, default: Any) -> Any:
        return self._attrs.get(name, default)

    def refuse(self, reason: str) -> Refusal:
        return Refusal(reason, self.node)

    def refuse_inputs(self, *named: tuple[int, str]) -> None:
        """Refuse the node where one of these inputs is there."""
        for index, name in named:
            if self[index] is not None:
                raise self.refuse(f"{name} is not read")

    def refuse_attrs(self, **defaults: Any) -> None:
        """Refuse the node where an attribute differs from what it is by default."""
        for name, default in defaults.items():
            value = self.attr(name, default)
            if value != default:
                raise self.refuse(f"{name}={value} is not read")

    def used(self, index: int) -> bool:
        """Whether anything reads a result."""
        results = self.view.results(self.node)
        if index >= len(results):
            return False
        return bool(self.view.users(results[index])) or self.view.is_output(results[index])

    def refuse_results(self, *named: tuple[int, str]) -> None:
        for index, name in named:
            if self.used(index):
                raise self.refuse(f"its result {name} is used, which is not computed here")

    def results(self, values: Sequence[Value | None]) -> list[Value]:
        """A value for each result of the node; one that nothing reads needs none of its own."""
        first = values[0]
        assert first is not None
        results = []
        for index in range(len(self.view.results(self.node))):
            value = values[index] if index < len(values) else None
            if value is None and self.used(index):
                raise self.refuse(f"its result {index} is used, which is not computed here")
            results.append(first if value is None else value)
        return results

    def rank(self, value: Value) -> int:
        rank = self.view.type(value).rank
        if rank is None:
            raise self.refuse(f"the rank of {self.view.name(value)} is not known")
        return rank

    def width(self, value: Value, dim: int = -1) -> int:
        """The size of a dimension, which must be known."""
        shape = self.view.type(value).shape
        size = None if shape is None else shape[dim]
        if not isinstance(size, int):
            raise self.refuse(f"{self.view.name(value)} {self.view.type(value)}: a size is open")
        return size


def expand_fused(view: View, rules: Sequence[type[Fused]], *, step: int = 0) -> RewriteReport:
    """Expand the fused nodes of an ONNX graph, in place. Those in a form that is not covered stay
    native nodes; a warning says why."""
    report = RewriteReport()
    by_op: dict[str, list[Fused]] = {}
    for rule in rules:
        by_op.setdefault(rule.op, []).append(rule())
    if view.kind != "onnx" or not any(view.native_op(node) in by_op for node in view.nodes()):
        return report
    view.infer_types()
    while _expand_all(view, by_op, step, report):
        if not any(_is_fused(view, node, by_op) for node in view.nodes()):
            break
        view.infer_types()
    _warn(view, by_op, report)
    return report


def _is_fused(view: View, node: Node, by_op: dict[str, list[Fused]]) -> bool:
    return view.native_op(node) in by_op and view.op(node) == NATIVE


def _expand_all(
    view: View, by_op: dict[str, list[Fused]], step: int, report: RewriteReport
) -> bool:
    """Expand what can be, in the order of the graph; whether anything was."""
    before = report.total
    previous = view.origin
    types = OpenTypes(view)
    try:
        for node in list(view.nodes()):
            if _is_fused(view, node, by_op):
                types.forget(node)
                _expand(view, node, by_op[view.native_op(node)], step, report)
            else:
                types.settle(node)
    finally:
        view.origin = previous
    return report.total > before


def _expand(
    view: View, node: Node, rules: Sequence[Fused], step: int, report: RewriteReport
) -> None:
    for rule in rules:
        view.origin = Origin(rule.name, step)
        try:
            apply(view, rule, Match(view, node))
        except Refusal as refusal:
            report.refusals[rule.name] = refusal
            continue
        report.applied[rule.name] += 1
        return


def _warn(view: View, by_op: dict[str, list[Fused]], report: RewriteReport) -> None:
    counts = Counter(view.native_op(n) for n in view.nodes() if _is_fused(view, n, by_op))
    for op, count in counts.items():
        reasons = [report.refusals[r.name].reason for r in by_op[op] if r.name in report.refusals]
        why = reasons[-1] if reasons else "not reached"
        logger.warning("%d %s stay as they are: %s", count, op, why)
