"""What leaving out blocks costs: ``python -m graphwright.tools.bench.depth_table [COUNT ...]
[--model zoo:NAME] [--only WORDS] [--beginnings]``; the words are in a row's name.

zoo:tiny-llama (or zoo:tiny-vit, zoo:minilm, the language model of zoo:tiny-llava) without 1, 2 and
3 of its blocks (or the counts that are given), or as many halves of blocks, chosen by each score
and at random, with nothing in their place and with a linear map (``heal=linear``); ``cola`` and
``search-path`` search paths of as many blocks. Each row is the mean over three calibration sets
that share nothing (three seeds at random), with the lowest and the highest beside it.

Of text they are windows of joined text, as those are that judge, or where one asks for it the
beginnings of texts, a BOS the first token of each. Perplexity is that of 24 windows of 256 tokens
of the test split, joined text, of which the last 128 are judged: behind fewer tokens the model is
over-confident, and without a block it then looks better than it is. Keys and values are those of
what is timed: a prompt of 128 tokens, eight pictures, eight sentences, one question; on one thread,
by the processor's clock and in turns with the whole model (``evaluate/turns.py``), the mean of the
three; that of the first row is the whole model's beside itself. Pictures and questions are judged
by 1,000 of the test split, sentences by the mean cosine of 250 to the model's own. All runs in ONNX
Runtime. ``DEPTH.md`` holds runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import mean
from typing import NamedTuple

from ...backends import Executable
from ...backends import compile as compile_model
from ...ir.core.view import View
from ...ir.structure.costs import graph_costs, sample_sizes
from ...ir.structure.recognize import last_tower, recognize
from ...passes.manager import optimize
from ..evaluate.turns import Setting, timed_runs
from .depth_subjects import SETS, SUBJECTS, Batch, DepthSubject, subject

ROUNDS = 15


class Figures(NamedTuple):
    """Of one graph."""

    score: float
    time: float
    """By the whole model's."""
    kilobytes: float
    """Of keys and values."""


class Bench:
    """A model, and what was measured of its paths."""

    def __init__(self, judged: DepthSubject) -> None:
        self.subject = judged
        self.setting = Setting(judged.prompt, threads=1, rounds=ROUNDS)
        self.source = optimize(judged.view, "clean", samples=judged.samples).graph
        self.blocks = len(last_tower(recognize(self.source)))
        self.whole = compile_model(self.source, threads=1)
        self._known: dict[tuple[str, bool], Figures] = {}

    def of_recipe(self, recipe: str, learned: Sequence[Batch]) -> Figures:
        done = optimize(
            self.subject.view, recipe, samples=self.subject.samples, calibration=learned
        )
        path = done.report.passes[0].result.notes[-1]
        return self.figures(done.graph, path, healed="heal=" in recipe)

    def figures(self, graph: View, path: str, *, healed: bool = False) -> Figures:
        """Of a graph whose stream runs through ``path``. A path is judged once, and timed once with
        maps in the place of what it leaves out and once without: their numbers do not matter."""
        known = self._known.get((path, healed))
        if known is not None and not healed:
            return known
        run = compile_model(graph, threads=1)
        sizes = sample_sizes(graph, self.setting.inputs)
        figures = Figures(
            self.subject.score.of(run), self._time(run) if known is None else known.time,
            (graph_costs(graph, sizes).kv_bytes or 0) / 1000,
        )  # fmt: skip
        self._known[path, healed] = figures
        return figures

    def _time(self, run: Executable) -> float:
        whole, other = timed_runs([self.whole, run], self.setting)
        return other / whole


def recipes(count: int, blocks: int) -> dict[str, list[str]]:
    """By what a row is called, the recipe for each calibration set, of a model of ``blocks``."""
    drop = f"drop-blocks{{count={count} score="
    rows = {
        score: [f"{drop}{score}}}"] * SETS for score in ("influence", "angular", "kl", "greedy")
    } | {"random": [f"{drop}random seed={seed}}}" for seed in range(SETS)]}  # fmt: skip
    rows |= {f"{name}, healed": [text.replace("}", " heal=linear heal_rank=32}") for text in texts]
             for name, texts in rows.items()}  # fmt: skip
    half = f"drop-blocks{{count={count} of=half score=kl"
    rows |= {"halves by kl": [f"{half}}}"] * SETS,
             "halves by kl, healed": [f"{half} heal=linear}}"] * SETS,
             "cola": [f"cola{{max_path={blocks - count}}}"] * SETS}  # fmt: skip
    for method in ("bayes", "greedy", "mcts"):
        searched = f"search-path{{max_path={blocks - count} method={method}}}"
        rows[f"search-path, {method}"] = [searched] * SETS
    return rows


def main(name: str, counts: Sequence[int], only: str, beginnings: bool) -> None:
    bench = Bench(subject(name, beginnings=beginnings))
    score = bench.subject.score
    print(f"| left out | chosen by | {score.name} | time | KB of keys and values |")
    print("|---|---|---|---|---|", flush=True)
    source = bench.figures(bench.source, "all of it")
    print(f"| 0 | | {source.score:.{score.digits}f} | {source.time:.2f} | {source.kilobytes:.0f} |",
          flush=True)  # fmt: skip
    for count in counts:
        rows = recipes(count, bench.blocks).items()
        for row, texts in rows:
            if only not in row:
                continue
            pairs = zip(texts, bench.subject.sets, strict=True)
            scores, times, sizes = zip(*(bench.of_recipe(*pair) for pair in pairs), strict=True)
            centre, least, most = (f"{f(scores):.{score.digits}f}" for f in (mean, min, max))
            print(f"| {count} | {row} | {centre} ({least} to {most}) | {mean(times):.2f} | "
                  f"{mean(sizes):.0f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("counts", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--model", default="zoo:tiny-llama", choices=SUBJECTS)
    parser.add_argument("--only", default="", help="words in the names of rows")
    parser.add_argument("--beginnings", action="store_true", help="learn from texts' beginnings")
    options = parser.parse_args()
    main(options.model, options.counts, options.only, options.beginnings)
