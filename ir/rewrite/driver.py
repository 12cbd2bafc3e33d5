"""The driver: applies rules until none fits, linear in the size of the graph.

Nodes wait on a work list that is indexed by the root ops of the rules. A rewrite puts back on the
list what may match now and did not before: the new nodes, the users of its results, and from there
every root that the change can reach through ops in the inside of a pattern; and the roots that
were refused because a node that is gone used one of their intermediates.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..core.errors import InvalidGraph, Refusal
from ..core.view import NATIVE, Node, Origin, View
from .pattern import Matcher, inner_ops, pattern_depth
from .rule import Applied, Rule, apply


@dataclass
class RewriteReport:
    """How often each rule applied, and the refusal that came nearest for each that met its root."""

    applied: Counter[str] = field(default_factory=Counter)
    refusals: dict[str, Refusal] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.applied.total()


class _Indexed:
    __slots__ = ("depth", "inner", "matcher", "rule")

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.matcher: Matcher = rule.matcher()
        self.depth = pattern_depth(self.matcher.pattern)
        self.inner = inner_ops(self.matcher.pattern)


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
    nodes = list(view.nodes())
    worklist = _Worklist(view, index, nodes)
    report = RewriteReport()
    budget = rounds_per_node * len(nodes) + 64
    count = 0
    previous = view.origin
    try:
        while (visit := worklist.pop()) is not None:
            changed = _try_rules(view, *visit, step, report, worklist)
            if changed is None:
                continue
            worklist.update(changed)
            count += 1
            if count > budget:
                raise InvalidGraph(f"the rules do not settle: {dict(report.applied)}")
    finally:
        view.origin = previous
    return report


def _root_key(view: View, node: Node) -> str:
    op = view.op(node)
    return view.native_op(node) if op == NATIVE else op


def _try_rules(
    view: View,
    node: Node,
    entries: list[_Indexed],
    step: int,
    report: RewriteReport,
    worklist: _Worklist,
) -> Applied | None:
    for entry in entries:
        match = entry.matcher.match(view, node)
        if match is None:
            _remember(report, entry, view)
            worklist.block(entry.matcher.leak, node)
            continue
        view.origin = Origin(entry.rule.name, step)
        try:
            changed = apply(view, entry.rule, match)
        except Refusal as refusal:
            refusal.depth = 1 << 30
            known = report.refusals.get(entry.rule.name)
            if known is None or known.depth < refusal.depth:
                report.refusals[entry.rule.name] = refusal
            continue
        report.applied[entry.rule.name] += 1
        return changed
    return None


def _remember(report: RewriteReport, entry: _Indexed, view: View) -> None:
    """Keep the refusal that came deepest; its text is made only where it does."""
    known = report.refusals.get(entry.rule.name)
    if known is not None and entry.matcher.reached <= known.depth:
        return
    refusal = entry.matcher.refusal(view)
    refusal.depth = entry.matcher.reached
    report.refusals[entry.rule.name] = refusal


class _Worklist:
    """Nodes to visit, each at most once at a time, in graph order."""

    def __init__(self, view: View, index: dict[str, list[_Indexed]], nodes: list[Node]) -> None:
        self._view = view
        self._index = index
        entries = [e for group in index.values() for e in group]
        self._reach = max((e.depth for e in entries), default=1)
        self._inner = frozenset(op for e in entries for op in e.inner)
        self._queue: deque[Node] = deque()
        self._waiting: dict[Node, list[_Indexed]] = {}
        self._blocked: dict[Node, list[Node]] = {}
        self._stuck: set[Node] = set()
        self._push(nodes)

    def pop(self) -> tuple[Node, list[_Indexed]] | None:
        """The next node and the rules that its op is the root of."""
        while self._queue:
            node = self._queue.popleft()
            entries = self._waiting.pop(node, None)
            if entries is not None:
                return node, entries
        return None

    def block(self, user: Node | None, root: Node) -> None:
        """Visit ``root`` again when ``user`` is gone."""
        if user is not None:
            self._blocked.setdefault(user, []).append(root)
            self._stuck.add(root)

    def update(self, changed: Applied) -> None:
        """Take the nodes that are gone off the list and put on it what the change can reach."""
        gone = set(changed.gone)
        freed: list[Node] = []
        for node in gone:
            self._waiting.pop(node, None)
            self._stuck.discard(node)
            freed += self._blocked.pop(node, ())
        if freed:
            self._push(root for root in dict.fromkeys(freed) if root in self._stuck)
        front = self._push(changed.new)
        seen = set(front)
        front += self._push(n for n in changed.users if n not in seen and n not in gone)
        for _ in range(self._reach - 2):
            if not front:
                return
            seen.update(front)
            front = self._push(self._users(front, seen))

    def _users(self, nodes: Iterable[Node], seen: set[Node]) -> list[Node]:
        view = self._view
        users = (u for n in nodes for value in view.results(n) for u in view.users(value))
        return [user for user in dict.fromkeys(users) if user not in seen]

    def _push(self, nodes: Iterable[Node]) -> list[Node]:
        """Queue those that are the root of a rule; the ones that are inside some pattern."""
        inside: list[Node] = []
        for node in nodes:
            key = _root_key(self._view, node)
            entries = self._index.get(key)
            if entries is not None and node not in self._waiting:
                self._waiting[node] = entries
                self._queue.append(node)
            if key in self._inner:
                inside.append(node)
        return inside
