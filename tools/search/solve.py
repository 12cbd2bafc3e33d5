"""The choice: an integer program over all candidates, solved by SciPy's HiGHS."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...ir.core.errors import BadInput
from ...ir.core.quiet import silenced

KEPT = "kept"
"""The kind of an option that changes nothing."""
GAP, SECONDS = 1e-4, 60.0
"""At most this far from the best, relatively; and how long is searched for a proof of it."""


Key = tuple[Hashable, Any]
"""Of an option, in any problem of a menu: its place, unit or pair of units, and what it is."""


@dataclass(frozen=True)
class Option:
    """One candidate at one place."""

    what: Any
    """What the place holds then: ``None`` is the source's own."""
    costs: Mapping[str, float]
    """By measure; ``loss`` as it adds up."""
    kind: str
    """Candidates whose forecast loss is corrected together."""
    forecast: float | None = None
    """The loss before it was corrected; ``None`` where it was not."""
    beside: tuple[str, Any] | None = None
    """Of another place the option that this one goes with: it is taken where that is. Other places
    where that may be chosen have options beside each of its own."""

    @property
    def uncorrected(self) -> float:
        return self.costs["loss"] if self.forecast is None else self.forecast


@dataclass(frozen=True)
class Place:
    """Where exactly one of some options is chosen, or none where its unit is left out."""

    name: str
    options: Sequence[Option]
    unit: str = ""
    """The half of a block that it lies in, where that may be left out."""


@dataclass(frozen=True)
class Problem:
    """All that is chosen from. Costs of what is not chosen from are in ``fixed``."""

    places: Sequence[Place]
    fixed: Mapping[str, float]
    units: Mapping[str, Option] = field(default_factory=dict)
    """What may be left out, by name; costs may be negative: what goes with it beside its places."""
    pairs: Mapping[tuple[str, str], Option] = field(default_factory=dict)
    """Of two units that are both left out, what that costs beyond the sum: it may be negative."""
    stay: Sequence[Collection[str]] = ()
    """Groups of units of which one has to stay: a model without any attention, or any feed-forward,
    is not proposed."""

    @property
    def options(self) -> dict[Key, Option]:
        """All that there are."""
        by_owner: list[tuple[Hashable, Sequence[Option]]] = [
            *((place.name, place.options) for place in self.places),
            *((name, [option]) for name, option in (*self.units.items(), *self.pairs.items())),
        ]
        return {(owner, o.what): o for owner, options in by_owner for o in options}

    def corrected(self, factors: Mapping[str, float]) -> Problem:
        """With the losses of each kind multiplied."""
        return self.with_losses(
            lambda _, option: option.uncorrected * factors.get(option.kind, 1.0)
        )

    def with_losses(self, loss: Callable[[Key, Option], float]) -> Problem:
        """With the losses that ``loss`` gives by key and option; what they were before any
        correction is still known."""

        def with_loss(owner: Hashable, option: Option) -> Option:
            costs = {**option.costs, "loss": loss((owner, option.what), option)}
            return replace(option, costs=costs, forecast=option.uncorrected)

        places = [
            replace(place, options=[with_loss(place.name, o) for o in place.options])
            for place in self.places
        ]
        units = {name: with_loss(name, o) for name, o in self.units.items()}
        pairs = {names: with_loss(names, o) for names, o in self.pairs.items()}
        return replace(self, places=places, units=units, pairs=pairs)

    def has(self, choice: Choice) -> bool:
        """Whether all that a choice took is here: it may be of another way to drop image tokens."""
        return self.options.keys() >= {*choice.keys}

    def again(self, choice: Choice) -> Choice:
        """The same choice by what its options cost here, where losses may be corrected since."""
        options = self.options
        chosen = {name: options[name, o.what] for name, o in choice.chosen.items()}
        return self.choice(chosen, {name: self.units[name] for name in choice.dropped})

    def choice(self, chosen: Mapping[str, Option], dropped: Mapping[str, Option]) -> Choice:
        """The choice of some options and units, with what it costs."""
        pairs = {(a, b): o for (a, b), o in self.pairs.items() if a in dropped and b in dropped}
        options = [*chosen.values(), *dropped.values(), *pairs.values()]
        measures = {*self.fixed, "loss"}.union(*(option.costs for option in options))
        costs = {
            m: self.fixed.get(m, 0.0) + sum(o.costs.get(m, 0.0) for o in options)
            for m in sorted(measures)
        }
        return Choice(chosen, dropped, costs, pairs)


@dataclass(frozen=True)
class Choice:
    """A solution: the option of each place that is there, and the units that are left out."""

    chosen: Mapping[str, Option]
    dropped: Mapping[str, Option]
    costs: Mapping[str, float]
    pairs: Mapping[tuple[str, str], Option] = field(default_factory=dict)
    """Of the problem, those whose units are both left out."""

    @property
    def options(self) -> list[Option]:
        """All that was taken."""
        return [*self.chosen.values(), *self.dropped.values(), *self.pairs.values()]

    @property
    def keys(self) -> list[Key]:
        """Of all that was taken."""
        parts = (*self.chosen.items(), *self.dropped.items(), *self.pairs.items())
        return [(owner, option.what) for owner, option in parts]

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for choices that make the same recipe."""
        return (tuple((name, o.what) for name, o in self.chosen.items()), tuple(self.dropped))


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
        if bound >= least - GAP * abs(least):
            break
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
                options={"mip_rel_gap": GAP, "time_limit": SECONDS},
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


def useful(options: Sequence[Option], measures: Sequence[str]) -> list[Option]:
    """Those that no other beats, or equals, in all of ``measures``; the first of equals."""
    kept: list[Option] = []
    ordered = sorted(options, key=lambda o: [o.costs.get(m, 0.0) for m in measures])
    for option in ordered:
        costs = [option.costs.get(m, 0.0) for m in measures]
        if not any(
            all(k.costs.get(m, 0.0) <= c for m, c in zip(measures, costs, strict=True))
            for k in kept
        ):
            kept.append(option)
    return kept
