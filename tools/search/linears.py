"""Linears as parts of the problem: what each may hold, what that weighs and is forecast to hurt."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...ir.core.view import View
from ...ir.run.statistics import Statistics
from ...ir.structure.recognize import Linear, Structure
from ...ir.vocab.targets import Target
from ...passes.checkpoint_store import CheckpointStore, remembered
from ...passes.linear_pass import weight_of
from ...passes.stored import reason_against_storing
from .data import Parts
from .forms import FAST, FED_BACK, NO_PATH, PATHS, ROUNDED, Form, Path
from .heads import Level, Site, by_linear, levels
from .judge import Judge, needed, value_of
from .probe import Gap, Minded, sensitivities, spread_over_blocks
from .problem import KEPT, Option, Place, useful
from .recipe_of import Held, HeldTables
from .survey import ROUNDING, Errors, asked, dense, stored, survey
from .times import Times
from .wholes import work

Progress = Callable[[str, int, int], None]
RANK_ALONE = Form("quantize", 4, 32)
"""What linears hold beside the source's own where only ranks are searched."""
FED_BACK_UP_TO = 5e7
"""Weights in all linears up to which candidates with feedback are fitted: a matrix takes as many
seconds for each of them as rounding takes for all."""
PROBE_WORK = 4e12
"""Multiply-accumulates that probing linears may take: less than two minutes on one core of the
reference CPU."""


def candidates(
    groups: Sequence[Sequence[Linear]], data: Parts, using: Collection[str], *, fast: bool
) -> tuple[Sequence[Form], Sequence[Path]]:
    """How a linear may be stored, and the paths beside it; nothing where no knob asks for it."""
    if not {"bits", "rank"} & set(using):
        return (), ()
    paths = (NO_PATH, *(PATHS if "rank" in using and not data.large else ()))
    if "bits" not in using:
        return (RANK_ALONE,) if len(paths) > 1 else (), paths
    weights = sum(group[0].in_features * group[0].out_features for group in groups)
    fed_back = () if data.large or weights > FED_BACK_UP_TO else FED_BACK
    return (*ROUNDED, *fed_back, *((FAST,) if fast else ())), paths


def linear_places(
    view: View, structure: Structure, data: Parts, probe: Judge, target: Target,
    groups: Sequence[Sequence[Linear]], forms: Sequence[Form], paths: Sequence[Path],
    sites: Sequence[Site], times: Times | None, progress: Progress,
    checkpoints: CheckpointStore | None,
) -> list[Place]:  # fmt: skip
    if not forms:
        return []
    # Nobody knows what the others are for: what is judged does not depend on them.
    judged = {*needed(view, [value_of(view, probe.output)])}
    groups = [group for group in groups if all(x.node in judged for x in group)]

    def surveyed() -> dict[str, Any]:
        by_name = survey(
            view, data.fit, groups, forms, target, progress, ranks=len(paths) > 1,
            sampled=data.large,
        )  # fmt: skip
        return {name: errors.listed() for name, errors in by_name.items()}

    of_forms = f"survey of {', '.join(map(str, forms))}"
    known = remembered(checkpoints, of_forms, surveyed)
    errors = {name: Errors.of_list(forms, *listed) for name, listed in known.items()}
    by_use = {x.name: errors[group[0].name] for group in groups for x in group}
    most = int(PROBE_WORK / max(1.0, work(view, structure, data.probe) / 2))
    minded, drifts = remembered(
        checkpoints, "sensitivities",
        lambda: _minded(view, probe, groups, by_use, forms, most, target, progress),
    )  # fmt: skip
    places, site_of = [], by_linear(sites)
    for group in groups:
        uses = [
            Use(minded[x.name], replace(by_use[x.name], drift=drifts.get(x.name, {})))
            for x in group
        ]
        sizes = levels(site_of.get(group[0].name), group[0])
        places.append(_place(view, group, sizes, uses, forms, paths, target, times))
    return places


@dataclass(frozen=True)
class Use:
    """A linear, of one or of several that share a weight."""

    minded: Mapping[str, float]
    """How much the loss minds a mean squared error of 1 there, by method."""
    errors: Errors

    def loss(self, form: Form, path: Path) -> float:
        """What a form with a path beside it is forecast to lose there."""
        minded = self.minded.get(form.method, self.minded.get(ROUNDING, 0.0))
        return minded * self.errors.of(form, path)


def storable_groups(view: View, structure: Structure) -> list[list[Linear]]:
    """The linears that can be stored otherwise, those that share a weight together."""
    by_weight: dict[Hashable, list[Linear]] = {}
    for linear in structure.linears:
        if reason_against_storing(view, linear) is None:
            by_weight.setdefault(weight_of(view, linear).key, []).append(linear)
    return list(by_weight.values())


