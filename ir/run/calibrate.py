"""One sweep of the calibration data through a graph, in which all statistics are gathered.

A statistic is kept from the first value that it sees until everything that was asked of it is
done, and then let go: what is in memory is one layer's statistics and the activations of one cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.errors import BadInput
from ..core.view import Node, Value, View
from .masks import padding_masks
from .statistics import Stat, Statistic, Statistics
from .sweep import Results, joined, sweep_together

Place = tuple[Value, ...]
"""Values that a statistic sees together."""


@dataclass(frozen=True, eq=False)
class Request:
    """Statistics that are wanted of one site, and who is told when they are complete."""

    site: str
    """For messages."""
    places: tuple[Place, ...]
    """One, or several that count together: the inputs of linears that hold one weight, say."""
    stats: tuple[Stat, ...]
    done: Callable[[Statistics], None]


Compressed = Callable[[list[Tensor], list[Results]], list[Results]]
"""From the inputs of a linear and its results, batch by batch, to the results that what follows
sees."""


def calibrate(
    view: View,
    batches: Sequence[Mapping[str, Tensor]],
    requests: Sequence[Request],
    compressed: Mapping[Node, Compressed] | None = None,
) -> None:
    """Sweep once, gather what is asked for and call ``done`` of each request when it is complete.

    Requests for the same statistic of the same places share it. That of a linear's input is
    complete before the linear runs, so that ``done`` can make what ``compressed`` (by the linear's
    node) then uses. Raises ``BadInput`` where a statistic matches no site: a value that is never
    computed, or that has no token which counts.
    """
    gathering = _Gathering(view, batches, requests)
    compressed = compressed or {}

    def visit(node: Node, arguments: list[list[Any]], results: list[Results]) -> list[Results]:
        if node in compressed:
            index = view.arguments(node).index(view.operands(node)[0])
            results = compressed[node]([row[index] for row in arguments], results)
        for i, value in enumerate(view.results(node)):
            gathering.see(value, [row[i] for row in results])
        return results

    makers = (view.producer(value) for value in gathering.watched)
    nodes = {node for node in makers if node is not None} | set(compressed)
    with torch.no_grad():
        gathering.see_constants()
        sweep_together(view, batches, visit, frozenset(nodes), outputs=False)
    gathering.check_complete()


@dataclass
class _Tally:
    """One statistic at its places, as far as they have been seen."""

    statistic: Statistic
    stat: Stat
    missing: int
    """Places that were not seen yet."""
    requests: list[Request] = field(default_factory=list)
    held: dict[Place, dict[Value, list[Tensor]]] = field(default_factory=dict)
    """What was taken of places of which other values are still to come."""


class _Gathering:
    """All tallies of one sweep, by the values that they wait for."""

    def __init__(
        self, view: View, batches: Sequence[Mapping[str, Tensor]], requests: Sequence[Request]
    ) -> None:
        self.view, self.batches = view, batches
        self.masks = padding_masks(view, batches)
        tallies: dict[tuple[Stat, tuple[Place, ...]], _Tally] = {}
        self.missing: dict[Request, dict[Stat, Statistic | None]] = {}
        self.watched: dict[Value, list[tuple[_Tally, Place]]] = {}
        for request in requests:
            self.missing[request] = dict.fromkeys(request.stats)
            for stat in request.stats:
                key = stat, request.places
                if key not in tallies:
                    tallies[key] = _Tally(stat.make(), stat, len(request.places))
                    for place in request.places:
                        for value in place:
                            self.watched.setdefault(value, []).append((tallies[key], place))
                tallies[key].requests.append(request)

    def see_constants(self) -> None:
        """The inputs and weights among the values that are watched."""
        names = dict(zip(self.view.inputs(), self.view.input_names(), strict=True))
        for value in list(self.watched):
            weight = self.view.weight(value)
            if value in names:
                self.see(value, [batch[names[value]] for batch in self.batches])
            elif weight is not None:
                self.see(value, [weight.read()] * len(self.batches))

    def see(self, value: Value, batches: Sequence[Tensor]) -> None:
        """Take in a value that has been computed; tell those whose statistics are complete."""
        for tally, place in self.watched.pop(value, ()):
            pairs = zip(batches, self.masks, strict=True)
            parts = [tally.statistic.take(x, masks) for x, masks in pairs]
            held = tally.held.setdefault(place, {})
            held[value] = parts
            if len(held) < len(place):
                continue
            for runs in zip(*(joined(held[v]) for v in place), strict=True):
                tally.statistic.see(*map(torch.cat, runs))
            del tally.held[place]
            tally.missing -= 1
            if not tally.missing:
                self._complete(tally)

    def _complete(self, tally: _Tally) -> None:
        if not tally.statistic.count:
            raise BadInput("the calibration data holds no token: every one is masked out")
        for request in tally.requests:
            statistics = self.missing[request]
            statistics[tally.stat] = tally.statistic
            known = [statistic for statistic in statistics.values() if statistic is not None]
            if len(known) == len(statistics):
                del self.missing[request]
                request.done(Statistics(known))

    def check_complete(self) -> None:
        for request, statistics in self.missing.items():
            names = ", ".join(stat.name for stat, entry in statistics.items() if entry is None)
            raise BadInput(
                f"{names} matches no site: what {request.site} takes is never computed"
            )
