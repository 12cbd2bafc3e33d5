"""All candidates of a model, with what each costs and is forecast to hurt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.core.view import View
from ...ir.structure.costs import weight_bytes
from ...ir.structure.recognize import Linear, Structure, recognize
from ...ir.vocab.targets import Target
from ...passes.linear_pass import weight_of
from ...passes.stored import reason_against_storing
from ...passes.weights.quantizers import rtn
from .data import Parts
from .forms import FED_BACK, NO_PATH, PATHS, ROUNDED, Form, Path
from .judge import Judge
from .probe import sensitivities, spread_over_blocks
from .recipe_of import Held
from .solve import Option, Place, Problem, useful
from .survey import Errors, survey
from .tables import tables_place

Progress = Callable[[str, int, int], None]
FED_BACK_UP_TO = 5e7
"""Weights in all linears up to which candidates with feedback are fitted: a matrix takes as many
seconds for each of them as rounding takes for all."""
PROBE_WORK = 2e12
"""Multiply-accumulates that probing may take: a minute on one core of the reference CPU."""
PROBE_BITS, PROBE_GROUP = 3, 32
"""What linears are rounded to where the loss is asked how much it minds."""


@dataclass(frozen=True)
class Menu:
    """The problem, and what it was made of."""

    problem: Problem
    target: Target
    using: Sequence[str]
    notes: Sequence[str] = ()

    @classmethod
    def of(
        cls, view: View, data: Parts, judge: Judge, target: Target, using: Collection[str],
        progress: Progress,
    ) -> Menu:  # fmt: skip
        """Survey a canonical graph. Raises ``BadInput`` where there is nothing to choose from."""
        structure = recognize(view)
        groups = _groups(view, structure)
        linears = [group[0] for group in groups]
        minded = _minded(view, structure, data, groups, progress)
        large = sum(x.in_features * x.out_features for x in linears) > FED_BACK_UP_TO
        forms = () if "bits" not in using else ROUNDED if large else (*ROUNDED, *FED_BACK)
        paths = (NO_PATH, *(PATHS if "rank" in using else ()))
        errors = survey(view, data.fit, linears, forms, target, progress, ranks=len(paths) > 1)
        places, fixed = [], float(weight_bytes(view))
        for group in groups:
            loss = sum(minded.get(x.name, 0.0) for x in group)
            if not all(x.name in minded for x in group):
                continue  # what is judged does not depend on it: nobody knows what it is for
            places.append(_place(view, group, loss, errors[group[0].name], forms, paths, target))
            fixed -= weight_of(view, group[0]).nbytes
        found = tables_place(view, structure, judge, target) if "bits" in using else None
        if found is not None:
            places.append(found[0])
            fixed -= found[1]
        if not places:
            raise BadInput(
                "there is nothing to choose from: no linear of this model has a dense weight that "
                "its output depends on"
            )
        return cls(Problem(places, {"bytes": fixed}), target, tuple(using))


def _groups(view: View, structure: Structure) -> list[list[Linear]]:
    """The linears that can be stored otherwise, those that share a weight together."""
    found: dict[Hashable, list[Linear]] = {}
    for linear in structure.linears:
        if reason_against_storing(view, linear) is None:
            found.setdefault(weight_of(view, linear).key, []).append(linear)
    return list(found.values())


def _minded(
    view: View, structure: Structure, data: Parts, groups: Sequence[Sequence[Linear]],
    progress: Progress,
) -> dict[str, float]:  # fmt: skip
    """How much the loss minds a mean squared error of 1 at each linear."""
    linears = [linear for group in groups for linear in group]
    judge = Judge(view, structure, data.probe)
    tokens = sum(batch[next(iter(batch))].shape[:2].numel() for batch in data.probe)
    weights = sum(x.in_features * x.out_features for x in structure.linears)
    probed, filled = spread_over_blocks(linears, int(PROBE_WORK / (tokens * weights / 2)))

    def gap(linear: Linear) -> Tensor:
        weight = weight_of(view, linear).read().float()
        return weight - rtn(weight, PROBE_BITS, PROBE_GROUP, name=linear.name).dequantized()

    return filled(sensitivities(view, judge, probed, gap, progress))


def _place(
    view: View, group: Sequence[Linear], minded: float, errors: Errors, forms: Sequence[Form],
    paths: Sequence[Path], target: Target,
) -> Place:  # fmt: skip
    linear, names = group[0], tuple(x.name for x in group)
    weight = weight_of(view, linear)
    options = [Option(Held(names), {"bytes": weight.nbytes, "loss": 0.0}, "kept")]
    for form in forms:
        size = form.nbytes(linear, weight, target)
        for path in paths:
            beside = path.nbytes(linear.out_features, linear.in_features) * len(group)
            if 2 * path.rank >= min(linear.out_features, linear.in_features):
                continue
            costs = {"bytes": size + beside, "loss": minded * errors.of(form, path)}
            options.append(Option(Held(names, form, path), costs, f"{form.bits} bits"))
    return Place(linear.name, useful(options, ("bytes", "loss")))


def used(choice: Mapping[str, Option]) -> dict[str, int]:
    """How many places hold what: ``gptq 3/64``."""
    return dict(sorted(Counter(str(option.what) for option in choice.values()).items()))
