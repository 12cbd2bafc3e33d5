"""Whole heads and feed-forward units as a knob: which share of them may go where, measured.

A place that loses some of its heads or units makes a smaller model by itself, so what that loses is
measured place by place and share by share. What its linears hold is chosen with it, at the sizes
that they have then.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from ...ir.core.view import Value, View
from ...ir.run.calibrate import Request, calibrate
from ...ir.run.statistics import Statistics
from ...ir.structure.recognize import Linear, Structure, recognize
from ...passes.base import Context, PassResult
from ...passes.checkpoint_store import CheckpointStore, remembered
from ...passes.linear_pass import weight_of
from ...passes.weights import structured
from .data import Parts
from .judge import Judge, needed, value_of
from .problem import KEPT, Option, Place, Problem
from .recipe_of import Thinned, thinning
from .skips import Measured, Progress, graph_measures
from .times import Times
from .wholes import DEPTH_WORK, work

SHARES = (0.125, 0.25, 0.5, 0.75)
"""Of the heads of keys, or the units, of a place, what may go."""
WIDE_WORK = 1e12
"""Multiply-accumulates up to which all judged rows are asked, as they are of halves of blocks: many
places times four shares would take longer than all the rest of a survey."""
KIND = "heads"
"""Forecasts of all shares of all places are corrected together."""
Batches = Sequence[Mapping[str, Tensor]]
Fits = Mapping[Thinned, tuple[Sequence[int], structured.Repair]]
"""Which heads or units stay, and what stands in for the others."""


@dataclass(frozen=True)
class Site:
    """An attention or a feed-forward of which heads or units may go."""

    place: structured.Place

    @property
    def name(self) -> str:
        return f"{self.place.kind} of {self.place.name}"

    @property
    def options(self) -> list[Thinned]:
        """What it may hold, all of it first; of shares that come to one number, the least."""
        by_count: dict[int, Thinned] = {}
        for gone in (0.0, *SHARES):
            count = structured.staying(self.place.count, gone)
            by_count.setdefault(count, Thinned(self.place.name, self.place.kind, gone))
        return list(by_count.values())

    def staying(self, what: Thinned) -> int:
        """How many heads or units stay."""
        return structured.staying(self.place.count, what.gone)

    def smaller(self, linear: Linear, what: Thinned) -> Linear:
        """One of its linears, at the size that it has then."""
        stays, count = self.staying(what), self.place.count
        if linear.name == self.place.name:
            return replace(linear, in_features=linear.in_features * stays // count)
        return replace(linear, out_features=linear.out_features * stays // count)


@dataclass(frozen=True)
class Level:
    """A linear at the size that it has beside what its site holds."""

    linear: Linear
    stays: float = 1.0
    """Share of its weights."""
    beside: tuple[str, Any] | None = None


def sites_of(view: View, structure: Structure, output: Value | None = None) -> list[Site]:
    """The places that may lose something, in the order of the graph; of an ``output``, those that
    it depends on. What the move refuses is none: heads of a cache, weights that several share."""
    context = Context(view, structure=structure)
    places = structured.find_places(context, PassResult(), ("heads", "units"))
    behind = None if output is None else set(needed(view, [output]))
    sites = (Site(p) for p in places if behind is None or p.sink.node in behind)
    return [site for site in sites if len(site.options) > 1]


def why_whole(view: View, structure: Structure) -> str:
    """Why all heads and units stay, by one place of those that cannot lose any."""
    result = PassResult()
    if structured.find_places(Context(view, structure=structure), result, ("heads", "units")):
        return "its output depends on no heads or units that could go"
    if not result.refused:
        return "no attention and no feed-forward is seen that could lose heads or units"
    name, reason = result.refused[0]
    more = f", and {len(result.refused) - 1} more places" if len(result.refused) > 1 else ""
    return f"heads and units stay, as those in front of {name}: {reason}{more}"


def by_linear(sites: Sequence[Site]) -> dict[str, Site]:
    """The site that each linear is in, by its name."""
    return {linear.name: site for site in sites for linear in site.place.linears}


def levels(site: Site | None, linear: Linear) -> list[Level]:
    """The sizes that a linear of a site may have, its own first."""
    if site is None:
        return [Level(linear)]
    return [
        Level(
            site.smaller(linear, what), site.staying(what) / site.place.count, (site.name, what)
        )
        for what in site.options
    ]  # fmt: skip


def thinned(
    view: View, kept: Mapping[str, Sequence[int]],
    repairs: Mapping[str, structured.Repair] | None = None,
) -> View:  # fmt: skip
    """A copy of a canonical graph in which places keep the heads or units that ``kept`` names, by
    their sinks' names."""
    copy = view.copy()
    context = Context(copy)
    places = structured.find_places(context, PassResult(), ("heads", "units"))
    chosen = [place for place in places if place.name in kept]
    structured.take_away(context, kept, chosen, repairs or {}, PassResult(), "search")
    copy.drop_unused_weights()
    return copy


