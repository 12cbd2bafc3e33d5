"""What holds before a pass runs and after it: needs, bounds, that it did something."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence

from ..ir.core.errors import BadInput, BoundExceeded, Missing
from ..ir.run.verify import Difference
from .base import Pass, PassResult
from .recipe import Recipe
from .report import PassReport

CHECKED_BATCHES = 2
"""Of the source's own samples, those on which every pass is measured."""


def as_recipe(recipe: str | Recipe | Pass | Sequence[Pass | str]) -> Recipe:
    """A recipe out of its text, a pass or several. Raises ``BadInput`` as ``Recipe.of``."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str):
        return Recipe.parse(recipe)
    return Recipe.of(*(recipe if isinstance(recipe, list | tuple) else [recipe]))


def check_needs(recipe: Recipe, *, calibrated: bool) -> None:
    """Raise what a recipe alone can tell: ``Missing`` for a package, ``BadInput`` where a pass
    learns from calibration data and there are none."""
    check_packages(recipe)
    hungry = [pass_.name for pass_ in recipe.passes if pass_.requires().data]
    if hungry and not calibrated:
        raise BadInput(
            f"{', '.join(hungry)} needs calibration data: give --calib DATA (calibration=[...] in "
            "Python)"
        )


def check_packages(recipe: Recipe) -> None:
    """Raise ``Missing`` for a package that a pass needs and that is not installed."""
    for pass_ in recipe.passes:
        for package in pass_.requires().packages:
            if importlib.util.find_spec(package) is None:
                raise Missing(f"{pass_.name} needs the package {package}: pip install {package}")


def require_change(pass_: Pass, result: PassResult) -> None:
    """Raise ``BadInput`` where a pass did nothing, unless that is fine."""
    if result.changed or pass_.optional:
        return
    reasons = "; ".join(f"{site}: {reason}" for site, reason in result.refused[:3])
    raise BadInput(
        f"{pass_.name} found nothing to do"
        + (f" (nearest: {reasons})" if reasons else "")
        + f"; mark it {pass_.name}{{optional=true}} if that is fine"
    )


def check_bounds(
    pass_: Pass, done: PassReport, total: Mapping[str, Difference], rounding: float,
    max_error: float | None,
) -> None:  # fmt: skip
    """``rounding`` is what an exact pass may move an output by."""
    site = _worst_site(done.result)
    for name, error in done.errors.items():
        bound = pass_.max_error
        if pass_.exact:
            bound = rounding
        if bound is not None and not error.within(bound):
            kind = "is exact but" if pass_.exact else "passed its bound:"
            raise BoundExceeded(
                f"{pass_.name} {kind} moved the output {name} by {error.rel_l2:.3g} (relative L2; "
                f"bound {bound:g}). Rolled back.{site} {_advice(pass_)}"
            )
        if not error.finite:
            raise BoundExceeded(
                f"{pass_.name} made the output {name} non-finite. "
                f"Rolled back.{site} {_advice(pass_)}"
            )
    for name, error in total.items():
        if max_error is not None and not error.within(max_error):
            raise BoundExceeded(
                f"after {pass_.name} the output {name} is {error.rel_l2:.3g} from the source "
                f"(relative L2; bound {max_error:g}). Rolled back.{site} {_advice(pass_)}"
            )


def _worst_site(result: PassResult) -> str:
    known = [s for s in result.sites if s.rel_l2 is not None]
    if not known:
        return ""
    worst = max(known, key=lambda s: s.rel_l2 or 0.0)
    return f" Worst site: {worst.name} (weight error {worst.rel_l2:.3g})."


def _advice(pass_: Pass) -> str:
    if pass_.exact:
        return "Please report this as a bug, with the model's structure."
    return "Try more bits, smaller groups, or exclude= that site."
