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
from ...ir.structure.recognize import Linear, Structure, last_tower, recognize
from ...ir.structure.units import Unit
from ...ir.vocab.targets import Target
from ...passes.checkpoint_store import CheckpointStore, remembered
from ...passes.linear_pass import weight_of
from ...passes.recipe import Recipe
from ...passes.stored import reason_against_storing
from ...passes.tokens.token_pass import KeepPass
from .data import Parts
from .forms import FED_BACK, NO_PATH, PATHS, ROUNDED, Form, Path
from .judge import Judge
from .probe import Minded, sensitivities, spread_over_blocks
from .recipe_of import Cut, Held, recipe_of
from .skips import PAIRED, Measured, excess_of_pairs, graph_measures, left_out, token_cuts, units
from .solve import KEPT, Choice, Option, Place, Problem, useful
from .survey import PROBED, Errors, dense, stored, survey
from .tables import tables_place

Progress = Callable[[str, int, int], None]
FED_BACK_UP_TO = 5e7
"""Weights in all linears up to which candidates with feedback are fitted: a matrix takes as many
seconds for each of them as rounding takes for all."""
PROBE_WORK, DEPTH_WORK = 4e12, 4e12
"""Multiply-accumulates that probing linears and leaving out halves of blocks may take: less than
two minutes each on one core of the reference CPU."""
RANK_ALONE = Form("quantize", 4, 32)
"""What linears hold beside the source's own where only ranks are searched."""
TOKENS = "image tokens"
"""The place at which they are dropped, or not."""


@dataclass(frozen=True)
class Menu:
    """The problems, one for each way to drop image tokens, and what they were made of."""

    problems: Sequence[Problem]
    target: Target
    using: Sequence[str]
    units: Sequence[Unit] = ()
    """The halves of blocks, where they may be left out."""
    notes: Sequence[str] = ()

    @classmethod
    def of(
        cls, view: View, data: Parts, judge: Judge, target: Target, using: Collection[str],
        progress: Progress, checkpoints: CheckpointStore | None = None,
    ) -> Menu:  # fmt: skip
        """Survey a canonical graph. Raises ``BadInput`` where there is nothing to choose from."""
        structure = recognize(view)
        source = graph_measures(view, judge.batches[0])
        probe = Judge(view, structure, data.probe)
        halves, notes = units(view, structure) if "layers" in using else [], []
        # By as many rows as time allows: of the halves, few are chosen by small differences.
        wide = len(halves) * _work(structure, data.judge) <= DEPTH_WORK
        if not wide and len(halves) * _work(structure, data.probe) > DEPTH_WORK:
            halves, notes = [], ["halves of blocks stay: a model of this size takes too long"]
        if data.large and "rank" in using:
            notes = [*notes, "no low-rank paths: a model of this size takes too long"]
        judging = judge if wide else probe
        gone = _gone(view, halves, judging, progress, checkpoints)
        pairs = _pairs(view, structure, data, halves, gone, probe, progress, checkpoints)
        places = _linear_places(
            view, structure, data, probe, target, using, progress, checkpoints
        )
        table_place = tables_place(view, structure, judge, target) if "bits" in using else None
        places += [] if table_place is None else [table_place]
        places = [replace(place, unit=_unit_of(place, halves, structure, gone)) for place in places]
        cuts = [*token_cuts(view, structure, judge, progress)] if "tokens" in using else []
        whole = [Place(TOKENS, [Option(Cut(), {"loss": 0.0}, KEPT)])] if cuts else []
        units_out = _left_out(source, places, gone)
        base = Problem(places, source, units_out, pairs, most_units=max(0, len(halves) - 1))
        held = sum(_kept_bytes(place) for place in places)
        base = replace(base, fixed={**source, "bytes": source["bytes"] - held})
        behind = (behind_cut(base, source, cut, measured) for cut, measured in cuts)
        problems = [replace(base, places=[*places, *whole]), *behind]
        if not (places or gone or len(problems) > 1):
            raise BadInput(
                f"there is nothing to choose from by {', '.join(using)}: no linear of this model "
                "has a dense weight that its output depends on"
            )
        return cls(problems, target, tuple(using), halves, notes)

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
        base = self.problems[0]
        places = [
            replace(place, options=[
                o for o in place.options if not isinstance(o.what, Held) or not o.what.path.rank
            ])
            for place in base.places
        ]  # fmt: skip
        alone = replace(base, places=places, units={}, pairs={})
        return replace(self, problems=[alone], using=("bits",))

    def corrected(self, factors: Mapping[str, float]) -> list[Problem]:
        """The problems with the losses of each kind multiplied."""
        return [problem.corrected(factors) for problem in self.problems]


def _work(structure: Structure, batches: Sequence[Mapping[str, Tensor]]) -> float:
    """Multiply-accumulates of one run over some batches, about."""
    tokens = sum(next(iter(batch.values())).shape[:2].numel() for batch in batches)
    return float(tokens * sum(x.in_features * x.out_features for x in structure.linears))


