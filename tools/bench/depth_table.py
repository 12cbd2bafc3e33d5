"""What leaving out blocks costs: ``python -m graphwright.tools.bench.depth_table [COUNT ...]
[--only WORDS] [--beginnings]``; the words are in a row's name.

zoo:tiny-llama without 1, 2 and 3 of its ten blocks (or the counts that are given), or as many
halves of blocks, chosen by each score and at random, with nothing in their place and with a linear
map (``heal=linear``); ``cola`` and ``search-path`` search paths of as many blocks. Each row is the
mean over three calibration sets that share no text (three seeds at random), with the lowest and the
highest beside it. They are windows of joined text, as those are that judge, or where one asks for
it the beginnings of texts, a BOS the first token of each. Perplexity is that of 24 windows of 256
tokens of the test split, joined text, of which the last 128 are judged: behind fewer tokens the
model is over-confident, and without a block it then looks better than it is. Keys and values are
those of 128 tokens; the time is a prompt's of 128 tokens on one thread, by the processor's clock
and in turns with the whole model (``evaluate/turns.py``), the mean of the three; that of the first
row is the whole model's beside itself. All runs in ONNX Runtime. ``DEPTH.md`` holds a run.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch

from ...backends import Executable
from ...backends import compile as compile_model
from ...ir.canonical.families import canonicalize
from ...ir.core.view import View
from ...ir.load.sources import load
from ...ir.load.zoo.text import read_tokenizer, shipped_text
from ...ir.structure.costs import graph_costs, sample_sizes
from ...passes.manager import optimize
from ..evaluate.turns import Setting, timed_runs

WINDOWS, WINDOW, JUDGED = 24, 256, 128
SETS, LEARNED, TOKENS, ROUNDS = 3, 14, 128, 15
Batch = Mapping[str, torch.Tensor]


def learned_sets(view: View, *, beginnings: bool = False) -> list[list[dict[str, torch.Tensor]]]:
    """``SETS`` sets of ``LEARNED`` windows of ``TOKENS`` tokens of the calibration split: joined
    text, or each a text's ``beginnings``."""
    tokenizer, texts = _tokenizer(view), shipped_text("calibration")
    if not beginnings:
        return [windows(view, texts[n::SETS], LEARNED, TOKENS) for n in range(SETS)]
    whole = (tokenizer.encode(text).ids for text in texts if len(text) > 900)
    rows = torch.tensor([ids[:TOKENS] for ids in whole if len(ids) >= TOKENS])
    return [_batches(rows[n::SETS][:LEARNED]) for n in range(SETS)]


def windows(
    view: View, texts: Sequence[str], count: int, length: int
) -> list[dict[str, torch.Tensor]]:
    """Batches of windows of joined texts, one behind the other."""
    tokenizer = _tokenizer(view)
    ids = [i for text in texts for i in tokenizer.encode(text).ids]
    return _batches(torch.tensor(ids[: count * length]).view(count, length))


def _tokenizer(view: View) -> Any:
    tokenizer = read_tokenizer(Path(view.source.folder or ""))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _batches(rows: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Of up to eight rows of tokens."""
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)}
            for part in torch.split(rows, 8)]  # fmt: skip


def perplexity(run: Executable, batches: Sequence[Batch]) -> float:
    """Of the last ``JUDGED`` tokens of each row."""
    total, count = 0.0, 0
    for batch in batches:
        likely = run(**batch)["logits"][:, -JUDGED - 1 : -1].log_softmax(-1)
        next_ids = batch["input_ids"][:, -JUDGED:, None]
        total -= float(likely.gather(-1, next_ids).sum(dtype=torch.float64))
        count += next_ids.numel()
    return math.exp(total / count)


class Figures(NamedTuple):
    """Of one graph."""

    perplexity: float
    time: float
    """By the whole model's."""
    kilobytes: float
    """Of keys and values."""


class Bench:
    """The model, what passes learn from and are judged on, and what was measured of paths."""

    def __init__(self, *, beginnings: bool = False) -> None:
        self.view = load("zoo:tiny-llama", cache=True)
        canonicalize(self.view)  # once: every run takes a copy
        self.sets = learned_sets(self.view, beginnings=beginnings)
        self.unseen = windows(self.view, shipped_text("test"), WINDOWS, WINDOW)
        self.samples = [{name: tensor[:1, -32:] for name, tensor in self.sets[0][0].items()}]
        prompt = {name: tensor[:1, :TOKENS] for name, tensor in self.unseen[0].items()}
        self.setting = Setting(prompt, threads=1, rounds=ROUNDS)
        self.source = optimize(self.view, "clean", samples=self.samples).graph
        self.whole = compile_model(self.source, threads=1)
        self._known: dict[tuple[str, bool], Figures] = {}

    def of_recipe(self, recipe: str, learned: Sequence[Batch]) -> Figures:
        done = optimize(self.view, recipe, samples=self.samples, calibration=learned)
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
            perplexity(run, self.unseen), self._time(run) if known is None else known.time,
            (graph_costs(graph, sizes).kv_bytes or 0) / 1000,
        )  # fmt: skip
        self._known[path, healed] = figures
        return figures

    def _time(self, run: Executable) -> float:
        whole, other = timed_runs([self.whole, run], self.setting)
        return other / whole


def recipes(count: int) -> dict[str, list[str]]:
    """By what a row is called, the recipe for each calibration set."""
    drop = f"drop-blocks{{count={count} score="
    rows = {
        score: [f"{drop}{score}}}"] * SETS for score in ("influence", "angular", "kl", "greedy")
    } | {"random": [f"{drop}random seed={seed}}}" for seed in range(SETS)]}  # fmt: skip
    rows |= {f"{name}, healed": [text.replace("}", " heal=linear heal_rank=32}") for text in texts]
             for name, texts in rows.items()}  # fmt: skip
    half = f"drop-blocks{{count={count} of=half score=kl"
    rows |= {"halves by kl": [f"{half}}}"] * SETS,
             "halves by kl, healed": [f"{half} heal=linear}}"] * SETS,
             "cola": [f"cola{{max_path={10 - count}}}"] * SETS}  # fmt: skip
    for method in ("bayes", "greedy", "mcts"):
        searched = f"search-path{{max_path={10 - count} method={method}}}"
        rows[f"search-path, {method}"] = [searched] * SETS
    return rows


def main(counts: Sequence[int], only: str, beginnings: bool) -> None:
    bench = Bench(beginnings=beginnings)
    print("| left out | chosen by | perplexity | time | KB of keys and values |")
    print("|---|---|---|---|---|", flush=True)
    source = bench.figures(bench.source, "all of it")
    print(f"| 0 | | {source.perplexity:.2f} | {source.time:.2f} | {source.kilobytes:.0f} |",
          flush=True)  # fmt: skip
    for count in counts:
        chosen = {name: texts for name, texts in recipes(count).items() if only in name}
        for name, texts in chosen.items():
            rows = [bench.of_recipe(*pair) for pair in zip(texts, bench.sets, strict=True)]
            likely, times, sizes = zip(*rows, strict=True)
            print(
                f"| {count} | {name} | {mean(likely):.2f} ({min(likely):.2f} to "
                f"{max(likely):.2f}) | {mean(times):.2f} | {mean(sizes):.0f} |", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("counts", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--only", default="", help="words in the names of rows")
    parser.add_argument("--beginnings", action="store_true", help="learn from texts' beginnings")
    options = parser.parse_args()
    main(options.counts, options.only, options.beginnings)
