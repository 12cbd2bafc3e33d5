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
import sys
import time
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from ...ir.core.errors import BadInput, GraphwrightError, near_misses
from ...ir.core.view import View
from ...ir.load.sources import load
from ...passes.manager import optimize
from ...passes.report import RunReport
from ..data import calibration
from ..evaluate import EvalResult, Subject, evaluate

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
        started = time.process_time()
        result = optimize(self.graph, recipe, calibration=self.data)
        seconds = time.process_time() - started
        perplexity, kl = self.figures(result.graph)
        return perplexity, kl, f"{bits_per_weight(result.report):.3f}", f"{seconds:.0f}"

    def figures(self, graph: View) -> tuple[str, str]:
        folder = self.graph.source.folder
        judged = Subject.of(graph, backend="onnxruntime", tokenizer=folder)
        tasks = ["perplexity", "agreement"]
        found = evaluate(judged, tasks, reference=self.source, samples=self.samples)
        return _figure(found["perplexity"], "perplexity"), _figure(found["agreement"], "kl")


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


def _chosen(text: str, known: Sequence[str], what: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise BadInput(f"no {what} {name!r}; {near_misses(name, known)}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="zoo:tiny-llama")
    parser.add_argument("--bits", default="8,4,3,2")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--before", default=",".join(BEFORE))
    parser.add_argument("--behind", default=",".join(BEHIND))
    parser.add_argument("--samples", type=int, default=40, help="windows of text to judge by")
    given = parser.parse_args()
    try:
        judge = Judge(given.model, given.samples)
        table = Table(*COLUMNS, title=given.model)
        for row in rows(
            judge, _chosen(given.bits, ("2", "3", "4", "8"), "width"),
            _chosen(given.methods, tuple(METHODS), "method"),
            _chosen(given.before, tuple(BEFORE), "pass"),
            _chosen(given.behind, tuple(BEHIND), "pass"),
        ):  # fmt: skip
            table.add_row(*row)
            print(*row, sep="\t", file=sys.stderr, flush=True)
    except GraphwrightError as error:
        sys.exit(f"error: {error}")
    Console().print(table)


if __name__ == "__main__":
    main()
