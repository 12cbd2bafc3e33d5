"""How long a search takes, by where it measures, and whether it finds the same."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from rich.table import Table

from ...ir.core.errors import Missing
from ...passes.recipe import Recipe
from ..search.budget import Budget
from ..search.measure import measured
from ..search.ray_workers import OnRay
from ..search.rounds import Rounds
from ..search.search import ROUNDS
from ..search.workers import Forked, Here, Workers
from .budget_subject import Subject

T = TypeVar("T")


def workers(subject: Subject, budget: str) -> Table:
    """One ``w4-eora``, the survey, and the rounds by each kind of worker: wall time, and processor
    time of this process and those that it forked (of Ray's, none is seen from here)."""
    table = Table(title=f"{subject.name}, {budget}", box=None, pad_edge=False)
    for column in ("what", "wall s", "processor s", "measured", "found"):
        table.add_column(column)
    _, *spent = _spent(lambda: subject.optimized(Recipe.load("w4-eora")))
    table.add_row("w4-eora", *spent)
    menu, *spent = _spent(subject.menu)
    table.add_row("survey", *spent)
    measure = partial(measured, subject.graph, subject.judge, subject.parts.fit)
    engines: dict[str, Callable[[], Workers]] = {
        "this process": lambda: Here(measure),
        "1 worker": lambda: Forked(1, measure),
        "2 workers": lambda: Forked(2, measure),
        "ray": lambda: OnRay(subject.graph, subject.parts, None),
    }
    first: dict[str, object] = {}
    for name, make in engines.items():
        try:
            engine = make()
        except Missing as error:
            table.add_row(name, "", "", "", str(error))
            continue
        rounds = Rounds(
            subject.graph, subject.source, Budget.parse(budget), subject.parts, menu, subject.judge,
            ROUNDS, lambda *_: None, workers=engine,
        )  # fmt: skip
        best, *spent = _spent(rounds.found)
        engine.close()
        points = [(str(p.recipe), p.costs, p.measured) for p in rounds.measured.values()]
        same = [
            what for what, known in (("recipe", str(best.recipe)), ("figures", points))
            if first.setdefault(what, known) == known
        ]  # fmt: skip
        table.add_row(name, *spent, str(len(points)), f"the first's {' and '.join(same) or 'not'}")
    return table


def _spent(run: Callable[[], T]) -> tuple[T, str, str]:
    """What ``run`` gives, and the seconds that it took, of the clock and of processors."""
    started, before = time.perf_counter(), _processor_seconds()
    result = run()
    wall, spent = time.perf_counter() - started, _processor_seconds() - before
    return result, f"{wall:.1f}", f"{spent:.1f}"


def _processor_seconds() -> float:
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
