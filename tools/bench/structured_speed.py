"""Whole heads and units taken away: the speed-up that was asked, and the clock's.

``python -m graphwright.tools.bench.structured_speed [--model zoo:tiny-llama] [--length 128]
[--rounds 40] [--samples N]`` makes the table of times that ``ziplm`` goes by (``optimize-model
bench --ziplm-table``), and prints for ``ziplm`` at some speed-ups, ``flap`` at some ratios,
``dormant-heads`` and ``drop-blocks``: what the model's time then is by the clock, all of them in
turns with the model as it is, how far that is from what was asked, and perplexity with its 95 %
interval. Behind it, what ``drop-blocks`` would give at the same time, between its rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from ...ir.canonical.families import canonicalize
from ...ir.core.errors import BadInput
from ...ir.core.view import View
from ...passes.manager import optimize
from ..cli.latency_table import inputs_of, latency_table
from ..evaluate.turns import Setting, timed
from .method_tables import Bench
from .showing import ended, growing

SPEEDUPS = (1.25, 1.5, 2.0)
RATIOS = (0.1, 0.3)
DORMANT = (0.95, 0.8)
BLOCKS = (1, 2, 3, 4)
COLUMNS = ("pass", "asked", "by the table", "measured", "off", "perplexity", "drop-blocks, as fast")


def recipes(table: Path) -> list[tuple[str, float | None]]:
    """Passes, and the speed-up that each is asked for."""
    return [
        *((f"drop-blocks{{count={count}}}", None) for count in BLOCKS),
        *((f"ziplm{{speedup={asked} table={table}}}", asked) for asked in SPEEDUPS),
        *((f"flap{{ratio={ratio}}}", None) for ratio in RATIOS),
        *((f"dormant-heads{{threshold={least}}}", None) for least in DORMANT),
    ]


class Speeds:
    """One model, its table of times, and what passes make of it."""

    def __init__(self, bench: Bench, setting: Setting, scratch: Path) -> None:
        self.bench, self.setting = bench, setting
        # As it was traced it takes a tenth longer than in the vocabulary's words.
        self.source = bench.graph.copy()
        canonicalize(self.source)
        self.table = scratch / "times.json"
        self.table.write_text(json.dumps(latency_table(self.source, setting)))
        self.dropped = [(1.0, self._perplexity(bench.graph))]
        """Speed-ups and perplexities of fewer blocks."""

    def rows(self) -> Iterator[Sequence[str]]:
        yield "source", "", "", "1", "", self.bench.judge(self.bench.graph), ""
        for recipe, asked in recipes(self.table):
            shown = recipe.replace(str(self.table), "TABLE")
            try:
                done = optimize(self.bench.graph, recipe, calibration=self.bench.data)
            except BadInput as error:
                yield shown, "", "", str(error).partition(";")[0], "", "", ""
                continue
            before, after = timed([self.source, done.graph], self.setting)
            measured, figure = before / after, self.bench.judge(done.graph)
            if recipe.startswith("drop-blocks"):
                self.dropped.append((measured, self.bench.value))
            notes = done.report.passes[0].result.notes
            yield (
                shown, f"{asked:.2f}" if asked else "", notes[-1].split()[0] if asked else "",
                f"{measured:.3f}", f"{measured / asked - 1:+.1%}" if asked else "", figure,
                "" if recipe.startswith("drop-blocks") else self._as_fast(measured),
            )  # fmt: skip

    def _perplexity(self, graph: View) -> float:
        self.bench.judge(graph)
        return self.bench.value

    def _as_fast(self, speed: float) -> str:
        """What fewer blocks give at one speed-up: between two rows, in the logarithm."""
        points = sorted(self.dropped)
        for (slow, low), (fast, high) in itertools.pairwise(points):
            if slow <= speed <= fast:
                share = (speed - slow) / (fast - slow)
                return f"{math.exp((1 - share) * math.log(low) + share * math.log(high)):.4g}"
        return "beyond its rows"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="zoo:tiny-llama")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--samples", type=int, help="windows of text to judge by")
    options = parser.parse_args(arguments)

    def show(console: Console) -> None:
        bench = Bench(options.model, "perplexity", options.samples)
        inputs = inputs_of(bench.graph, options.length)
        setting = Setting(inputs, options.threads, options.rounds)
        with tempfile.TemporaryDirectory() as scratch:
            speeds = Speeds(bench, setting, Path(scratch))
            title = f"{options.model}, {options.length} tokens"
            console.print(growing(title, COLUMNS, speeds.rows()))

    return ended(show)


if __name__ == "__main__":
    raise SystemExit(main())
