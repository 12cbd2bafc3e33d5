"""A written artifact in ONNX Runtime, its graph optimisation on and off, beside its graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ...ir.core.errors import BoundExceeded, InvalidGraph, NodeFailed
from ...ir.core.heap import give_back
from ...ir.core.view import View
from ...ir.run.sweep import sweep, sweep_together
from ...ir.run.truth import Reference
from ...ir.run.unrounded import chooses, unrounded
from ...ir.run.verify import Difference, Rule, rounds_activations, worst, worst_of
from ...ir.run.widened import sweep_widened
from ...ir.structure.cache_slots import answers, has_cache, next_step
from ..base import Executable
from ..onnx.model_files import MODEL_FILE
from ..registry import DEFAULT, compile
from ..runtimes.original import REPACKED_BYTES, ROUNDED_BYTES, must_repack
from ..runtimes.pieces import in_pieces
from ..runtimes.unrounded import may_be_fused, unrounded_file
from .artifact import model_bytes, rows_begin
from .optimization import float_twin, optimization_alone
from .widened import widened_twin

Outputs = Mapping[str, torch.Tensor]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Checked:
    """How an artifact ran."""

    optimized: Difference
    """The worst output against the graph by the reference interpreter, graph optimisation on."""
    unoptimized: Difference
    """The same with it off; where the graph rounds activations, of both without the rounding."""
    prepacked: bool
    """Whether the runtime, its optimisation on, repacked the weights as it does for a user."""
    outputs: list[Outputs]
    """Of every sample, optimisation on, without a key-value cache; none where the runtime was kept
    from rounding activations as it does for a user."""
    widened: bool
    """Whether float32 was run in the place of bfloat16: see ``widened``."""
    optimization: Difference | None
    """How far the runtime's optimisation alone moves the worst output, in float32 and without
    rounding; ``None`` where that is not another run, or cannot be made: see ``float_twin``."""

    def to_dict(self) -> dict[str, dict[str, float]]:
        """The errors, as the manifest holds them."""
        runs = {"optimized": self.optimized, "unoptimized": self.unoptimized}
        alone = {} if self.optimization is None else {"optimization": self.optimization}
        return {name: error.to_dict() for name, error in (runs | alone).items()}


class Judge:
    """Holds runs of a graph against what it should give on the first sample and, with a cache, on
    the step that follows it.

    ``expected`` are the graph's outputs on that sample, if they are known. The step goes on from
    the graph's own cache: blocks may have left it.

    Where linears round their activations to 8 bits, two sound runs of the graph differ by that. A
    runtime is then held against ``plain``, the same graph without the rounding, to the tolerance
    between two runtimes; and what rounds, against ``plain`` within what the rounding explains.

    ``widened`` are the outputs of ``plain`` in float32, once half types needed them to decide.
    """

    def __init__(
        self, graph: View, samples: Sequence[Mapping[str, torch.Tensor]], reference: Reference,
        expected: Outputs | None = None,
    ) -> None:  # fmt: skip
        self.graph, self.plain = graph, unrounded(graph)
        self._rule, self._reference, self.samples = Rule.of(self.plain), reference, samples
        self.widened: list[Outputs] = []
        self.inputs = [samples[0]]
        self._rounded: list[Outputs] = [sweep(graph, samples[0]) if expected is None else expected]
        # A graph may give its keys and values without taking any.
        step = next_step(self.inputs[0], self._rounded[0]) if has_cache(graph) else None
        if step is not None:
            self.inputs.append(step)
        self.expected: list[Outputs] = (
            [*sweep_together(self.plain, self.inputs)] if self.rounds
            else [*self._rounded, *(sweep(graph, later) for later in self.inputs[1:])]
        )  # fmt: skip

    @property
    def rounds(self) -> bool:
        """Whether ``plain`` is another graph than the one that was given."""
        return self.plain is not self.graph

    @property
    def coarse(self) -> bool:
        """Whether two sound runs of ``plain`` may differ by more than float32 rounds."""
        return self._rule.coarse

    def judge(self, actual: Sequence[Outputs], what: str, advice: str) -> Difference:
        """The worst difference of a run of ``plain`` on ``inputs`` from it.

        ``BoundExceeded``, which names ``what`` ran and gives ``advice``, for an output that the
        rule does not allow.
        """
        return self._held(self._rule, self.expected, actual, what, advice)

    def _held(
        self, rule: Rule, expected: Sequence[Outputs], actual: Sequence[Outputs], what: str,
        advice: str,
    ) -> Difference:  # fmt: skip
        errors = worst_of(expected, actual)
        for name, error in errors.items():
            if rule.allows(error):
                continue
            beside = self._to_source(name, actual, expected)
            if beside is not None and rule.allows_beside(*beside):
                continue
            exact = self._to_widened(name, actual, expected) if rule.half else None
            if exact is not None and rule.allows_in_half(*exact):
                continue
            far = "" if beside is None else (
                f", and {beside[0].rel_l2:.3g} from the source, from which the graph is "
                f"{beside[1].rel_l2:.3g}"
            )  # fmt: skip
            far += "" if exact is None else (
                f", and {exact[0].rel_l2:.3g} from what its nodes give in float32, from which the "
                f"graph is {exact[1].rel_l2:.3g}"
            )  # fmt: skip
            raise BoundExceeded(
                f"{what}: the output {name} is {error.rel_l2:.3g} (relative L2; bound "
                f"{rule.bound:g}) from what the rewritten graph gives{far}: the artifact is "
                f"not published. {advice}"
            )
        return worst(errors)

    def _to_widened(
        self, name: str, actual: Sequence[Outputs], expected: Sequence[Outputs]
    ) -> tuple[Difference, Difference] | None:
        """How far an output and the ``expected`` one are from the graph's in float32; ``None`` of a
        graph that ``chooses``, where a rounding says nothing of how far two right runs are, and of
        one that does not run in it."""
        if chooses(self.graph):
            return None
        try:
            self.widened = self.widened or [*sweep_widened(self.plain, self.inputs)]
        except NodeFailed:
            return None
        exact = [{name: row[name]} for row in self.widened[: len(actual)]]
        sides = ([{name: row[name]} for row in rows] for rows in (actual, expected))
        to_exact, graph_to_exact = (worst(worst_of(exact, side)) for side in sides)
        return to_exact, graph_to_exact

    def judge_rounded(self, actual: Sequence[Outputs], what: str, advice: str) -> Difference:
        """The worst difference of a run of the graph itself: its outputs on the sample, or of all
        ``inputs`` where nothing rounds.

        Raises as ``judge``, where the rounding does not explain an output's distance from
        ``plain``, or from the source. Of a graph that ``chooses``, its answers are held against
        its own and the source's.
        """
        if not self.rounds:
            return self.judge(actual, what, advice)
        if chooses(self.graph):
            # A cache holds what was chosen: of another choice nothing in it can be compared, and
            # the run without rounding tells whether it is right.
            rounded = map(answers, self._with_rounding(len(self.inputs)))
            ours = list(map(answers, actual))
            return self._held(Rule.of(self.graph), [*rounded], ours, what, advice)
        errors, moved = worst_of(self.expected, actual), self._moved(1)
        if len(self.inputs) > 1:
            unexplained = {n for n, e in errors.items() if not self._rule.explains(e, moved[n])}
            moved |= {n: m for n, m in (self._moved(2) if unexplained else {}).items()
                      if n in unexplained}  # fmt: skip
        for name, error in errors.items():
            beside = self._to_source(name, actual[:1], self._rounded[:1])
            if self._rule.explains(error, moved[name]) and (
                beside is None or self._rule.explains(*beside)
            ):
                continue
            raise BoundExceeded(
                f"{what}: the output {name} is {error.rel_l2:.3g} (relative L2) from what the "
                f"rewritten graph gives without the rounding of activations to 8 bits, which "
                f"moves it by {moved[name].rel_l2:.3g}: the artifact is not published. {advice}"
            )
        return worst(worst_of(self._rounded[:1], actual[:1]))

    def _moved(self, count: int) -> dict[str, Difference]:
        """How far the rounding moves each output on the first ``count`` inputs."""
        return worst_of(self.expected[:count], self._with_rounding(count))

    def _with_rounding(self, count: int) -> list[Outputs]:
        """The graph's outputs on the first ``count`` inputs. That of the step is computed where the
        sample's alone does not explain what ran."""
        missing = self.inputs[len(self._rounded) : count]
        self._rounded += (sweep(self.graph, inputs) for inputs in missing)
        return self._rounded[:count]

    def _to_source(
        self, name: str, actual: Sequence[Outputs], expected: Sequence[Outputs]
    ) -> tuple[Difference, Difference] | None:
        """How far an output and the ``expected`` one are from the source's; ``None`` where it has
        no such output."""

        def far(rows: Sequence[Outputs]) -> Difference:
            pairs = [[{name: row[name]} for row in side] for side in (source, rows)]
            return worst(worst_of(*pairs, shortened=True))

        source = self._reference.first(len(actual))
        if len(source) < len(actual) or any(name not in row for row in source):
            return None
        try:
            return far(actual), far(expected)
        except InvalidGraph:  # a cache of fewer tokens
            return None


