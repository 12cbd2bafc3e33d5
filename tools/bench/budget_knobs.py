"""Which knobs a found recipe turned, and what is lost with each of them taken away."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence

from rich.table import Table

from ...ir.core.errors import BadInput
from ..run.machine import processor
from ..search.menu import Menu
from ..search.problem import Choice
from ..search.recipe_of import Cut, Held, HeldTables, Thinned
from ..search.timing import Timing
from .budget_rivals import measured_row
from .budget_subject import Subject


def turned(choice: Choice) -> str:
    """What of a choice each knob changed: ``bits 60 of 71, rank 12``."""
    held = [option.what for option in choice.chosen.values()]
    linears = [what for what in held if isinstance(what, Held)]
    counts = Counter({
        "bits": sum(what.form is not None for what in linears),
        "rank": sum(bool(what.path.rank) for what in linears),
        "layers": len(choice.dropped),
        "heads": sum(isinstance(what, Thinned) and what.gone > 0 for what in held),
        "tables": sum(isinstance(what, HeldTables) and what.bits is not None for what in held),
        "tokens": sum(isinstance(what, Cut) and what.by is not None for what in held),
    })  # fmt: skip
    widths = Counter(what.form.bits for what in linears if what.form is not None)
    by_bits = " ".join(f"{count}x{bits}" for bits, count in sorted(widths.items()))
    return ", ".join(
        f"{knob} {count}" + (f" ({by_bits})" if knob == "bits" else "")
        for knob, count in counts.items() if count
    )  # fmt: skip


def knobs(subject: Subject, budgets: Sequence[str]) -> Table:
    """At each budget what is found with all knobs and with each one taken away, on unseen data."""
    table = Table(title=f"{subject.name}: knobs", box=None, pad_edge=False)
    for column in ("budget", "without", "turned", "MB", "loss", "95 %"):
        table.add_column(column, overflow="fold")
    timing = Timing(machine=processor()) if any("ms=" in budget for budget in budgets) else None
    for budget in budgets:
        whole = subject.menu(timing, budget)
        for without in ("", *whole.using):
            cells = (budget, without or "none", *_cells(subject, budget, whole, without))
            table.add_row(*cells)
            print(*cells, sep="\t", file=sys.stderr, flush=True)
    return table


def _cells(subject: Subject, budget: str, whole: Menu, without: str) -> tuple[str, ...]:
    try:
        best = subject.search(budget, whole.without(without) if without else whole).best
    except BadInput as error:
        return str(error).partition(":")[0], "", "", ""
    row = measured_row(subject, without, best.recipe)
    loss = row.loss
    return (
        turned(best.choice), f"{row.bytes / 1e6:.3f}", f"{loss.value:.3%}",
        f"{loss.low:.3%} to {loss.high:.3%}",
    )  # fmt: skip
