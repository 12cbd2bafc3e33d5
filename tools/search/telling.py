"""A search as the manifest holds it."""

from __future__ import annotations

from ...ir.run.batches import count_samples
from ..report.manifest import FrontEntry, PriceEntry, SearchEntry
from .menu import used
from .points import Found, Point
from .prices import Price, prices

WORDS = (
    "exp(KL) - 1: how much the perplexity of what the source would write grows, by the mean KL "
    "divergence from the source's distributions"
)
ENERGY = "squared error of the first output over its energy"


def search_entry(search: Found) -> SearchEntry:
    """What the manifest tells of a search."""
    choice = search.best.choice
    problems = search.menu.corrected(search.factors)
    measures = ("bytes", *(m for m in ("ms", "kv") if m in search.limits))
    return SearchEntry(
        budget=str(search.budget), axis=search.budget.axis, limits=dict(search.limits),
        source={m: cost for m, cost in search.source.items() if m != "loss"},
        using=list(search.menu.using),
        loss_is=WORDS if search.judge.over_words else ENERGY,
        judged=count_samples(search.judge.batches),
        held={**used(choice.chosen), **dict.fromkeys((f"{d} left out" for d in choice.dropped), 1)},
        front=[_front(point, chosen=point is search.best) for point in search.front],
        prices=[
            _price(price) for measure in measures for price in prices(problems, choice, measure)
        ],
        factors=dict(search.factors), notes=list(search.notes),
    )  # fmt: skip


def _front(point: Point, *, chosen: bool) -> FrontEntry:
    extra = {name: point.costs[name] for name in ("kv", "ms") if name in point.costs}
    entry = FrontEntry(
        recipe=str(point.recipe), bytes=round(point.costs["bytes"]), loss=point.costs["loss"]
    )
    if extra:
        entry.costs = dict(extra)
    if point.measured is not None:
        entry.interval = [point.measured.low, point.measured.high]
    if chosen:
        entry.chosen = True
    return entry


def _price(price: Price) -> PriceEntry:
    entry = PriceEntry(knob=price.knob)
    if price.measure != "bytes":
        entry.of = price.measure
    if price.last is not None:
        entry.last, entry.last_step = price.last.price, str(price.last)
    if price.next is not None:
        entry.next, entry.next_step = price.next.price, str(price.next)
    return entry
