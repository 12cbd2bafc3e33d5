"""Rounds of a search: measure what was chosen, correct the forecasts, solve again, refine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ...ir.core.errors import BadInput
from ...ir.core.view import View
from ...passes.checkpoint_store import CheckpointStore, is_remembered, remembered
from .budget import Budget
from .correct import corrections
from .data import Parts
from .judge import Judge, Loss
from .measure import measured
from .menu import Menu
from .pace import Pace
from .points import Found, Point
from .problem import Choice
from .refine import MOST_STEPS, PATIENCE, SEED, Allowance, neighbours
from .skips import graph_measures
from .solve import solve
from .standing import Standing, unforeseen
from .timing import SECONDS
from .uniform import uniform
from .workers import Here, Workers

Progress = Callable[[str, int, int], None]
STEPS = (0.7, 1.4)
"""Beside a bound, the multiples of it that the first round measures too: corrections of forecasts
need recipes that differ."""
CLOSE = {"loss": 1.5, "bytes": 1.1}
"""How many times the least forecast of the goal another may be for its recipe to be measured too.
Of random recipes of zoo:tiny-vit the ratio of two forecast losses was off by 1.5, as a standard
deviation. One bit less is four times the loss: of 3 bits that is a tenth."""
FRONT = (0.5, 0.6, 0.7, 0.85, 1.0, 1.2, 1.4, 1.7, 2.0)
"""Multiples of what was found, at which the front is forecast."""


class Rounds:
    """Measure, correct, solve again: what ``search`` does with a menu."""

    def __init__(
        self, graph: View, source: View, budget: Budget, data: Parts, menu: Menu, judge: Judge,
        rounds: int, progress: Progress, checkpoints: CheckpointStore | None = None,
        workers: Workers | None = None, refine: float = 0.0,
    ) -> None:  # fmt: skip
        self.graph, self.budget, self.data, self.menu = graph, budget, data, menu
        self.judge, self.rounds, self.tell, self.seconds = judge, rounds, progress, refine
        self.checkpoints = checkpoints
        self.workers = workers or Here(partial(measured, graph, judge, data.fit))
        # Bits by themselves, asked for in each round; the same menu is not solved twice.
        self._alone = menu if (*menu.using,) == ("bits",) else menu.bits_alone()
        self.source = {**graph_measures(source, judge.batches[0]), "loss": 1.0}
        if menu.times is not None:
            self.source["ms"] = menu.times.whole
        self.pace = Pace(source, menu, judge.batches[0])
        self.limits = budget.limits(self.source)
        self.standing = Standing(self.limits, budget.goal)
        self.measured: dict[object, Point] = {}
        self.refused: dict[object, str] = {}
        """Choices whose recipes do not run, and why."""
        self.factors: Mapping[str, float] = {}

    def found(self) -> Found:
        """Measured rounds, until a choice comes again; then neighbours of the best."""
        first = self.solve(self.menu, self.limits)
        notes = list(self.menu.notes)
        if not self.rounds:
            return self._outcome(
                self.forecast(first), [*notes, "forecast alone: nothing was measured"]
            )
        try:
            for number in range(self.rounds):
                if not self.round(number):
                    break
            if self.seconds:
                before = len(self.measured)
                self.refine()
                count = len(self.measured) - before
                notes.append(f"refined: {count} neighbours of what was found were measured too")
            self.settle()
        except KeyboardInterrupt:
            if self.best() is None:
                raise
            notes.append("interrupted: the best that had been measured by then")
        best = self.best()
        if best is None:
            raise BadInput(self._lost())
        return self._outcome(best, notes)

    def _outcome(self, best: Point, notes: list[str]) -> Found:
        notes += self.pace.notes(best.choice, best.costs)
        if self.refused:
            first, *_ = self.refused.values()
            notes.append(f"recipes that do not run, left out: {len(self.refused)} ({first})")
        return Found(
            best.recipe, best, self.budget, self.limits, self.source, self.front(best),
            self.factors, self.menu, self.judge, notes,
        )  # fmt: skip

    def round(self, number: int) -> bool:
        """Measure the choice at the budget, and those of smaller menus that may be as good; at
        first neighbours of it and of bits alone too, and one number of bits for all. Whether any
        of it was news."""
        choices = [self._near(self.menu, 1.0)]
        choices += self._smaller(choices[0])
        if number == 0:
            menus = [self.menu] if self._alone is self.menu else [self.menu, self._alone]
            choices += [self._near(menu, scale) for menu in menus for scale in STEPS]
            choices.append(self._uniform())
        news = {
            choice.key: choice for choice in choices
            if choice is not None and choice.key not in {*self.measured, *self.refused}
        }  # fmt: skip
        self.measure(list(news.values()), f"round {number + 1}")
        self.factors = corrections(self._known(), self.menu.kinds)
        return bool(news)

    def refine(self) -> None:
        """Measure neighbours of the best, while there is time for it and a few steps bring one;
        those of the nearest where nothing keeps the bounds."""
        allowance, rng, vain = Allowance(self.seconds), np.random.default_rng(SEED), 0
        for step in range(MOST_STEPS):
            best = self.best()
            if vain == PATIENCE or not self.measured or not allowance.step():
                return
            news = neighbours(
                self.menu.corrected(self.factors), self._known(), (best or self.nearest()).choice,
                self.additive_limits(self.limits), self.budget.goal, rng,
            )  # fmt: skip
            news = [choice for choice in news if choice.key not in self.refused]
            if not news:
                return
            self.measure(news, f"refining, step {step + 1}")
            self.factors = corrections(self._known(), self.menu.kinds)
            vain = vain + 1 if self.best() is best else 0

    def settle(self) -> None:
        """Time the finalists again, and take the mean: what a busy machine was slow at is else
        lost, and what it was kind to taken. What was measured before stands where none keeps the
        bound now."""
        if "ms" not in self.limits or not self.pace.here:
            return
        finalists = self.standing.finalists(self.measured.values())
        if len(finalists) < 2:
            return
        before = dict(self.measured)
        for number, point in enumerate(finalists):
            self.tell("timing the best again", number, len(finalists))
            ms = remembered(
                self.checkpoints, f"timed again {point.recipe}",
                partial(self.pace.timed, point.choice, 2 * SECONDS),
            )  # fmt: skip
            costs = {**point.costs, "ms": (point.costs["ms"] + ms) / 2}
            self.measured[point.choice.key] = replace(point, costs=costs)
        if self.best() is None:
            self.measured = before

    def _known(self) -> list[tuple[Choice, float]]:
        """The measured choices with their losses, as these add up."""
        return [(point.choice, self._additive(point)) for point in self.measured.values()]

    def solve(self, menu: Menu, limits: Mapping[str, float]) -> Choice:
        """The choice within limits by forecasts as they are corrected now."""
        problems = menu.corrected(self._factors_of(menu))
        return solve(problems, self.additive_limits(limits), self.budget.goal)

    def _factors_of(self, menu: Menu) -> Mapping[str, float]:
        """Of a smaller menu by what was measured of it, where that is enough: recipes of all knobs
        say little of one. (Of zoo:tiny-llava at 25 % of its bytes they made 4 bits 10 times as dear
        as forecast and 2 bits 46 times, those of bits alone 8 and 6 times.)"""
        if menu is self.menu:
            return self.factors
        own = [
            (choice, loss) for choice, loss in self._known()
            if any(problem.has(choice) for problem in menu.problems)
        ]
        found = corrections(own, menu.kinds) if len(own) > len(STEPS) else {}
        return found or self.factors

    def additive_limits(self, limits: Mapping[str, float]) -> dict[str, float]:
        """What forecasts may say for a run to keep limits."""
        within = {
            m: self.judge.additive(limit) if m == "loss" else limit for m, limit in limits.items()
        }
        if "ms" in within:
            within["ms"] = self.pace.forecast(within["ms"])
        points = self.measured.values()
        return {m: limit - unforeseen(points, m) for m, limit in within.items()}

    def _near(self, menu: Menu, scale: float) -> Choice | None:
        """The choice where the bounds are so many times as large; ``None`` where there is none."""
        if not any(problem.options for problem in menu.problems):
            return None  # without its one knob nothing is left to choose
        try:
            return self.solve(menu, {m: limit * scale for m, limit in self.limits.items()})
        except BadInput:
            return None

    def _smaller(self, best: Choice | None) -> Iterator[Choice]:
        """What bits alone, and the menu without each knob, would give: by forecast hardly better
        than ``best``, but perhaps when measured. Those far behind it, and behind what was measured,
        are not."""
        if best is None:
            return
        knobs = self.menu.using if len(self.menu.using) > 1 else ()
        goal, known = self.budget.goal, self.best()
        least = best.costs[goal]
        if known is not None:
            least = max(least, self._additive(known) if goal == "loss" else known.costs[goal])
        for menu in (self._alone, *map(self.menu.without, knobs)):
            choice = self._near(menu, 1.0)
            if choice is not None and choice.costs[goal] <= CLOSE[goal] * least:
                yield choice

    def _uniform(self) -> Choice | None:
        """One number of bits for all linears, where it keeps the bounds by forecast."""
        problem = self._alone.corrected(self.factors)[0]
        return uniform(problem, self.additive_limits(self.limits), self.budget.goal)

    def measure(self, choices: Sequence[Choice], what: str) -> None:
        """Run the recipe of each choice on the fitting part, and judge it."""
        asked = []
        for choice in choices:
            if is_remembered(self.checkpoints, self._key(choice)):
                self._add(choice, dict)
            else:
                asked.append(choice)

        def begin(place: int) -> None:
            best = self.best()
            so_far = "" if best is None else f", best so far {self._shown(best)}"
            most = max(len(STEPS) + 2 * self.rounds, len(self.measured) + len(asked) - place)
            self.tell(f"{what}: measuring{so_far}", len(self.measured), most)

        self.workers.run(
            [self.menu.recipe(choice) for choice in asked], begin,
            lambda place, known: self._add(asked[place], lambda: known),
        )  # fmt: skip
        for choice in choices:  # in their order, whichever came first: ties are broken by it
            if choice.key in self.measured:
                self.measured[choice.key] = self.measured.pop(choice.key)

    def _key(self, choice: Choice) -> str:
        return f"measured {self.menu.recipe(choice)}"

    def _add(self, choice: Choice, measure: Callable[[], dict[str, Any]]) -> None:
        """The point of a choice, by what is remembered of it or measured."""

        def measured_and_timed() -> dict[str, Any]:
            known = measure()
            if "refused" in known:
                return known
            return {**known, "costs": {**known["costs"], **self.pace.of(choice)}}

        known = remembered(self.checkpoints, self._key(choice), measured_and_timed)
        if "refused" in known:
            self.refused[choice.key] = known["refused"]
            return
        self.pace.learn(choice, known["costs"])
        loss = Loss(*known["loss"])
        costs = {**choice.costs, **known["costs"], "loss": loss.value}
        self.measured[choice.key] = Point(choice, self.menu.recipe(choice), costs, loss)

    def _shown(self, point: Point) -> str:
        ms = f" and {point.costs['ms']:.4g} ms" if "ms" in point.costs else ""
        return f"loss {point.costs['loss']:.2%} in {point.costs['bytes'] / 1e6:.4g} MB{ms}"

    def _additive(self, point: Point) -> float:
        assert point.measured is not None
        return self.judge.additive(point.measured.value)

    def best(self) -> Point | None:
        """Of what was measured and keeps all bounds, the one of the least goal."""
        return self.standing.best(self.measured.values())

    def nearest(self) -> Point:
        """Of what was measured the one that exceeds a bound by the least, relatively."""
        return self.standing.nearest(self.measured.values())

    def _lost(self) -> str:
        if not self.measured:
            return "; ".join(dict.fromkeys(self.refused.values()))
        nearest = self.nearest()
        return (
            f"nothing that was measured keeps {self.budget}: the nearest has {self._shown(nearest)}"
        )

    def forecast(self, choice: Choice) -> Point:
        """A choice by its forecast, as it is corrected now."""
        costs = {**choice.costs, "loss": self.judge.figure(choice.costs["loss"])}
        if "ms" in costs:
            costs["ms"] = self.pace.expected(costs["ms"])
        return Point(choice, self.menu.recipe(choice), costs)

    def front(self, best: Point) -> list[Point]:
        """Measured points, and forecasts that cost less or more, along the budget's axis."""
        points, axis = list(self.measured.values()), self.budget.axis
        others = {m: limit for m, limit in self.limits.items() if m != "loss"}
        problems = self.menu.corrected(self.factors)
        for scale in FRONT:
            limits = self.additive_limits({**others, axis: scale * best.costs[axis]})
            try:
                choice = solve(problems, limits, "loss")
            except BadInput:
                continue
            if choice.key in self.measured or choice.key == best.choice.key:
                continue
            points.append(self.forecast(choice))
        points += [] if best.measured else [best]
        return sorted(points, key=lambda p: p.costs[axis])
