"""What a refinement adds to the rounds of a search, where it chose and on unseen data."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence

from rich.table import Table

from ..search.judge import Loss
from .budget_subject import Subject


def refinements(subject: Subject, budgets: Sequence[str], seconds: float) -> Table:
    """At each budget of bytes the recipe of the rounds, and that of the refinement behind them;
    ``seconds`` of 0 are no bound: it goes on until nothing better comes."""
    table = Table(title=f"{subject.name}: refinement", box=None, pad_edge=False)
    columns = ("budget", "refined", "measured", "CPU s", "MB", "loss judged by", "loss unseen")
    for column in columns:
        table.add_column(column, overflow="fold")
    menu = subject.menu()
    for budget in budgets:
        for allowed in (0.0, seconds or math.inf):
            started = time.process_time()
            outcome = subject.search(budget, menu, allowed)
            spent = time.process_time() - started
            assert outcome.best.measured is not None
            size, unseen = subject.judged(outcome.recipe)
            cells = (
                budget, "yes" if allowed else "no",
                str(sum(point.measured is not None for point in outcome.front)), f"{spent:.0f}",
                f"{size / 1e6:.4f}", _shown(outcome.best.measured), _shown(unseen),
            )  # fmt: skip
            table.add_row(*cells)
            print(*cells, sep="\t", file=sys.stderr, flush=True)
    return table


def _shown(loss: Loss) -> str:
    return f"{loss.value:.4%} ({loss.low:.4%} to {loss.high:.4%})"
