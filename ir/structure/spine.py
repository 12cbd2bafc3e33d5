"""The residual spine: the additions through which every path from the first value must go.

The graph's values are taken as a flow from where tokens or patches enter. What dominates the output
in it is a chain; the chain's additions of two values of the flow are the sub-block boundaries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import networkx
import torch

from ..core.view import NATIVE, Node, Operand, Value, View, is_value
from ..vocab import traits
from .asides import is_aside
from .beside import beside_edges
from .cache_slots import is_past

_NO_STREAM = frozenset({torch.int64, torch.bool})
"""Dtypes of ids, positions and masks: what is chosen by the stream is not a part of it."""
_TOKENS_RANK = 3
"""Of ``[batch, tokens, width]``."""
_REACH = 32
"""Nodes at most between a constant and the first attention of a stream that starts there."""
_ALONG = frozenset({"add", "cast", "identity", "transpose"})
"""What a stream may go through between two additions and remain itself."""


@dataclass(frozen=True)
class Spine:
    """The chain of nodes that dominate the output, and where every other node branches off."""

    start: Value | Node | None
    additions: tuple[Node, ...]
    position: Mapping[Node | Value, int]
    """For each node of the flow, how many additions of the spine dominate it, itself among them."""
    chain: frozenset[Node]
    entry: int
    """Place in graph order of the value that the first addition's branch starts from."""
    forks: tuple[Value, ...] = ()
    """For each addition, the value that its branch and the stream around it both start from."""
    besides: frozenset[Node] = frozenset()
    """Nodes between two streams, placed where the later one uses them: what a decoder makes of its
    encoder's result."""


NO_SPINE = Spine(None, (), {}, frozenset(), 0)


def find_spine(view: View, attending: Collection[Node] = ()) -> Spine:
    """The longest residual spine that starts at an embedding or a floating input.

    Where other streams join it that have additions of their own (a decoder that looks at its
    encoder), or run beside it with attention of their own (the second tower of CLIP), the spines
    follow each other. A stream that attends before it meets an input starts at a constant (the
    queries of DETR and of BLIP-2). ``attending`` are the nodes that attend.
    """
    graph, order = _flow(view)
    spines = [_spine_from(view, graph, order, start) for start in _starts(view, order)]
    spines.sort(key=lambda spine: -len(spine.additions))
    best = _all_joined(view, order, spines, attending)
    apart = next((node for node in attending if node not in best.position), None)
    if apart is not None:
        queries = [_spine_from(view, graph, order, start)
                   for start in _constants_above(view, graph, apart, order)]  # fmt: skip
        longest = max(queries, key=lambda spine: len(spine.additions), default=NO_SPINE)
        best = _all_joined(view, order, [*spines, longest], attending)
    if best.start is None or not _is_crowded(best, attending):
        return best
    # Layers whose results leave the stream before its end, as a neck takes them (DPT), are on no
    # way to the output.
    whole = _spine_from(view, graph, order, best.start, to_output=False)
    beside = _spine_from(view, graph, order, best.start, beside=True)
    return max((best, beside, whole), key=lambda spine: len(spine.additions))


def feeds(spine: Spine, order: Mapping[Node, int], node: Node) -> bool:
    """Whether a node comes before the next of the additions, so that it may lead to it: what comes
    later reads what skips that addition."""
    place = spine.position[node]
    return place < len(spine.additions) and order[node] < order[spine.additions[place]]


def _all_joined(
    view: View, order: Mapping[Node, int], spines: Sequence[Spine], attending: Collection[Node]
) -> Spine:
    """The first of the spines and all that are streams of their own, in a row."""
    best = spines[0] if spines else NO_SPINE
    for other in spines[1:]:
        best = _joined(view, order, best, other, attending) or best
    return best


def _is_crowded(spine: Spine, attending: Collection[Node]) -> bool:
    """Whether two attentions lie between two additions, or one behind the last."""
    counts = Counter(spine.position[node] for node in attending if node in spine.position)
    return len(spine.additions) in counts or max(counts.values(), default=0) > 1


