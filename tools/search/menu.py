"""All candidates of a model, with what each costs and is forecast to hurt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.core.view import View
from ...ir.run.statistics import Statistics
from ...ir.structure.recognize import Linear, Structure, recognize
from ...ir.structure.units import Unit
from ...ir.vocab.targets import Target
from ...passes.checkpoint_store import CheckpointStore, remembered
from ...passes.linear_pass import weight_of
from ...passes.recipe import Recipe
from ...passes.stored import reason_against_storing
from .data import Parts
from .forms import FAST, FED_BACK, NO_PATH, PATHS, ROUNDED, Form, Path
from .judge import Judge
from .probe import Minded, sensitivities, spread_over_blocks
from .recipe_of import Cut, Held, HeldTables, recipe_of
from .skips import graph_measures, token_cuts, units
from .solve import KEPT, Choice, Option, Place, Problem, useful
from .survey import PROBED, Errors, dense, stored, survey
from .tables import storable_tables, tables_place
from .times import Times
from .timing import Subject, Timing
from .wholes import (
    DEPTH_WORK,
    TOKENS,
    behind_cut,
    gone_units,
    kept_bytes,
    left_out_options,
    pairs_of,
    staying,
    timed_tables,
    unit_of,
    work,
)

Progress = Callable[[str, int, int], None]
FED_BACK_UP_TO = 5e7
"""Weights in all linears up to which candidates with feedback are fitted: a matrix takes as many
seconds for each of them as rounding takes for all."""
PROBE_WORK = 4e12
"""Multiply-accumulates that probing linears may take: less than two minutes on one core of the
reference CPU."""
RANK_ALONE = Form("quantize", 4, 32)
"""What linears hold beside the source's own where only ranks are searched."""


