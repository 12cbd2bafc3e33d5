"""One model and figures of what recipes make of it; recipes that begin alike share what that costs.

A judged graph runs once on each window of text, and the source once for all graphs: what it says
on 40 windows of 512 tokens takes 670 MB.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from copy import deepcopy
from functools import cached_property
from typing import Any

import torch

from ...backends import Executable
from ...ir.core.types import Type
from ...ir.core.view import View
from ...ir.load.sources import load
from ...passes.manager import optimize
from ...passes.recipe import Recipe
from ...passes.report import RunReport
from ..data import calibration
from ..evaluate import EvalResult, Subject, evaluate

TASKS = ("perplexity", "agreement", "recall")


class Judge:
    """One model, its calibration data, and figures of rewritten graphs."""

    def __init__(self, name: str, samples: int) -> None:
        self.graph, self.samples = load(name, cache=False), samples
        self.data = calibration.read(name, self.graph).batches
        self.source = self._judged(self.graph)

    def row(self, recipe: str) -> tuple[str, ...]:
        """All figures of a recipe."""
        return Start(self, recipe).row("")

    def optimized(self, recipe: str, kept: Kept | None = None) -> tuple[View, RunReport, float]:
        """What a recipe makes of the model, and the processor seconds of that."""
        started = time.process_time()
        result = optimize(self.graph, recipe, calibration=self.data, checkpoints=kept)
        return result.graph, result.report, time.process_time() - started

    def figures(self, graph: View) -> tuple[str, str, str]:
        """Perplexity, KL to the source and recall."""
        judged = self.source if graph is self.graph else self._judged(graph)
        by_task = evaluate(judged, TASKS, reference=self.source, samples=self.samples)
        recall = by_task["recall"].figures["recall"]
        return (
            _figure(by_task["perplexity"], "perplexity"), _figure(by_task["agreement"], "kl"),
            f"{recall:.3g}",
        )  # fmt: skip

    def perplexity(self, graph: View) -> str:
        """That figure alone."""
        by_task = evaluate(self._judged(graph), "perplexity", samples=self.samples)
        return _figure(by_task["perplexity"], "perplexity")

    def _judged(self, graph: View) -> Subject:
        folder = self.graph.source.folder
        subject = Subject.of(graph, backend="onnxruntime", tokenizer=folder)
        subject.executable = Once(subject.executable)
        return subject


class Start:
    """A recipe, and those that go on behind it: what its passes compute is computed once."""

    def __init__(self, judge: Judge, recipe: str) -> None:
        self._judge, self._recipe = judge, recipe
        self._kept = Kept(len(Recipe.parse(recipe).passes))

    @cached_property
    def _alone(self) -> tuple[View, RunReport, float]:
        return self._judge.optimized(self._recipe, self._kept)

    def row(self, behind: str) -> tuple[str, ...]:
        """The figures of the recipe with ``behind`` at its end. The seconds are those of both,
        what any run begins with twice among them."""
        graph, report, seconds = self._alone
        if behind:
            self._kept.forget_what_followed()
            graph, report, more = self._judge.optimized(self._recipe + behind, self._kept)
            seconds += more
        bits = f"{bits_per_weight(report):.3f}"
        return *self._judge.figures(graph), bits, f"{seconds:.0f}"


class Kept:
    """In memory, what the first ``steps`` passes of recipes that begin alike computed
    (``passes/checkpoint_store.py``)."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._results: dict[str, Any] = {}

    def recall(self, key: str) -> Any:
        return deepcopy(self._results[key])

    def keep(self, key: str, result: Any) -> None:
        self._results[key] = result

    def forget_what_followed(self) -> None:
        """Keys begin with the number of the pass."""
        pairs = self._results.items()
        self._results = {k: v for k, v in pairs if int(k.partition(":")[0]) <= self._steps}


class Once:
    """An executable that runs once on an input: two tasks put the same windows to it."""

    def __init__(self, run: Executable) -> None:
        self._run = run
        self._outputs: dict[tuple[Any, ...], dict[str, torch.Tensor]] = {}

    @property
    def input_names(self) -> tuple[str, ...]:
        return self._run.input_names

    @property
    def input_types(self) -> Mapping[str, Type]:
        return self._run.input_types

    @property
    def output_names(self) -> tuple[str, ...]:
        return self._run.output_names

    def __call__(self, *args: torch.Tensor, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        named = dict(zip(self.input_names, args, strict=False)) | inputs
        key = tuple((n, tuple(x.shape), x.numpy().tobytes()) for n, x in sorted(named.items()))
        if key not in self._outputs:
            self._outputs[key] = self._run(**named)
        return self._outputs[key]


def bits_per_weight(report: RunReport) -> float:
    """Stored bits, paths among them, per weight of the linears that are stored anew."""
    last = {s.name: s for p in report.passes if not p.pass_.exact for s in p.result.sites}
    weights = sum(site.shape[0] * site.shape[1] for site in last.values())
    return 8 * sum(site.bytes_after for site in last.values()) / weights


def _figure(result: EvalResult, name: str) -> str:
    low, high = result.interval[name]
    return f"{result.figures[name]:.4g} ({low:.4g} to {high:.4g})"
