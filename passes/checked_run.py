"""A run of a recipe: the graph as it is, what it is held against, and the report so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..ir.canonical.families import canonicalize
from ..ir.core.errors import BadInput, NodeFailed
from ..ir.core.heap import peak_rss_bytes
from ..ir.core.view import View
from ..ir.core.weights import Spool
from ..ir.run.batches import check_batches, count_samples
from ..ir.run.inputs import sample_inputs
from ..ir.run.sweep import sweep
from ..ir.run.truth import Truth, ask_source, check_read, hold
from ..ir.run.verify import Difference, check_structure, tolerance, worst_of
from ..ir.structure.cache_slots import answers
from ..ir.structure.costs import graph_costs, sample_sizes, weight_bytes
from ..ir.structure.recognize import Structure, recognize
from .base import REDEFINED, Context, Pass, PassResult
from .checkpoint_store import CheckpointStore, remembered
from .checks import CHECKED_BATCHES, check_bounds, require_change
from .learning import Learning
from .narrowing import Narrowing, narrowed
from .original import prepare
from .recipe import Recipe, Step
from .report import PassReport, RunReport
from .rules import check_order, remarks

_SAME = Difference(0.0, 1.0, 0.0)
Samples = Sequence[Mapping[str, torch.Tensor]]
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many steps are done and how many there are."""


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
    standard: View
    """The graph that the result is held against: the one that was given, or of a recipe that makes
    a special case of it, that case."""


