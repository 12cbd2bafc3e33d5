"""Additive codes beside what else 2 bits can hold, and what their ONNX form costs.

``python -m graphwright.tools.bench.aqlm quality [--model zoo:tiny-llama] [--samples N]`` prints, at
about equal bits a weight, rounding to nearest, error feedback and ``aqlm``: perplexity and KL to
the source with 95 % intervals, recall, stored bits a weight, processor seconds of the recipe.

``python -m graphwright.tools.bench.aqlm costs [ROWSxCOLUMNS ...]`` prints for one linear in
float32, as additive codes and in 4 bits: the artifact's bytes, ms until ONNX Runtime has loaded it,
and ms a row as it runs, with optimisation off too. Codes are random: time does not depend on them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console

from ...backends import compile as compile_model
from ...backends import export
from ...backends.artifacts import artifact
from ...ir.core.view import View
from ...ir.core.weights import MemoryWeight
from ...ir.load.tracing.trace import trace
from ...ir.moves import swap
from ...ir.ops.linear_aqlm import operand_types
from ...ir.structure.recognize import recognize
from ...passes.manager import optimize
from .showing import ended, growing
from .weight_judge import Judge

RECIPES = (
    "quantize{bits=2 group=128 symmetric=false embeddings=keep}",
    "quantize{bits=2 group=64 symmetric=false embeddings=keep}",
    "gptq{bits=2 group=128 symmetric=false}", "gptq{bits=2 group=64 symmetric=false}",
    "gptq{bits=2 group=32 symmetric=false mse=true}", "aqlm{bits=2}", "aqlm{bits=2 beam=1}",
    "aqlm{bits=2 vectors=256}",
)  # fmt: skip
QUALITY = ("recipe", "perplexity", "KL", "recall", "bits a weight", "seconds")
COSTS = ("N x K", "form", "file, KiB", "load, ms", "a row, ms", "a row, not optimised, ms")
ROUNDS = 7


def quality(model: str, samples: int) -> Iterator[Sequence[str]]:
    judge = Judge(model, samples)
    yield "source", *judge.figures(judge.graph), "", ""
    for recipe in RECIPES:
        yield recipe, *judge.row(recipe)


def costs(sizes: Sequence[str]) -> Iterator[Sequence[str]]:
    for size in sizes:
        rows, columns = map(int, size.split("x"))
        for name, view in _forms(rows, columns).items():
            yield size, name, *_cost(view, columns)


def _forms(rows: int, columns: int) -> dict[str, View]:
    layer = torch.nn.Linear(columns, rows, bias=False).eval()
    x = torch.randn(1, columns)
    dense = trace(layer, (x,))
    (name,) = dense.input_names()
    recipe = "quantize{bits=4 group=32 accuracy_level=4}"
    return {
        "float32": dense,
        "aqlm, 2 bits": _coded(dense, rows, columns),
        "4 bits, level 4": optimize(dense, recipe, samples=[{name: x}]).graph,
    }


def _coded(dense: View, rows: int, columns: int) -> View:
    view = dense.copy()
    (linear,) = recognize(view).linears
    weights = []
    types = operand_types(columns, rows, planes=2, entries=256)
    for name, kind in zip(("codes", "codebooks", "scales"), types, strict=True):
        assert kind.shape is not None and kind.dtype is not None
        shape = tuple(int(n) for n in kind.shape)
        coded = kind.dtype == torch.uint8
        numbers = torch.randint(0, 256, shape) if coded else torch.rand(shape)
        weights.append((name, MemoryWeight(numbers.to(kind.dtype))))
    attrs = {"in_features": columns, "out_features": rows}
    swap(view, linear, "linear_aqlm", weights, attrs, rule="random-codes")
    return view


def _cost(view: View, columns: int) -> Sequence[str]:
    with tempfile.TemporaryDirectory(prefix="graphwright-") as scratch:
        folder = export(view, Path(scratch) / "out")
        size = artifact.model_bytes(folder)
        loads, calls = [], []
        for optimized in (True, False):
            started = time.perf_counter()
            run = compile_model(folder, backend="onnxruntime", threads=1, optimize=optimized)
            loads.append(1e3 * (time.perf_counter() - started))
            (name,) = run.input_names
            times = []
            for _ in range(ROUNDS):
                started = time.perf_counter()
                run(**{name: torch.ones(1, columns)})
                times.append(1e3 * (time.perf_counter() - started))
            calls.append(statistics.median(times))
    return f"{size / 1024:.0f}", f"{loads[0]:.0f}", f"{calls[0]:.3f}", f"{calls[1]:.3f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print one of the tables."""
    parser = argparse.ArgumentParser(
        prog="aqlm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=("quality", "costs"))
    parser.add_argument("sizes", nargs="*", default=["1024x1024", "2048x2048"])
    parser.add_argument("--model", default="zoo:tiny-llama")
    parser.add_argument("--samples", type=int, default=40, help="windows of text to judge by")
    options = parser.parse_args(arguments)

    def show(console: Console) -> None:
        if options.table == "quality":
            lines = quality(options.model, options.samples)
            console.print(growing(options.model, QUALITY, lines))
        else:
            console.print(growing("one linear, one thread", COSTS, costs(options.sizes)))

    return ended(show)


if __name__ == "__main__":
    raise SystemExit(main())
