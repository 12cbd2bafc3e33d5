"""The move *bypass*: the residual stream runs around a block, or through it again."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from ..core.errors import Refusal
from ..core.types import UNKNOWN_DIM, Dim, Type
from ..core.view import Node, Value, View
from ..structure.asides import without_aside
from ..structure.beside import Edges, beside_edges
from ..structure.layers import Block
from ..structure.units import Unit
from ..vocab.builder import Builder
from .block_path import Path
from .slots import Slots


def refusals(view: View, units: Sequence[Unit]) -> list[str]:
    """For each block, or half of one, why it cannot be left out; empty where it can."""
    places, slots = _Places.of(view), Slots(view)
    return [_refusal(view, unit, places, slots) for unit in units]


def _refusal(view: View, unit: Unit, places: _Places, slots: Slots) -> str:
    try:
        body = _body(view, unit, places)
        _check_closed(view, unit, body, slots)
        slots.stand_ins(slots.within(body), body)
    except Refusal as refusal:
        return refusal.reason
    return ""


def bypass(view: View, unit: Unit, *, rule: str, step: int = 0) -> None:
    """Connect the residual stream around a block or a half of one, whose nodes and weights leave.

    So do its slots of the key-value cache; the others are numbered anew. Raises ``Refusal`` where
    the stream changes its type within it, or where something outside reads a value from inside.
    """
    body, slots = _body(view, unit, _Places.of(view)), Slots(view)
    _check_closed(view, unit, body, slots)
    leaving = slots.within(body)
    stand_ins = slots.stand_ins(leaving, body)
    with view.made_by(rule, step):
        slots.release(leaving, stand_ins, body)
        view.replace(unit.exit, unit.entry)
        view.erase_dead(body[-1])
        slots.renumber()
    view.drop_unused_weights()


def follow(
    view: View, blocks: Sequence[Block], path: Path,
    instead: Mapping[str, Callable[[Builder, Value], Value]] | None = None,
    *, rule: str, step: int = 0,
) -> None:  # fmt: skip
    """Let the stream run through ``blocks`` as ``path`` says.

    ``blocks`` are consecutive: each starts where the last one ends, or at a selection of tokens.
    ``instead`` makes, for a block or half by its name, what becomes of the stream in its place
    where it is left out; nothing is repeated in such a path.
    What is repeated is copied with slots of its own in the key-value cache; its weights stay
    shared. The path of every block once, in order, changes nothing. Raises ``Refusal`` as
    ``bypass`` and where blocks come first in another order than the graph's, ``BadInput`` for one
    that is not there.
    """
    units, places = path.units(blocks)
    counts = [places.count(i) for i in range(len(units))]
    if set(counts) == {1}:
        return
    where, slots = _Places.of(view), Slots(view)
    bodies = [_body(view, unit, where) for unit in units]
    gone = {node for body, count in zip(bodies, counts, strict=True) for node in body if not count}
    for unit, body, count in zip(units, bodies, counts, strict=True):
        if count != 1:
            _check_closed(view, unit, body, slots, gone)
    check_repeats(view, units, path, counts)
    leaving = slots.within(gone)
    stand_ins = slots.stand_ins(leaving, gone)
    with view.made_by(rule, step):
        slots.release(leaving, stand_ins, gone)
        if max(counts) > 1:
            _rewire(view, units, bodies, places, slots)
        else:
            _leave_out(view, units, bodies, counts, instead or {})
        slots.renumber()
    view.drop_unused_weights()


def check_repeats(view: View, units: Sequence[Unit], path: Path, counts: Sequence[int]) -> None:
    """Raise ``Refusal`` where a unit is run again, which ``counts`` say of each, and something
    happens to the stream between two of them, which none of the two would do."""
    if max(counts) < 2:
        return
    for before, unit in itertools.pairwise(units):
        if unit.entry is before.exit:
            continue
        what = "tokens are selected, or put together anew,"
        if without_aside(view, unit.entry) is before.exit:
            what = "features of images join the stream (DeepStack)"
        raise Refusal(
            f"path {path}: {what} between {before.name} and the next; blocks can be left out "
            "there, not repeated"
        )


def _leave_out(
    view: View, units: Sequence[Unit], bodies: Sequence[list[Node]], counts: Sequence[int],
    instead: Mapping[str, Callable[[Builder, Value], Value]],
) -> None:  # fmt: skip
    """The last first: what read a block's exit reads its entry, the exit of the one before."""
    for unit, body, count in reversed(list(zip(units, bodies, counts, strict=True))):
        if count:
            continue
        around = unit.entry
        if unit.name in instead:
            around = instead[unit.name](Builder(view, body[0]), unit.entry)
        view.replace(unit.exit, around)
        view.erase_dead(body[-1])


