"""The move *bypass*: the residual stream runs around a block, or through it again."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..core.errors import BadInput, Refusal
from ..core.types import UNKNOWN_DIM, Dim, Type
from ..core.view import Node, Value, View
from ..structure.recognize import Block, SubBlock
from ..vocab.builder import Builder
from .slots import Slots


@dataclass(frozen=True)
class Path:
    """Which blocks the stream runs through, in order: ``str`` prints what ``parse`` takes."""

    blocks: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Path:
        """``0-3,3,5-11``: blocks and runs of them. Raises ``BadInput`` where it is none."""
        found: list[int] = []
        for part in text.split(","):
            match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
            if match is None:
                raise BadInput(f"path {text!r}: {part!r} is not a block, as 3, and no run, as 0-3")
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first:
                raise BadInput(f"path {text!r}: the run {part} goes backwards")
            found += range(first, last + 1)
        return cls(tuple(found))

    def __str__(self) -> str:
        runs: list[list[int]] = []
        for block in self.blocks:
            if runs and block == runs[-1][-1] + 1:
                runs[-1].append(block)
            else:
                runs.append([block])
        return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def refusals(view: View, blocks: Sequence[Block | SubBlock]) -> list[str]:
    """For each block why it cannot be left out; empty where it can."""
    order, slots = _order(view), Slots(view)
    return [_refusal(view, block, order, slots) for block in blocks]


def _refusal(
    view: View, block: Block | SubBlock, order: Mapping[Node, int], slots: Slots
) -> str:
    try:
        body = _body(view, block, order)
        _check_closed(view, block, body, slots)
        slots.stand_ins(slots.within(body), body)
    except Refusal as refusal:
        return refusal.reason
    return ""


def bypass(view: View, block: Block | SubBlock, *, rule: str, step: int = 0) -> None:
    """Connect the residual stream around a block or sub-block, whose nodes and weights leave.

    So do its slots of the key-value cache; the others are numbered anew. Raises ``Refusal`` where
    the stream changes its type within it, or where something outside reads a value from inside.
    """
    body, slots = _body(view, block, _order(view)), Slots(view)
    _check_closed(view, block, body, slots)
    leaving = slots.within(body)
    stand_ins = slots.stand_ins(leaving, body)
    with view.made_by(rule, step):
        slots.release(leaving, stand_ins, body)
        view.replace(block.exit, block.entry)
        view.erase_dead(body[-1])
        slots.renumber()
    view.drop_unused_weights()


def follow(
    view: View, blocks: Sequence[Block], path: Path, *, rule: str, step: int = 0
) -> tuple[int, ...]:
    """Let the stream run through ``blocks`` as ``path`` says; how often each is run through.

    ``blocks`` are consecutive: each starts where the last one ends, or at a selection of tokens. A
    repeated block is copied with slots of its own in the key-value cache; its weights stay shared.
    The path of every block once, in order, changes nothing. Raises ``Refusal`` as ``bypass`` and
    where blocks come first in another order than the graph's, ``BadInput`` for a block that is not
    there.
    """
    counts = _counts(path, len(blocks))
    if counts == (1,) * len(blocks):
        return counts
    order, slots = _order(view), Slots(view)
    bodies = [_body(view, block, order) for block in blocks]
    for block, body, count in zip(blocks, bodies, counts, strict=True):
        if count != 1:
            _check_closed(view, block, body, slots)
    if max(counts) > 1:
        _check_joined(blocks, path)
    gone = {node for body, count in zip(bodies, counts, strict=True) for node in body if not count}
    leaving = slots.within(gone)
    stand_ins = slots.stand_ins(leaving, gone)
    with view.made_by(rule, step):
        slots.release(leaving, stand_ins, gone)
        if max(counts) > 1:
            _rewire(view, blocks, bodies, path, slots)
        else:
            _leave_out(view, blocks, bodies, counts)
        slots.renumber()
    view.drop_unused_weights()
    return counts


def _check_joined(blocks: Sequence[Block], path: Path) -> None:
    for before, block in itertools.pairwise(blocks):
        if block.entry is not before.exit:
            raise Refusal(
                f"path {path}: tokens are selected between block {before.index} and the next; "
                "blocks can be left out there, not repeated"
            )


def _leave_out(
    view: View, blocks: Sequence[Block], bodies: Sequence[list[Node]], counts: Sequence[int]
) -> None:
    """The last first: what read a block's exit reads its entry, the exit of the one before."""
    for block, body, count in reversed(list(zip(blocks, bodies, counts, strict=True))):
        if not count:
            view.replace(block.exit, block.entry)
            view.erase_dead(body[-1])


