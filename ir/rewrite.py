"""The driver: applies rules until none fits, linear in the size of the graph.

Nodes wait on a work list that is indexed by the root ops of the rules. A rewrite puts its new
nodes, and the users of its results as far down as the deepest pattern reaches, back on the list.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from .errors import InvalidGraph, Refusal
from .pattern import Matcher, pattern_depth
from .rule import Rule, apply
from .view import NATIVE, Node, Origin, Value, View


@dataclass
class RewriteReport:
    """How often each rule applied, and the refusal that came nearest for each that met its root."""

    applied: Counter[str] = field(default_factory=Counter)
    refusals: dict[str, Refusal] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.applied.total()


class _Indexed:
    __slots__ = ("depth", "matcher", "rule")

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.matcher: Matcher = rule.matcher()
        self.depth = pattern_depth(self.matcher.pattern)


def rewrite(
    view: View, rules: Sequence[Rule], *, step: int = 0, rounds_per_node: int = 16
) -> RewriteReport:
    """Apply ``rules`` wherever they match, earlier rules first; the graph is edited in place.

    Raises ``InvalidGraph`` where the rules keep undoing each other: more rewrites than
    ``rounds_per_node`` times the nodes of the graph.
    """
    index: dict[str, list[_Indexed]] = {}
    for rule in rules:
        entry = _Indexed(rule)
        index.setdefault(entry.matcher.pattern.op, []).append(entry)
    reach = max((e.depth for entries in index.values() for e in entries), default=1)
    nodes = list(view.nodes())
    worklist = _Worklist(view, index, nodes)
    report = RewriteReport()
    budget = rounds_per_node * len(nodes) + 64
    previous = view.origin
    try:
        while (node := worklist.pop()) is not None:
            changed = _try_rules(view, index[_root_key(view, node)], node, step, report)
            if changed is None:
                continue
            made, gone = changed
            worklist.forget(gone)
            worklist.push_near(made, reach)
            if report.total > budget:
                raise InvalidGraph(f"the rules do not settle: {dict(report.applied)}")
    finally:
        view.origin = previous
    return report


def _root_key(view: View, node: Node) -> str:
    op = view.op(node)
    return view.native_op(node) if op == NATIVE else op


def _try_rules(
    view: View, entries: list[_Indexed], node: Node, step: int, report: RewriteReport
) -> tuple[list[Value], list[Node]] | None:
    for entry in entries:
        match = entry.matcher.match(view, node)
        if match is None:
            _remember(report, entry.rule, entry.matcher, view)
            continue
        view.origin = Origin(entry.rule.name, step)
        try:
            changed = apply(view, entry.rule, match)
        except Refusal as refusal:
            refusal.depth = 1 << 30
            report.refusals.setdefault(entry.rule.name, refusal)
            continue
        report.applied[entry.rule.name] += 1
        return changed
    return None


def _remember(report: RewriteReport, rule: Rule, matcher: Matcher, view: View) -> None:
    """Keep the refusal that came deepest; its text is made only where it does."""
    known = report.refusals.get(rule.name)
    depth = matcher.deepest[0] if matcher.deepest is not None else 0
    if known is None or depth > known.depth:
        refusal = matcher.refusal(view)
        refusal.depth = depth
        report.refusals[rule.name] = refusal


class _Worklist:
    """Nodes to visit, each at most once at a time, in graph order."""

    def __init__(self, view: View, index: dict[str, list[_Indexed]], nodes: list[Node]) -> None:
        self._view = view
        self._index = index
        self._queue = deque(n for n in nodes if _root_key(view, n) in index)
        self._waiting = set(self._queue)

    def pop(self) -> Node | None:
        while self._queue:
            node = self._queue.popleft()
            if node in self._waiting:
                self._waiting.discard(node)
                return node
        return None

    def forget(self, gone: list[Node]) -> None:
        self._waiting.difference_update(gone)

    def push_near(self, values: list[Value], reach: int) -> None:
        """Queue the makers of values and the users within ``reach`` ops of them."""
        frontier = {n for n in (self._view.producer(v) for v in values) if n is not None}
        seen = set(frontier)
        self._push(frontier)
        for _ in range(reach - 1):
            frontier = {
                user
                for node in frontier
                for value in self._view.results(node)
                for user in self._view.users(value)
            } - seen
            seen |= frontier
            self._push(frontier)

    def _push(self, nodes: set[Node]) -> None:
        for node in nodes:
            if node not in self._waiting and _root_key(self._view, node) in self._index:
                self._waiting.add(node)
                self._queue.append(node)
