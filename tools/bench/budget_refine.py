"""What a refinement adds to the rounds of a search, where it chose and on unseen data."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from ...passes.recipe import Recipe
from ..search.judge import Loss, outputs
from ..search.menu import Menu
from ..search.points import Found
from ..search.skips import graph_measures
from ..search.workers import Here
from .budget_subject import Subject

SPLITS = 400
"""Drawn halves of the judged rows."""


@dataclass(frozen=True)
class Judged:
    """A recipe on each row that recipes are judged by ``[2, rows]``, and on unseen data."""

    sums: NDArray[np.float64]
    unseen: Loss


def refinements(subject: Subject, budgets: Sequence[str], seconds: float) -> Table:
    """At each budget of bytes the recipe of the rounds, that of the refinement behind them, and
    what would come of it if half of the rows chose and the other half accepted. ``seconds`` of 0
    are no bound: it goes on until nothing better comes."""
    table = Table(title=f"{subject.name}: refinement", box=None, pad_edge=False)
    columns = ("budget", "refined", "measured", "CPU s", "MB", "loss judged by", "loss unseen")
    for column in columns:
        table.add_column(column, overflow="fold")
    menu = subject.menu()
    for budget in budgets:
        judged: dict[str, Judged] = {}
        alone, spent = _searched(subject, budget, menu, 0.0, judged)
        refined, more = _searched(subject, budget, menu, seconds or math.inf, judged)
        rows = [
            _cells(budget, "no", alone, spent, judged), _cells(budget, "yes", refined, more, judged)
        ]  # fmt: skip
        mean, accepted = halved(refined, judged, str(alone.recipe))
        half = f"{mean:.4%} on the average, accepted in {accepted:.0%} of {SPLITS} splits"
        for cells in (*rows, (budget, "by halves", "", "", "", "", half)):
            table.add_row(*cells)
            print(*cells, sep="\t", file=sys.stderr, flush=True)
    return table


def _searched(
    subject: Subject, budget: str, menu: Menu, seconds: float, judged: dict[str, Judged]
) -> tuple[Found, float]:
    """What is found, and the seconds of processor time without those of unseen data."""
    aside = 0.0

    def measure(recipe: Recipe) -> dict[str, Any]:
        nonlocal aside
        graph, judge = subject.optimized(recipe), subject.judge
        tensors = outputs(graph, judge.output, judge.batches)
        loss, started = judge.loss(tensors), time.process_time()
        judged[str(recipe)] = Judged(judge.sums(tensors), subject.unseen.of(graph))
        aside += time.process_time() - started
        costs = graph_measures(graph, judge.batches[0])
        return {"costs": costs, "loss": [loss.value, loss.low, loss.high]}

    started = time.process_time()
    outcome = subject.search(budget, menu, seconds, Here(measure))
    return outcome, time.process_time() - started - aside


def halved(
    refined: Found, judged: Mapping[str, Judged], rounds: str
) -> tuple[float, float]:
    """The mean loss on unseen data where one half of the rows chooses among all that keeps the
    budget, and that is taken where it is better than what the rounds found on the other half; and
    how often it is."""
    kept = [
        str(point.recipe) for point in refined.front
        if point.measured and all(point.costs[m] <= x for m, x in refined.limits.items())
    ]  # fmt: skip
    sums = np.stack([judged[recipe].sums for recipe in kept])
    picks, accepted = by_halves(sums, kept.index(rounds))
    return float(np.mean([judged[kept[i]].unseen.value for i in picks])), accepted


def by_halves(sums: NDArray[np.float64], before: int) -> tuple[list[int], float]:
    """Which of some recipes each split takes, by sums ``[recipes, 2, rows]``; and how often that is
    another than ``before``."""
    rng, picks = np.random.default_rng(0), []
    for _ in range(SPLITS):
        order = rng.permutation(sums.shape[2])
        choosing, accepting = (
            sums[:, 0, half].sum(1) / sums[:, 1, half].sum(1) for half in np.array_split(order, 2)
        )
        best = int(choosing.argmin())
        picks.append(best if accepting[best] < accepting[before] else before)
    return picks, float(np.mean([pick != before for pick in picks]))


def _cells(
    budget: str, refined: str, outcome: Found, spent: float, judged: dict[str, Judged]
) -> tuple[str, ...]:
    assert outcome.best.measured is not None
    return (
        budget, refined, str(sum(point.measured is not None for point in outcome.front)),
        f"{spent:.0f}", f"{outcome.best.costs['bytes'] / 1e6:.4f}", _shown(outcome.best.measured),
        _shown(judged[str(outcome.recipe)].unseen),
    )  # fmt: skip


def _shown(loss: Loss) -> str:
    return f"{loss.value:.4%} ({loss.low:.4%} to {loss.high:.4%})"
