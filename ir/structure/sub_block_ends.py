"""Where the stream enters a sub-block and where it leaves it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ..core.view import Node, Value, View, is_value
from .spine import Spine
from .stacked import is_stack, written

_BEHIND = 6
"""Ops at most between a sum and the stream that the next branch starts from."""


def ends(
    view: View, spine: Spine, linears: Sequence[Sequence[str]]
) -> tuple[list[Value], list[Value]]:
    """The stream ahead of each addition's branch, and behind the addition. ``linears`` are the
    names of those in each branch."""
    entries = [_unflattened(view, spine, fork) for fork in spine.forks]
    before = [(), *linears]
    entries = [_before_norm(view, *of) for of in zip(entries, before, linears, strict=False)]
    return entries, _exits(view, spine, entries, linears)


def _before_norm(
    view: View, entry: Value, before: Sequence[str], inside: Sequence[str]
) -> Value:
    """Where a branch starts. A layer whose stream is its norm's result (MiniMax) has the graph of
    one whose norm is its last node (BERT): the names of weights tell whose the norm is."""
    node = view.producer(entry)
    if node is None or view.op(node) not in ("layer_norm", "rms_norm") or not inside:
        return entry
    own = _shared(view, node, inside[:1])
    return view.tensor(node) if own > _shared(view, node, before[-1:]) else entry


def _shared(view: View, norm: Node, linears: Sequence[str]) -> int:
    """How many parts the names of a norm's weight and of a linear have in common, from the left; 0
    where none of them is a layer's number."""
    names = [view.name(o) for o in view.operands(norm)[1:] if is_value(o)]
    return _common(names, linears)


def _common(names: Sequence[str], others: Sequence[str]) -> int:
    """How many parts of a layer's name the first of each have in common; 0 without a number."""
    for pair in zip(names[:1], others[:1], strict=False):
        parts = zip(*(name.split(".") for name in pair), strict=False)
        common = [a for a, _ in itertools.takewhile(lambda p: p[0] == p[1], parts)]
        if any(part.isdigit() for part in common):
            return len(common)
    return 0


def _exits(
    view: View, spine: Spine, entries: Sequence[Value], linears: Sequence[Sequence[str]]
) -> list[Value]:
    """The stream behind each addition. Where the next branch starts at a norm of the sum, norms
    come after the sums (as in BERT), and the last sum's norm belongs to it likewise; so it is with
    what scales a sum or is added to it (MobileBERT, the positions of YOLOS). The last norm is the
    model's own where those before it have names of their layers and it has not."""
    sums = [_reshaped_back(view, spine, view.results(addition)[0]) for addition in spine.additions]
    sums = [written(view, value) if is_stack(view, value) else value for value in sums]
    exits: list[Value] = []
    usual: tuple[str, ...] = ()
    named = False
    for i, value in enumerate(sums):
        behind = _behind(view, spine, value)
        values = [value, *(result for _, result in behind)]
        ops = tuple(op for op, _ in behind)
        if i + 1 < len(sums):
            reached = values.index(entries[i + 1]) if entries[i + 1] in values else 0
            usual = ops[:reached]
            named = reached > 0 and _named(view, values[reached], linears[i])
        elif ops[: len(usual)] != usual or (
            named and usual and not _named(view, values[len(usual)], linears[i])
        ):
            reached = 0
        else:
            reached = len(usual)
        if i + 1 == len(sums) and not reached:
            # The last layer's own scale or norm, where its last branch is not as the one before.
            own = bool(behind) and behind[0][0] in ("mul", "layer_norm", "rms_norm")
            # Of a stage of layers (PVT v2), its norm has the name of the stage alone.
            layer = _common(linears[i][-1:], linears[i - 1][-1:]) if i else 0
            reached = own and _named(view, values[1], linears[i], at_least=layer)
        exits.append(values[reached])
    return exits


def _named(view: View, value: Value, linears: Sequence[str], at_least: int = 1) -> bool:
    """Whether what makes a value is of the same layer as a branch's linears, by its name: as many
    parts of it."""
    node = view.producer(value)
    return node is not None and _shared(view, node, linears[-1:]) >= max(1, at_least)


def _behind(view: View, spine: Spine, value: Value) -> list[tuple[str, Value]]:
    """Norms, scales and constants that a sum goes through, each its only use; and their ops."""
    links: list[tuple[str, Value]] = []
    users = view.users(value)
    while len(users) == 1 and len(links) < _BEHIND and _keeps(view, spine, users[0], value):
        value = view.results(users[0])[0]
        links.append((view.op(users[0]), value))
        users = view.users(value)
    return links


def _keeps(view: View, spine: Spine, node: Node, stream: Value) -> bool:
    """Whether a node norms a stream, turns its axes, or scales or adds to it what is constant."""
    op = view.op(node)
    if op in ("layer_norm", "rms_norm", "transpose"):
        return True
    others = [o for o in view.operands(node) if is_value(o) and o is not stream]
    return op in ("add", "mul") and not any(
        o in spine.position or view.producer(o) in spine.position for o in others
    )


def _unflattened(view: View, spine: Spine, fork: Value) -> Value:
    """The stream as it is where it starts: OPT's feed-forward reads ``[tokens, width]`` of it."""
    node, rank = view.producer(fork), view.type(spine.forks[0]).rank
    if node is None or view.op(node) != "reshape" or view.type(fork).rank == rank:
        return fork
    source = view.tensor(node)
    return source if view.type(source).rank == rank else fork


def _reshaped_back(view: View, spine: Spine, value: Value) -> Value:
    """A sum of flattened streams in the form that the stream starts in."""
    users, rank = view.users(value), view.type(spine.forks[0]).rank
    if view.type(value).rank == rank or len(users) != 1 or view.op(users[0]) != "reshape":
        return value
    result = view.results(users[0])[0]
    return result if view.type(result).rank == rank else value