def _linear_places(
    view: View, structure: Structure, data: Parts, probe: Judge, target: Target,
    using: Collection[str], progress: Progress, checkpoints: CheckpointStore | None,
) -> list[Place]:  # fmt: skip
    if not {"bits", "rank"} & set(using):
        return []
    groups = _groups(view, structure)
    linears = [group[0] for group in groups]
    many = data.large or sum(x.in_features * x.out_features for x in linears) > FED_BACK_UP_TO
    forms: Sequence[Form] = ROUNDED if many else (*ROUNDED, *FED_BACK)
    if "bits" not in using:
        forms = (RANK_ALONE,)
    paths = (NO_PATH, *(PATHS if "rank" in using and not data.large else ()))

    def surveyed() -> dict[str, Any]:
        by_name = survey(
            view, data.fit, linears, forms, target, progress, ranks=len(paths) > 1,
            sampled=data.large,
        )  # fmt: skip
        return {name: errors.listed() for name, errors in by_name.items()}

    known = remembered(checkpoints, "survey", surveyed)
    errors = {name: Errors.of_list(forms, *listed) for name, listed in known.items()}
    gaps = {x.name: errors[group[0].name].gaps for group in groups for x in group}
    most = int(PROBE_WORK / max(1.0, _work(structure, data.probe) / 2))
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
        places.append(_place(view, group, sums, errors[group[0].name], forms, paths))
    return places


def _gone(
    view: View, halves: Sequence[Unit], judge: Judge, progress: Progress,
    checkpoints: CheckpointStore | None,
) -> dict[str, Measured]:  # fmt: skip
    """The model without each half of a block that may be left out, by name."""

    def run() -> dict[str, Any]:
        pairs = left_out(view, halves, judge, progress)
        return {unit.name: [dict(measured.costs), measured.loss] for unit, measured in pairs}

    known = remembered(checkpoints, "halves of blocks", run)
    return {name: Measured(*fields) for name, fields in known.items()}


def _pairs(
    view: View, structure: Structure, data: Parts, halves: Sequence[Unit],
    gone: Mapping[str, Measured], probe: Judge, progress: Progress,
    checkpoints: CheckpointStore | None,
) -> dict[tuple[str, str], Option]:  # fmt: skip
    """What two halves cost beyond their sum, where there is time to measure that."""
    count = min(PAIRED, len(gone))
    if count * (count + 1) / 2 * _work(structure, data.probe) > DEPTH_WORK:
        return {}
    losses = {name: measured.loss for name, measured in gone.items()}

    def run() -> list[Any]:
        pairs = excess_of_pairs(view, halves, losses, probe, progress)
        return [[*names, share] for names, share in pairs]

    return {
        (one, other): Option(
            (one, other), {"loss": share * (losses[one] + losses[other])}, "layers"
        )
        for one, other, share in remembered(checkpoints, "pairs of halves", run)
    }  # fmt: skip


def _unit_of(
    place: Place, halves: Sequence[Unit], structure: Structure, gone: Mapping[str, Measured]
) -> str:
    """The half of a block that all linears of a place lie in, where it may be left out."""
    held = _kept(place).what
    if not isinstance(held, Held) or not halves:
        return ""
    blocks = last_tower(structure)
    for unit in halves:
        first, *rest = blocks[unit.block].sub_blocks
        subs = {"attn": [first], "mlp": rest}.get(unit.part, [first, *rest])
        inside = {name for sub in subs for name in sub.linears}
        if unit.name in gone and inside.issuperset(held.names):
            return unit.name
    return ""


def _kept(place: Place) -> Option:
    return next(option for option in place.options if option.kind == KEPT)


def _kept_bytes(place: Place) -> float:
    return _kept(place).costs["bytes"]


def _left_out(
    source: Mapping[str, float], places: Sequence[Place], gone: Mapping[str, Measured]
) -> dict[str, Option]:
    """What each unit takes with it beside its places."""
    options = {}
    for name, measured in gone.items():
        inside = sum(_kept_bytes(place) for place in places if place.unit == name)
        costs = {m: measured.costs.get(m, 0.0) - cost for m, cost in source.items()}
        costs |= {"bytes": costs["bytes"] + inside, "loss": measured.loss}
        options[name] = Option(name, costs, "layers")
    return options


def behind_cut(
    base: Problem, source: Mapping[str, float], cut: KeepPass, measured: Measured
) -> Problem:
    """The problem behind a cut, which scales what blocks cost beside their bytes."""
    share = {m: measured.costs.get(m, 0.0) / cost for m, cost in source.items()} | {"bytes": 1.0}
    place = Place(TOKENS, [Option(Cut(cut), {"loss": measured.loss}, "tokens")])
    units = {
        name: replace(o, costs={m: c * share.get(m, 1.0) for m, c in o.costs.items()})
        for name, o in base.units.items()
    }
    fixed = {m: cost * share[m] for m, cost in base.fixed.items()}
    fixed["bytes"] += measured.costs["bytes"] - source["bytes"]
    return replace(base, places=[*base.places, place], fixed=fixed, units=units)


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
    forms: Sequence[Form], paths: Sequence[Path],
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
            loss = minded.get(form.method, minded[PROBED[0].method]) * errors.of(form, path)
            costs = {"bytes": size + beside, "loss": loss}
            options.append(Option(Held(names, form, path), costs, f"{form.bits} bits"))
    chosen = useful(options, ("bytes", "loss"))
    # What is kept exactly may be larger than what loses nothing; a recipe may still leave it.
    return Place(linear.name, chosen if kept in chosen else [*chosen, kept])


def used(choice: Mapping[str, Option]) -> dict[str, int]:
    """How many places hold what: ``gptq 3/64``."""
    return dict(sorted(Counter(str(option.what) for option in choice.values()).items()))
