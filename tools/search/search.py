"""The search: one survey, one integer program, and rounds of measuring what it chose."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ...ir.canonical.families import canonicalize
from ...ir.core.errors import BadInput, near_misses
from ...ir.core.view import View
from ...ir.run.batches import check_batches
from ...ir.structure.recognize import recognize
from ...ir.vocab.targets import CPU, find_target
from ...passes.checkpoint_store import CheckpointStore, is_remembered, remembered
from ..data.calibration import read
from .budget import Budget
from .correct import corrections
from .data import Parts, parts, unfitted
from .judge import Judge, Loss
from .measure import measured
from .menu import Menu
from .pace import SLACK, Pace
from .points import Found, Point
from .ray_workers import RAY, OnRay
from .skips import graph_measures
from .solve import Choice, solve
from .times import Times
from .timing import Timing
from .workers import Forked, Here, Workers

Progress = Callable[[str, int, int], None]
Batch = Mapping[str, torch.Tensor]
KNOBS = ("tokens", "layers", "bits", "rank")
ROUNDS = 4
"""Of measuring and solving again, at most."""
STEPS = (0.7, 1.4)
"""Beside a bound, the multiples of it that the first round measures too: corrections of forecasts
need recipes that differ."""
FRONT = (0.5, 0.6, 0.7, 0.85, 1.0, 1.2, 1.4, 1.7, 2.0)
"""Multiples of what was found, at which the front is forecast."""


def search(
    graph: View,
    *,
    budget: str | Budget,
    calibration: str | Sequence[Batch],
    judged: Sequence[Batch] = (),
    using: Sequence[str] = KNOBS,
    target: str = CPU.name,
    rounds: int = ROUNDS,
    progress: Progress | None = None,
    checkpoints: CheckpointStore | None = None,
    workers: int | str = 0,
    reload: Callable[[], View] | None = None,
    times: Times | None = None,
    machine: str = "this machine",
) -> Found:
    """The recipe that spends ``budget`` best on ``graph``, which stays as it is.

    ``budget`` bounds what it names (``bytes=25%``, ``loss=1%``) and makes what it does not name as
    small as it can. Bytes are those of all weights of the graph, as the cost model counts them.
    ``calibration`` is fitted to and losses are measured by ``judged``; without that, by each second
    batch of ``calibration``, the others being fitted to. Named as ``--calib`` takes it, it is read
    on for what is judged by. ``using`` are the knobs; image tokens are only dropped where the
    cache is bounded. Without ``rounds`` nothing is measured: the recipe is the best by forecast.
    ``checkpoints`` keeps what was surveyed and each measured point, and gives them back to the same
    search on the same graph and data. ``workers`` are processes that measure beside each other, or
    ``"ray"`` for those of a Ray cluster; the result is the same for any number of them above 0,
    where they measure on one thread each. Those of Ray load the graph by its source's name, or by
    ``reload`` where that does not make the same of it.
    Where time is bounded, that of one run on one row of what is judged by, ``times`` is a table of
    it; else one is measured here, on ``machine``, or counted where the target runs elsewhere. Each
    recipe that is measured is then timed too, in turns with the source.

    Raises ``BadInput`` for a budget that nothing meets, with the nearest that there is, for bounds
    that contradict each other, and where there are no data; ``Missing`` where Ray is not there.
    """
    bounds = Budget.parse(budget) if isinstance(budget, str) else budget
    unknown = [knob for knob in using if knob not in KNOBS]
    if unknown:
        raise BadInput(f"using {unknown[0]}: {near_misses(unknown[0], KNOBS)}")
    if not calibration:
        raise BadInput(
            "a budget is spent by what the loss minds, which takes data: give --calib DATA "
            "(calibration=[...] in Python)"
        )
    # Fewer image tokens take no byte of a weight: to measure them would be for nothing.
    lighter = bounds.bounded & {"kv", "ms"}
    turned = [knob for knob in using if knob != "tokens" or lighter]
    if not turned:
        raise BadInput("tokens are in the cache, not in the weights: bound it, such as by kv=50%")
    timing = Timing(times, machine) if "ms" in bounds.bounded else None
    if isinstance(calibration, str):
        data: Sequence[Batch] = read(calibration, graph).batches
        judged = judged or unfitted(calibration, graph, data)
    else:
        data = calibration
    tell = progress or (lambda *_: None)
    source = graph.copy()
    canonicalize(source)
    check_batches(source, [*data, *judged])
    known = parts(source, data, judged)
    judge = Judge(source, recognize(source), known.judge)
    with contextlib.closing(_workers(workers, graph, judge, known, reload)) as engine:
        aim = find_target(target)
        menu = Menu.of(source, known, judge, aim, turned, tell, checkpoints, timing)
        return Rounds(
            graph, source, bounds, known, menu, judge, rounds, tell, checkpoints, engine
        ).found()


def _workers(
    workers: int | str, graph: View, judge: Judge, data: Parts, reload: Callable[[], View] | None
) -> Workers:
    if workers == RAY:
        return OnRay(graph, data, reload)
    if not isinstance(workers, int):
        raise BadInput(f"workers={workers!r}: a number of processes, or {RAY}")
    measure = partial(measured, graph, judge, data.fit)
    return Forked(workers, measure) if workers else Here(measure)


class Rounds:
    """Measure, correct, solve again: what ``search`` does with a menu."""

    def __init__(
        self, graph: View, source: View, budget: Budget, data: Parts, menu: Menu, judge: Judge,
        rounds: int, progress: Progress, checkpoints: CheckpointStore | None = None,
        workers: Workers | None = None,
    ) -> None:  # fmt: skip
        self.graph, self.budget, self.data, self.menu = graph, budget, data, menu
        self.judge, self.rounds, self.tell = judge, rounds, progress
        self.checkpoints = checkpoints
        self.workers = workers or Here(partial(measured, graph, judge, data.fit))
        self.source = {**graph_measures(source, judge.batches[0]), "loss": 1.0}
        if menu.times is not None:
            self.source["ms"] = menu.times.whole
        self.pace = Pace(source, menu, judge.batches[0])
        self.limits = budget.limits(self.source)
        self.measured: dict[object, Point] = {}
        self.factors: Mapping[str, float] = {}

    def found(self) -> Found:
        """Measured rounds, until a choice comes again."""
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
        return Found(
            best.recipe, best, self.budget, self.limits, self.source, self.front(best),
            self.factors, self.menu, self.judge, notes,
        )  # fmt: skip

    def round(self, number: int) -> bool:
        """Measure the choice at the budget, and that of bits alone, which forecasts may have missed
        narrowly; at first the neighbours too. Whether any of it was news."""
        scaled = [1.0, *(STEPS if number == 0 else ())]
        choices = [self._near(self.menu, scale) for scale in scaled]
        choices.append(self._near(self.menu.bits_alone(), 1.0))
        news = {
            choice.key: choice for choice in choices
            if choice is not None and choice.key not in self.measured
        }  # fmt: skip
        self.measure(list(news.values()), f"round {number + 1}")
        known = [(point.choice, self._additive(point)) for point in self.measured.values()]
        self.factors = corrections(known, self.menu.kinds)
        return bool(news)

    def solve(self, menu: Menu, limits: Mapping[str, float]) -> Choice:
        """The choice within limits by forecasts as they are corrected now."""
        within = {
            m: self.judge.additive(limit) if m == "loss" else limit for m, limit in limits.items()
        }
        if "ms" in within:
            within["ms"] = self.pace.forecast(within["ms"])
        return solve(menu.corrected(self.factors), within, self.budget.goal)

    def _near(self, menu: Menu, scale: float) -> Choice | None:
        """The choice where the bounds are so many times as large; ``None`` where there is none."""
        try:
            return self.solve(menu, {m: limit * scale for m, limit in self.limits.items()})
        except BadInput:
            return None

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
            most = len(STEPS) + 2 * self.rounds
            self.tell(f"{what}: measuring{so_far}", len(self.measured), most)

        self.workers.run(
            [self.menu.recipe(choice) for choice in asked], begin,
            lambda place, known: self._add(asked[place], lambda: known),
        )  # fmt: skip
        for choice in choices:  # in their order, whichever came first: ties are broken by it
            self.measured[choice.key] = self.measured.pop(choice.key)

    def _key(self, choice: Choice) -> str:
        return f"measured {self.menu.recipe(choice)}"

    def _add(self, choice: Choice, measure: Callable[[], dict[str, Any]]) -> None:
        """The point of a choice, by what is remembered of it or measured."""

        def measured_and_timed() -> dict[str, Any]:
            known = measure()
            return {**known, "costs": {**known["costs"], **self.pace.of(choice)}}

        known = remembered(self.checkpoints, self._key(choice), measured_and_timed)
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
        """Of what was measured and keeps all bounds, the one of the least goal.

        Losses are compared by the upper ends of their intervals: the lowest of several that are
        nearly equal would else be the one that the judged rows were kindest to.
        """
        kept = [
            point for point in self.measured.values()
            if all(point.costs[m] <= SLACK.get(m, 1.0) * limit for m, limit in self.limits.items())
        ]  # fmt: skip
        return min(kept, key=self._rank, default=None)

    def _rank(self, point: Point) -> tuple[float, float]:
        assert point.measured is not None
        goal = self.budget.goal
        return point.measured.high if goal == "loss" else point.costs[goal], point.costs["bytes"]

    def _lost(self) -> str:
        nearest = min(self.measured.values(), key=lambda p: p.costs["loss"])
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
        """Measured points, and forecasts at other sizes, by bytes."""
        points = list(self.measured.values())
        others = {m: limit for m, limit in self.limits.items() if m not in ("bytes", "loss")}
        if "ms" in others:
            others["ms"] = self.pace.forecast(others["ms"])
        for scale in FRONT:
            limits = {**others, "bytes": scale * best.costs["bytes"]}
            try:
                choice = solve(self.menu.corrected(self.factors), limits, "loss")
            except BadInput:
                continue
            if choice.key in self.measured or choice.key == best.choice.key:
                continue
            points.append(self.forecast(choice))
        points += [] if best.measured else [best]
        return sorted(points, key=lambda p: p.costs["bytes"])
