"""What a graph keeps between steps as blocks leave and multiply: the slots of its cache, and the
states of convolutions and recurrences, by their inputs and outputs and the numbers of these."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..core.errors import Refusal
from ..core.view import Node, Value, View
from ..structure.cache_slots import (
    PARTS,
    PAST_AXIS,
    SLOTS_KEY,
    STREAM,
    CacheSlot,
    find_slot,
    is_recurrent,
    latent_slots,
    past_name,
    past_slot,
    present_name,
    present_of,
    state_name,
)
from ..vocab import traits
from ..vocab.builder import Builder


@dataclass(frozen=True)
class State:
    """What a layer keeps that does not grow: the graph's input and the output that goes on."""

    name: str
    """Of the input, ``past.N.conv`` or ``past.N.recurrent``; N is the layer's, in the source."""
    past: tuple[Value]
    present: tuple[Value]


Kept = CacheSlot | State
_TO_END = 2**63 - 1
_SHAPING = ("concat", "pad", "expand")
"""What may lie between a layer and the output of its state, beside what rearranges."""


class Slots:
    """The slots of a graph's key-value cache before an edit; ``renumber`` after it.

    ``layers`` holds, for each slot by its input of keys, the layer of the source that it is of.
    """

    def __init__(self, view: View) -> None:
        self.view = view
        self.sites: list[tuple[Node, CacheSlot]] = []
        for node in view.nodes():
            slot = find_slot(view, node) if view.op(node) == "sdpa" else None
            # Of layers that look at the same keys the first makes them.
            if slot is not None and all(slot.past != other.past for _, other in self.sites):
                self.sites.append((node, slot))
        latent = latent_slots(view, {value for _, slot in self.sites for value in slot.past})
        if latent:
            self.sites = sorted([*self.sites, *latent], key=lambda site: self._order[site[0]])
        numbers = json.loads(view.metadata().get(SLOTS_KEY, "[]"))
        names = dict(zip(view.inputs(), view.input_names(), strict=True))
        self.layers: dict[Value, int] = {}
        for index, (_, slot) in enumerate(self.sites):
            named = past_slot(names[slot.past[0]])
            number = index if named is None else named
            self.layers[slot.past[0]] = numbers[number] if number < len(numbers) else number
        self._state = {v for _, slot in self.sites for v in (*slot.past, *slot.present)}
        returned = dict(zip(view.output_names(), view.outputs(), strict=True))
        self.states = [
            State(name, (value,), (returned[present_of(name)],))
            for value, name in names.items() if is_recurrent(name) and present_of(name) in returned
        ]  # fmt: skip
        self._left: set[Value] = set()

    def within(self, body: Collection[Node]) -> list[Kept]:
        """The slots of the attention sites among these nodes, those of latents that are joined
        there, and the states that they update."""
        members = set(body)
        slots = [slot for node, slot in self.sites if node in members]
        return [*slots, *(state for state in self.states if self._behind(state, members))]

    def exports(self, slots: Iterable[Kept], body: Collection[Node]) -> list[Node]:
        """Nodes outside of ``body`` that shape what it computes into the slots' outputs."""
        shapers: list[Node] = []
        members = set(body)
        for slot in slots:
            if isinstance(slot, State):
                behind = self._behind(slot, members)
                shapers += sorted(behind - members, key=self._order.__getitem__)
                continue
            for value in slot.present:
                chain, node = [], self.view.producer(value)
                while node is not None and node not in body:
                    chain.append(node)
                    node = self.view.producer(self.view.tensor(node))
                shapers += chain[::-1]
        return shapers

    @cached_property
    def _order(self) -> dict[Node, int]:
        return {node: place for place, node in enumerate(self.view.nodes())}

    def _behind(self, state: State, body: set[Node]) -> set[Node]:
        """The nodes of ``body`` that a state's output is shaped from, and those outside that shape
        it; empty where it is the state of another layer."""
        view = self.view
        inside: set[Node] = set()
        shaping: set[Node] = set()
        stack = [view.producer(state.present[0])]
        while stack:
            node = stack.pop()
            if node is None or node in inside or node in shaping:
                continue
            if node in body:
                inside.add(node)
            elif view.op(node) in _SHAPING or traits(view.op(node)).rearranges:
                shaping.add(node)
                stack += [view.producer(value) for value in view.arguments(node)]
        below = set(inside)
        for node in sorted(shaping, key=self._order.__getitem__):
            if any(view.producer(value) in below for value in view.arguments(node)):
                below.add(node)
        return below

    def imports(self, slots: Iterable[Kept], body: Collection[Node]) -> list[Node]:
        """Nodes outside of ``body`` that bring the slots' states there, in order."""
        view, members = self.view, set(body)
        queue = [value for slot in slots if isinstance(slot, State) for value in slot.past]
        found: dict[Node, None] = {}
        for value in queue:
            strange = self._strangers(value, members)
            bringing = [u for u in self._readers(value, members) if u not in strange]
            found |= dict.fromkeys(bringing)
            queue += [result for user in bringing for result in view.results(user)]
        return sorted(found, key=self._order.__getitem__)

    def _readers(self, value: Value, body: Collection[Node]) -> list[Node]:
        return [user for user in self.view.users(value) if user not in body]

    def _strangers(self, value: Value, body: Collection[Node]) -> list[Node]:
        """Who reads a state outside of ``body``, but for what only brings it there."""
        known: dict[Node, bool] = {}
        return [user for user in self._readers(value, body) if self._is_strange(user, body, known)]

    def _is_strange(self, node: Node, body: Collection[Node], known: dict[Node, bool]) -> bool:
        """Whether what a node makes is returned, or read by something that does not lead to
        ``body``. A size may lead to the whole graph: each node is asked once."""
        view, stack = self.view, [node]
        while stack:
            results = view.results(stack[-1])
            users = [user for result in results for user in self._readers(result, body)]
            unknown = next((user for user in users if user not in known), None)
            if any(view.is_output(result) or not view.users(result) for result in results) or any(
                known.get(user) for user in users
            ):
                known[stack.pop()] = True
            elif unknown is None:
                known[stack.pop()] = False
            else:
                stack.append(unknown)
        return known[node]

    def stand_ins(
        self, leaving: Sequence[Kept], body: Collection[Node]
    ) -> dict[Value, Value]:
        """For each input of leaving slots that nodes outside of ``body`` measure, one that stays.

        Where no slot of the same length stays none is named for what asks for the number of rows
        or of tokens alone, which ``release`` answers otherwise. Raises ``Refusal`` where it cannot.
        """
        substitutes: dict[Value, Value] = {}
        members = set(body)
        for slot in leaving:
            single = isinstance(slot, State)
            readers = self._strangers if single else self._readers
            strangers = [user for value in slot.past for user in readers(value, members)]
            if not strangers:
                continue
            others: list[Kept] = [*self.states] if single else [slot for _, slot in self.sites]
            stays = next((s for s in others if s not in leaving and self._alike(s, slot)), None)
            if stays is None:
                self._check_measured(slot, strangers, leaving)
                continue
            substitutes.update(zip(slot.past, stays.past, strict=True))
        return substitutes

    def _check_measured(
        self, slot: Kept, strangers: Sequence[Node], leaving: Sequence[Kept]
    ) -> None:
        """Raise ``Refusal`` where it takes the slot itself to answer those who read it."""
        for node in strangers:
            dim = self.view.attrs(node)["dim"] if self.view.op(node) == "size" else None
            if dim == 0 and self._as_many(slot, leaving) is not None:
                continue
            if dim == PAST_AXIS and isinstance(slot, CacheSlot) and self._text() is not None:
                continue
            raise Refusal(
                f"{self.view.name(node)} reads the cache {self.view.name(slot.past[0])}, and no "
                "other of its length stays; nor is there an attention_mask that tells how many "
                "tokens were before", node,
            )  # fmt: skip

    def _text(self) -> tuple[Value, Value] | None:
        """The inputs that say which tokens there are ``[batch, past + seq]``, and which are read
        ``[batch, seq]``."""
        named = dict(zip(self.view.input_names(), self.view.inputs(), strict=True))
        mask, read = named.get("attention_mask"), named.get("input_ids", named.get(STREAM))
        return None if mask is None or read is None else (mask, read)

    def _answer(self, node: Node, slot: Kept, old: Value, leaving: Sequence[Kept]) -> None:
        """Let a node that measures a leaving slot measure the text instead.

        Where no other layer keeps keys the mask may be of the tokens that are read, and none were
        before: what is left does not look at them but by its states.
        """
        view = self.view
        rows = self._as_many(slot, leaving)
        if view.attrs(node)["dim"] == 0 and rows is not None:
            view.rewire(node, old, rows)
            return
        text = self._text()
        assert text is not None
        b = Builder(view, node)
        mask, read = text
        before = b.slice(mask, b.size(read, dim=1), _TO_END, dim=1, step=1)
        result = view.results(node)[0]
        view.replace(result, b.size(before, dim=1))
        view.erase_dead(node)

    def _as_many(self, slot: Kept, leaving: Sequence[Kept]) -> Value | None:
        """An input of as many rows that stays."""
        view, gone = self.view, {value for other in leaving for value in other.past}
        rows = (view.type(slot.past[0]).shape or (None,))[0]
        staying = (value for value in view.inputs() if value not in gone)
        return next((v for v in staying if (view.type(v).shape or ("",))[0] == rows), None)

    def _alike(self, a: Kept, b: Kept) -> bool:
        pairs = zip((*a.past, *a.present), (*b.past, *b.present), strict=True)
        return all(self.view.type(x).shape == self.view.type(y).shape for x, y in pairs)

    def release(
        self, leaving: Sequence[Kept], stand_ins: dict[Value, Value], body: Collection[Node]
    ) -> None:
        """Take the outputs of leaving slots back, and let others measure ``stand_ins``."""
        view = self.view
        gone = {value for slot in leaving for value in slot.present}
        outputs = zip(view.output_names(), view.outputs(), strict=True)
        view.set_outputs({name: value for name, value in outputs if value not in gone})
        states = {slot.past[0] for slot in leaving if isinstance(slot, State)}
        self._left |= states
        for slot, old in [(one, value) for one in leaving for value in one.past]:
            readers = self._strangers if old in states else self._readers
            for user in readers(old, body):
                if old in stand_ins:
                    view.rewire(user, old, stand_ins[old])
                else:
                    self._answer(user, slot, old, leaving)
        for value in gone:
            if not view.users(value) and (maker := view.producer(value)) is not None:
                view.erase_dead(maker)

    def copies(self, slots: Iterable[Kept]) -> dict[Value, Value]:
        """New inputs for a copy of a block, by those of the block's own slots. The states of a copy
        have a number of their own, behind all others."""
        inputs: dict[Value, Value] = {}
        numbers = [int(state.name.split(".")[1]) for state in self.states]
        for slot in slots:
            if isinstance(slot, State):
                name = state_name(max(numbers) + 1, slot.name.rpartition(".")[2])
                inputs[slot.past[0]] = self.view.add_input(name, slot.past[0])
                continue
            for value, part in zip(slot.past, PARTS, strict=True):
                name = f"past_key_values.{len(self.layers)}.{part}.copy"
                inputs[value] = self.view.add_input(name, value)
                self._state.add(inputs[value])
            self.layers[inputs[slot.past[0]]] = self.layers[slot.past[0]]
        return inputs

    def grow(self, own: Sequence[Kept], values: Mapping[Value, Value]) -> None:
        """Return what a copy computed, ``values`` by those of the block itself, as its slots' keys
        and values and as its states."""
        view = self.view
        named = dict(zip(view.output_names(), view.outputs(), strict=True))
        inputs = dict(zip(view.inputs(), view.input_names(), strict=True))
        made = [State(inputs[values[s.past[0]]], (values[s.past[0]],), (values[s.present[0]],))
                for s in own if isinstance(s, State)]  # fmt: skip
        self.states += made
        named |= {present_of(state.name): state.present[0] for state in made}
        presents = [values[v] for s in own if isinstance(s, CacheSlot) for v in s.present]
        named |= {f"present.{len(named)}.{i}.copy": value for i, value in enumerate(presents)}
        view.set_outputs(named)
        self._state.update(presents)

    def renumber(self) -> None:
        """Number the slots that there are now from 0 on, in the order of their blocks; the
        metadata says which layer each is of."""
        view = self.view
        if self._left:
            inputs = zip(view.input_names(), view.inputs(), strict=True)
            view.set_inputs({name: value for name, value in inputs if value not in self._left})
        slots = Slots(view).sites
        if not self.sites:
            return
        pasts = {past_name(i, p): v for i, (_, slot) in enumerate(slots)
                 for p, v in zip(PARTS, slot.past, strict=True)}  # fmt: skip
        presents = {present_name(i, p): v for i, (_, slot) in enumerate(slots)
                    for p, v in zip(PARTS, slot.present, strict=True)}  # fmt: skip
        inputs = zip(view.input_names(), view.inputs(), strict=True)
        outputs = zip(view.output_names(), view.outputs(), strict=True)
        view.set_inputs(_placed(dict(inputs), pasts, self._state))
        view.set_outputs(_placed(dict(outputs), presents, self._state))
        view.metadata()[SLOTS_KEY] = json.dumps([self.layers[slot.past[0]] for _, slot in slots])


def _placed(
    named: dict[str, Value], slots: dict[str, Value], state: Collection[Value]
) -> dict[str, Value]:
    """``named`` with all ``slots`` in the place of the first of ``state`` in it."""
    entries: dict[str, Value] = {}
    for name, value in named.items():
        if value in state:
            entries |= slots
        else:
            entries[name] = value
    return entries