def checkable(
    folder: Path, samples: Sequence[Mapping[str, torch.Tensor]]
) -> Sequence[Mapping[str, torch.Tensor]]:
    """The samples, as far as the artifact takes them: where it knows rows by their length, padding
    before a text is read as text. They stay the very list where nothing is to be changed."""
    masks = [inputs.get("attention_mask") for inputs in samples]
    whole = all(mask is None or bool(mask.all()) for mask in masks)
    if whole or not rows_begin(folder):
        return samples
    return [
        inputs if mask is None else {**inputs, "attention_mask": torch.ones_like(mask)}
        for inputs, mask in zip(samples, masks, strict=True)
    ]


def check_artifact(
    folder: Path, graph: View, judge: Judge, *, device: str = "cpu",
    progress: Progress = lambda *_: None, file: str = MODEL_FILE,
) -> Checked:  # fmt: skip
    """Run the artifact in ``folder``, or another one of its files, which was written from
    ``graph``, on every sample.

    Raises ``BoundExceeded`` as ``Judge.judge``, and ``BadInput`` where the runtime rejects it.
    """
    size = model_bytes(folder)
    runtime = "ONNX Runtime" if file == MODEL_FILE else f"{file} in ONNX Runtime"
    path = folder / file
    plain = in_pieces(unrounded_file(path)) if judge.rounds else None
    twin = widened_twin(path, device)
    rounds = rounds_activations(graph) and (plain is None or size <= ROUNDED_BYTES)
    prepacked = rounds or size <= REPACKED_BYTES
    lean = size > ROUNDED_BYTES
    open_session = partial(compile, path, backend=DEFAULT, device=device, sparing=True)
    advice = "Update onnxruntime, or report the model"
    progress("running the artifact, graph optimisation on", 0, 1)
    instead = None if prepacked else plain
    executable = open_session(optimize=True, lean=not prepacked, instead=instead or twin)
    actual = [executable(**inputs) for inputs in judge.inputs]
    judged = judge.judge_rounded if instead is None else judge.judge
    optimized = judged(actual, f"{runtime} (graph optimisation on)", advice)
    outputs: list[Outputs] = []
    if instead is None:
        rest = (answers(executable(**inputs)) for inputs in judge.samples[1:])
        outputs = [answers(actual[0]), *rest]
    # The next session is made when this one is gone: each may hold the whole model.
    del actual, executable
    give_back()
    progress("running the artifact, graph optimisation off", 0, 1)
    executable = open_session(
        optimize=False, lean=lean and not must_repack(judge.plain), instead=plain or twin
    )
    actual = [executable(**inputs) for inputs in judge.inputs]
    unoptimized = judge.judge(actual, f"{runtime} (graph optimisation off)", advice)
    del executable
    give_back()
    alone = None
    exact = plain if instead is None else None
    if judge.coarse:
        exact = float_twin(path) if size <= ROUNDED_BYTES else None
        exact = None if exact is None else in_pieces(exact)
        actual = actual if exact == plain else []
    if exact is not None and device == "cpu":
        progress("running the artifact, nothing rounded", 0, 1)

        def open_exact(model: bytes, optimize: bool) -> Executable:
            kept = lean or may_be_fused(model)
            return open_session(optimize=optimize, lean=kept, instead=model)

        alone = optimization_alone(
            exact, judge.inputs, open_exact, runtime, actual, judge.widened
        )
    return Checked(optimized, unoptimized, prepacked, outputs, twin is not None, alone)
