"""Layers: runs of branches along one residual stream, each of which the stream can run around."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..core.view import Node, Operand, Value, View, is_value
from .asides import without_aside
from .spine import Spine, feeds
from .stacked import guesses

_TO_END = 2**63 - 1
_PICTURE_RANK = 4
"""Of ``[batch, channels, height, width]``."""


@dataclass(frozen=True)
class SubBlock:
    """What lies between two additions of the spine: a branch and the addition that joins it."""

    index: int
    addition: Node
    linears: tuple[str, ...]
    attentions: tuple[int, ...]
    """Indices into ``Structure.attentions``."""
    entry: Value
    """The residual stream that the branch reads."""
    exit: Value
    """The residual stream behind it: the sum, or its norm where norms come after the sums."""
    attends: bool
    """Whether there is attention in it, one that is read as ``sdpa`` or another, or what stands in
    its place: ``mixers``."""


@dataclass(frozen=True)
class Block:
    """A run of sub-blocks that starts at one with attention: a layer."""

    index: int
    sub_blocks: tuple[SubBlock, ...]
    linears: tuple[str, ...]
    attentions: tuple[int, ...]
    tower: int = 0
    """Which run of blocks it belongs to: within a tower, a block starts where the last one ends, or
    at a selection of its tokens."""

    @property
    def entry(self) -> Value:
        """The residual stream before the block."""
        return self.sub_blocks[0].entry

    @property
    def exit(self) -> Value:
        """The residual stream behind the block."""
        return self.sub_blocks[-1].exit


def layers_within(
    view: View, spine: Spine, order: Mapping[Node, int], attending: Collection[Node]
) -> frozenset[int]:
    """The branches that are parts of no block: those with several layers in them or beside them.

    In a branch one attention looks at another's result where streams look at each other (SD3's of
    text and of image), or where one sum runs around whole layers. Attention that the stream feeds,
    but by way of none of the sums that follow, reads what skips these sums, as in a UNet and in
    DETR's decoder, which looks at its encoder in every layer: from there on nothing is one stream.
    """
    skipped = len(spine.additions)
    branches: dict[int, list[Node]] = {}
    for node in attending:
        place = spine.position.get(node)
        if place is None or place >= len(spine.additions) or node in spine.chain:
            continue
        if not feeds(spine, order, node):
            skipped = min(skipped, place)
        elif place or order[node] > spine.entry:
            branches.setdefault(place, []).append(node)
    crowded = {p for p, nodes in branches.items() if _follow_each_other(view, spine, nodes)}
    return frozenset(crowded.union(range(skipped, len(spine.additions))))


def _follow_each_other(view: View, spine: Spine, nodes: Sequence[Node]) -> bool:
    """Whether one of the nodes of a branch needs what another computes."""
    if len(nodes) < 2:
        return False
    place = spine.position[nodes[0]]
    stack, visited = list(nodes), set(nodes)
    while stack:
        for value in view.arguments(stack.pop()):
            maker = view.producer(value)
            if maker in nodes:
                return True
            if maker is None or maker in visited or spine.position.get(maker) != place:
                continue
            visited.add(maker)
            stack.append(maker)
    return False


def layers_of(view: View, subs: Sequence[SubBlock], beside: Collection[int]) -> tuple[Block, ...]:
    """Sub-blocks in runs: a run starts at attention, or at each one where there is none at all.

    ``beside`` is what ``layers_within`` says: no such branch is a part of a block.
    """
    blocks: list[Block] = []
    for i, run in enumerate(_layers(view, _runs(view, subs), beside)):
        names = tuple(name for sub in run for name in sub.linears)
        sites = tuple(a for sub in run for a in sub.attentions)
        tower = 0
        if blocks:
            goes_on = blocks[-1].exit is _stream_of(view, run[0].entry)
            tower = blocks[-1].tower + (not goes_on)
        blocks.append(Block(i, tuple(run), names, sites, tower))
    return tuple(blocks)


def _runs(view: View, subs: Sequence[SubBlock]) -> list[list[SubBlock]]:
    """Layers. Where nothing attends, branches without a linear, which join tokens (FNet), start
    them. What comes before the first and has no linear, or another rank, is a stem: positions by
    convolution, a backbone."""
    starts = [sub.attends for sub in subs]
    mixing = guesses(view, [sub.entry for sub in subs], starts)
    if any(mixing):
        starts = mixing
    if not any(starts):
        joins = [not sub.linears for sub in subs]
        starts = joins if any(joins) and not all(joins) else [True] * len(subs)
    starts = _named_apart(subs, _led(view, subs, starts))
    runs: list[list[SubBlock]] = []
    first = subs[starts.index(True)] if subs else None
    for sub, start in zip(subs, starts, strict=True):
        assert first is not None
        if start or (not runs and sub.linears and _rank(view, sub) == _rank(view, first)):
            runs.append([])
        if runs:
            runs[-1].append(sub)
    return runs


def _led(view: View, subs: Sequence[SubBlock], starts: Sequence[bool]) -> list[bool]:
    """The starts of layers whose attention comes behind other branches, as a Conformer's does
    behind the first half of its feed-forward (arXiv 2005.08100): as many branches as lead to the
    first attention are what the last one lacks behind it."""
    places = [i for i, start in enumerate(starts) if start]
    steps = {after - before for before, after in pairwise(places)}
    if len(steps) != 1:
        return list(starts)
    (step,), lead = steps, 0
    while lead < places[0]:
        before = subs[places[0] - lead - 1]
        if not before.linears or _rank(view, before) != _rank(view, subs[places[0]]):
            break
        lead += 1
    if not lead or len(subs) - places[-1] != step - lead:
        return list(starts)
    return [i + lead in places for i in range(len(subs))]


def _named_apart(subs: Sequence[SubBlock], starts: Sequence[bool]) -> list[bool]:
    """The starts, and branches whose weights' names are of another layer than those of the branch
    before: each layer of Nemotron-H (arXiv 2504.03624) holds attention, a state or feed-forward
    alone. The layer's number is where the names of the first two starts part; where linears of one
    branch have several, they are numbered one by one, and tell nothing."""
    firsts = [sub.linears[0].split(".") for sub, start in zip(subs, starts, strict=True)
              if start and sub.linears][:2]  # fmt: skip
    if len(firsts) < 2:
        return list(starts)
    place = next((i for i, (a, b) in enumerate(zip(*firsts, strict=False)) if a != b), 0)
    if not place or not all(parts[place].isdigit() for parts in firsts):
        return list(starts)
    numbers = [{parts[place] for name in sub.linears if len(parts := name.split(".")) > place
                and parts[:place] == firsts[0][:place]} for sub in subs]  # fmt: skip
    if any(len(own) > 1 for own in numbers):
        return list(starts)
    layer = {i: own.pop() for i, own in enumerate(numbers) if own}
    apart = list(starts)
    for run in _between(starts):
        named = [(i, layer[i]) for i in run if i in layer]
        turns = [b[0] for a, b in pairwise(named) if a[1] != b[1]]
        # Where a run comes back to a layer, several share the weights, and names tell nothing.
        if len(turns) < len({layer for _, layer in named}):
            for i in turns:
                apart[i] = True
    return _led_by_names(starts, apart, layer)


def _led_by_names(
    starts: Sequence[bool], apart: list[bool], layer: Mapping[int, str]
) -> list[bool]:
    """``apart`` without the starts whose layer began at a branch before, as that of a Conformer
    does at the first half of its feed-forward (Seamless, which has an adapter behind its last)."""
    led = False
    for i in [i for i, (old, new) in enumerate(zip(starts, apart, strict=True)) if new > old]:
        after = next((j for j in range(i + 1, len(apart)) if apart[j]), None)
        if after is not None and layer.get(after) == layer[i]:
            apart[after], led = False, True
    first = starts.index(True)
    lead = first
    while led and lead and layer.get(lead - 1) == layer.get(first) is not None:
        lead -= 1
    apart[first], apart[lead] = False, True
    return apart


def _between(starts: Sequence[bool]) -> list[range]:
    """Places from each start to the next."""
    places = [i for i, start in enumerate(starts) if start]
    return [range(a, b) for a, b in pairwise([*places, len(starts)])]


def _rank(view: View, sub: SubBlock) -> int | None:
    return view.type(sub.entry).rank


def _layers(
    view: View, runs: Sequence[Sequence[SubBlock]], beside: Collection[int]
) -> list[Sequence[SubBlock]]:
    """Those of the runs that are layers, each up to where its stream ends (a stage of pictures is
    resized, a latent is drawn). Branches without attention are one where the stream goes on from
    them to the next, as where their attention was left out, or comes to them from the last."""
    layers = [_unbroken(view, run) for run in runs]
    if not any(sub.attends for run in layers for sub in run[:2]):
        return layers
    layers = [run for run in layers
              if _is_layer(view, run) and not any(sub.index in beside for sub in run)]  # fmt: skip
    for i, run in reversed(list(enumerate(layers))):
        pairs = [(run, layers[i + 1])] if i + 1 < len(layers) else []
        pairs += [(layers[i - 1], run)] if i else []
        joined = any(_stream_of(view, b[0].entry) is a[-1].exit for a, b in pairs)
        if not any(sub.attends for sub in run[:2]) and not joined:
            del layers[i]
    return layers


def _unbroken(view: View, run: Sequence[SubBlock]) -> Sequence[SubBlock]:
    """The first sub-blocks of a run, each of which starts where the last one ends."""
    for i, sub in enumerate(run[1:], 1):
        if _stream_of(view, sub.entry) is not run[i - 1].exit:
            return run[:i]
    return run


def _is_layer(view: View, run: Sequence[SubBlock]) -> bool:
    """Whether it is not attention among convolutions of pictures, as in an autoencoder."""
    others = [sub for sub in run if not sub.attends]
    convolves = _rank(view, run[0]) == _PICTURE_RANK and not any(sub.linears for sub in others)
    return not (others and convolves)


def _stream_of(view: View, value: Value) -> Value:
    """The stream before tokens of it were selected or merged, or before it was taken apart and put
    together again as it was (Flux, between layers of text and image in one row)."""
    value, _ = uncut(view, without_aside(view, uncut(view, value)[0]))
    node = view.producer(value)
    if node is not None and view.op(node) == "token_merge":
        return _stream_of(view, view.tensor(node))
    if node is None or view.op(node) != "concat":
        return value
    source: Operand = None
    reached: Operand = 0
    for part in view.arguments(node):
        cut = view.producer(part)
        if cut is None or view.op(cut) != "slice" or view.attrs(cut) != {
            "dim": view.attrs(node)["dim"], "step": 1,
        }:  # fmt: skip
            return value
        whole, start, end = view.operands(cut)
        if (start is not reached and start != reached) or source not in (None, whole):
            return value
        source, reached = whole, end
    return source if is_value(source) and reached == _TO_END else value


def uncut(view: View, value: Value) -> tuple[Value, tuple[Value, ...]]:
    """The stream before tokens of it were selected, and the positions kept each time, in order."""
    positions: list[Value] = []
    node = view.producer(value)
    while node is not None and view.op(node) == "token_select":
        value = view.tensor(node)
        positions.insert(0, view.tensor(node, 1))
        node = view.producer(value)
    return value, tuple(positions)