def _constants_above(
    view: View, graph: networkx.MultiDiGraph, node: Node, order: Mapping[Node, int]
) -> list[Node]:
    """Nodes that make attention's queries of constants alone, in the order of the graph."""
    queue: list[Node | Value] = [node]
    for current in queue:
        if len(queue) > _REACH:
            return []
        queue += [above for above in graph.predecessors(current) if above not in queue]
    makers = [current for current in queue if current in order and current is not node]
    return [] if len(makers) + 1 < len(queue) else sorted(makers, key=order.__getitem__)  # type: ignore[arg-type]


def _joined(
    view: View, order: Mapping[Node, int], best: Spine, other: Spine, attending: Collection[Node]
) -> Spine | None:
    """Both spines in a row; ``None`` where the other is not a stream of its own."""
    if other.start in best.position or best.start in other.position:
        return None
    if not any(n in other.position and n not in best.position for n in attending) or not any(
        n in best.position and n not in other.position for n in attending
    ):
        return None
    into, back = _reaches(best, other), _reaches(other, best)
    if into and back:
        return None
    first, last = (best, other) if into else (other, best)
    if not into and not back:
        first, last = sorted((best, other), key=lambda spine: order[spine.additions[0]])
    count = sum(a not in last.position for a in first.additions)
    if not count:
        return None
    position = {n: place for n, place in first.position.items() if place < count}
    position |= {first.additions[count - 1]: count}
    position |= {n: count + place for n, place in last.position.items()}
    besides: set[Node] = set()
    for node in reversed([n for n in order if n in first.position and n not in position]):
        users = [u for value in view.results(node) for u in view.users(value) if u in position]
        if users:
            position[node] = min(position[user] for user in users)
            besides.add(node)
    return Spine(
        first.start, (*first.additions[:count], *last.additions), position,
        frozenset(n for n in first.chain | last.chain if n not in besides), first.entry,
        (*first.forks[:count], *last.forks), frozenset(besides),
    )  # fmt: skip


def _reaches(spine: Spine, other: Spine) -> bool:
    """Whether a stream flows into additions that are the other's own."""
    return any(a in spine.position for a in set(other.additions).difference(spine.additions))


def _flow(view: View) -> tuple[networkx.MultiDiGraph, dict[Node, int]]:
    """Nodes and inputs, an edge for each use; sizes, positions and masks carry nothing."""
    graph = networkx.MultiDiGraph()
    order: dict[Node, int] = {}
    beside = beside_edges(view)
    for place, node in enumerate(view.nodes()):
        order[node] = place
        graph.add_node(node)
        op = view.op(node)
        if traits(op).shape_only or (op == NATIVE and view.native_op(node) == "Shape"):
            continue
        for value in view.arguments(node):
            joins = op == "add" and is_aside(view, value)
            if joins or (node, value) in beside or view.type(value).dtype in _NO_STREAM:
                continue
            if view.weight(value) is None:
                graph.add_edge(view.producer(value) or value, node)
    return graph, order


def _starts(view: View, order: dict[Node, int]) -> Iterable[Value | Node]:
    for value in view.inputs():
        dtype = view.type(value).dtype
        if dtype is not None and dtype.is_floating_point and not is_past(view, value):
            yield value
    for node in order:
        if traits(view.op(node)).table is not None:
            yield node


