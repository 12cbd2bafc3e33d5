"""All candidates of a model, with what each costs and is forecast to hurt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from ...ir.core.errors import BadInput
from ...ir.core.view import View
from ...ir.structure.recognize import Structure, recognize
from ...ir.structure.units import Unit
from ...ir.vocab.targets import Target
from ...passes.checkpoint_store import CheckpointStore
from ...passes.recipe import Recipe
from ...passes.tokens.token_pass import KeepPass
from .cache_bits import (
    PLACE,
    Narrow,
    measured_caches,
    timed_caches,
    why_wide,
    with_caches,
)
from .data import Parts
from .heads import (
    Site,
    searched_sites,
    site_places,
    sites_of,
    timed_sites,
    why_whole,
    with_all_heads,
)
from .healing import Healing
from .judge import Judge
from .linears import (
    candidates,
    linear_places,
    paths_alone,
    storable_groups,
    without_paths,
)
from .problem import KEPT, Choice, Option, Place, Problem
from .recipe_of import Cut, Thinned, recipe_of
from .skips import Measured, graph_measures, may_go, token_cuts, units
from .tables import storable_tables, tables_place
from .times import Times
from .timing import Subject, Timing, changed
from .wholes import (
    DEPTH_WORK,
    TOKENS,
    as_in_source,
    behind_cut,
    gone_units,
    in_tower,
    kept_bytes,
    left_out_options,
    linears_of,
    pairs_of,
    staying,
    timed_cuts,
    timed_forms,
    timed_tables,
    unit_of,
    untorn,
    work,
)

Progress = Callable[[str, int, int], None]
AS_A_WHOLE = {"tokens": TOKENS, "cache": PLACE}
"""Knobs of which each choice has problems of its own, and their places."""


@dataclass(frozen=True)
class Menu:
    """The problems, one for each way to drop image tokens, and what they were made of."""

    problems: Sequence[Problem]
    target: Target
    using: Sequence[str]
    units: Sequence[Unit] = ()
    """The halves of blocks, where they may be left out."""
    heal: bool = True
    """Whether maps stand in for those that are."""
    notes: Sequence[str] = ()
    times: Times | None = None
    """Where time is bounded."""

    @classmethod
    def of(
        cls, view: View, data: Parts, judge: Judge, target: Target, using: Collection[str],
        progress: Progress, checkpoints: CheckpointStore | None = None,
        timing: Timing | None = None, cache: float | None = None,
    ) -> Menu:  # fmt: skip
        """Survey a canonical graph. ``timing`` says how times become known, where they are bounded;
        ``cache`` is the bound on the bytes of one sample's keys and values, where there is one.
        Raises ``BadInput`` where there is nothing to choose from."""
        structure = recognize(view)
        source = graph_measures(view, judge.batches[0])
        probe = Judge(view, structure, data.probe)
        halves, notes = units(view, structure) if "layers" in using else [], list[str]()
        if data.shared:
            notes = ["all data are one row, fitted to and judged by: on others more is lost"]
        # By as many rows as time allows: of the halves, few are chosen by small differences.
        wide = len(halves) * work(view, structure, data.judge) <= DEPTH_WORK
        if not wide and len(halves) * work(view, structure, data.probe) > DEPTH_WORK:
            halves = []
            notes = [*notes, "halves of blocks stay: a model of this size takes too long"]
        if data.large and "rank" in using:
            notes = [*notes, "no low-rank paths: a model of this size takes too long"]
        healing = Healing(view, structure, may_go(view, halves), data.fit)
        may_be_out = gone_units(healing, data, judge if wide else probe, progress, checkpoints)
        if may_be_out and not healing.heals:
            notes = [*notes, "halves of blocks go as they are: the data are too few to heal them"]
        groups = storable_groups(view, structure)
        gone = untorn(may_be_out, groups)
        if len(gone) < len(may_be_out):
            count = f"{len(may_be_out) - len(gone)} of {len(may_be_out)} halves of blocks stay"
            notes = [*notes, f"{count}: linears share their weights with others outside of them"]
        pairs = pairs_of(healing, gone, data, probe, progress, checkpoints)
        sites: list[Site] = []
        losses: dict[Thinned, Measured] = {}
        if "heads" in using:
            sites, losses, remarks = searched_sites(
                view, structure, data, judge, probe, progress, checkpoints
            )
            notes = [*notes, *remarks]
        forms, paths = candidates(groups, data, using, fast=timing is not None)
        table_place = tables_place(view, structure, judge, target) if "bits" in using else None
        cuts: list[tuple[KeepPass, Measured]] = []
        if "tokens" in using:
            cuts = [*token_cuts(view, structure, judge, progress, cache)]
        caches: Narrow = ()
        if "cache" in using:
            caches = measured_caches(view, data.fit, judge, progress, checkpoints)
            notes = [*notes, *why_wide(view, structure, caches)]
        times, about_times = None, list[str]()
        if timing is not None:
            tables = [] if table_place is None else storable_tables(view, structure)
            subject = Subject(
                view, structure, target, forms, paths, tables, halves,
                healing.units, sites,
                [cut for cut, _ in cuts], [held for held, _ in caches], healing.heals,
            )  # fmt: skip
            times, remark = timing.times(subject, judge.batches[0], data, progress, checkpoints)
            sites, untimed = timed_sites(sites, times)
            forms, unknown = timed_forms(forms, times)
            about_times = [remark, *untimed, *unknown]
            source = {**source, "ms": times.whole}
            cuts, more = timed_cuts(cuts, times)
            caches, still = timed_caches(caches, times)
            about_times += [*more, *still]
        places = linear_places(
            view, structure, data, probe, target, groups, forms, paths, sites, times, progress,
            checkpoints,
        )  # fmt: skip
        stored_anew = {name for place in places for name in linears_of(place)}
        places = [*site_places(view, sites, losses, source, stored_anew, times), *places]
        places += [] if table_place is None else [timed_tables(table_place, times)]
        places = [replace(place, unit=unit_of(place, gone)) for place in places]
        whole = [Place(TOKENS, [Option(Cut(), {"loss": 0.0}, KEPT)])] if cuts else []
        units_out = left_out_options(source, places, gone, halves, times)
        base = Problem(places, source, units_out, pairs, stay=staying(halves, gone))
        held = sum(kept_bytes(place) for place in places)
        base = replace(base, fixed={**source, "bytes": source["bytes"] - held})
        inside = in_tower(places, structure) if cuts else set[str]()
        problems = list[Problem]()
        for problem in with_caches(base, source, caches, times):
            problems.append(replace(problem, places=[*problem.places, *whole]))
            problems += (
                behind_cut(
                    fit_for(problem, view, sites, cut), source, cut, measured, inside, times
                )
                for cut, measured in cuts
            )
        if not (places or gone or len(problems) > 1):
            raise BadInput(_nothing(view, structure, using, notes))
        return cls(
            problems, target, tuple(using), halves, healing.heals, [*notes, *about_times], times
        )

    @property
    def kinds(self) -> set[str]:
        """Of all candidates."""
        places = (place for problem in self.problems for place in problem.places)
        kinds = {option.kind for place in places for option in place.options}
        return kinds | {unit.kind for unit in self.problems[0].units.values()}

    def recipe(self, choice: Choice) -> Recipe:
        return recipe_of(choice, self.target, self.units, heal=self.heal)

    def bits_alone(self) -> Menu:
        """The same candidates without paths, and with every block, head, unit and token."""
        menu = self.without("rank").without("layers").without("heads")
        return menu.without("tokens").without("cache")

    def without(self, knob: str) -> Menu:
        """The same candidates with one knob taken away."""
        problems = [*self.problems]
        if knob in AS_A_WHOLE:
            problems = [p for p in problems if as_in_source(p, AS_A_WHOLE[knob])]
        if knob == "layers":
            problems = [replace(p, units={}, pairs={}, stay=()) for p in problems]
        if knob == "heads":
            problems = [with_all_heads(problem) for problem in problems]
        if knob in ("bits", "rank"):
            fits = without_paths if knob == "rank" else paths_alone
            problems = [
                replace(p, places=[
                    replace(x, options=[o for o in x.options if fits(o.what)]) for x in p.places
                ])
                for p in problems
            ]  # fmt: skip
        using = tuple(name for name in self.using if name != knob)
        return replace(self, problems=problems, using=using)

    def corrected(self, factors: Mapping[str, float]) -> list[Problem]:
        """The problems with the losses of each kind multiplied."""
        return [problem.corrected(factors) for problem in self.problems]


def _nothing(
    view: View, structure: Structure, using: Collection[str], notes: Sequence[str]
) -> str:
    """Why there is nothing to choose from: what ``notes`` say of the size, or else by knob."""
    no_linear = "no linear of this model has a dense weight that its output depends on"
    reasons = {
        "bits": no_linear, "rank": no_linear, "layers": "no half of a block may be left out",
        "tokens": "no image token may be dropped", "heads": why_whole(view, structure),
        "cache": "no keys and values are kept that could have fewer bits",
    }  # fmt: skip
    shown = dict.fromkeys(reasons[knob] for knob in using)
    return f"there is nothing to choose from by {', '.join(using)}: {'; '.join(notes or shown)}"


def fit_for(problem: Problem, view: View, sites: Sequence[Site], cut: KeepPass) -> Problem:
    """Without the heads that a cut looks at: they stay whole behind it."""
    if not sites:
        return problem
    after = changed(view, cut)
    free = {site.place.name for site in sites_of(after, recognize(after))}
    return with_all_heads(problem, but=free)


def used(choice: Mapping[str, Option]) -> dict[str, int]:
    """How many places hold what: ``gptq 3/64``."""
    return dict(sorted(Counter(str(option.what) for option in choice.values()).items()))