class CheckedRun:
    """Reads a graph, holds it against its source, and applies pass after pass, each checked.

    Parameters and errors are those of ``optimize``.
    """

    def __init__(
        self,
        graph: View,
        recipe: Recipe,
        *,
        samples: Samples | None,
        calibration: Samples | None,
        max_error: float | None,
        progress: Progress | None,
        checkpoints: CheckpointStore | None,
        truth: Truth | None,
        original: View | None,
    ) -> None:
        self.recipe, self.max_error = recipe, max_error
        self.progress, self.checkpoints = progress, checkpoints
        self.spool = Spool()
        self.batches, data = _choose_samples(graph, samples)
        self.calibration = calibration
        self.standard = graph
        self._read(truth)
        self.structure = recognize(self.view)
        check_order(recipe.passes, self.structure, compressed=original is not None)
        baseline = None if original is None else prepare(original, self.view, self.structure)
        if baseline is not None:
            self.reference = baseline.view
        self.learning = Learning(recipe.passes, None if baseline is None else baseline.view)
        self.original_keys = None if baseline is None else baseline.original_keys
        self.report = _new_report(graph, self.structure, recipe, max_error)
        self.report.samples, self.report.data = count_samples(self.batches), data
        self.report.sizes = sample_sizes(self.view, self.batches[0])
        self._ask(truth, data, chosen=bool(samples))
        self.costs = graph_costs(self.view, self.report.sizes, self.structure)
        self.report.add_costs("source", self.costs)
        self.before = self.first = [answers(row) for row in self.outputs]
        self.errors = dict.fromkeys(self.first[0], _SAME)
        self.shortened = False

    def run(self) -> Result:
        notes = remarks(self.recipe.passes)
        for number, entry in enumerate(self.recipe.steps, 1):
            self._apply(number, entry, notes[number - 1])
        self.report.errors, self.report.shortened = self.errors, self.shortened
        self.view.source = self.view.source.behind(str(self.recipe))
        return Result(
            self.view, self.report, self.as_read, self.batches, self.outputs, self.truth,
            self.standard,
        )  # fmt: skip

    def _tell(self, what: str) -> None:
        if self.progress is not None:
            self.progress(what, 0, 1)

    # --- before the first pass ------------------------------------------------------------------

    def _read(self, truth: Truth | None) -> None:
        self.view = self.standard.copy()
        self._tell("comparing the graph with its source")
        canonicalize(self.view)
        check_read(self.view, self.standard, self.batches, truth)
        if self.calibration is not None:
            check_batches(self.view, self.calibration)
        self.as_read = self.reference = self.view.copy()

    def _ask(self, truth: Truth | None, data: str, *, chosen: bool) -> None:
        """What the source gives on the samples, and what the graph does."""
        try:
            self.truth = truth or ask_source(self.standard, self.batches)
            self.outputs = self._swept(0)
        except NodeFailed as error:
            advice = f"do {data} fit the model?" if chosen else _ADVICE
            raise BadInput(f"{error}: {advice}") from error
        difference = hold(self.standard, self.as_read, self.truth, self.outputs)
        self.report.add_truth(self.truth, difference)

    def _swept(self, step: int) -> list[dict[str, torch.Tensor]]:
        """What the graph gives on the samples now."""

        def run() -> list[dict[str, torch.Tensor]]:
            return [sweep(self.view, batch) for batch in self.batches]

        return remembered(self.checkpoints, f"{step}: outputs", run)

    # --- one pass after the other ---------------------------------------------------------------

    def _apply(self, number: int, entry: Step, notes: Sequence[str]) -> None:
        pass_, view = entry.pass_, self.view
        done = PassReport(
            pass_, str(entry), PassResult(), bytes_before=self.costs.weight_bytes,
            macs_before=self.costs.macs,
        )  # fmt: skip
        started = time.perf_counter()
        context = Context(
            view, step=number, spool=self.spool, progress=self.progress,
            calibration=self.calibration or (), original=self.reference,
            checkpoints=self.checkpoints, learning=self.learning, structure=self.structure,
            original_keys=self.original_keys,
        )  # fmt: skip
        self.learning.before(context)
        edits = view.edits
        whole = view.copy() if pass_.narrows else None
        done.result = pass_.run(context)
        self.reference = context.original or self.reference
        require_change(pass_, done.result)
        done.result.notes += notes
        done.errors = dict.fromkeys(self.first[0], _SAME)
        # What a pass says of itself does not decide whether it is checked.
        if done.result.changed or view.edits != edits:
            self._check(number, done, context, whole)
        if REDEFINED in pass_.provides:
            self.reference = view.copy()
        done.errors_to_source = self.errors
        done.seconds = time.perf_counter() - started
        self.report.add_costs(f"{number} {pass_.name}", self.costs)
        done.bytes_after, done.macs_after = self.costs.weight_bytes, self.costs.macs
        done.peak_rss_bytes = peak_rss_bytes()
        self.report.passes.append(done)

    def _check(self, number: int, done: PassReport, context: Context, whole: View | None) -> None:
        """Structure, then numbers: against the graph before the pass, and against the first."""
        view, case = self.view, done.result.narrowing
        view.drop_unused_weights()
        context.edited()
        self._tell(f"checking what {done.pass_.name} made")
        check_structure(view)
        if case is not None and whole is not None:
            self._narrow(done.pass_, case, whole)
        self.outputs = self._swept(number)
        if case is not None:
            self._hold_case()
        after = [answers(row) for row in self.outputs]
        done.errors = worst_of(self.before, after, shortened=done.result.shortened)
        # The first pass starts from the source: its error is the error so far.
        alone = self.before is self.first and not self.shortened
        self.shortened |= done.result.shortened
        self.errors = (
            done.errors if alone else worst_of(self.first, after, shortened=self.shortened)
        )
        check_bounds(done.pass_, done, self.errors, tolerance(view), self.max_error)
        self.before, self.structure = after, context.structure
        self.costs = graph_costs(view, sample_sizes(view, self.batches[0]), self.structure)

    def _narrow(self, pass_: Pass, case: Narrowing, whole: View) -> None:
        """From here on the model is a special case of itself: so are samples and data, and what
        the graph before the pass, ``whole``, gives of it is what all is compared with."""
        self.view.source = narrowed(self.view.source, case)
        self.calibration = _narrowed_data(pass_, case, self.calibration)
        self.batches = [case.narrow(batch) for batch in self.batches]
        wide = (sweep(case.before or whole, case.widen(batch)) for batch in self.batches)
        self.before = self.first = [answers(case.outputs(row)) for row in wide]

    def _hold_case(self) -> None:
        """The special case as a graph of its own, held against what runs the source."""
        self.standard = self.reference = self.view.copy()
        self.standard.count_anew()
        self.truth = ask_source(self.standard, self.batches)
        hold(self.standard, self.view, self.truth, self.outputs)


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


def _new_report(
    graph: View, structure: Structure, recipe: Recipe, max_error: float | None
) -> RunReport:
    done, notes = graph.source.done, list(graph.source.notes)
    if done:
        notes.append(f"{done} came before this run: errors are against the graph that it left")
    return RunReport(
        source={
            "kind": graph.source.kind,
            "name": graph.source.name,
            "sha256": graph.source.sha256,
            "task": graph.source.task,
            **({"notes": notes} if notes else {}),
        },
        recipe=str(recipe) if not done else f"{done},{recipe}",
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
