"""Cache slots as blocks leave and multiply: their inputs and outputs, and the slots' numbers."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence

from ..core.errors import Refusal
from ..core.view import Node, Value, View
from ..structure.cache_slots import (
    PARTS,
    SLOTS_KEY,
    CacheSlot,
    find_slot,
    past_name,
    past_slot,
    present_name,
)


class Slots:
    """The slots of a graph's key-value cache before an edit; ``renumber`` after it.

    ``layers`` holds, for each slot by its input of keys, the layer of the source that it is of.
    """

    def __init__(self, view: View) -> None:
        self.view = view
        self.sites = [(node, slot) for node in view.nodes() if view.op(node) == "sdpa"
                      if (slot := find_slot(view, node)) is not None]  # fmt: skip
        numbers = json.loads(view.metadata().get(SLOTS_KEY, "[]"))
        names = dict(zip(view.inputs(), view.input_names(), strict=True))
        self.layers: dict[Value, int] = {}
        for index, (_, slot) in enumerate(self.sites):
            named = past_slot(names[slot.past[0]])
            number = index if named is None else named
            self.layers[slot.past[0]] = numbers[number] if number < len(numbers) else number
        self._state = {v for _, slot in self.sites for v in (*slot.past, *slot.present)}

    def within(self, body: Collection[Node]) -> list[CacheSlot]:
        """The slots of the attention sites among these nodes."""
        return [slot for node, slot in self.sites if node in body]

    def exports(self, slots: Iterable[CacheSlot], body: Collection[Node]) -> list[Node]:
        """Nodes outside of ``body`` that shape what it computes into the slots' outputs."""
        shapers: list[Node] = []
        for slot in slots:
            for value in slot.present:
                chain, node = [], self.view.producer(value)
                while node is not None and node not in body:
                    chain.append(node)
                    node = self.view.producer(self.view.tensor(node))
                shapers += chain[::-1]
        return shapers

    def stand_ins(
        self, leaving: Sequence[CacheSlot], body: Collection[Node]
    ) -> dict[Value, Value]:
        """For each input of leaving slots that nodes outside of ``body`` measure, one that stays.

        Raises ``Refusal`` where no slot of the same length stays.
        """
        substitutes: dict[Value, Value] = {}
        for slot in leaving:
            strangers = [u for v in slot.past for u in self.view.users(v) if u not in body]
            if not strangers:
                continue
            stays = next((s for _, s in self.sites if s not in leaving and self._alike(s, slot)),
                         None)  # fmt: skip
            if stays is None:
                raise Refusal(
                    f"{self.view.name(strangers[0])} reads the cache "
                    f"{self.view.name(slot.past[0])}, and no other of its length stays",
                    strangers[0],
                )
            substitutes.update(zip(slot.past, stays.past, strict=True))
        return substitutes

    def _alike(self, a: CacheSlot, b: CacheSlot) -> bool:
        pairs = zip((*a.past, *a.present), (*b.past, *b.present), strict=True)
        return all(self.view.type(x).shape == self.view.type(y).shape for x, y in pairs)

    def release(
        self, leaving: Sequence[CacheSlot], stand_ins: dict[Value, Value], body: Collection[Node]
    ) -> None:
        """Take the outputs of leaving slots back, and let others measure ``stand_ins``."""
        view = self.view
        gone = {value for slot in leaving for value in slot.present}
        outputs = zip(view.output_names(), view.outputs(), strict=True)
        view.set_outputs({name: value for name, value in outputs if value not in gone})
        for old, new in stand_ins.items():
            for user in view.users(old):
                if user not in body:
                    view.rewire(user, old, new)
        for value in gone:
            if not view.users(value) and (maker := view.producer(value)) is not None:
                view.erase_dead(maker)

    def copies(self, slots: Iterable[CacheSlot]) -> dict[Value, Value]:
        """New inputs for a copy of a block, by those of the block's own slots."""
        inputs: dict[Value, Value] = {}
        for slot in slots:
            for value, part in zip(slot.past, PARTS, strict=True):
                name = f"past_key_values.{len(self.layers)}.{part}.copy"
                inputs[value] = self.view.add_input(name, value)
                self._state.add(inputs[value])
            self.layers[inputs[slot.past[0]]] = self.layers[slot.past[0]]
        return inputs

    def grow(self, presents: Sequence[Value]) -> None:
        """Return what a copy computed as its slots' keys and values."""
        view = self.view
        named = dict(zip(view.output_names(), view.outputs(), strict=True))
        named |= {f"present.{len(named)}.{i}.copy": value for i, value in enumerate(presents)}
        view.set_outputs(named)
        self._state.update(presents)

    def renumber(self) -> None:
        """Number the slots that there are now from 0 on, in the order of their blocks; the
        metadata says which layer each is of."""
        view = self.view
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
