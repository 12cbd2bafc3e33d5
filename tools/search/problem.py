"""All that is chosen from, and what was chosen: options of places, units that may go."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

KEPT = "kept"
"""The kind of an option that changes nothing."""


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

    @cached_property
    def options(self) -> Mapping[Key, Option]:
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

    def like(self, choice: Choice) -> Choice | None:
        """A choice of another problem, with what this one has instead in places of one option;
        ``None`` where it lacks something else."""
        chosen: dict[str, Option] = {}
        for place in self.places:
            if place.name in choice.chosen:
                only = place.options[0] if len(place.options) == 1 else None
                option = self.options.get((place.name, choice.chosen[place.name].what), only)
                chosen |= {} if option is None else {place.name: option}
        if chosen.keys() != choice.chosen.keys() or not self.units.keys() >= {*choice.dropped}:
            return None
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