def _counts(path: Path, total: int) -> tuple[int, ...]:
    if not path.blocks:
        raise BadInput("the path is empty: name at least one block")
    strange = [b for b in path.blocks if b >= total]
    if strange:
        raise BadInput(f"path {path}: there is no block {strange[0]}; there are 0 to {total - 1}")
    firsts = list(dict.fromkeys(path.blocks))
    if firsts != sorted(firsts):
        raise Refusal(
            f"path {path}: block {firsts[-1]} comes first after a later one; blocks may be left "
            "out and repeated, but not moved forward"
        )
    return tuple(path.blocks.count(b) for b in range(total))


def _rewire(
    view: View, blocks: Sequence[Block], bodies: Sequence[list[Node]], path: Path, slots: Slots
) -> None:
    last = blocks[-1].exit
    # What is behind the blocks reads a stand-in, so that copies may read the last block's result.
    behind = Builder(view, view.after(view.maker(last))).identity(last, like=last)
    view.replace(last, behind)
    stream = blocks[0].entry
    entries: dict[int, Value] = {}
    for index in path.blocks:
        block, body = blocks[index], bodies[index]
        if index in entries:
            stream = _copy(view, body, {entries[index]: stream}, block.exit, slots)
            continue
        entries[index] = stream
        _redirect(view, body, block.entry, stream)
        stream = block.exit
    node = view.maker(behind)
    view.replace(behind, stream)
    gone = set(view.erase_dead(node))
    for index in sorted(set(range(len(blocks))) - set(entries), reverse=True):
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
    for node in [*body, *slots.exports(own, body)]:
        copies = view.clone(node, values, before=place)
        values.update(zip(view.results(node), copies, strict=True))
        place = view.after(view.maker(copies[-1]))
    if own:
        slots.grow([values[value] for slot in own for value in slot.present])
    return values[last]


# --- what lies in a block -----------------------------------------------------------------------


def _order(view: View) -> dict[Node, int]:
    return {node: place for place, node in enumerate(view.nodes())}


def bodies(view: View, blocks: Sequence[Block | SubBlock]) -> list[list[Node]]:
    """The nodes between each block's entry and exit, in the order of the graph.

    Masks, rotary tables and sizes that are made outside of the stream do not belong to them.
    """
    order = _order(view)
    return [_body(view, block, order) for block in blocks]


def _body(view: View, block: Block | SubBlock, order: Mapping[Node, int]) -> list[Node]:
    before = view.producer(block.entry)
    start = -1 if before is None else order.get(before, -1)
    stack, seen = [view.producer(block.exit)], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen or order[node] <= start:
            continue
        seen.add(node)
        stack += [view.producer(v) for v in view.arguments(node) if v is not block.entry]
    inside: list[Node] = []
    stream = {block.entry}
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
    given = (dim for value in view.inputs() for dim in view.type(value).shape or ())
    known = {word for dim in given for word in _words(dim)}

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
    view: View, block: Block | SubBlock, inside: Sequence[Node], slots: Slots
) -> None:
    name = f"block {block.index}"
    entry, leaving = view.type(block.entry), view.type(block.exit)
    if not is_one_stream(view, entry, leaving):
        raise Refusal(f"{name} changes the stream from {entry} to {leaving}")
    own = slots.within(inside)
    members = {*inside, *slots.exports(own, inside)}
    presents = {value for slot in own for value in slot.present}
    for node in members:
        for value in view.results(node):
            if value is block.exit:
                continue
            strangers = [u for u in view.users(value) if u not in members]
            if strangers:
                raise Refusal(
                    f"{view.name(strangers[0])} reads a value from inside {name}", strangers[0]
                )
            if view.is_output(value) and value not in presents:
                raise Refusal(f"the graph returns {view.name(value)} from inside {name}", node)
