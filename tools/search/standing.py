"""Where measured points stand: what keeps the bounds, what is the best, what is timed again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from .pace import SLACK
from .points import Point

NEAR = 1.06
"""How many times a bound on time what is timed again took the first time."""
FINALISTS = 5
"""That are timed again, at most."""


@dataclass(frozen=True)
class Standing:
    """The bounds of a search, by measure, and its goal."""

    limits: Mapping[str, float]
    goal: str

    def keeps(self, point: Point, slack: Mapping[str, float] = SLACK) -> bool:
        """Whether a point keeps all bounds, or so many times of one."""
        return all(point.costs[m] <= slack.get(m, 1.0) * x for m, x in self.limits.items())

    def best(self, points: Collection[Point]) -> Point | None:
        """Of those that keep all bounds, the one of the least goal.

        Losses are compared by the upper ends of their intervals: the lowest of several that are
        nearly equal would else be the one that the judged rows were kindest to.
        """
        return min(filter(self.keeps, points), key=self._rank, default=None)

    def nearest(self, points: Collection[Point]) -> Point:
        """The one that exceeds a bound by the least, relatively."""

        def excess(point: Point) -> float:
            return max(point.costs[m] / limit for m, limit in self.limits.items())

        return min(points, key=excess)

    def finalists(self, points: Collection[Point]) -> list[Point]:
        """Those that are the best if they keep the bound on time, until one is well within it."""
        chosen: list[Point] = []
        for point in sorted(points, key=self._rank):
            if self.keeps(point, {"ms": NEAR}) and len(chosen) < FINALISTS:
                chosen.append(point)
                if self.keeps(point, {"ms": 1 / NEAR}):
                    break
        return chosen

    def _rank(self, point: Point) -> tuple[float, float]:
        assert point.measured is not None
        first = point.measured.high if self.goal == "loss" else point.costs[self.goal]
        return first, point.costs["bytes"]


def unforeseen(points: Collection[Point], measure: str) -> float:
    """By how much a recipe took more bytes than forecast, at most: exact as forecasts are of nearly
    all graphs, one that exceeds its bound by constants of shapes would be found again."""
    if measure not in ("bytes", "kv"):
        return 0.0
    return max((0.0, *(point.costs[measure] - point.choice.costs[measure] for point in points)))
