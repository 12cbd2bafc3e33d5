"""A written artifact in ONNX Runtime, its graph optimisation on and off, beside its graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..ir.core.errors import BoundExceeded, InvalidGraph
from ..ir.core.heap import give_back
from ..ir.core.view import View
from ..ir.run.sweep import sweep
from ..ir.run.truth import Reference
from ..ir.run.verify import Difference, Rule, rounds_activations, worst, worst_of
from ..ir.structure.cache_slots import answers, has_cache, next_step
from .artifact import MODEL_FILE, model_bytes
from .original import REPACKED_BYTES, must_repack
from .registry import DEFAULT, compile

Outputs = Mapping[str, torch.Tensor]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Checked:
    """How an artifact ran."""

    optimized: Difference
    """The worst output against the graph by the reference interpreter, graph optimisation on."""
    unoptimized: Difference
    """The same with it off."""
    prepacked: bool
    """Whether the runtime, its optimisation on, repacked the weights as it does for a user."""
    outputs: list[Outputs]
    """Of every sample, optimisation on, without a key-value cache."""


class Judge:
    """Holds runs of a graph against what it should give on the first sample and, with a cache, on
    the step that follows it.

    ``expected`` are the graph's outputs on that sample, if they are known. The step goes on from
    the graph's own cache: blocks may have left it.
    """

    def __init__(
        self, graph: View, samples: Sequence[Mapping[str, torch.Tensor]], reference: Reference,
        expected: Outputs | None = None,
    ) -> None:  # fmt: skip
        self._rule, self._reference, self.samples = Rule.of(graph), reference, samples
        self.inputs = [samples[0]]
        self.expected = [sweep(graph, samples[0]) if expected is None else expected]
        # A graph may give its keys and values without taking any.
        step = next_step(self.inputs[0], self.expected[0]) if has_cache(graph) else None
        if step is not None:
            self.inputs.append(step)
            self.expected.append(sweep(graph, step))

    def judge(self, actual: Sequence[Outputs], what: str, advice: str) -> Difference:
        """The worst difference of a run on ``inputs`` from the graph.

        ``BoundExceeded``, which names ``what`` ran and gives ``advice``, for an output that the
        rule does not allow.
        """
        errors = worst_of(self.expected, actual)
        for name, error in errors.items():
            if self._rule.allows(error):
                continue
            beside = self._to_source(name, actual)
            if beside is not None and self._rule.allows_beside(*beside):
                continue
            far = "" if beside is None else (
                f", and {beside[0].rel_l2:.3g} from the source, from which the graph is "
                f"{beside[1].rel_l2:.3g}"
            )  # fmt: skip
            raise BoundExceeded(
                f"{what}: the output {name} is {error.rel_l2:.3g} (relative L2; bound "
                f"{self._rule.bound:g}) from what the rewritten graph gives{far}: the artifact is "
                f"not published. {advice}"
            )
        return worst(errors)

    def _to_source(
        self, name: str, actual: Sequence[Outputs]
    ) -> tuple[Difference, Difference] | None:
        """How far an output and the graph's are from the source's; ``None`` where it has no such
        output."""

        def far(rows: Sequence[Outputs]) -> Difference:
            pairs = [[{name: row[name]} for row in side] for side in (source, rows)]
            return worst(worst_of(*pairs, shortened=True))

        source = self._reference.first[: len(actual)]
        if len(source) < len(actual) or any(name not in row for row in source):
            return None
        try:
            return far(actual), far(self.expected)
        except InvalidGraph:  # a cache of fewer tokens
            return None


def check_artifact(
    folder: Path, graph: View, judge: Judge, *, device: str = "cpu",
    progress: Progress = lambda *_: None,
) -> Checked:  # fmt: skip
    """Run the artifact in ``folder``, which was written from ``graph``, on every sample.

    Raises ``BoundExceeded`` as ``Judge.judge``, and ``BadInput`` where the runtime rejects it.
    """
    prepacked = rounds_activations(graph) or model_bytes(folder) <= REPACKED_BYTES
    repacked = {True: prepacked, False: must_repack(graph)}
    errors: list[Difference] = []
    outputs: list[Outputs] = []
    for optimized in (True, False):
        switched = f"graph optimisation {'on' if optimized else 'off'}"
        progress(f"running the artifact, {switched}", 0, 1)
        executable = compile(
            folder / MODEL_FILE, backend=DEFAULT, device=device,
            optimize=optimized, lean=not repacked[optimized],
        )  # fmt: skip
        actual = [executable(**inputs) for inputs in judge.inputs]
        advice = "Update onnxruntime, or report the model"
        errors.append(judge.judge(actual, f"ONNX Runtime ({switched})", advice))
        if optimized:
            rest = (answers(executable(**inputs)) for inputs in judge.samples[1:])
            outputs = [answers(actual[0]), *rest]
        # The next session is made when this one is gone: each may hold the whole model.
        del actual, executable
        give_back()
    return Checked(errors[0], errors[1], prepacked, outputs)