@dataclass(frozen=True)
class Menu:
    """The problems, one for each way to drop image tokens, and what they were made of."""

    problems: Sequence[Problem]
    target: Target
    using: Sequence[str]
    units: Sequence[Unit] = ()
    """The halves of blocks, where they may be left out."""
    notes: Sequence[str] = ()
    times: Times | None = None
    """Where time is bounded."""

    @classmethod
    def of(
        cls, view: View, data: Parts, judge: Judge, target: Target, using: Collection[str],
        progress: Progress, checkpoints: CheckpointStore | None = None,
        timing: Timing | None = None,
    ) -> Menu:  # fmt: skip
        """Survey a canonical graph. ``timing`` says how times become known, where they are bounded.
        Raises ``BadInput`` where there is nothing to choose from."""
        structure = recognize(view)
        source = graph_measures(view, judge.batches[0])
        probe = Judge(view, structure, data.probe)
        halves, notes = units(view, structure) if "layers" in using else [], []
        # By as many rows as time allows: of the halves, few are chosen by small differences.
        wide = len(halves) * work(structure, data.judge) <= DEPTH_WORK
        if not wide and len(halves) * work(structure, data.probe) > DEPTH_WORK:
            halves, notes = [], ["halves of blocks stay: a model of this size takes too long"]
        if data.large and "rank" in using:
            notes = [*notes, "no low-rank paths: a model of this size takes too long"]
        judging = judge if wide else probe
        gone = gone_units(view, halves, judging, progress, checkpoints)
        pairs = pairs_of(view, structure, data, halves, gone, probe, progress, checkpoints)
        groups = _groups(view, structure)
        forms, paths = _candidates(groups, data, using, fast=timing is not None)
        table_place = tables_place(view, structure, judge, target) if "bits" in using else None
        cuts = [*token_cuts(view, structure, judge, progress)] if "tokens" in using else []
        times = None
        if timing is not None:
            tables = [] if table_place is None else storable_tables(view, structure)
            subject = Subject(
                view, structure, target, forms, paths, tables, halves,
                [unit for unit in halves if unit.name in gone], cut=bool(cuts),
            )  # fmt: skip
            times, said = timing.times(subject, judge.batches[0], data, progress, checkpoints)
            notes, source = [*notes, said], {**source, "ms": times.whole}
        places = _linear_places(
            view, structure, data, probe, target, groups, forms, paths, times, progress, checkpoints
        )
        places += [] if table_place is None else [timed_tables(table_place, times)]
        places = [replace(place, unit=unit_of(place, halves, structure, gone)) for place in places]
        whole = [Place(TOKENS, [Option(Cut(), {"loss": 0.0}, KEPT)])] if cuts else []
        units_out = left_out_options(source, places, gone, halves, times)
        base = Problem(places, source, units_out, pairs, stay=staying(halves, gone))
        held = sum(kept_bytes(place) for place in places)
        base = replace(base, fixed={**source, "bytes": source["bytes"] - held})
        behind = (behind_cut(base, source, cut, measured, times) for cut, measured in cuts)
        problems = [replace(base, places=[*places, *whole]), *behind]
        if not (places or gone or len(problems) > 1):
            raise BadInput(
                f"there is nothing to choose from by {', '.join(using)}: no linear of this model "
                "has a dense weight that its output depends on"
            )
        return cls(problems, target, tuple(using), halves, notes, times)

    @property
    def kinds(self) -> set[str]:
        """Of all candidates."""
        places = (place for problem in self.problems for place in problem.places)
        kinds = {option.kind for place in places for option in place.options}
        return kinds | {unit.kind for unit in self.problems[0].units.values()}

    def recipe(self, choice: Choice) -> Recipe:
        return recipe_of(choice, self.target, self.units)

    def bits_alone(self) -> Menu:
        """The same candidates without paths, and with every block and every token."""
        return self.without("rank").without("layers").without("tokens")

    def without(self, knob: str) -> Menu:
        """The same candidates with one knob taken away."""
        problems = [*self.problems[:1]] if knob == "tokens" else [*self.problems]
        if knob == "layers":
            problems = [replace(p, units={}, pairs={}, stay=()) for p in problems]
        if knob in ("bits", "rank"):
            held = _without_paths if knob == "rank" else _paths_alone
            problems = [
                replace(p, places=[
                    replace(x, options=[o for o in x.options if held(o.what)]) for x in p.places
                ])
                for p in problems
            ]  # fmt: skip
        using = tuple(name for name in self.using if name != knob)
        return replace(self, problems=problems, using=using)

    def corrected(self, factors: Mapping[str, float]) -> list[Problem]:
        """The problems with the losses of each kind multiplied."""
        return [problem.corrected(factors) for problem in self.problems]


def _without_paths(what: Any) -> bool:
    return not isinstance(what, Held) or not what.path.rank


def _paths_alone(what: Any) -> bool:
    """As if ranks alone were searched."""
    if isinstance(what, HeldTables):
        return what.bits is None
    return not isinstance(what, Held) or what.form in (None, RANK_ALONE)


def _candidates(
    groups: Sequence[Sequence[Linear]], data: Parts, using: Collection[str], *, fast: bool
) -> tuple[Sequence[Form], Sequence[Path]]:
    """How a linear may be stored, and the paths beside it; nothing where no knob asks for it."""
    if not {"bits", "rank"} & set(using):
        return (), ()
    paths = (NO_PATH, *(PATHS if "rank" in using and not data.large else ()))
    if "bits" not in using:
        return (RANK_ALONE,), paths
    weights = sum(group[0].in_features * group[0].out_features for group in groups)
    fed_back = () if data.large or weights > FED_BACK_UP_TO else FED_BACK
    return (*ROUNDED, *fed_back, *((FAST,) if fast else ())), paths


