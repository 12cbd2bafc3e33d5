"""Halves of blocks, image tokens and tables as parts of the problem, measured as wholes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...ir.core.view import View
from ...ir.structure.costs import graph_costs, sample_sizes
from ...ir.structure.recognize import Linear, Structure, last_tower
from ...ir.structure.units import Unit
from ...passes.checkpoint_store import CheckpointStore, remembered
from ...passes.tokens.token_pass import KeepPass
from .data import Parts
from .forms import Form
from .healing import Healing
from .judge import Judge
from .problem import KEPT, Option, Place, Problem
from .recipe_of import Cut, Held, Thinned
from .skips import PAIRED, Measured, Progress, excess_of_pairs, left_out
from .times import Times

DEPTH_WORK = 4e12
"""Multiply-accumulates that leaving out halves of blocks may take: less than two minutes on one
core of the reference CPU."""
LEAST = 1e-9
"""Of a loss whose logarithm is taken."""
TOKENS = "image tokens"
"""The place at which they are dropped, or not."""


def work(
    view: View, structure: Structure, batches: Sequence[Mapping[str, Tensor]]
) -> float:
    """Multiply-accumulates of one run over some batches."""
    by_shape: dict[tuple[tuple[int, ...], ...], float] = {}
    total = 0.0
    for batch in batches:
        shapes = tuple(tuple(tensor.shape[1:]) for tensor in batch.values())
        if shapes not in by_shape:
            by_shape[shapes] = _macs(view, structure, batch)
        total += by_shape[shapes] * max(len(t) for t in batch.values() if t.dim())
    return total


def _macs(view: View, structure: Structure, batch: Mapping[str, Tensor]) -> float:
    """Of one sample; of what the cost model cannot count, those of its linears by tokens."""
    counted = graph_costs(view, sample_sizes(view, batch), structure).macs
    if counted is not None:
        return float(counted)
    tokens = next(iter(batch.values())).shape[1:2].numel()
    return float(tokens * sum(x.in_features * x.out_features for x in structure.linears))


def gone_units(
    healing: Healing, data: Parts, judge: Judge, progress: Progress,
    checkpoints: CheckpointStore | None,
) -> dict[str, Measured]:  # fmt: skip
    """The model without each half of a block that may be left out, by name. They are healed, which
    ``healing`` says then, where that makes their losses less on rows that nothing was fitted to: as
    a geometric mean, since those that lose much are not what is chosen."""

    def without(heals: bool) -> dict[str, Any]:
        healing.heals = heals
        pairs = left_out(healing, judge, progress)
        return {unit.name: [dict(m.costs), m.loss, [*m.lost]] for unit, m in pairs}

    def run() -> list[Any]:
        ways = [without(heals) for heals in ((False,) if data.shared else (False, True))]
        sums = [sum(math.log(max(loss, LEAST)) for _, loss, _ in way.values()) for way in ways]
        best = sums.index(min(sums))
        return [bool(best), ways[best]]

    healing.heals, known = remembered(checkpoints, "halves of blocks, healed or not", run)
    return {name: Measured(*fields) for name, fields in known.items()}


def pairs_of(
    healing: Healing, gone: Mapping[str, Measured], data: Parts, probe: Judge, progress: Progress,
    checkpoints: CheckpointStore | None,
) -> dict[tuple[str, str], Option]:  # fmt: skip
    """What two halves cost beyond their sum: neighbours are healed by one map, and weigh as much
    less; what else two lose, where there is time to measure that.

    What two lose less than their sum is not counted: over all pairs of many halves it would add up
    to more than these lose. (zoo:tiny-llava without 7 of 12 was forecast to lose next to nothing,
    and lost 91 %.)
    """
    count = min(PAIRED, len(gone))
    work_of_pairs = count * (count + 1) / 2 * work(healing.view, healing.structure, data.probe)
    losses = {name: measured.loss for name, measured in gone.items()}

    def run() -> list[Any]:
        shares = dict[tuple[str, str], float]()
        if work_of_pairs <= DEPTH_WORK:
            shares = dict(excess_of_pairs(healing, losses, probe, progress))
        saved = {
            (one.name, other.name):
            healing.nbytes(one, other) - healing.nbytes(one) - healing.nbytes(other)
            for one, other in healing.neighbours if {one.name, other.name} <= gone.keys()
        }
        return [[*pair, shares.get(pair, 0.0), saved.get(pair, 0)] for pair in {**shares, **saved}]

    known = remembered(checkpoints, "pairs of halves, healed or not", run)
    return {
        (one, other): Option(
            (one, other), {"bytes": saved, "loss": max(share, 0.0) * (losses[one] + losses[other])},
            "layers",
        )
        for one, other, share, saved in known if share > 0 or saved
    }  # fmt: skip


def untorn(
    gone: Mapping[str, Measured], groups: Sequence[Sequence[Linear]]
) -> dict[str, Measured]:
    """Those halves of blocks with which no linear goes that shares its weight with one that stays:
    what is stored by all their names would not be found again."""
    names = [{linear.name for linear in group} for group in groups]
    return {
        unit: measured for unit, measured in gone.items()
        if all(group.isdisjoint(measured.lost) or group <= {*measured.lost} for group in names)
    }  # fmt: skip


def unit_of(place: Place, gone: Mapping[str, Measured]) -> str:
    """The half of a block with which all linears of a place go, where it may be left out."""
    names = {*linears_of(place)}
    units = (unit for unit, measured in gone.items() if names and names <= {*measured.lost})
    return next(units, "")


def linears_of(place: Place) -> tuple[str, ...]:
    """The names of those that a place says what they hold, or of the one behind its heads or units;
    none of a place of tables or tokens."""
    what = kept_option(place).what
    if isinstance(what, Thinned):
        return (what.sink,)
    return what.names if isinstance(what, Held) else ()


def staying(halves: Sequence[Unit], gone: Mapping[str, Measured]) -> list[list[str]]:
    """Of each kind of halves all of which may be left out, the names: one of them has to stay."""
    by_part: dict[str, list[str]] = {}
    for unit in halves:
        by_part.setdefault(unit.part, []).append(unit.name)
    return [names for names in by_part.values() if all(name in gone for name in names)]


def as_in_source(problem: Problem, place: str) -> bool:
    """Whether a place that a problem has one option of holds what the source does."""
    kinds = (option.kind for x in problem.places if x.name == place for option in x.options)
    return all(kind == KEPT for kind in kinds)


def kept_option(place: Place) -> Option:
    return next(option for option in place.options if option.kind == KEPT)


def kept_bytes(place: Place) -> float:
    return kept_option(place).costs["bytes"]


def left_out_options(
    source: Mapping[str, float], places: Sequence[Place], gone: Mapping[str, Measured],
    halves: Sequence[Unit], times: Times | None,
) -> dict[str, Option]:  # fmt: skip
    """What each unit takes with it beside its places."""
    parts = {unit.name: unit.part for unit in halves}
    options = {}
    for name, measured in gone.items():
        inside = sum(kept_bytes(place) for place in places if place.unit == name)
        costs = {m: measured.costs.get(m, 0.0) - cost for m, cost in source.items()}
        costs |= {"bytes": costs["bytes"] + inside, "loss": measured.loss}
        if times is not None:  # of its linears as the source has them, which are no options then
            costs["ms"] = -times.half(parts[name])
        options[name] = Option(name, costs, "layers")
    return options


def in_tower(places: Sequence[Place], structure: Structure) -> set[str]:
    """The names of those whose linears all lie in blocks of the language model."""
    subs = (sub for block in last_tower(structure) for sub in block.sub_blocks)
    inside = {name for sub in subs for name in sub.linears}
    return {x.name for x in places if linears_of(x) and inside.issuperset(linears_of(x))}


def behind_cut(
    base: Problem, source: Mapping[str, float], cut: KeepPass, measured: Measured,
    inside: Collection[str], times: Times | None = None,
) -> Problem:  # fmt: skip
    """The problem behind a cut, which scales what blocks, and the places ``inside`` of them, cost
    beside their bytes: the cache, and the time, by the tokens that the cache still holds."""
    share = {m: measured.costs.get(m, 0.0) / cost for m, cost in source.items()} | {"bytes": 1.0}
    share["ms"] = share.get("kv", 1.0)
    cut_place = Place(TOKENS, [Option(Cut(cut), {"loss": measured.loss}, "tokens")])

    def behind(option: Option) -> Option:
        return replace(option, costs={m: c * share.get(m, 1.0) for m, c in option.costs.items()})

    units = {name: behind(option) for name, option in base.units.items()}
    places = [
        replace(place, options=[behind(o) for o in place.options])
        if place.name in inside else place
        for place in base.places
    ]
    fixed = {m: cost * share[m] for m, cost in base.fixed.items()}
    fixed["bytes"] += measured.costs["bytes"] - source["bytes"]
    if times is not None:
        fixed["ms"] = times.behind(str(Cut(cut)))
    return replace(base, places=[*places, cut_place], fixed=fixed, units=units)


def timed_tables(place: Place, times: Times | None) -> Place:
    """The place of the tables, with what each form of them adds to the time."""
    if times is None:
        return place
    return replace(place, options=[
        replace(o, costs={**o.costs, "ms": times.tables.get(str(o.what), 0.0)})
        for o in place.options
    ])  # fmt: skip


def timed_forms(forms: Sequence[Form], times: Times) -> tuple[Sequence[Form], list[str]]:
    """The forms that a table of times knows of some linear, and what a person should know of the
    others: an older version did not measure all."""
    known = set[str]().union(*times.linears.values())
    lacking = [form for form in forms if known and form.timed not in known]
    if not lacking:
        return forms, []
    names = ", ".join(dict.fromkeys(form.timed for form in lacking))
    note = f"no linear is stored as {names}: the table of times has none of that"
    return [form for form in forms if form not in lacking], [note]


def timed_cuts(
    cuts: Sequence[tuple[KeepPass, Measured]], times: Times
) -> tuple[list[tuple[KeepPass, Measured]], list[str]]:
    """The cuts that a table of times knows, and what a person should know of the others."""
    timed = [(cut, behind) for cut, behind in cuts if str(Cut(cut)) in times.cuts]
    if len(timed) == len(cuts):
        return timed, []
    count = f"{len(cuts) - len(timed)} of {len(cuts)} ways to drop image tokens"
    return timed, [f"{count} are left out: the table of times has none of them"]