def _minded(
    view: View, probe: Judge, groups: Sequence[Sequence[Linear]], errors: Mapping[str, Errors],
    forms: Sequence[Form], most: int, target: Target, progress: Progress,
) -> tuple[Minded, Minded]:  # fmt: skip
    """How much the loss minds a mean squared error of 1 at each linear, by method, and how errors
    drift there from those of a survey; about ``most`` times it is asked."""
    linears = [linear for group in groups for linear in group]
    methods = max((len(known.gaps) for known in errors.values()), default=1)
    probed, filled = spread_over_blocks(linears, most // max(1, methods))
    rounding = next((form for form in asked(forms) if form.method == ROUNDING), RANK_ALONE)

    def gaps(linear: Linear) -> Mapping[str, Gap]:
        if errors[linear.name].gaps:
            return errors[linear.name].gaps
        weight = weight_of(view, linear).read()
        gap = weight.float() - dense(stored(rounding, weight, Statistics(), linear, target))
        return {ROUNDING: Gap(gap, gap[:0])}

    minded, met = sensitivities(view, probe, probed, gaps, progress)
    return filled(minded), filled({name: errors[name].drifts(m) for name, m in met.items()})


def _place(
    view: View, group: Sequence[Linear], sizes: Sequence[Level], uses: Sequence[Use],
    forms: Sequence[Form], paths: Sequence[Path], target: Target, times: Times | None,
) -> Place:  # fmt: skip
    """What linears that share a weight may hold, at each size that they may have.

    Heads and units that go are those that vary least: they take next to nothing of the loss along
    that rounding their linears makes, which is forecast as that of the whole ones.
    """
    names, options = tuple(x.name for x in group), list[Option]()
    weight = weight_of(view, group[0])
    for size in sizes:
        linear, gone = size.linear, 1 - size.stays
        # Codes of a checkpoint stay as they are, but not in a part of a weight.
        nbytes = weight.stored_bytes if not gone else round(weight.nbytes * size.stays)
        fitting = [Option(Held(names, gone=gone), {"bytes": nbytes, "loss": 0.0}, KEPT)]
        for form in forms:
            coded = _stored_bytes(view, group[0], linear, form, uses[0].errors, target)
            if coded is None:
                continue
            for path in paths:
                if 2 * path.rank >= min(linear.out_features, linear.in_features):
                    continue
                if path.rank and form == FAST:
                    continue  # 8 bits leave it little, and it would run beside the fastest form
                beside = path.nbytes(linear.out_features, linear.in_features) * len(group)
                loss = sum(use.loss(form, path) for use in uses)
                costs = {"bytes": coded + beside, "loss": loss}
                if times is not None:
                    costs["ms"] = size.stays * sum(times.added(x, form, path) for x in group)
                held = Held(names, form, path, gone)
                fitting.append(Option(held, costs, f"{form.bits} bits"))
        options += [replace(option, beside=size.beside) for option in worth_having(fitting)]
    return Place(group[0].name, options)


def worth_having(options: Sequence[Option]) -> list[Option]:
    """Those that no other of their kind beats, by size: of all, of those without paths, and of
    ranks alone. So a menu without a knob has what a search without it would have, and what
    corrections, which are by kind, may make the better one is still there.

    What is kept exactly may be larger than what loses nothing: a recipe may still leave it.
    """
    menus: tuple[Callable[[Any], bool], ...] = (lambda _: True, without_paths, paths_alone)
    worth = {
        option.what
        for menu in menus
        for kind in {option.kind for option in options}
        for option in useful(
            [o for o in options if o.kind == kind and menu(o.what)], ("bytes", "loss", "ms")
        )
    }  # fmt: skip
    chosen = [option for option in options if option.kind == KEPT or option.what in worth]
    return sorted(chosen, key=lambda option: option.costs["bytes"])


def without_paths(what: Any) -> bool:
    """Whether that may be held where no ranks are searched."""
    return not isinstance(what, Held) or not what.path.rank


def paths_alone(what: Any) -> bool:
    """Whether that may be held where ranks alone are searched."""
    if isinstance(what, HeldTables):
        return what.bits is None
    return not isinstance(what, Held) or what.form in (None, RANK_ALONE)


def _stored_bytes(
    view: View, whole: Linear, linear: Linear, form: Form, errors: Errors, target: Target
) -> int | None:
    """What a form takes of a linear at one of its sizes: as the survey found it, or by shapes.
    ``None`` where the survey found scales wider than usual, which a part may have or not."""
    if linear.in_features * linear.out_features == whole.in_features * whole.out_features:
        return errors.nbytes[form]
    by, weight = form.pass_((), target), weight_of(view, whole)
    if by.at(whole).predicted_bytes(whole, weight) != errors.nbytes[form]:
        return None
    return by.at(linear).predicted_bytes(linear, weight)