def with_the_first(view: View, losing: Collection[Thinned]) -> View:
    """A graph whose sites keep the first of their heads and units: it takes as long as one that
    keeps the best, and is fitted to nothing."""
    if not losing:
        return view
    by_sink = {what.sink: what for what in losing}
    sites = [s for s in sites_of(view, recognize(view)) if s.place.name in by_sink]
    return thinned(view, {s.place.name: range(s.staying(by_sink[s.place.name])) for s in sites})


def searched_sites(
    view: View, structure: Structure, data: Parts, judge: Judge, probe: Judge, progress: Progress,
    checkpoints: CheckpointStore | None,
) -> tuple[list[Site], dict[Thinned, Measured], list[str]]:  # fmt: skip
    """The sites of what is judged, the model with less of each, and what a person should know."""
    sites = sites_of(view, structure, value_of(view, judge.output))
    if sites and data.shared:
        return [], {}, ["heads and units stay: what stands in for them needs rows to judge it by"]
    runs = sum(len(site.options) - 1 for site in sites)
    if sites and (data.large or runs * work(view, structure, data.probe) > DEPTH_WORK):
        return [], {}, ["heads and units stay: a model of this size takes too long"]
    wide = runs * work(view, structure, data.judge) <= WIDE_WORK
    judging = judge if wide else probe
    return sites, measured_sites(view, sites, data.fit, judging, progress, checkpoints), []


def measured_sites(
    view: View, sites: Sequence[Site], fit: Batches, judge: Judge, progress: Progress,
    checkpoints: CheckpointStore | None,
) -> dict[Thinned, Measured]:  # fmt: skip
    """The model without each share of each site, fitted to some batches and judged by others."""
    smaller = [what for site in sites for what in site.options if what.gone]

    def run() -> list[Any]:
        fits, rows = _fitted(view, sites, fit), []
        for number, what in enumerate(smaller):
            progress(f"{what} of {what.sink}", number, len(smaller))
            stays, repair = fits[what]
            copy = thinned(view, {what.sink: stays}, {what.sink: repair})
            rows.append([graph_measures(copy, judge.batches[0]), judge.mean_of(copy)])
        return rows

    known = remembered(checkpoints, "heads and units", run)
    return {what: Measured(*fields) for what, fields in zip(smaller, known, strict=True)}


def _fitted(view: View, sites: Sequence[Site], batches: Batches) -> Fits:
    """One sweep, in which each place is fitted at all its shares."""
    fits: dict[Thinned, tuple[Sequence[int], structured.Repair]] = {}

    def done(site: Site, statistics: Statistics) -> None:
        for what in site.options:
            if what.gone:
                fits[what] = thinning(what.gone).at_place(view, site.place, statistics)

    calibrate(view, batches, [
        Request(
            site.place.name, ((view.tensor(site.place.sink.node),),),
            thinning(SHARES[0]).requires().stats, partial(done, site),
        )
        for site in sites
    ])  # fmt: skip
    return fits


def timed_sites(sites: Sequence[Site], times: Times) -> tuple[list[Site], list[str]]:
    """The sites that a table of times knows, and what a person should know of the others: one that
    was measured with a key-value cache has no heads."""
    timed = [
        site for site in sites
        if times.knows(site.place.signature, (o.gone for o in site.options if o.gone))
    ]  # fmt: skip
    if len(timed) == len(sites):
        return timed, []
    count = f"{len(sites) - len(timed)} of {len(sites)} places keep all their heads or units"
    return timed, [f"{count}: the table of times has none of a part of them"]


def site_places(
    view: View, sites: Sequence[Site], measured: Mapping[Thinned, Measured],
    source: Mapping[str, float], chosen_from: Collection[str], times: Times | None,
) -> list[Place]:  # fmt: skip
    """What each site may hold; what linears in ``chosen_from`` weigh is theirs, not the site's."""

    def option(site: Site, what: Thinned) -> Option:
        if not what.gone:
            return Option(what, {"bytes": 0.0, "loss": 0.0}, KEPT)
        after = measured[what]
        costs = {m: after.costs.get(m, 0.0) - cost for m, cost in source.items() if m != "ms"}
        own = [x for x in site.place.linears if x.name in chosen_from]
        costs["bytes"] += sum(weight_of(view, x).stored_bytes for x in own)
        costs["bytes"] -= sum(_bytes(view, site.smaller(x, what)) for x in own)
        costs["loss"] = after.loss
        if times is not None:
            costs["ms"] = -times.saved(site.place.signature, what.gone)
        return Option(what, costs, KIND)

    return [Place(site.name, [option(site, what) for what in site.options]) for site in sites]


def _bytes(view: View, linear: Linear) -> int:
    """Of a part of a linear, which is stored as numbers whatever codes the whole one has."""
    return linear.in_features * linear.out_features * weight_of(view, linear).dtype.itemsize


def with_all_heads(problem: Problem, but: Collection[str] = ()) -> Problem:
    """The problem without what takes heads or units away, but for sites of these sinks."""

    def whole(option: Option) -> bool:
        what = option.what if option.beside is None else option.beside[1]
        return not (isinstance(what, Thinned) and what.gone) or what.sink in but

    return replace(problem, places=[
        replace(place, options=[option for option in place.options if whole(option)])
        for place in problem.places
    ])  # fmt: skip
