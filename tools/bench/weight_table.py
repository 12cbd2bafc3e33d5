"""Ways to store weights in few bits, side by side: quality, true size, time.

``python -m graphwright.tools.bench.weight_table [--model zoo:tiny-llama] [--bits 4,3]
[--methods quantize,gptq] [--before none,rotate] [--behind none,eora-16] [--samples N]
[--rows FILE.md]`` prints a row for each combination, as soon as it is known: perplexity and KL to
the source with their 95 % intervals, recall, stored bits per weight of the linears that are
rewritten, processor seconds of the recipe; and behind the table, which methods round no better
than to nearest. Graphs are judged in ONNX Runtime. A tied head stays as it is, before a rotation
too. With ``--rows`` each row goes to the end of that file as it comes, and those that it holds are
not measured again, so that a run that was stopped goes on (``tools/bench/WEIGHTS.md``).
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path

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
    "quantize": "quantize{{bits={bits} group=32 embeddings=keep{keep}}}",
    "quantize-asym": "quantize{{bits={bits} group=32 symmetric=false embeddings=keep{keep}}}",
    "easyquant": "easyquant{{bits={bits} group=32{keep}}}",
    "hqq": "hqq{{bits={bits} group=32{keep}}}",
    "finequant": "finequant{{bits={bits} group=32{keep}}}",
    "awq": "awq{{bits={bits} group=32{keep}}}",
    "gptq": "gptq{{bits={bits} group=32{keep}}}",
    "autoround": "autoround{{bits={bits} group=32 steps=50{keep}}}",
    "aqlm": "aqlm{{bits={bits}{keep}}}",
}
NARROW = {"aqlm": ("2", "3", "4")}
"""The widths of methods that have not all of them."""
BEFORE = {"none": "", "rotate": "rotate,"}
BEHIND = {
    "none": "",
    "svd-16": ",svd-compensate{rank=16}",
    "eora-8": ",eora{rank=8}",
    "eora-16": ",eora{rank=16}",
    "eora-32": ",eora{rank=32}",
    "eora-16-4-bit": ",eora{rank=16 factor_bits=4}",
}
COLUMNS = (
    "bits", "method", "before", "behind", "perplexity", "KL", "recall", "bits a weight", "seconds"
)  # fmt: skip
NAMED = 4
"""Columns that say which row it is."""
TASKS = ("perplexity", "agreement", "recall")
BASELINES = ("quantize", "quantize-asym")


Row = tuple[str, ...]


class Judge:
    """One model, its calibration data, and figures of rewritten graphs."""

    def __init__(self, name: str, samples: int) -> None:
        self.graph, self.samples = load(name, cache=False), samples
        self.data = calibration.read(name, self.graph).batches
        folder = self.graph.source.folder
        self.source = Subject.of(self.graph, backend="onnxruntime", tokenizer=folder)

    def row(self, recipe: str) -> tuple[str, ...]:
        graph, report, seconds = self.optimized(recipe)
        return *self.figures(graph), f"{bits_per_weight(report):.3f}", f"{seconds:.0f}"

    def optimized(self, recipe: str) -> tuple[View, RunReport, float]:
        """What a recipe makes of the model, and the processor seconds of that."""
        started = time.process_time()
        result = optimize(self.graph, recipe, calibration=self.data)
        return result.graph, result.report, time.process_time() - started

    def figures(self, graph: View) -> tuple[str, str, str]:
        """Perplexity, KL to the source and recall."""
        judged = self._judged(graph)
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
    behind: Sequence[str], known: Container[Row] = (),
) -> Iterator[Row]:  # fmt: skip
    """The rows but those that are known, all methods first before a path is put behind any."""
    if ("-", "source", "-", "-") not in known:
        yield "-", "source", "-", "-", *judge.figures(judge.graph), "-", "-"
    for last, first, width, method in itertools.product(behind, before, bits, methods):
        if (width, method, first, last) in known or width not in NARROW.get(method, (width,)):
            continue
        keep = " exclude=lm_head" if first == "rotate" else ""
        recipe = BEFORE[first] + METHODS[method].format(bits=width, keep=keep) + BEHIND[last]
        yield width, method, first, last, *judge.row(recipe)


def rows_of(file: Path) -> list[Row]:
    """The rows of a table in Markdown, its head left out."""
    lines = file.read_text().splitlines() if file.is_file() else []
    cells = [tuple(line.strip("| ").split(" | ")) for line in lines if line.startswith("| ")]
    return [row for row in cells if len(row) == len(COLUMNS) and row != COLUMNS and row[0] != "---"]


def added_to(file: Path, lines: Iterable[Row]) -> Iterator[Row]:
    """The rows as they come, each put at the file's end."""
    if not rows_of(file):
        with file.open("a") as out:
            out.write(_line(COLUMNS) + _line(["---"] * len(COLUMNS)))
    for row in lines:
        with file.open("a") as out:
            out.write(_line(row))
        yield row


def collected(lines: Iterable[Row], table: list[Row]) -> Iterator[Row]:
    """The rows as they come, each put behind those of ``table``."""
    for row in lines:
        table.append(row)
        yield row


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def no_better(table: Sequence[Row]) -> list[str]:
    """A line for each setting in which methods give no lower perplexity than rounding to nearest,
    symmetric or not."""
    by_setting: dict[tuple[str, str, str], dict[str, float]] = {}
    for width, method, first, last, perplexity, *_ in table:
        if method != "source":
            value = float(perplexity.partition(" ")[0])
            by_setting.setdefault((width, first, last), {})[method] = value
    lines = []
    for (width, first, last), values in by_setting.items():
        least = min((values[name] for name in BASELINES if name in values), default=0.0)
        worse = [f"{name} {value:.4g}" for name, value in values.items()
                 if name not in BASELINES and value >= least > 0]  # fmt: skip
        if worse:
            setting = f"{width} bits, before: {first}, behind: {last}"
            lines.append(f"{setting}: to nearest {least:.4g}; no better: {', '.join(worse)}")
    return lines


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
    parser.add_argument("--rows", type=Path, metavar="FILE.md", help="go on with this table")
    options = parser.parse_args(arguments)

    def show(console: Console) -> None:
        asked = (
            chosen(options.bits, ("2", "3", "4", "8"), "width"),
            chosen(options.methods, tuple(METHODS), "method"),
            chosen(options.before, tuple(BEFORE), "pass"),
            chosen(options.behind, tuple(BEHIND), "pass"),
        )
        judge = Judge(options.model, options.samples)
        table = [] if options.rows is None else rows_of(options.rows)
        lines = rows(judge, *asked, known={row[:NAMED] for row in table})
        if options.rows is not None:
            lines = added_to(options.rows, lines)
        console.print(growing(options.model, COLUMNS, collected(lines, table)))
        for line in no_better(table):
            console.print(line)

    return ended(show)


if __name__ == "__main__":
    raise SystemExit(main())
