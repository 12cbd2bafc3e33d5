"""How well attention ranks passages, and what it costs: ``python -m
graphwright.tools.bench.reranking [LISTS]``.

Each list holds ``DOCUMENTS`` passages of pages of the text that ``zoo:tiny-llama`` did not learn
from; the query is what follows one of them on its page. A row is a way to rank: how often that
passage comes first (95 % interval, lists), its mean reciprocal rank, bytes of the model, and the
time of a list in ONNX Runtime, all ways in turns. ``attention`` is in-context re-ranking by the
artifact of ``rerank-by-attention`` with all blocks, and with fewer; ``likelihood`` the whole
model's of the query behind each passage alone, a call for each; ``words`` counts the query's words
in a passage, rare ones for more; ``chance`` is one in so many.
"""

from __future__ import annotations

import math
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...backends import Executable, export
from ...backends import compile as compile_model
from ...backends.artifacts import artifact
from ...ir.load.sources import load
from ...ir.load.zoo.text import read_tokenizer, shipped_text
from ...passes.manager import optimize
from ..evaluate.stats import wilson
from ..run.reranking import Reranker

MODEL = "zoo:tiny-llama"
DOCUMENTS, LISTS = 5, 120
PASSAGE, QUERY = 50, 20
"""Tokens of each."""
BLOCKS = {"attention": "", "attention, blocks 0-6": "0-6", "attention, blocks 3-6": "3-6",
          "attention, blocks 0-4": "0-4"}  # fmt: skip
Ranker = Callable[[str, Sequence[str]], Sequence[int]]


@dataclass(frozen=True)
class Asked:
    """A query, the passages, and the place of the one that it follows."""

    query: str
    documents: tuple[str, ...]
    answer: int


def lists(count: int, tokenizer: Any) -> Iterator[Asked]:
    """``count`` of them, each passage of another page."""
    pages = [tokenizer.encode(text, add_special_tokens=False).ids for text in shipped_text("test")]
    pages = [ids for ids in pages if len(ids) >= PASSAGE + QUERY]
    rng = random.Random(0)
    for _ in range(count):
        chosen = rng.sample(pages, DOCUMENTS)
        answer = rng.randrange(DOCUMENTS)
        query = tokenizer.decode(chosen[answer][PASSAGE : PASSAGE + QUERY])
        yield Asked(query, tuple(tokenizer.decode(ids[:PASSAGE]) for ids in chosen), answer)


def by_attention(ranker: Reranker) -> Ranker:
    return lambda query, documents: [one.place for one in ranker(query, documents)]


def by_likelihood(run: Executable, tokenizer: Any) -> Ranker:
    """By the log likelihood of the query's tokens behind each passage."""
    start = tokenizer.encode("").ids

    def rank(query: str, documents: Sequence[str]) -> Sequence[int]:
        asked = tokenizer.encode(query, add_special_tokens=False).ids
        scores = []
        for document in documents:
            ids = tokenizer.encode(document, add_special_tokens=False).ids
            text = torch.tensor([[*start, *ids, *asked]])
            logits = run(input_ids=text, attention_mask=torch.ones_like(text))["logits"][0]
            words = torch.log_softmax(logits[-len(asked) - 1 : -1], -1)
            scores.append(float(words.gather(1, torch.tensor(asked)[:, None]).sum()))
        return sorted(range(len(documents)), key=lambda place: -scores[place])

    return rank


def by_words() -> Ranker:
    """By the words of the query that a passage has, each for the log of how rare it is in the
    text."""
    pages = [set(_words(text)) for text in shipped_text("test")]
    counts = Counter(word for page in pages for word in page)

    def rank(query: str, documents: Sequence[str]) -> Sequence[int]:
        asked = set(_words(query))
        scores = [
            sum(math.log(len(pages) / counts[word]) for word in asked & set(_words(document))
                if counts[word])
            for document in documents
        ]  # fmt: skip
        return sorted(range(len(documents)), key=lambda place: -scores[place])

    return rank


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def main(count: int) -> None:
    graph = load(MODEL)
    folder = Path(graph.source.folder or "")
    tokenizer = read_tokenizer(folder)
    asked = list(lists(count, tokenizer))
    rankers: dict[str, tuple[Ranker, int]] = {}
    with tempfile.TemporaryDirectory() as place:
        whole = export(optimize(graph, "clean").graph, Path(place) / "whole")
        for name, blocks in BLOCKS.items():
            recipe = f"rerank-by-attention{{queries={2 * QUERY} blocks={blocks}}}"
            result = optimize(graph, recipe if blocks else recipe.replace(" blocks=", ""))
            out = export(result.graph, Path(place) / name.replace(" ", "-"))
            ranker = Reranker(compile_model(out, threads=1), folder)
            rankers[name] = by_attention(ranker), artifact.model_bytes(out)
        run = compile_model(whole, threads=1)
        rankers["likelihood"] = by_likelihood(run, tokenizer), artifact.model_bytes(whole)
        rankers["words"] = by_words(), 0
        ranks: dict[str, list[int]] = {name: [] for name in rankers}
        times: dict[str, list[float]] = {name: [] for name in rankers}
        for one in asked:
            for name, (rank, _) in rankers.items():
                began = time.perf_counter()
                order = rank(one.query, one.documents)
                times[name].append(time.perf_counter() - began)
                ranks[name].append(1 + list(order).index(one.answer))
    print(f"{MODEL}, {count} lists of {DOCUMENTS}: first, mean reciprocal rank, MB, ms a list")
    for name, places in ranks.items():
        hits = places.count(1)
        low, high = (100 * share for share in wilson(hits, count))
        print(
            f"{name:24} {hits / count:6.1%} ({low:.1f} to {high:.1f})"
            f" {statistics.mean(1 / place for place in places):6.3f}"
            f" {rankers[name][1] / 1e6:6.1f} {1000 * statistics.median(times[name]):8.1f}"
        )
    print(f"{'chance':24} {1 / DOCUMENTS:6.1%}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else LISTS)
