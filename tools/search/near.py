"""The neighbourhood of a choice, as rows of the integer program that choices are solved by.

Local branching (Fischetti and Lodi, Mathematical Programming 98, 2003): the number of places where
a solution is otherwise than a choice is linear in the variables, so the solver itself keeps to the
neighbourhood, and leaves out what was measured already. What is swapped at one place is made up for
at another by the same bounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .problem import Choice, Problem
from .recipe_of import Held
from .solve import Rows


def near(centre: Choice, changes: int, besides: Iterable[Choice]) -> Rows:
    """Solutions that differ from ``centre`` in so many places and units at most, and that are none
    of ``besides``. A half of a block that goes or comes back counts as one with all its places."""
    others = tuple(besides)

    def rows(problem: Problem) -> Sequence[Any]:
        from scipy.optimize import LinearConstraint

        row, constant = _differing(problem, centre)
        inside = LinearConstraint(row[None], -np.inf, changes - constant)
        outside = (_differing(problem, other) for other in others)
        return [inside, *(LinearConstraint(r[None], 1 - c, np.inf) for r, c in outside)]

    return rows


def _differing(problem: Problem, choice: Choice) -> tuple[NDArray[np.float64], int]:
    """How many places and units of a solution are otherwise than in ``choice``: factors of the
    variables ``[n]``, and what is added.

    Of a place that the choice has, 1 less its option's variable and that of its unit, with which
    it goes; of a unit, its variable, or 1 less it where the choice leaves it out. What a linear
    holds is the same at any of its sizes, which are those of the place of its heads or units.
    """
    start = sum(len(place.options) for place in problem.places)
    unit_at = {name: start + i for i, name in enumerate(problem.units)}
    row, constant, at = np.zeros(start + len(unit_at) + len(problem.pairs)), 0, 0
    for place in problem.places:
        end, option = at + len(place.options), choice.chosen.get(place.name)
        if option is not None:
            constant += 1
            row[at:end] -= [_plain(other.what) == _plain(option.what) for other in place.options]
            row[[unit_at[place.unit]] if place.unit in unit_at else []] -= 1
        at = end
    for name, column in unit_at.items():
        gone = name in choice.dropped
        constant += gone
        row[column] += -1 if gone else 1
    return row, constant


def _plain(what: Any) -> Any:
    return what.plain if isinstance(what, Held) else what
