"""Recipes timed as they are measured, and what that says of the forecasts of time."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch

from ...ir.core.view import View
from .menu import Menu
from .problem import Choice
from .timing import SECONDS, clock_of, one_row, stand_in

SLACK = {"ms": 1.02}
"""Times the bound: two measurements of one graph differ by so much."""


class Pace:
    """Whole runs in turns with the source, where a search bounds time and this machine is the one
    that the table of times is of."""

    def __init__(self, source: View, menu: Menu, batch: Mapping[str, torch.Tensor]) -> None:
        self._source, self._menu, self._batch = source, menu, batch
        self._ratios: list[float] = []

    @property
    def here(self) -> bool:
        """Whether recipes are timed at all."""
        return self._menu.times is not None and self._menu.times.here

    def of(self, choice: Choice) -> dict[str, float]:
        """The milliseconds of a choice under ``ms``; nothing where they are not measured."""
        return {"ms": self.timed(choice)} if self.here else {}

    def timed(self, choice: Choice, seconds: float = SECONDS) -> float:
        """The milliseconds of a choice, in turns with nothing but the source, as an artifact is
        compared with it: between sessions of several recipes the processor's caches hold less."""
        times = self._menu.times
        assert times is not None
        clock = clock_of(one_row(self._source, self._batch), times.threads, seconds)
        graph = stand_in(self._source, choice, self._menu.recipe)
        source, ms = clock([self._source, graph])
        return ms / source * times.whole

    def learn(self, choice: Choice, costs: Mapping[str, float]) -> None:
        """Take in what was measured of a choice."""
        if "ms" in costs:
            self._ratios.append(costs["ms"] / choice.costs["ms"])

    def forecast(self, ms: float) -> float:
        """What a forecast may say for a run to take ``ms``, by the runs so far."""
        return ms / statistics.median(self._ratios) if self._ratios else ms

    def expected(self, ms: float) -> float:
        """What a run will take that a forecast says ``ms`` of, by the runs so far."""
        return ms / self.forecast(1.0)

    def notes(self, choice: Choice, costs: Mapping[str, float]) -> Sequence[str]:
        """What a person should know of the time that was found."""
        times = self._menu.times
        if times is None:
            return []
        shapes = ", ".join(f"{n} {'x'.join(map(str, s))}" for n, s in times.inputs.items())
        forecast = choice.costs["ms"]
        known = f"measured {costs['ms']:.4g} in turns with it" if self._ratios else "not measured"
        run = f"one run ({shapes or 'by the cost model'}) takes the source {times.whole:.4g} ms"
        return [f"{run}; the recipe: forecast {forecast:.4g}, {known}"]
