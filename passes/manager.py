"""Runs a recipe on a graph: needs first, then pass by pass with checks and rollback."""

from __future__ import annotations

import importlib.util
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..ir.costs import node_macs, weight_bytes
from ..ir.errors import BadInput, BoundExceeded, GraphwrightError, InvalidGraph, Missing
from ..ir.raising import raise_graph
from ..ir.sweep import sweep
from ..ir.verify import check_structure, compare, exact_tolerance, sample_inputs
from ..ir.view import View
from ..ir.weights import Spool
from .base import Context, Pass, PassResult
from .recipe import Recipe
from .report import PassReport, RunReport

Samples = Sequence[Mapping[str, torch.Tensor]]
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many steps are done and how many there are."""


SWEEP_BYTES_PER_SECOND = 5e8
"""Weights that a checking sweep reads and multiplies on the reference CPU; forecasts use it. A run
sweeps once for each pass, once before, and about three times for the artifact."""


@dataclass
class Result:
    """The rewritten graph and the report of how it came about."""

    graph: View
    report: RunReport


@dataclass
class Plan:
    """What a recipe would do, from shapes alone."""

    passes: list[tuple[str, PassResult]]
    source_bytes: int
    artifact_bytes: int
    peak_rss_bytes: int
    seconds: float


def optimize(
    graph: View,
    recipe: str | Recipe | Pass | Sequence[Pass],
    *,
    samples: Samples | None = None,
    calibration: Samples | None = None,
    max_error: float | None = None,
    progress: Progress | None = None,
) -> Result:
    """Apply a recipe to a copy of ``graph``; each pass is checked before the next one runs.

    ``samples`` are batches of inputs by name, on which every pass is measured: the graph's own
    (``graph.source``) or random ones where absent; ``calibration`` is what passes that need data
    learn from. ``max_error`` bounds the relative L2 of any
    output against the source graph.

    Raises ``BadInput`` for a recipe that does not fit, ``Missing`` for a need that is not met, and
    ``BoundExceeded`` where an exact pass changed numbers or a bound was passed: the error's
    ``graph`` is then the graph before that pass.
    """
    recipe = as_recipe(recipe)
    _check_needs(recipe)
    _check_calibration(recipe, calibration)
    batches, data = _choose_samples(graph, samples)
    view = graph.copy()
    raise_graph(view)
    check_structure(view)
    original = view.copy()
    report = _new_report(view, graph, recipe, max_error)
    report.samples, report.data = _count(batches), data
    spool = Spool()
    first, macs = _measure(view, batches)
    before = first
    for step, entry in enumerate(recipe.steps, 1):
        snapshot = view.copy()
        size = weight_bytes(view)
        done = PassReport(entry.made, str(entry), PassResult(), bytes_before=size, macs_before=macs)
        started = time.perf_counter()
        try:
            context = Context(
                view, step=step, spool=spool, progress=progress, calibration=calibration or (),
                original=original,
            )  # fmt: skip
            done.result = entry.made.run(context)
            _require_change(entry.made, done.result)
            view.drop_unused_weights()
            check_structure(view)
            after, macs = _measure(view, batches)
            done.errors = _worst_of(before, after)
            _check_bounds(entry.made, done, _worst_of(first, after), max_error)
        except GraphwrightError as error:
            error.graph = snapshot  # type: ignore[attr-defined]
            raise
        done.seconds = time.perf_counter() - started
        done.bytes_after, done.macs_after = weight_bytes(view), macs
        done.peak_rss_bytes = peak_rss_bytes()
        report.passes.append(done)
        before = after
    report.errors = _worst_of(first, before)
    return Result(view, report)


def plan(graph: View, recipe: str | Recipe | Pass | Sequence[Pass]) -> Plan:
    """What ``optimize`` would do and cost. No weight is read and the graph stays as it is."""
    recipe = as_recipe(recipe)
    _check_needs(recipe)
    view = graph.copy()
    raise_graph(view)
    size = source = weight_bytes(view)
    context = Context(view)
    planned: list[tuple[str, PassResult]] = []
    seconds, working = 0.0, 0
    for entry in recipe.steps:
        result = entry.made.plan(context)
        _require_change(entry.made, result)
        context.planned.update({site.name: site for site in result.sites})
        planned.append((str(entry), result))
        size += sum(site.bytes_after - site.bytes_before for site in result.sites)
        seconds += entry.made.seconds(result)
        working = max(working, entry.made.peak_bytes(result))
    seconds += (len(recipe.steps) + 4) * source / SWEEP_BYTES_PER_SECOND
    spooled = min(size, 1 << 30)
    return Plan(planned, source, size, peak_rss_bytes() + working + spooled, seconds)


def as_recipe(recipe: str | Recipe | Pass | Sequence[Pass]) -> Recipe:
    """A recipe out of its text, a pass or several."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str):
        return Recipe.parse(recipe)
    return Recipe.of(*([recipe] if isinstance(recipe, Pass) else recipe))


