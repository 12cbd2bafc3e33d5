"""The bits of keys and values as a knob: one number for all of a model, measured as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.core.view import View
from ...ir.structure.cache_slots import has_cache
from ...ir.structure.recognize import Structure
from ...passes.base import Context
from ...passes.checkpoint_store import CheckpointStore, remembered
from .judge import Judge
from .problem import KEPT, Option, Place, Problem
from .recipe_of import HeldCache
from .skips import Measured, Progress, measured_graph
from .times import Times

PLACE = "keys and values"
NARROW = (HeldCache(8), HeldCache(4))
KIND = "cache"
Narrow = Sequence[tuple[HeldCache, Measured]]


def narrowed(view: View, held: HeldCache, batches: Sequence[Mapping[str, Tensor]]) -> View | None:
    """A copy of a canonical graph whose cache is in few bits, its scales by some batches; ``None``
    where some or all of it cannot be."""
    context = Context(view.copy(), calibration=batches)
    try:
        result = held.pass_().run(context)
    except BadInput:
        return None
    context.view.drop_unused_weights()
    return None if result.refused else context.view


def measured_caches(
    view: View, fit: Sequence[Mapping[str, Tensor]], judge: Judge, progress: Progress,
    checkpoints: CheckpointStore | None,
) -> Narrow:  # fmt: skip
    """The model with its cache in few bits, for each number of them that it can have."""

    def run() -> Iterator[list[Any]]:
        for number, held in enumerate(NARROW):
            progress(str(held), number, len(NARROW))
            graph = narrowed(view, held, fit)
            if graph is not None:
                measured = measured_graph(graph, judge)
                yield [held.bits, dict(measured.costs), measured.loss]

    known = remembered(checkpoints, "bits of the cache", lambda: [*run()])
    return [(HeldCache(bits), Measured(costs, loss)) for bits, costs, loss in known]


def why_wide(view: View, structure: Structure, caches: Narrow) -> list[str]:
    """What a person should know of a cache that keeps its bits, or some numbers of them."""
    known, notes = {held for held, _ in caches}, list[str]()
    for held in NARROW if has_cache(view) else ():
        if held in known:
            continue
        try:
            refused = held.pass_().plan(Context(view, structure=structure)).refused
            reason = "; ".join(f"{name}: {why}" for name, why in refused[:1]) or "it does not run"
        except BadInput as error:
            reason = str(error)
        notes.append(f"no {held}: {reason}")
    return notes


def timed_caches(caches: Narrow, times: Times) -> tuple[Narrow, list[str]]:
    """Those that a table of times knows, and what a person should know of the others."""
    timed = [(held, measured) for held, measured in caches if str(held) in times.caches]
    if len(timed) == len(caches):
        return timed, []
    return timed, ["the cache keeps its bits: the table of times has none of fewer"]


def with_caches(
    base: Problem, source: Mapping[str, float], caches: Narrow, times: Times | None
) -> Iterator[Problem]:
    """The problem with the cache as it is, and with each number of bits, which makes smaller what
    everything adds to the cache; its scales go where that goes."""
    if not caches:
        yield base
        return
    yield _with(base, Option(HeldCache(), {"loss": 0.0}, KEPT))
    for held, measured in caches:
        share = measured.costs["kv"] / source["kv"]
        scales = (measured.costs["bytes"] - source["bytes"]) / source["kv"]
        costs = {"loss": measured.loss}
        if times is not None:
            costs["ms"] = times.caches[str(held)]
        yield _with(_lighter(base, share, scales), Option(held, costs, KIND))


def _with(problem: Problem, option: Option) -> Problem:
    return replace(problem, places=[*problem.places, Place(PLACE, [option])])


def _lighter(base: Problem, share: float, scales: float) -> Problem:
    def costs(known: Mapping[str, float]) -> dict[str, float]:
        kv = known.get("kv", 0.0)
        if not kv:
            return {**known}
        return {**known, "kv": kv * share, "bytes": known.get("bytes", 0.0) + kv * scales}

    def lighter(option: Option) -> Option:
        return replace(option, costs=costs(option.costs))

    places = [replace(place, options=[*map(lighter, place.options)]) for place in base.places]
    units = {name: lighter(option) for name, option in base.units.items()}
    return replace(base, places=places, units=units, fixed=costs(base.fixed))
