"""What leaving out blocks costs: ``python -m graphwright.tools.bench.depth_table [COUNT ...]
[--only WORDS]``, which are in a row's name.

zoo:tiny-llama without 1, 2 and 3 of its ten blocks (or the counts that are given), or as many
halves of blocks, chosen by each score and at random, with nothing in their place and with a linear
map (``heal=linear``); ``cola`` and ``search-path`` search paths of as many blocks. Each row is the
mean over three calibration sets that share no text (three seeds at random), with the lowest and the
highest beside it. Perplexity is that of 24 windows of 256 tokens of the test split, joined text,
of which the last 128 are judged: behind fewer tokens the model is over-confident, and without a
block it then looks better than it is. Keys and values are those of 128 tokens; the time is a
prompt's of 128 tokens by the graph in ONNX Runtime, beside the whole model's in turns (ratio of
medians, the least of the three). ``DEPTH.md`` holds a run.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ...backends import Executable
from ...backends import compile as compile_model
from ...ir.core.view import View
from ...ir.load.sources import load
from ...ir.load.zoo.text import read_tokenizer, shipped_text, token_batches
from ...ir.run.sweep import sweep_together
from ...ir.structure.costs import graph_costs, sample_sizes
from ...passes.manager import optimize

WINDOWS, WINDOW, JUDGED = 24, 256, 128
SETS, LEARNED, TOKENS, ROUNDS = 3, 24, 128, 9
Batch = Mapping[str, torch.Tensor]


def learned_sets(view: View) -> list[list[dict[str, torch.Tensor]]]:
    """``SETS`` sets of batches of eight texts of the calibration split, up to ``LEARNED`` texts of
    ``TOKENS`` tokens each: it has 42 that are long enough."""
    tokenizer = read_tokenizer(Path(view.source.folder or ""))
    texts = [t for t in shipped_text("calibration") if len(t) > 900]
    return [
        token_batches(tokenizer, texts[n::SETS][:LEARNED], batch=8, longest=TOKENS, left=True)
        for n in range(SETS)
    ]  # fmt: skip


def unseen_windows(view: View) -> list[dict[str, torch.Tensor]]:
    """Batches of eight windows of the test split, one behind the other."""
    tokenizer = read_tokenizer(Path(view.source.folder or ""))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = [i for text in shipped_text("test") for i in tokenizer.encode(text).ids]
    rows = torch.tensor(ids[: WINDOWS * WINDOW]).view(WINDOWS, WINDOW)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)}
            for part in torch.split(rows, 8)]  # fmt: skip


def perplexity(view: View, batches: Sequence[Batch]) -> float:
    """Of the last ``JUDGED`` tokens of each row."""
    total, count = 0.0, 0
    for outputs, batch in zip(sweep_together(view, batches), batches, strict=True):
        likely = outputs["logits"][:, -JUDGED - 1 : -1].log_softmax(-1)
        next_ids = batch["input_ids"][:, -JUDGED:, None]
        total -= float(likely.gather(-1, next_ids).sum(dtype=torch.float64))
        count += next_ids.numel()
    return math.exp(total / count)


def milliseconds(whole: Executable, other: Executable, batch: Batch) -> float:
    """Time of ``other`` by that of ``whole``."""
    times: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for run, column in zip((whole, other), times, strict=True):
            began = time.perf_counter()
            run(**batch)
            column.append(time.perf_counter() - began)
    return statistics.median(times[1]) / statistics.median(times[0])


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


def main(counts: Sequence[int], only: str) -> None:
    view = load("zoo:tiny-llama", cache=True)
    sets, unseen = learned_sets(view), unseen_windows(view)
    small = [{name: tensor[:1, -32:] for name, tensor in sets[0][0].items()}]
    one = {name: tensor[:1, :TOKENS] for name, tensor in unseen[0].items()}
    whole = compile_model(view, threads=1)
    print("| left out | chosen by | perplexity | time | KB of keys and values |")
    print("|---|---|---|---|---|")
    source = optimize(view, "clean", samples=small).graph
    keys = graph_costs(source, sample_sizes(source, one)).kv_bytes or 0
    print(f"| 0 | | {perplexity(source, unseen):.2f} | 1 | {keys / 1000:.0f} |", flush=True)
    for count in counts:
        chosen = {name: texts for name, texts in recipes(count).items() if only in name}
        for name, texts in chosen.items():
            figures = []
            for text, learned in zip(texts, sets, strict=True):
                graph = optimize(view, text, samples=small, calibration=learned).graph
                keys = graph_costs(graph, sample_sizes(graph, one)).kv_bytes or 0
                ratio = milliseconds(whole, compile_model(graph, threads=1), one)
                figures.append((perplexity(graph, unseen), ratio, keys / 1000))
            likely, ratios, sizes = zip(*figures, strict=True)
            print(
                f"| {count} | {name} | {sum(likely) / SETS:.2f} ({min(likely):.2f} to "
                f"{max(likely):.2f}) | {min(ratios):.2f} | {sum(sizes) / SETS:.0f} |", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("counts", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--only", default="", help="words in the names of rows")
    options = parser.parse_args()
    main(options.counts, options.only)