def peak_rss_bytes() -> int:
    """Peak resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _check_needs(recipe: Recipe) -> None:
    for made in recipe.passes:
        for package in made.requires().packages:
            if importlib.util.find_spec(package) is None:
                raise Missing(
                    f"{made.name} needs the package {package}: pip install {package}"
                )


def _check_calibration(recipe: Recipe, calibration: Samples | None) -> None:
    hungry = [made.name for made in recipe.passes if made.requires().calibration]
    if hungry and not calibration:
        raise BadInput(f"{', '.join(hungry)} needs calibration data: give calibration=[...]")


def _new_report(
    view: View, graph: View, recipe: Recipe, max_error: float | None
) -> RunReport:
    structure = Context(view).structure
    return RunReport(
        source={
            "kind": graph.source.kind,
            "name": graph.source.name,
            "sha256": graph.source.sha256,
            "task": graph.source.task,
        },
        recipe=str(recipe),
        max_error=max_error,
        structure={
            "blocks": len(structure.blocks),
            "linears": len(structure.linears),
            "attention_sites": len(structure.attentions),
        },
        source_bytes=graph.source.source_bytes or weight_bytes(graph),
    )


def _choose_samples(graph: View, samples: Samples | None) -> tuple[Samples, str]:
    if samples is not None:
        if not samples:
            raise BadInput("samples are given but empty")
        return samples, "given samples"
    own = graph.source.samples
    if own:
        return own[:2], f"samples of {graph.source.name}"
    return [sample_inputs(graph)], "random inputs"


def _count(samples: Samples) -> int:
    firsts = [next(iter(batch.values())) for batch in samples]
    return sum(int(t.shape[0]) if t.dim() else 1 for t in firsts)


def _measure(view: View, samples: Samples) -> tuple[list[dict[str, torch.Tensor]], int]:
    """Outputs on every batch, and the multiply-accumulates of the first."""
    macs = 0

    def count(node: Any, given: list[Any], results: tuple[Any, ...]) -> None:
        nonlocal macs
        macs += node_macs(view, node, given, results)

    outputs = [sweep(view, samples[0], observe=count)]
    outputs += [sweep(view, batch) for batch in samples[1:]]
    return outputs, macs


def _worst_of(
    expected: Sequence[Mapping[str, torch.Tensor]], actual: Sequence[Mapping[str, torch.Tensor]]
) -> dict[str, Any]:
    """The error of each output over all batches together."""
    joined = [
        {
            name: torch.cat([batch[name].double().reshape(-1) for batch in side])
            if side[0][name].dtype.is_floating_point
            else torch.cat([batch[name].reshape(-1) for batch in side])
            for name in side[0]
        }
        for side in (expected, actual)
    ]
    for name, tensor in expected[0].items():
        if name in actual[0] and actual[0][name].shape != tensor.shape:
            raise InvalidGraph(
                f"the output {name} changed its shape from {list(tensor.shape)} to "
                f"{list(actual[0][name].shape)}"
            )
    return compare(joined[0], joined[1])


def _require_change(made: Pass, result: PassResult) -> None:
    if result.changed or made.optional:
        return
    reasons = "; ".join(f"{site}: {reason}" for site, reason in result.refused[:3])
    raise BadInput(
        f"{made.name} found nothing to do"
        + (f" (nearest: {reasons})" if reasons else "")
        + f"; mark it {made.name}{{optional=true}} if that is fine"
    )


def _check_bounds(
    made: Pass, done: PassReport, total: Mapping[str, Any], max_error: float | None
) -> None:
    site = _worst_site(done.result)
    for name, found in done.errors.items():
        bound = made.max_error
        if made.exact:
            bound = exact_tolerance(torch.float32)
        if bound is not None and not found.rel_l2 <= bound:
            kind = "is exact but" if made.exact else "passed its bound:"
            raise BoundExceeded(
                f"{made.name} {kind} moved the output {name} by {found.rel_l2:.3g} (relative L2; "
                f"bound {bound:g}). Rolled back.{site} {_advice(made)}"
            )
        if not found.finite:
            raise BoundExceeded(
                f"{made.name} made the output {name} non-finite. Rolled back.{site} {_advice(made)}"
            )
    for name, found in total.items():
        if max_error is not None and not found.rel_l2 <= max_error:
            raise BoundExceeded(
                f"after {made.name} the output {name} is {found.rel_l2:.3g} from the source "
                f"(relative L2; bound {max_error:g}). Rolled back.{site} {_advice(made)}"
            )


def _worst_site(result: PassResult) -> str:
    known = [s for s in result.sites if s.rel_l2 is not None]
    if not known:
        return ""
    worst = max(known, key=lambda s: s.rel_l2 or 0.0)
    return f" Worst site: {worst.name} (weight error {worst.rel_l2:.3g})."


def _advice(made: Pass) -> str:
    if made.exact:
        return "Please report this as a bug, with the model's structure."
    return "Try more bits, smaller groups, or exclude= that site."
