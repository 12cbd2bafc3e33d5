"""What leaving out blocks costs: ``python -m graphwright.tools.bench.depth_table [COUNT ...]``.

zoo:tiny-llama without 1, 2 and 3 of its ten blocks (or the counts that are given), or as many
halves of blocks, chosen by each score and at random (mean of three seeds), with nothing in their
place and with a linear map (``heal=linear``); ``cola`` searches paths of as many blocks. Perplexity
is that of 24 texts of the test split, 128 tokens each, which no score has seen; keys and values are
those of 128 tokens; the time is a prompt's of 128 tokens by the graph in ONNX Runtime, beside the
whole model's in turns (ratio of medians). ``DEPTH.md`` holds a run.
"""

from __future__ import annotations

import math
import statistics
import sys
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

TEXTS, LEARNED, TOKENS, ROUNDS = 24, 24, 128, 9
Batch = Mapping[str, torch.Tensor]


def texts_of(view: View, split: str, count: int) -> list[dict[str, torch.Tensor]]:
    """Batches of eight texts of the split, each of ``TOKENS`` tokens."""
    tokenizer = read_tokenizer(Path(view.source.folder or ""))
    long = [t for t in shipped_text(split) if len(t) > 900][:count]
    return token_batches(tokenizer, long, batch=8, longest=TOKENS, left=True)


def perplexity(view: View, batches: Sequence[Batch]) -> float:
    total, count = 0.0, 0
    for outputs, batch in zip(sweep_together(view, batches), batches, strict=True):
        likely = outputs["logits"].log_softmax(-1)[:, :-1]
        said = batch["input_ids"][:, 1:, None]
        mask = batch["attention_mask"][:, :-1] != 0
        total -= float(likely.gather(-1, said)[..., 0][mask].sum(dtype=torch.float64))
        count += int(mask.sum())
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
    """By what a row is called, the recipes that it is the mean of."""
    drop = f"drop-blocks{{count={count} score="
    rows = {
        score: [f"{drop}{score}}}"] for score in ("influence", "angular", "kl", "greedy")
    } | {"random": [f"{drop}random seed={seed}}}" for seed in range(3)]}  # fmt: skip
    rows |= {f"{name}, healed": [text.replace("}", " heal=linear heal_rank=32}") for text in texts]
             for name, texts in rows.items()}  # fmt: skip
    half = f"drop-blocks{{count={count} of=half score=kl"
    rows |= {"halves by kl": [f"{half}}}"], "halves by kl, healed": [f"{half} heal=linear}}"]}
    rows["cola"] = [f"cola{{max_path={10 - count}}}"]
    return rows


def main(counts: Sequence[int]) -> None:
    view = load("zoo:tiny-llama", cache=True)
    learned, unseen = texts_of(view, "calibration", LEARNED), texts_of(view, "test", TEXTS)
    small = [{name: tensor[:1, -32:] for name, tensor in learned[0].items()}]
    one = {name: tensor[:1] for name, tensor in unseen[0].items()}
    whole = compile_model(view, threads=1)
    print("| left out | chosen by | perplexity | time | KB of keys and values |")
    print("|---|---|---|---|---|")
    source = optimize(view, "clean", samples=small).graph
    keys = graph_costs(source, sample_sizes(source, one)).kv_bytes or 0
    print(f"| 0 | | {perplexity(source, unseen):.2f} | 1 | {keys / 1000:.0f} |")
    for count in counts:
        for name, texts in recipes(count).items():
            figures = []
            for text in texts:
                graph = optimize(view, text, samples=small, calibration=learned).graph
                keys = graph_costs(graph, sample_sizes(graph, one)).kv_bytes or 0
                ratio = milliseconds(whole, compile_model(graph, threads=1), one)
                figures.append((perplexity(graph, unseen), ratio, keys / 1000))
            row = [sum(column) / len(column) for column in zip(*figures, strict=True)]
            print(f"| {count} | {name} | {row[0]:.2f} | {row[1]:.2f} | {row[2]:.0f} |", flush=True)


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or [1, 2, 3])
