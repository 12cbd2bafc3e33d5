"""The choice: an integer program over all candidates, solved by SciPy's HiGHS."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...ir.core.errors import BadInput
from ...ir.core.quiet import silenced
from .problem import Choice, Key, Option, Problem

GAP, NODES = 1e-4, 3000
"""At most this far from the best, relatively; and how many nodes are searched for a proof of it:
not how many seconds, for a busy machine finds the same then. (Budgets of bytes of the zoo's models
take 0 to 105 nodes, 1.3 s at most.)"""

Rows = Callable[[Problem], Sequence[Any]]
"""Further ``LinearConstraint`` of SciPy's on the variables of a problem: 0 or 1 for each option of
each place, then for each unit, then for each pair of units."""


def solve(problems: Sequence[Problem], limits: Mapping[str, float], goal: str) -> Choice:
    """The choice of the least ``goal`` within ``limits``, by measure, of all the problems.

    Raises ``BadInput`` where there is none, with the nearest that there is.
    """
    choice = best(problems, limits, goal)
    if choice is None:
        raise BadInput(_nearest(problems, limits))
    return choice


def best(
    problems: Sequence[Problem], limits: Mapping[str, float], goal: str, rows: Rows | None = None
) -> Choice | None:
    """As ``solve``, and within further ``rows``; ``None`` where there is no such choice.

    Of several problems those whose linear relaxation is no better than a choice that is known are
    not solved: the most promising is the first, and most ways to drop image tokens end there.
    """
    programs = [_Program.of(problem, limits, goal, rows) for problem in problems]
    bounds = [p.bound() for p in programs] if len(programs) > 1 else [-math.inf]
    found: Choice | None = None
    for bound, number in sorted(zip(bounds, range(len(programs)), strict=True)):
        least = math.inf if found is None else found.costs[goal]
        if bound == math.inf or bound >= (1 - GAP) * least:
            break  # no choice is legal, or none is better: nor of those behind it
        choice = programs[number].solved()
        if choice is not None and choice.costs[goal] < least:
            found = choice
    return found


def _nearest(problems: Sequence[Problem], limits: Mapping[str, float]) -> str:
    """Which bound cannot be kept, and what can."""
    for measure, limit in limits.items():
        least = best(problems, {}, measure)
        assert least is not None
        if least.costs[measure] > limit:
            return (
                f"no choice keeps {measure} within {_shown(measure, limit)}: the least that these "
                f"knobs reach is {_shown(measure, least.costs[measure])}"
            )
    kept: dict[str, float] = {}
    for measure, limit in limits.items():
        least = best(problems, kept, measure)
        assert least is not None
        if least.costs[measure] > limit:
            others = " and ".join(f"{m} within {_shown(m, v)}" for m, v in kept.items())
            return (
                f"the bounds contradict each other: with {others}, the least {measure} is "
                f"{_shown(measure, least.costs[measure])}, more than {_shown(measure, limit)}"
            )
        kept[measure] = limit
    return "no choice keeps all the bounds"


def _shown(measure: str, value: float) -> str:
    if measure in ("bytes", "kv"):
        return f"{value / 1e6:.4g} MB"
    return f"{value:.4g}{' ms' if measure == 'ms' else ''}"


@dataclass(frozen=True)
class _Program:
    """One problem, its bounds and its goal as SciPy takes them."""

    columns: _Columns
    goal: str
    constraints: Sequence[Any]

    @classmethod
    def of(
        cls, problem: Problem, limits: Mapping[str, float], goal: str, rows: Rows | None
    ) -> _Program:
        from scipy.optimize import LinearConstraint

        columns = _Columns.of(problem)
        constraints = [*columns.constraints, *(rows(problem) if rows is not None else ())]
        for measure, limit in limits.items():
            room = limit - problem.fixed.get(measure, 0.0)
            row = columns.costs(measure)
            scale = max(abs(room), float(np.abs(row).max(initial=0.0)), 1e-300)
            # In millionths of the bound, and a millionth of a millionth inside it: HiGHS keeps rows
            # to an absolute 1e-6.
            row, room = row[None] / scale * 1e6, room / scale * 1e6
            constraints.append(LinearConstraint(row, -np.inf, room))
        return cls(columns, goal, constraints)

    def solved(self) -> Choice | None:
        """The choice; ``None`` where there is none."""
        solution = self._run(whole=True)[0]
        return None if solution.x is None else self.columns.choice(solution.x > 0.5)

    def bound(self) -> float:
        """What no choice has less of, by the linear relaxation; infinity where there is none."""
        solution, unit = self._run(whole=False)
        if solution.x is None:
            return math.inf if solution.status == 2 else -math.inf
        return float(solution.fun) * unit + self.columns.problem.fixed.get(self.goal, 0.0)

    def _run(self, *, whole: bool) -> tuple[Any, float]:
        """What SciPy found, and what a unit of its goal is."""
        from scipy.optimize import Bounds, milp

        target = self.columns.costs(self.goal)
        unit = max(float(np.abs(target).max(initial=0.0)), 1e-300) / 1e4
        with silenced():
            solution = milp(
                target / unit, constraints=self.constraints,
                integrality=np.full(len(target), int(whole)), bounds=Bounds(0, 1),
                options={"mip_rel_gap": GAP, "node_limit": NODES},
            )  # fmt: skip
        return solution, unit


@dataclass(frozen=True)
class _Columns:
    """The variables: each option of each place, then each unit, then each pair of units."""

    problem: Problem
    options: Sequence[Option]
    constraints: Sequence[Any]
    """Of each place exactly one option is taken, or its unit; a pair is where both its units are.
    """

    @classmethod
    def of(cls, problem: Problem) -> _Columns:
        from scipy.optimize import LinearConstraint

        options = [option for place in problem.places for option in place.options]
        unit_at = {name: len(options) + i for i, name in enumerate(problem.units)}
        options += [*problem.units.values(), *problem.pairs.values()]
        entries: list[tuple[int, int, int]] = []
        start = 0
        for row, place in enumerate(problem.places):
            end = start + len(place.options)
            mine = [*range(start, end), *([unit_at[place.unit]] if place.unit in unit_at else [])]
            entries += [(row, column, 1) for column in mine]
            start = end
        first = len(options) - len(problem.pairs)
        for i, (one, other) in enumerate(problem.pairs):
            row = len(problem.places) + i
            entries += [(row, first + i, 2), (row, unit_at[one], -1), (row, unit_at[other], -1)]
        shape = (len(problem.places) + len(problem.pairs), len(options))
        table = _sparse(entries, shape)
        # 2 p - a - b is within -1 and 0 where p = a b alone.
        low = np.repeat([1.0, -1.0], [len(problem.places), len(problem.pairs)])
        high = np.repeat([1.0, 0.0], [len(problem.places), len(problem.pairs)])
        constraints = [LinearConstraint(table, low, high)]
        ties = _ties(problem)
        if ties:
            shape = (1 + max(row for row, *_ in ties), len(options))
            constraints.append(LinearConstraint(_sparse(ties, shape), 0, 0))
        for group in problem.stay:
            gone = np.zeros((1, len(options)))
            gone[0, [unit_at[name] for name in group]] = 1
            constraints.append(LinearConstraint(gone, 0, len(group) - 1))
        return cls(problem, options, constraints)

    def costs(self, measure: str) -> NDArray[np.float64]:
        return np.array([o.costs.get(measure, 0.0) for o in self.options], dtype=np.float64)

    def choice(self, taken: NDArray[np.bool_]) -> Choice:
        names = [place.name for place in self.problem.places for _ in place.options]
        names += self.problem.units
        kept = [(n, o) for n, o, is_in in zip(names, self.options, taken, strict=False) if is_in]
        units = self.problem.units
        return self.problem.choice(
            {name: option for name, option in kept if name not in units},
            {name: option for name, option in kept if name in units},
        )


def _ties(problem: Problem) -> list[tuple[int, int, int]]:
    """Rows, columns and factors: of the options of a place that go with one of another place, as
    many are taken as of that one."""
    keys = [(place.name, option.what) for place in problem.places for option in place.options]
    column_at: dict[Key, int] = {key: i for i, key in enumerate(keys)}
    rows: dict[tuple[str, Key], int] = {}
    entries = []
    for place in problem.places:
        for option in place.options:
            if option.beside is None:
                continue
            tie = (place.name, option.beside)
            if tie not in rows:
                rows[tie] = len(rows)
                entries.append((rows[tie], column_at[option.beside], -1))
            entries.append((rows[tie], column_at[place.name, option.what], 1))
    return entries


def _sparse(entries: Sequence[tuple[int, int, int]], shape: tuple[int, int]) -> Any:
    from scipy.sparse import csr_array

    rows, columns, factors = (np.array(entries).reshape(-1, 3).T).astype(np.int64)
    return csr_array((factors.astype(np.float64), (rows, columns)), shape=shape)
