"""What the last megabyte bought on each knob, or the last millisecond, and what the next one would:
single steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .menu import AS_A_WHOLE
from .problem import Choice, Option, Place, Problem
from .recipe_of import HeldTables, Thinned

UNITS = {"bytes": 1e6, "ms": 1.0, "kv": 1e6}
"""By measure, what prices are of: a megabyte, of weights or of the cache, or a millisecond."""


@dataclass(frozen=True)
class Step:
    """Another option at one place."""

    place: str
    before: str
    after: str
    price: float
    """Loss by a megabyte, or a millisecond."""

    def __str__(self) -> str:
        return f"{self.place}: {self.before} to {self.after}"


@dataclass(frozen=True)
class Price:
    """Of one knob: the step back that costs least by the unit, which is what the last one
    bought; and the step on that gains most, which is what the next one would buy."""

    knob: str
    measure: str
    last: Step | None
    next: Step | None


def prices(
    problems: Sequence[Problem], choice: Choice, measure: str = "bytes"
) -> list[Price]:
    """By knob, of the problems of a menu whose losses are corrected and a choice of one of them,
    which may be from before they were; ``measure`` is one of ``UNITS``."""
    problem = next(problem for problem in problems if problem.has(choice))
    choice = problem.again(choice)
    back: dict[str, list[Step]] = {}
    on: dict[str, list[Step]] = {}
    for place in problem.places:
        now = choice.chosen.get(place.name)
        if now is None:
            continue
        if isinstance(now.what, Thinned):
            steps = _thinnings(problem, choice, place, now, measure)
        else:
            steps = _steps(place.name, now, place.options, measure)
        for knob, step, smaller in steps:
            (back if smaller else on).setdefault(knob, []).append(step)
    others = (other for other in problems if other is not problem)
    for knob, step, smaller in _as_a_whole(others, choice, measure):
        (back if smaller else on).setdefault(knob, []).append(step)
    for name, unit in problem.units.items():
        if name not in choice.dropped:
            out = _leaving_out(name, unit, problem, choice, measure)
            back.setdefault("layers", []).extend([] if out is None else [out])
    return [
        Price(
            knob, measure, min(back.get(knob, []), key=lambda s: s.price, default=None),
            max(on.get(knob, []), key=lambda s: s.price, default=None),
        )
        for knob in sorted({*back, *on})
    ]  # fmt: skip


def _steps(
    place: str, now: Option, options: Sequence[Option], measure: str
) -> Iterator[tuple[str, Step, bool]]:
    """Knob, step, and whether it takes something back."""
    for other in options:
        size = now.costs.get(measure, 0.0) - other.costs.get(measure, 0.0)
        loss = other.costs["loss"] - now.costs["loss"]
        if size * loss <= 0 or other.beside != now.beside:
            continue
        step = Step(place, str(now.what), str(other.what), loss / size * UNITS[measure])
        yield _knob(now, other), step, size > 0


def _thinnings(
    problem: Problem, choice: Choice, site: Place, now: Option, measure: str
) -> Iterator[tuple[str, Step, bool]]:
    """As ``_steps``, of other shares of heads or units, where the linears of the site hold the same
    at their other sizes."""
    beside = (site.name, now.what)
    linears = [
        (place, choice.chosen[place.name]) for place in problem.places
        if place.name in choice.chosen and choice.chosen[place.name].beside == beside
    ]  # fmt: skip
    for other in site.options:
        swapped = [(now, other)]
        for place, option in linears:
            alike = (o for o in place.options if o.beside == (site.name, other.what))
            swapped += [(option, o) for o in alike if o.what.plain == option.what.plain][:1]
        size = sum(a.costs.get(measure, 0.0) - b.costs.get(measure, 0.0) for a, b in swapped)
        loss = sum(b.costs["loss"] - a.costs["loss"] for a, b in swapped)
        if len(swapped) > len(linears) and size * loss > 0:
            price = loss / size * UNITS[measure]
            yield "heads", Step(site.name, str(now.what), str(other.what), price), size > 0


def _as_a_whole(
    problems: Iterable[Problem], choice: Choice, measure: str
) -> Iterator[tuple[str, Step, bool]]:
    """As ``_steps``, of what each problem has one of: the image tokens that stay, the bits of the
    cache. All else stays as it was chosen."""
    knobs = {place: knob for knob, place in AS_A_WHOLE.items()}
    for problem in problems:
        other = problem.like(choice)
        if other is None:
            continue
        now, then = choice.chosen, other.chosen
        changed = [name for name in now if now[name].what != then[name].what]
        size = choice.costs.get(measure, 0.0) - other.costs.get(measure, 0.0)
        loss = other.costs["loss"] - choice.costs["loss"]
        if len(changed) == 1 and changed[0] in knobs and size * loss > 0:
            (name,) = changed
            price = loss / size * UNITS[measure]
            step = Step(name, str(now[name].what), str(then[name].what), price)
            yield knobs[name], step, size > 0


def _knob(now: Option, other: Option) -> str:
    """What differs between two options of a place."""
    if isinstance(now.what, HeldTables):
        return "tables"
    return "rank" if now.what.form == other.what.form else "bits"


def _leaving_out(
    name: str, unit: Option, problem: Problem, choice: Choice, measure: str
) -> Step | None:
    """What leaving out a unit costs by what goes with it and its places."""
    inside = [p.name for p in problem.places if p.unit == name and p.name in choice.chosen]
    size = sum(choice.chosen[n].costs.get(measure, 0.0) for n in inside)
    size -= unit.costs.get(measure, 0.0)
    loss = unit.costs["loss"] - sum(choice.chosen[n].costs["loss"] for n in inside)
    if size <= 0 or loss <= 0:
        return None
    return Step(name, "kept", "left out", loss / size * UNITS[measure])