def _rewire(
    view: View, units: Sequence[Unit], bodies: Sequence[list[Node]], places: Sequence[int],
    slots: Slots,
) -> None:  # fmt: skip
    last = units[-1].exit
    # What is behind the blocks reads a stand-in, so that copies may read the last block's result.
    behind = Builder(view, view.after(view.maker(last))).identity(last, like=last)
    view.replace(last, behind)
    stream = units[0].entry
    entries: dict[int, Value] = {}
    for index in places:
        unit, body = units[index], bodies[index]
        if index in entries:
            stream = _copy(view, body, {entries[index]: stream}, unit.exit, slots)
            continue
        entries[index] = stream
        _redirect(view, body, unit.entry, stream)
        stream = unit.exit
    node = view.maker(behind)
    view.replace(behind, stream)
    gone = set(view.erase_dead(node))
    for index in sorted(set(range(len(units))) - set(entries), reverse=True):
        if bodies[index][-1] not in gone:
            gone.update(view.erase_dead(bodies[index][-1]))


def _redirect(view: View, body: Sequence[Node], old: Value, new: Value) -> None:
    if old is new:
        return
    for node in body:
        if old in view.arguments(node):
            view.rewire(node, old, new)


def _copy(
    view: View, body: Sequence[Node], values: dict[Value, Value], last: Value, slots: Slots
) -> Value:
    """The body once more, reading ``values[v]`` where it reads ``v``; what ``last`` becomes."""
    place = view.after(view.maker(next(iter(values.values()))))
    own = slots.within(body)
    values |= slots.copies(own)
    for node in [*slots.imports(own, body), *body, *slots.exports(own, body)]:
        copies = view.clone(node, values, before=place)
        values.update(zip(view.results(node), copies, strict=True))
        place = view.after(view.maker(copies[-1]))
    if own:
        slots.grow(own, values)
    return values[last]


# --- what lies in a block -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Places:
    """Where nodes stand in the graph, and what they read from beside the stream."""

    order: Mapping[Node, int]
    beside: Edges

    @classmethod
    def of(cls, view: View) -> _Places:
        order = {node: place for place, node in enumerate(view.nodes())}
        return cls(order, beside_edges(view))


def bodies(view: View, units: Sequence[Unit]) -> list[list[Node]]:
    """The nodes between each one's entry and exit, in the order of the graph.

    Masks, rotary tables and sizes that are made outside of the stream do not belong to them.
    """
    places = _Places.of(view)
    return [_body(view, unit, places) for unit in units]


def _body(view: View, unit: Unit, places: _Places) -> list[Node]:
    before, order = view.producer(unit.entry), places.order
    start = -1 if before is None else order.get(before, -1)
    stack, seen = [view.producer(unit.exit)], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen or order[node] <= start:
            continue
        seen.add(node)
        stack += [view.producer(v) for v in view.arguments(node)
                  if v is not unit.entry and (node, v) not in places.beside]  # fmt: skip
    inside: list[Node] = []
    stream = {unit.entry}
    for node in sorted(seen, key=order.__getitem__):
        if any(value in stream for value in view.arguments(node)):
            inside.append(node)
            stream.update(view.results(node))
    return inside


def is_one_stream(view: View, entry: Type, leaving: Type) -> bool:
    """Whether two types differ at most in sizes that go by names that no input has.

    Shape inference makes one up (``unk__26``) for each size that it cannot follow, behind every
    sum anew.
    """
    if entry.dtype != leaving.dtype or entry.shape is None or leaving.shape is None:
        return entry == leaving
    dims = (dim for value in view.inputs() for dim in view.type(value).shape or ())
    known = {word for dim in dims for word in _words(dim)}

    def is_open(dim: Dim) -> bool:
        return dim == UNKNOWN_DIM or not _words(dim) <= known

    if len(entry.shape) != len(leaving.shape):
        return False
    return all(
        a == b or (not {type(a), type(b)} & {int} and (is_open(a) or is_open(b)))
        for a, b in zip(entry.shape, leaving.shape, strict=True)
    )


def _words(dim: Dim) -> set[str]:
    return set() if isinstance(dim, int) else set(re.findall(r"[A-Za-z_]\w*", dim))


def _check_closed(
    view: View, unit: Unit, inside: Sequence[Node], slots: Slots, gone: Collection[Node] = ()
) -> None:
    """Raise ``Refusal`` where a unit changes the stream, or where something else than what is
    ``gone`` too reads a value from inside."""
    name = unit.name
    entry, leaving = view.type(unit.entry), view.type(unit.exit)
    if not is_one_stream(view, entry, leaving):
        raise Refusal(f"{name} changes the stream from {entry} to {leaving}")
    own = slots.within(inside)
    members = {*inside, *slots.exports(own, inside)}
    presents = {value for slot in own for value in slot.present}
    for node in members:
        for value in view.results(node):
            if value is unit.exit:
                continue
            strangers = [u for u in view.users(value) if u not in members and u not in gone]
            if strangers and all(_attends_over(view, u, value) for u in strangers):
                raise Refusal(
                    f"layers behind {name} attend over its keys and values: they have none of "
                    "their own, and can only leave with it", strangers[0],
                )  # fmt: skip
            if strangers:
                raise Refusal(
                    f"{view.name(strangers[0])} reads a value from inside {name}", strangers[0]
                )
            if view.is_output(value) and value not in presents:
                raise Refusal(f"the graph returns {view.name(value)} from inside {name}", node)


def _attends_over(view: View, node: Node, value: Value) -> bool:
    return view.op(node) == "sdpa" and any(v is value for v in view.operands(node)[1:3])
