"""``python -m graphwright.tools.bench.linears``: a stack of linears on the CPU, by ONNX Runtime.

16 linears of 2048x5632, up and down in turns, whose weights no cache holds: in float32, in 4 bits,
and in 4 bits with a low-rank path of rank 32, each as the artifact that our passes and moves write.
The factors are random: time does not depend on them, and 16 decompositions would take minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ...backends import compile as compile_model
from ...backends import export
from ...backends.artifacts import artifact
from ...ir.core.errors import BadInput, GraphwrightError
from ...ir.core.view import View
from ...ir.core.weights import MemoryWeight
from ...ir.load.tracing.trace import trace
from ...ir.moves.graft_path import Factor, graft_low_rank
from ...ir.structure.recognize import recognize
from ...passes.manager import optimize
from ..evaluate.turns import Runner, in_turns
from ..run.machine import processor

RULE = "random-low-rank"


@dataclass(frozen=True)
class Stack:
    """What is timed: ``layers`` linears from ``narrow`` to ``wide`` features and back, in turns."""

    layers: int
    narrow: int
    wide: int

    def __post_init__(self) -> None:
        if min(self.layers, self.narrow, self.wide) < 1:
            raise BadInput(f"{self}: give 1 or more of each")

    def __str__(self) -> str:
        return f"{self.layers} linears of {self.narrow}x{self.wide}"

    def trace(self) -> View:
        """The FX graph, random weights in memory, any number of rows."""
        sizes = (self.narrow, self.wide)
        torch.manual_seed(0)
        layers = [
            torch.nn.Linear(sizes[i % 2], sizes[(i + 1) % 2], bias=False)
            for i in range(self.layers)
        ]
        rows = torch.export.Dim("rows")
        return trace(
            torch.nn.Sequential(*layers).eval(), (self.input(2),), dynamic_shapes=({0: rows},)
        )

    def input(self, rows: int) -> torch.Tensor:
        return torch.randn(rows, self.narrow, generator=torch.Generator().manual_seed(rows))


def with_low_rank(view: View, rank: int) -> View:
    """A copy whose linears have random low-rank paths, in float16 as ``eora`` stores them."""
    copied, rng = view.copy(), torch.Generator().manual_seed(0)

    def factor(rows: int, columns: int) -> MemoryWeight:
        return MemoryWeight((torch.randn(rows, columns, generator=rng) / 100).half())

    for site in recognize(copied).linears:
        down, up = factor(rank, site.in_features), factor(site.out_features, rank)
        x = copied.tensor(site.node)
        graft_low_rank(
            copied, x, Factor.dense(f"{site.name}.A", down),
            [(site.out, Factor.dense(f"{site.name}.B", up))], rule=RULE,
        )  # fmt: skip
    return copied


def forms(stack: Stack, *, rank: int, group: int) -> dict[str, View]:
    """The graphs by the names that the table has for them; the first is what they are held to."""
    dense = stack.trace()
    views = {"fp32": dense}
    for level in (0, 4):
        recipe = f"quantize{{bits=4 group={group} accuracy_level={level}}}"
        quantized = optimize(
            dense, recipe, samples=[{dense.input_names()[0]: stack.input(1)}]
        ).graph
        name = f"int4 group {group}, accuracy_level={level}"
        views[name] = quantized
        views[f"{name}, rank {rank}"] = with_low_rank(quantized, rank)
    return views


@dataclass(frozen=True)
class Timing:
    """One form at one number of rows."""

    rows: int
    form: str
    ms: float
    """Median of the rounds."""
    quartiles: tuple[float, float]
    times_fp32: float
    """How many times as fast as float32 it is."""
    gigabytes_per_second: float
    """Of the weights that the artifact stores, each read once."""


def measure(
    stack: Stack, batches: Sequence[int], *, rank: int, group: int, threads: int, rounds: int
) -> list[Timing]:
    """Write every form as an artifact, then time all of them in turns, by number of rows.

    Raises ``BadInput`` for a rank or a number of rounds that is too small, and as ``optimize``.
    """
    if rank < 1 or rounds < 2:
        raise BadInput(f"rank={rank}, rounds={rounds}: give a rank of 1 and 2 rounds or more")
    runners: dict[str, Runner] = {}
    size: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="graphwright-") as scratch:
        for index, (name, view) in enumerate(forms(stack, rank=rank, group=group).items()):
            folder = export(view, Path(scratch) / str(index))
            size[name] = artifact.model_bytes(folder)
            runners[name] = _runner(folder, threads)
        return [t for rows in batches for t in _timed(stack, rows, runners, size, rounds)]


def _runner(folder: Path, threads: int) -> Runner:
    run = compile_model(folder, backend="onnxruntime", threads=threads)
    (name,) = run.input_names
    return lambda batch: run(**{name: batch["x"]})


def _timed(
    stack: Stack, rows: int, runners: dict[str, Runner], size: dict[str, int], rounds: int
) -> list[Timing]:
    taken = in_turns(runners, {"x": stack.input(rows)}, rounds)
    medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
    base = next(iter(medians.values()))
    timings = []
    for name, seconds in taken.items():
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
        median = medians[name]
        timings.append(
            Timing(
                rows, name, 1e3 * median, (1e3 * low, 1e3 * high), base / median,
                size[name] / median / 1e9,
            )
        )  # fmt: skip
    return timings


def surroundings(threads: int) -> dict[str, Any]:
    """Versions, the processor, and how many runnable processes shared it in the last minute."""
    import onnxruntime

    return {
        "onnxruntime": onnxruntime.__version__, "torch": torch.__version__,
        "cpu": processor(), "threads": threads, "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def table(title: str, timings: Sequence[Timing]) -> Table:
    """A line a form and number of rows."""
    table = Table(title=title)
    table.add_column("rows", justify="right")
    table.add_column("form")
    for name in ("ms", "quartiles", "times fp32", "GB/s of weights"):
        table.add_column(name, justify="right")
    rows = None
    for one in timings:
        if rows not in (None, one.rows):
            table.add_section()
        rows = one.rows
        table.add_row(
            str(rows), one.form, f"{one.ms:.3g}", "{:.3g} to {:.3g}".format(*one.quartiles),
            f"{one.times_fp32:.2f}x", f"{one.gigabytes_per_second:.1f}",
        )  # fmt: skip
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table; 0, or the exit code of what went wrong."""
    parser = argparse.ArgumentParser(prog="python -m graphwright.tools.bench.linears")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--shape", type=_numbers("x", 2), default=(2048, 5632))
    parser.add_argument("--batch", type=_numbers(","), default=(1, 16, 128), help="Rows of x.")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="The figures as JSON.")
    options = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    torch.set_num_threads(options.threads)
    try:
        stack = Stack(options.layers, *options.shape)
        timings = measure(
            stack, options.batch, rank=options.rank, group=options.group,
            threads=options.threads, rounds=options.rounds,
        )  # fmt: skip
    except GraphwrightError as error:
        Console(stderr=True).print(str(error), markup=False, highlight=False, soft_wrap=True)
        return error.exit_code
    around = surroundings(options.threads)
    if options.json:
        written = {**around, "timings": [asdict(one) for one in timings]}
        sys.stdout.write(json.dumps(written) + "\n")
        return 0
    console.print(table(f"{stack}, median of {options.rounds} rounds in turns", timings))
    console.print(", ".join(f"{name} {value}" for name, value in around.items()), highlight=False)
    return 0


def _numbers(separator: str, count: int = 0) -> Callable[[str], tuple[int, ...]]:
    """``2048x5632`` or ``1,16,128`` as numbers of 1 or more."""

    def parse(text: str) -> tuple[int, ...]:
        parts = text.split(separator)
        if not all(part.isdecimal() and int(part) for part in parts) or count not in (
            0,
            len(parts),
        ):
            raise argparse.ArgumentTypeError(f"{text!r}: give whole numbers, like 64{separator}96")
        return tuple(map(int, parts))

    return parse


if __name__ == "__main__":
    sys.exit(main())
