"""The tables of embeddings as one place: their bits, and what these do to the loss, measured."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from ...ir.core.view import View
from ...ir.core.weights import MemoryWeight, Weight
from ...ir.structure.recognize import Structure, recognize
from ...ir.vocab.targets import CPU, Target
from ...passes.weights.quantize import Quantize
from ...passes.weights.tables import Table, TableForm, tables
from .judge import Judge
from .problem import KEPT, Option, Place
from .recipe_of import HeldTables

NAME, KIND = "tables of embeddings", "tables"
FORMS = (HeldTables(8, 64), HeldTables(8, 32), HeldTables(4, 64), HeldTables(4, 32))


@dataclass(frozen=True)
class Tables:
    """The tables that a form stores: those that it does not refuse."""

    form: TableForm
    stored: Sequence[Table]

    @classmethod
    def of(cls, view: View, structure: Structure, held: HeldTables, target: Target) -> Tables:
        by = held.pass_(target)
        assert isinstance(by, Quantize)
        form = TableForm(by, by.name)
        all_tables = tables(view, structure)
        return cls(form, [table for table in all_tables if form.refusal(table) is None])

    def rounded(self, view: View) -> View:
        """A copy whose tables, and the heads tied to them, hold the rounded numbers."""
        copy = view.copy()
        rounded: dict[Hashable, Weight] = {}
        for table in self.stored:
            weight = view.weight(table.embedding.weight)
            assert weight is not None
            numbers = self.form.by.quantize(weight.read(), table.embedding.name).dequantized()
            rounded[weight.key] = MemoryWeight(numbers.to(weight.dtype))
        structure = recognize(copy)
        values = [x.weight for x in structure.embeddings] + [x.weight for x in structure.linears]
        for value in values:
            held = copy.weight(value)
            if held is not None and held.key in rounded:
                copy.set_weight(value, rounded[held.key])
        return copy

    def nbytes(self, view: View) -> tuple[int, int]:
        """Stored bytes before and after."""
        before = {t.embedding.name: view.weight(t.embedding.weight) for t in self.stored}
        sizes = {name: 0 if weight is None else weight.nbytes for name, weight in before.items()}
        sites = [self.form.site(t, sizes[t.embedding.name]) for t in self.stored]
        return sum(site.bytes_before for site in sites), sum(site.bytes_after for site in sites)


def storable_tables(view: View, structure: Structure) -> list[HeldTables]:
    """The forms that some table can have."""
    return [held for held in FORMS if Tables.of(view, structure, held, CPU).stored]


def tables_place(
    view: View, structure: Structure, judge: Judge, target: Target
) -> Place | None:
    """The place; ``None`` where no table can be stored."""
    whole = max(
        (Tables.of(view, structure, held, target).nbytes(view)[0] for held in FORMS), default=0
    )
    options = [Option(HeldTables(), {"bytes": whole, "loss": 0.0}, KEPT)]
    for held in FORMS:
        storable = Tables.of(view, structure, held, target)
        if not storable.stored:
            continue
        before, after = storable.nbytes(view)
        loss = judge.mean_of(storable.rounded(view))
        options.append(Option(held, {"bytes": whole - before + after, "loss": loss}, KIND))
    return Place(NAME, options) if len(options) > 1 else None