def _linear_places(
    view: View, structure: Structure, data: Parts, probe: Judge, target: Target,
    groups: Sequence[Sequence[Linear]], forms: Sequence[Form], paths: Sequence[Path],
    times: Times | None, progress: Progress, checkpoints: CheckpointStore | None,
) -> list[Place]:  # fmt: skip
    if not forms:
        return []
    linears = [group[0] for group in groups]

    def surveyed() -> dict[str, Any]:
        by_name = survey(
            view, data.fit, linears, forms, target, progress, ranks=len(paths) > 1,
            sampled=data.large,
        )  # fmt: skip
        return {name: errors.listed() for name, errors in by_name.items()}

    known = remembered(checkpoints, "survey", surveyed)
    errors = {name: Errors.of_list(forms, *listed) for name, listed in known.items()}
    gaps = {x.name: errors[group[0].name].gaps for group in groups for x in group}
    most = int(PROBE_WORK / max(1.0, work(structure, data.probe) / 2))
    minded = remembered(
        checkpoints, "sensitivities",
        lambda: _minded(view, probe, groups, gaps, most, target, progress),
    )  # fmt: skip
    places = []
    for group in groups:
        if not all(x.name in minded for x in group):
            continue  # what is judged does not depend on it: nobody knows what it is for
        sums = Counter[str]()
        for x in group:
            sums.update(minded[x.name])
        places.append(_place(view, group, sums, errors[group[0].name], forms, paths, times))
    return places


def _groups(view: View, structure: Structure) -> list[list[Linear]]:
    """The linears that can be stored otherwise, those that share a weight together."""
    by_weight: dict[Hashable, list[Linear]] = {}
    for linear in structure.linears:
        if reason_against_storing(view, linear) is None:
            by_weight.setdefault(weight_of(view, linear).key, []).append(linear)
    return list(by_weight.values())


def _minded(
    view: View, probe: Judge, groups: Sequence[Sequence[Linear]],
    known: Mapping[str, Mapping[str, Tensor]], most: int, target: Target, progress: Progress,
) -> Minded:  # fmt: skip
    """How much the loss minds a mean squared error of 1 at each linear, by method; about ``most``
    times it is asked. ``known`` are gaps of a survey."""
    linears = [linear for group in groups for linear in group]
    methods = max((len(gaps) for gaps in known.values()), default=1)
    probed, filled = spread_over_blocks(linears, most // max(1, methods))

    def gaps(linear: Linear) -> Mapping[str, Tensor]:
        if known[linear.name]:
            return {method: gap.float() for method, gap in known[linear.name].items()}
        weight, form = weight_of(view, linear).read(), PROBED[0]
        held = stored(form, weight, Statistics(), linear, target)
        return {form.method: weight.float() - dense(held)}

    return filled(sensitivities(view, probe, probed, gaps, progress))


def _place(
    view: View, group: Sequence[Linear], minded: Mapping[str, float], errors: Errors,
    forms: Sequence[Form], paths: Sequence[Path], times: Times | None,
) -> Place:  # fmt: skip
    linear, names = group[0], tuple(x.name for x in group)
    weight = weight_of(view, linear)
    kept = Option(Held(names), {"bytes": weight.nbytes, "loss": 0.0}, KEPT)
    options = [kept]
    for form in forms:
        size = errors.nbytes[form]
        for path in paths:
            beside = path.nbytes(linear.out_features, linear.in_features) * len(group)
            if 2 * path.rank >= min(linear.out_features, linear.in_features):
                continue
            if path.rank and form == FAST:
                continue  # 8 bits leave a path little, and it would run beside the fastest form
            loss = minded.get(form.method, minded[PROBED[0].method]) * errors.of(form, path)
            costs = {"bytes": size + beside, "loss": loss}
            if times is not None:
                costs["ms"] = sum(times.added(x, form, path) for x in group)
            options.append(Option(Held(names, form, path), costs, f"{form.bits} bits"))
    chosen = useful(options, ("bytes", "loss", "ms"))
    # What is kept exactly may be larger than what loses nothing; a recipe may still leave it.
    return Place(linear.name, chosen if kept in chosen else [*chosen, kept])


def used(choice: Mapping[str, Option]) -> dict[str, int]:
    """How many places hold what: ``gptq 3/64``."""
    return dict(sorted(Counter(str(option.what) for option in choice.values()).items()))