def _spine_from(
    view: View, graph: networkx.MultiDiGraph, order: dict[Node, int], start: Value | Node,
    *, to_output: bool = True, beside: bool = False,
) -> Spine:  # fmt: skip
    """The spine of one stream: of the additions that every path to an output goes through, or of
    the most that follow each other. ``beside``: and of layers whose results come together."""
    if start not in graph:
        return NO_SPINE
    above = networkx.immediate_dominators(graph, start) | {start: start}
    # A node comes after its dominator in graph order; the start may be an input without a place.
    inner = sorted((n for n in above if n in order and n is not start), key=order.__getitem__)
    longest: list[Node] = []
    if inner and not to_output:
        depths = _counted(inner, above, start, frozenset(_additions(view, inner, above)))
        longest = _chain(above, max(inner, key=depths.__getitem__), start)
    for value in view.outputs() if to_output else ():
        chain = _chain(above, view.producer(value), start)
        if len(_additions(view, chain, above)) > len(_additions(view, longest, above)):
            longest = chain
    met = _met_layers(view, graph, longest, above) if beside else {}
    longest = [node for place in longest for node in (*met.get(place, ()), place)]
    additions = _additions(view, longest, above)
    if not additions:
        return NO_SPINE
    more = {node: len(_additions(view, chain, above)) for node, chain in met.items()}
    counts = _counted(inner, above, start, frozenset(additions), more)
    entry = order.get(above[additions[0]], -1)
    forks = tuple(above[a] if above[a] not in order else view.results(above[a])[0]
                  for a in additions)  # fmt: skip
    return Spine(start, tuple(additions), counts, frozenset(longest), entry, forks)


def _counted(
    inner: Sequence[Node], above: Mapping[Node, Node], start: Value | Node,
    additions: Collection[Node], more: Mapping[Node, int] | None = None,
) -> dict[Node | Value, int]:  # fmt: skip
    """How many of the additions dominate each node, itself among them; ``more`` says how many come
    before a node and do not dominate it."""
    counts: dict[Node | Value, int] = {start: 0}
    for node in inner:
        counts[node] = counts.get(above[node], 0) + (node in additions)
        counts[node] += 0 if more is None else more.get(node, 0)
    return counts


def _met_layers(
    view: View, graph: networkx.MultiDiGraph, chain: Sequence[Node], above: dict[Node, Node]
) -> dict[Node, list[Node]]:
    """For the nodes of a chain at which the results of several layers are put side by side, feature
    by feature (VipLLaVA, Granite Vision), the chain through the last of these layers."""
    met: dict[Node, list[Node]] = {}
    for node in chain:
        if view.op(node) != "concat" or view.type(view.result(node)).rank != _TOKENS_RANK:
            continue
        if view.attrs(node)["dim"] not in (-1, _TOKENS_RANK - 1):
            continue
        ways = [_chain(above, maker, above[node]) for maker in graph.predecessors(node)]
        met[node] = max(ways, key=lambda way: len(_additions(view, way, above)), default=[])
    return met


def _chain(above: dict[Node, Node], end: Node | None, start: Value | Node) -> list[Node]:
    """The dominators of ``end``, from ``start`` on; empty where the flow does not reach it."""
    chain: list[Node] = []
    while end is not None and end in above and end is not start:
        chain.append(end)
        end = above[end]
    return chain[::-1] if chain and end is not None else []


def _additions(view: View, chain: list[Node], above: dict[Node, Node]) -> list[Node]:
    """The nodes of a chain that add two values of the flow, one of them by way of no other op."""
    additions = []
    for node in chain:
        if view.op(node) != "add" or any(is_aside(view, v) for v in view.arguments(node)):
            continue
        makers = [_maker(view, o) for o in view.operands(node)]
        if all(m in above for m in makers) and _passes(view, node, above[node]):
            additions.append(node)
    return additions


def _maker(view: View, operand: Operand) -> Node | Value | None:
    if not is_value(operand):
        return None
    return view.producer(operand) or operand


def _passes(view: View, node: Node, source: Node | Value) -> bool:
    """Whether ``source`` reaches ``node`` as it is: added to, cast, or turned."""
    stack = [node]
    while stack:
        for operand in view.operands(stack.pop()):
            if not is_value(operand):
                continue
            maker = view.producer(operand)
            if (maker or operand) is source:
                return True
            if maker is not None and view.op(maker) in _ALONG:
                stack.append(maker)
    return False
