"""Sizes of one ``bitstack`` artifact beside rounding to nearest at equal bytes of the linears.

``python -m graphwright.tools.bench.bitstack_curve zoo:tiny-llama``
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ...backends import export
from ...backends.onnx.model_files import MODEL_FILE
from ...ir.core.errors import GraphwrightError
from ...ir.core.view import View
from ...ir.load.bitstack_size import possible_sizes
from ...ir.load.sources import load
from ...ir.ops.bitstack_blocks import place_of
from ...passes.base import Site
from ...passes.checked_run import Samples
from ...passes.forecast import plan
from ...passes.manager import optimize
from ..data import calibration
from ..evaluate import Setting, Subject, evaluate_all

FORMATS = tuple((bits, group) for bits in (2, 3, 4, 8) for group in (0, 128, 64, 32, 16))
"""Bits and groups of the rounded models that sizes are compared with."""

Judge = Callable[[View], "Quality"]


@dataclass(frozen=True)
class Quality:
    """How good a model is, on the windows of text of ``perplexity``."""

    perplexity: float
    kl: float
    """KL(source || model) of the next token, in nats."""
    top1: float
    """Share of tokens where both think the same one most likely."""


@dataclass(frozen=True)
class Point:
    """One model: what the weights of its linears take, and how good it is."""

    name: str
    linear_bytes: int
    bits_per_weight: float
    quality: Quality
    artifact_bytes: int = 0


def judge_of(source: View, setting: Setting) -> Judge:
    """Measures a graph against its source, both in ONNX Runtime."""
    folder = source.source.folder
    original = Subject.of(source, backend="onnxruntime", tokenizer=folder)

    def judge(graph: View) -> Quality:
        subject = Subject.of(graph, backend="onnxruntime", tokenizer=folder)
        tasks = ("perplexity", "agreement")
        by_task = evaluate_all([subject], tasks, original, setting)
        text, same = (by_task[task][0].figures for task in tasks)
        return Quality(text["perplexity"], same["kl"], same["top1"])

    return judge


def stacked(source: View, recipe: str, data: Samples, judge: Judge, count: int) -> list[Point]:
    """``count`` sizes of one artifact, from the least to the whole, evenly apart."""
    result = optimize(source, recipe, calibration=data)
    weights = _weights(result.report.passes[0].result.sites)
    points = []
    with tempfile.TemporaryDirectory(prefix="graphwright-curve-") as scratch:
        out = export(result.graph, Path(scratch) / "out", report=result.report)
        known = possible_sizes(out / MODEL_FILE)
        for i in range(count):
            target = known[0] + (known[-1] - known[0]) * i // max(1, count - 1)
            size = max(s for s in known if s <= target)
            graph = load(out, max_bytes=size)
            stored = _stacked_bytes(graph)
            quality = judge(graph)
            points.append(Point("bitstack", stored, 8 * stored / weights, quality, size))
    return points


def rounded(source: View, sizes: Sequence[int], judge: Judge) -> list[Point | None]:
    """For each size the rounded model that takes most bytes without taking more, if one does."""
    planned: dict[str, tuple[int, int]] = {}
    for bits, group in FORMATS:
        recipe = f"quantize{{bits={bits} group={group} symmetric=false accuracy_level=0}}"
        sites = plan(source, recipe).passes[0][1].sites
        planned[recipe] = sum(s.bytes_after for s in sites), _weights(sites)
    points: dict[str, Point] = {}
    largest: list[Point | None] = []
    for size in sizes:
        fitting = [recipe for recipe, (stored, _) in planned.items() if stored <= size]
        if not fitting:
            largest.append(None)
            continue
        recipe = max(fitting, key=lambda r: planned[r][0])
        if recipe not in points:
            graph = optimize(source, recipe).graph
            stored, weights = planned[recipe]
            points[recipe] = Point(recipe, stored, 8 * stored / weights, judge(graph))
        largest.append(points[recipe])
    return largest


def table(sizes: Sequence[Point], others: Sequence[Point | None], title: str) -> Table:
    """The sizes, and beside each what rounding makes of as many bytes."""
    table = Table(title=title)
    quality = ("perplexity", "KL", "top-1")
    for name in ("artifact", "linears", "bits/weight", *quality, "rounded to", "linears", *quality):
        table.add_column(name, justify="right")
    for point, other in zip(sizes, others, strict=True):
        row = [f"{point.artifact_bytes:,}", f"{point.linear_bytes:,}",
               f"{point.bits_per_weight:.2f}", *_figures(point.quality)]  # fmt: skip
        if other is not None:
            form = other.name.partition("{")[2].partition(" symmetric")[0]
            row += [form, f"{other.linear_bytes:,}", *_figures(other.quality)]
        else:
            row.append("nothing fits")
        table.add_row(*row)
    return table


def _figures(quality: Quality) -> list[str]:
    return [f"{quality.perplexity:.2f}", f"{quality.kl:.4f}", f"{quality.top1:.1%}"]


def _weights(sites: Sequence[Site]) -> int:
    return sum(s.shape[0] * s.shape[1] for s in sites)


def _stacked_bytes(graph: View) -> int:
    return sum(w.nbytes for n, w in graph.weights().items() if place_of(n) is not None)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a language model of the zoo: zoo:tiny-llama")
    parser.add_argument("--recipe", default="bitstack", help="one pass: bitstack{blocks=8}")
    parser.add_argument("--calib", default="", help="calibration data; default: the model's own")
    parser.add_argument("--calib-samples", type=int, default=32)
    parser.add_argument("--calib-length", type=int, default=256)
    parser.add_argument("--sizes", type=int, default=10)
    parser.add_argument("--samples", type=int, default=None, help="windows of perplexity")
    options = parser.parse_args()
    try:
        source = load(options.model, cache=False)
        data = calibration.read(
            options.calib or options.model, source, samples=options.calib_samples,
            length=options.calib_length,
        )  # fmt: skip
        judge = judge_of(source, Setting(samples=options.samples))
        points = stacked(source, options.recipe, data.batches, judge, options.sizes)
        others = rounded(source, [p.linear_bytes for p in points], judge)
        before = judge(source).perplexity
    except GraphwrightError as error:
        sys.exit(f"error: {error}")
    title = f"{options.model}, {options.recipe}; perplexity of the source {before:.2f}"
    Console(width=140).print(table(points, others, title))


if __name__ == "__main__":
    main()
