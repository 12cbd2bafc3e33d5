"""One number of bits for all linears, which each search measures too where it keeps the bounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from .problem import KEPT, Choice, Option, Place, Problem
from .recipe_of import Held, HeldTables

LEAST = ("loss", "bytes")
"""Of the forms of so many bits at a linear, that of the least of either."""


def uniform(problem: Problem, limits: Mapping[str, float], goal: str) -> Choice | None:
    """Of the choices that hold every linear in the same number of bits, whole and with no path
    beside it, that of the least forecast ``goal`` within ``limits``.

    Forecasts of 8 bits compare less well with those of 4 than with each other: a mixture that is
    forecast to lose less than 8 bits everywhere may lose more when both are measured.
    """
    legal = (
        choice for choice in _choices(problem)
        if all(choice.costs.get(m, 0.0) <= limit for m, limit in limits.items())
    )  # fmt: skip
    return min(legal, key=lambda choice: choice.costs[goal], default=None)


def _choices(problem: Problem) -> Iterator[Choice]:
    tables: list[Option | None] = [
        o for place in problem.places for o in place.options if isinstance(o.what, HeldTables)
    ]
    stored = [found for found in map(_stored, problem.places) if found]
    numbers = [{option.what.form.bits for option in found} for found in stored]
    for bits in sorted(set.intersection(*numbers)) if numbers else []:
        for least in LEAST:
            for table in tables or [None]:
                yield problem.choice(
                    {x.name: _option(x, bits, least, table) for x in problem.places}, {}
                )


def _option(place: Place, bits: int, least: str, table: Option | None) -> Option:
    of_bits = [option for option in _stored(place) if option.what.form.bits == bits]
    if of_bits:
        return min(of_bits, key=lambda option: option.costs[least])
    if table is not None and table in place.options:
        return table
    return next(o for o in place.options if o.kind == KEPT and not getattr(o.what, "gone", 0.0))


def _stored(place: Place) -> list[Option]:
    """Those that store linears whole, with no path beside them."""
    return [
        option for option in place.options
        if isinstance(option.what, Held) and option.what.form is not None
        and not option.what.path.rank and not option.what.gone
    ]  # fmt: skip
