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

from ..ir.canonical.families import canonicalize
from ..ir.core.errors import BadInput, BoundExceeded, Missing, NodeFailed
from ..ir.core.view import View
from ..ir.core.weights import SPOOLED_BYTES, Spool
from ..ir.run.batches import check_batches, count_samples
from ..ir.run.inputs import sample_inputs
from ..ir.run.sweep import sweep
from ..ir.run.truth import Truth, ask_source, check_read, hold
from ..ir.run.verify import Difference, check_structure, tolerance, worst_of
from ..ir.structure.cache_slots import answers
from ..ir.structure.costs import graph_costs, sample_sizes, weight_bytes
from ..ir.structure.recognize import Structure, recognize
from ..ir.vocab.targets import find_target
from .base import REDEFINED, Context, Pass, PassResult
from .checkpoint_store import CheckpointStore, remembered
from .learning import Learning
from .narrowing import Narrowing, narrowed
from .original import compressed_sites, prepare
from .recipe import Recipe
from .report import PassReport, RunReport
from .rules import check_order, remarks

CHECKED_BATCHES = 2
"""Of the source's own samples, those on which every pass is measured."""
_SAME = Difference(0.0, 1.0, 0.0)
Samples = Sequence[Mapping[str, torch.Tensor]]
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many steps are done and how many there are."""


SOURCE_SECONDS_PER_BYTE = 2.1e-9
"""Of a run, whatever its recipe: hashing the source's files, a sweep over the source graph as it
was given and one in the vocabulary's words. These and the next figures are of a 0.5B decoder in
bfloat16 on one thread of the reference CPU."""
SWEEP_SECONDS_PER_BYTE = 1.4e-9
"""A checking sweep over a rewritten graph, by bytes of the source: one for each pass, and one for
the step that follows a prompt."""
ARTIFACT_SECONDS_PER_BYTE = 1e-8
"""Writing the artifact and running it in ONNX Runtime, twice, by its bytes in the source's dtype:
bfloat16 is written as float32, and codes are widened by each run."""
MACS_PER_SECOND = 4e10
"""Of a sweep in float32 on one core of the reference CPU (zoo:minilm: 60 G in 1.4 s)."""
GRAPH_SECONDS = 5.0
"""What a run takes beside loading whatever the size: rules, translation, the report."""


@dataclass
class Result:
    """The rewritten graph and the report of how it came about."""

    graph: View
    report: RunReport
    source: View
    """The source graph in the words of the vocabulary, before the first pass."""
    batches: Samples
    """The samples that every pass was measured on."""
    outputs: Sequence[Mapping[str, torch.Tensor]]
    """What the rewritten graph gives on them, key-value caches among it."""
    truth: Truth
    """What the source itself gave."""
    given: View
    """The graph that the result is held against: the one that was given, or of a recipe that makes
    a special case of it, that case."""


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
    checkpoints: CheckpointStore | None = None,
    truth: Truth | None = None,
    target: str | None = None,
    original: View | None = None,
) -> Result:
    """Apply a recipe to a copy of ``graph``; each pass is checked before the next one runs.

    ``samples`` are batches of inputs by name, on which every pass is measured: the graph's own
    (``graph.source``) or random ones where absent; ``calibration`` is what passes that need data
    learn from. ``max_error`` bounds the relative L2 of any output against the source graph.
    ``checkpoints`` keeps what takes long, and gives it back to a run of the same recipe on the same
    graph and data. ``target`` names what the artifact is for (``vocab.targets``): what passes leave
    open, such as ``accuracy_level``, is then as that likes it. ``original`` is the model that
    ``graph`` was compressed from, where somebody else did that: passes that compensate then close
    the gap to it.

    Before the first pass the graph is held against the source itself, where something runs it:
    ``truth`` is what it gave on the samples, if they were already put to it.

    Raises ``BadInput`` for a recipe that does not fit and a source that contradicts itself,
    ``Missing`` for a need that is not met, and ``BoundExceeded`` where the graph is not the
    source's, an exact pass changed numbers or a bound was passed; ``graph`` stays as it is in any
    case.
    """
    recipe = as_recipe(recipe)
    check_order(recipe.passes, compressed=original is not None)
    if target is not None:
        recipe = recipe.settled(find_target(target))
    check_needs(recipe, calibrated=bool(calibration))
    tell = progress or (lambda *_: None)
    batches, data = _choose_samples(graph, samples)
    view = graph.copy()
    tell("comparing the graph with its source", 0, 1)
    canonicalize(view)
    check_read(view, graph, batches, truth)
    if calibration is not None:
        check_batches(view, calibration)
    as_read = reference = view.copy()
    structure = recognize(view)
    check_order(recipe.passes, structure, compressed=original is not None)
    baseline = None if original is None else prepare(original, view, structure)
    if baseline is not None:
        reference = baseline.view
    notes = remarks(recipe.passes)
    report = _new_report(graph, structure, recipe, max_error)
    report.samples, report.data = count_samples(batches), data
    report.sizes = sample_sizes(view, batches[0])
    spool = Spool()
    try:
        truth = truth or ask_source(graph, batches)
        outputs = _outputs(view, batches, checkpoints, 0)
    except NodeFailed as error:
        advice = f"do {data} fit the model?" if samples else _ADVICE
        raise BadInput(f"{error}: {advice}") from error
    report.add_truth(truth, hold(graph, as_read, truth, outputs))
    costs = graph_costs(view, report.sizes, structure)
    report.add_costs("source", costs)
    before = first = [answers(row) for row in outputs]
    given = graph
    errors = dict.fromkeys(first[0], _SAME)
    shortened = False
    learning = Learning(recipe.passes, None if baseline is None else baseline.view)
    original_keys = None if baseline is None else baseline.original_keys
    for step, entry in enumerate(recipe.steps, 1):
        done = PassReport(
            entry.pass_, str(entry), PassResult(), bytes_before=costs.weight_bytes,
            macs_before=costs.macs,
        )  # fmt: skip
        started = time.perf_counter()
        context = Context(
            view, step=step, spool=spool, progress=progress, calibration=calibration or (),
            original=reference, checkpoints=checkpoints, learning=learning, structure=structure,
            original_keys=original_keys,
        )  # fmt: skip
        learning.before(context)
        edits = view.edits
        whole = view.copy() if entry.pass_.narrows else None
        done.result = entry.pass_.run(context)
        reference = context.original or reference
        _require_change(entry.pass_, done.result)
        done.result.notes += notes[step - 1]
        done.errors = dict.fromkeys(first[0], _SAME)
        # What a pass says of itself does not decide whether it is checked.
        if done.result.changed or view.edits != edits:
            view.drop_unused_weights()
            context.edited()
            tell(f"checking what {entry.pass_.name} made", 0, 1)
            check_structure(view)
            case = done.result.narrowing
            if case is not None and whole is not None:
                view.source = narrowed(view.source, case)
                calibration = _narrowed_data(entry.pass_, case, calibration)
                batches = [case.narrow(batch) for batch in batches]
                wide = (sweep(whole, case.widen(batch)) for batch in batches)
                before = first = [answers(case.outputs(row)) for row in wide]
            outputs = _outputs(view, batches, checkpoints, step)
            if case is not None:
                given, truth = _given_case(view, batches, outputs)
                reference = given
            after = [answers(row) for row in outputs]
            done.errors = worst_of(before, after, shortened=done.result.shortened)
            # The first pass starts from the source: its error is the error so far.
            alone = before is first and not shortened
            shortened |= done.result.shortened
            errors = done.errors if alone else worst_of(first, after, shortened=shortened)
            _check_bounds(entry.pass_, done, errors, tolerance(view), max_error)
            before, structure = after, context.structure
            costs = graph_costs(view, sample_sizes(view, batches[0]), structure)
        if REDEFINED in entry.pass_.provides:
            reference = view.copy()
        done.errors_to_source = errors
        done.seconds = time.perf_counter() - started
        report.add_costs(f"{step} {entry.pass_.name}", costs)
        done.bytes_after, done.macs_after = costs.weight_bytes, costs.macs
        done.peak_rss_bytes = peak_rss_bytes()
        report.passes.append(done)
    report.errors, report.shortened = errors, shortened
    return Result(view, report, as_read, batches, outputs, truth, given)


def _narrowed_data(
    pass_: Pass, case: Narrowing, data: Samples | None
) -> list[Mapping[str, torch.Tensor]] | None:
    """Calibration data for what follows. Raises ``BadInput`` where some is of another case."""
    for number, batch in enumerate(data or (), 1):
        lacking = case.lacking(batch)
        if lacking:
            raise BadInput(
                f"{pass_.name}: the calibration data is of another case (batch {number}): {lacking}"
            )
    return None if data is None else [case.narrow(batch) for batch in data]


def _given_case(
    view: View, batches: Samples, outputs: Sequence[Mapping[str, torch.Tensor]]
) -> tuple[View, Truth]:
    """A special case of the source as a graph of its own, held against what runs the source; what
    that gave."""
    given = view.copy()
    given.edits = 0
    truth = ask_source(given, batches)
    hold(given, view, truth, outputs)
    return given, truth


def plan(
    graph: View, recipe: str | Recipe | Pass | Sequence[Pass], *, original: View | None = None
) -> Plan:
    """What ``optimize`` would do and cost. No weight is read and the graph stays as it is."""
    recipe = as_recipe(recipe)
    _check_packages(recipe)
    view = graph.copy()
    canonicalize(view)
    size = source = weight_bytes(view)
    context = Context(view)
    check_order(recipe.passes, context.structure, compressed=original is not None)
    if original is not None:
        context.planned.update(compressed_sites(view, context.structure))
    planned: list[tuple[str, PassResult]] = []
    seconds, working = 0.0, 0
    for entry, notes in zip(recipe.steps, remarks(recipe.passes), strict=True):
        result = entry.pass_.plan(context)
        _require_change(entry.pass_, result)
        result.notes += notes
        context.planned.update({site.name: site for site in result.sites})
        planned.append((str(entry), result))
        size += sum(site.bytes_after - site.bytes_before for site in result.sites)
        seconds += entry.pass_.seconds(result)
        working = max(working, entry.pass_.peak_bytes(result))
    seconds += GRAPH_SECONDS + source * SOURCE_SECONDS_PER_BYTE + size * ARTIFACT_SECONDS_PER_BYTE
    seconds += (len(recipe.steps) + 1) * source * SWEEP_SECONDS_PER_BYTE
    seconds += _checked_macs(view, graph, len(recipe.steps)) / MACS_PER_SECOND
    return Plan(planned, source, size, peak_rss_bytes() + working + _in_use(view), seconds)


def _checked_macs(view: View, graph: View, passes: int) -> int:
    """Multiply-accumulates of a run's checks on the source's own samples: on the first batches the
    source, its graph in two forms and each pass; on all of them source and artifact."""
    own = graph.source.samples or []
    macs = [
        (graph_costs(view, sample_sizes(view, batch)).macs or 0) * count_samples([batch])
        for batch in own
    ]
    return (3 + passes) * sum(macs[:CHECKED_BATCHES]) + 2 * sum(macs)


def _in_use(view: View) -> int:
    """Memory that checks need: the largest weight three times in float32, or its numbers as they
    are, as float32, and transposed for the artifact; and new weights before they go to disk."""
    largest = max((weight.numel for weight in view.weights().values()), default=0)
    return 3 * 4 * largest + SPOOLED_BYTES


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


def check_needs(recipe: Recipe, *, calibrated: bool) -> None:
    """Raise what a recipe alone can tell: ``Missing`` for a package, ``BadInput`` where a pass
    learns from calibration data and there are none."""
    _check_packages(recipe)
    hungry = [pass_.name for pass_ in recipe.passes if pass_.requires().data]
    if hungry and not calibrated:
        raise BadInput(
            f"{', '.join(hungry)} needs calibration data: give --calib DATA (calibration=[...] in "
            "Python)"
        )


def _check_packages(recipe: Recipe) -> None:
    for pass_ in recipe.passes:
        for package in pass_.requires().packages:
            if importlib.util.find_spec(package) is None:
                raise Missing(f"{pass_.name} needs the package {package}: pip install {package}")


def _new_report(
    graph: View, structure: Structure, recipe: Recipe, max_error: float | None
) -> RunReport:
    return RunReport(
        source={
            "kind": graph.source.kind,
            "name": graph.source.name,
            "sha256": graph.source.sha256,
            "task": graph.source.task,
            **({"notes": list(graph.source.notes)} if graph.source.notes else {}),
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


_ADVICE = (
    "the inputs were made up, and the model may take others: give some of its own with --calib "
    "DATA.npz (in Python samples=)"
)


def _choose_samples(graph: View, samples: Samples | None) -> tuple[Samples, str]:
    if samples is not None:
        if not samples:
            raise BadInput("samples are given but empty")
        return samples, "given samples"
    own = graph.source.samples
    if own:
        return own[:CHECKED_BATCHES], f"samples of {graph.source.name}"
    return [sample_inputs(graph)], "random inputs"


def _outputs(
    view: View, samples: Samples, checkpoints: CheckpointStore | None, step: int
) -> list[dict[str, torch.Tensor]]:
    def run() -> list[dict[str, torch.Tensor]]:
        return [sweep(view, batch) for batch in samples]

    return remembered(checkpoints, f"{step}: outputs", run)


def _require_change(pass_: Pass, result: PassResult) -> None:
    if result.changed or pass_.optional:
        return
    reasons = "; ".join(f"{site}: {reason}" for site, reason in result.refused[:3])
    raise BadInput(
        f"{pass_.name} found nothing to do"
        + (f" (nearest: {reasons})" if reasons else "")
        + f"; mark it {pass_.name}{{optional=true}} if that is fine"
    )


def _check_bounds(
    pass_: Pass, done: PassReport, total: Mapping[str, Any], rounding: float,
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
