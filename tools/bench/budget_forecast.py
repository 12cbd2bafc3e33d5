"""Forecasts of a search against what is measured: random recipes, their losses and their times."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ...ir.structure.costs import weight_bytes
from ..run.machine import processor
from ..run.outliers import rank_correlation
from ..search.problem import KEPT, Choice, Option, Problem
from ..search.recipe_of import Thinned
from ..search.timing import Timing, clock_of, one_row, stand_in
from .budget_subject import Subject

LESS = 0.3
"""Of the attentions and feed-forwards of a random recipe, how many may lose heads or units."""


def forecast(subject: Subject, count: int) -> None:
    """Random recipes: forecast and measured losses, bytes, and their rank correlation."""
    judge = subject.judge
    started = time.process_time()
    menu = subject.menu()
    surveyed = time.process_time() - started
    losses, forecasts, exact = [], [], 0
    for number, choice in enumerate(random_choices(menu.problems, count)):
        graph = subject.optimized(menu.recipe(choice))
        measured = judge.of(graph).value
        losses.append(measured)
        forecasts.append(judge.figure(choice.costs["loss"]))
        size = weight_bytes(graph)
        exact += size == choice.costs["bytes"]
        print(
            f"{number}\t{choice.costs['bytes']:.0f}\t{size}\t{forecasts[-1]:.5f}\t{measured:.5f}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    small = [i for i, loss in enumerate(losses) if loss < 0.2]
    print(
        f"{subject.name}: {count} random recipes, losses of {min(losses):.3g} to "
        f"{max(losses):.3g}: "
        f"rank correlation {rank_correlation(forecasts, losses):.3f} "
        f"({rank_correlation([forecasts[i] for i in small], [losses[i] for i in small]):.3f} over "
        f"the {len(small)} below 20 %); bytes exact in {exact}; the survey took {surveyed:.0f} s "
        "of processor time"
    )


def random_choices(problems: Sequence[Problem], count: int, seed: int = 0) -> Iterator[Choice]:
    """Choices between all small and all large: of each place an option near a level of the
    recipe's own, or, by a share of its own, any."""
    rng = random.Random(seed)
    for _ in range(count):
        problem = rng.choice(problems)
        level, mixed = rng.random(), rng.random()
        gone = min(rng.choices((0, 1, 2), (3, 2, 1))[0], len(problem.units))
        dropped = {name: problem.units[name] for name in rng.sample(list(problem.units), gone)}
        dropped = {} if any(dropped.keys() >= {*names} for names in problem.stay) else dropped
        chosen: dict[str, Option] = {}
        for place in problem.places:
            if place.unit in dropped:
                continue
            fitting = [o for o in place.options if o.beside is None or _there(o.beside, chosen)]
            if isinstance(fitting[0].what, Thinned):
                chosen[place.name] = rng.choice(fitting) if rng.random() < LESS else fitting[0]
                continue
            options = [o for o in fitting if o.kind != KEPT] or fitting
            at = rng.random() if rng.random() < mixed else level
            chosen[place.name] = options[min(int(at * len(options)), len(options) - 1)]
        yield problem.choice(chosen, dropped)


def _there(beside: tuple[str, Any], chosen: Mapping[str, Option]) -> bool:
    name, what = beside
    return name in chosen and chosen[name].what == what


def times(subject: Subject, count: int) -> None:
    """Random recipes: forecast milliseconds, and those of whole runs in turns with the source."""
    started = time.process_time()
    menu = subject.menu(Timing(machine=processor()))
    surveyed = time.process_time() - started
    assert menu.times is not None
    row = one_row(subject.source, subject.judge.batches[0])
    clock = clock_of(row, torch.get_num_threads(), 1.0)
    ratios = []
    for number, choice in enumerate(random_choices(menu.problems, count)):
        graph = stand_in(subject.source, choice, menu.recipe)
        source, ms = clock([subject.source, graph])
        ratios.append(ms / source * menu.times.whole / choice.costs["ms"])
        print(number, f"{choice.costs['ms']:.4g}", f"{ratios[-1]:.3f}", sep="\t", file=sys.stderr)
    within = sum(abs(ratio - 1) <= 0.1 for ratio in ratios)
    print(
        f"{subject.name}: {count} random recipes, of the forecast time {min(ratios):.3f} to "
        f"{max(ratios):.3f}, median {sorted(ratios)[count // 2]:.3f}; within 10 % {within}; source "
        f"{menu.times.whole:.4g} ms; survey and table took {surveyed:.0f} s of processor time"
    )
