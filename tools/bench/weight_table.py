"""Ways to store weights in few bits, side by side: quality, true size, time.

``python -m graphwright.tools.bench.weight_table [--model zoo:tiny-llama] [--bits 4,3]
[--methods quantize,gptq] [--before none,rotate] [--behind none,eora] [--samples N]`` prints a row
for each combination, as soon as it is known: perplexity with its 95 % interval, KL to the source,
stored bits per weight of the linears that are rewritten, processor seconds of the recipe. Graphs
are judged in ONNX Runtime. A tied head stays as it is, before a rotation too.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator, Sequence

from rich.console import Console

from ...ir.core.errors import BadInput, near_misses
from ...ir.core.view import View
from ...ir.load.sources import load
from ...passes.manager import optimize
from ...passes.report import RunReport
from ..data import calibration
from ..evaluate import EvalResult, Subject, evaluate
from .showing import ended, growing

METHODS = {
    "quantize": "quantize{{bits={bits} group=32{keep}}}",
    "quantize-asym": "quantize{{bits={bits} group=32 symmetric=false{keep}}}",
    "easyquant": "easyquant{{bits={bits} group=32{keep}}}",
    "hqq": "hqq{{bits={bits} group=32{keep}}}",
    "finequant": "finequant{{bits={bits} group=32{keep}}}",
    "awq": "awq{{bits={bits} group=32{keep}}}",
    "gptq": "gptq{{bits={bits} group=32{keep}}}",
    "autoround": "autoround{{bits={bits} group=32 steps=50{keep}}}",
}
BEFORE = {"none": "", "rotate": "rotate,"}
BEHIND = {"none": "", "eora": ",eora{rank=16}"}
COLUMNS = ("bits", "method", "before", "behind", "perplexity", "KL", "bits a weight", "seconds")


class Judge:
    """One model, its calibration data, and figures of rewritten graphs."""

    def __init__(self, name: str, samples: int) -> None:
        self.graph, self.samples = load(name, cache=False), samples
        self.data = calibration.read(name, self.graph).batches
        folder = self.graph.source.folder
        self.source = Subject.of(self.graph, backend="onnxruntime", tokenizer=folder)

    def row(self, recipe: str) -> tuple[str, str, str, str]:
        graph, report, seconds = self.made(recipe)
        perplexity, kl = self.figures(graph)
        return perplexity, kl, f"{bits_per_weight(report):.3f}", f"{seconds:.0f}"

    def made(self, recipe: str) -> tuple[View, RunReport, float]:
        """What a recipe makes of the model, and the processor seconds of that."""
        started = time.process_time()
        result = optimize(self.graph, recipe, calibration=self.data)
        return result.graph, result.report, time.process_time() - started

    def figures(self, graph: View) -> tuple[str, str]:
        judged, tasks = self._judged(graph), ["perplexity", "agreement"]
        by_task = evaluate(judged, tasks, reference=self.source, samples=self.samples)
        return _figure(by_task["perplexity"], "perplexity"), _figure(by_task["agreement"], "kl")

    def perplexity(self, graph: View) -> str:
        """That figure alone."""
        by_task = evaluate(self._judged(graph), "perplexity", samples=self.samples)
        return _figure(by_task["perplexity"], "perplexity")

    def _judged(self, graph: View) -> Subject:
        return Subject.of(graph, backend="onnxruntime", tokenizer=self.graph.source.folder)


def bits_per_weight(report: RunReport) -> float:
    """Stored bits, paths among them, per weight of the linears that are stored anew."""
    last = {s.name: s for p in report.passes if not p.pass_.exact for s in p.result.sites}
    weights = sum(site.shape[0] * site.shape[1] for site in last.values())
    return 8 * sum(site.bytes_after for site in last.values()) / weights


def _figure(result: EvalResult, name: str) -> str:
    low, high = result.interval[name]
    return f"{result.figures[name]:.4g} ({low:.4g} to {high:.4g})"


def rows(
    judge: Judge, bits: Sequence[str], methods: Sequence[str], before: Sequence[str],
    behind: Sequence[str],
) -> Iterator[Sequence[str]]:  # fmt: skip
    perplexity, _ = judge.figures(judge.graph)
    yield "", "source", "", "", perplexity, "", "", ""
    for width, method, first, last in itertools.product(bits, methods, before, behind):
        keep = " exclude=lm_head" if first == "rotate" else ""
        recipe = BEFORE[first] + METHODS[method].format(bits=width, keep=keep) + BEHIND[last]
        yield width, method, first, last, *judge.row(recipe)


def chosen(text: str, known: Sequence[str], what: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise BadInput(f"no {what} {name!r}; {near_misses(name, known)}")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="zoo:tiny-llama")
    parser.add_argument("--bits", default="8,4,3,2")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--before", default=",".join(BEFORE))
    parser.add_argument("--behind", default=",".join(BEHIND))
    parser.add_argument("--samples", type=int, default=40, help="windows of text to judge by")
    options = parser.parse_args(arguments)

    def show(console: Console) -> None:
        asked = (
            chosen(options.bits, ("2", "3", "4", "8"), "width"),
            chosen(options.methods, tuple(METHODS), "method"),
            chosen(options.before, tuple(BEFORE), "pass"),
            chosen(options.behind, tuple(BEHIND), "pass"),
        )
        judge = Judge(options.model, options.samples)
        console.print(growing(options.model, COLUMNS, rows(judge, *asked)))

    return ended(show)


if __name__ == "__main__":
    raise SystemExit(main())
