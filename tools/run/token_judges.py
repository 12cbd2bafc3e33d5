"""What graphs with fewer image tokens are judged by: right answers, or the source's next token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...backends.base import Executable
from ...ir.core.view import View
from ..evaluate import Subject, evaluate


@dataclass(frozen=True)
class Verdict:
    """How many of the prompts are right, and the share of these by type."""

    right: int
    count: int
    by_type: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Judge:
    """Judges a session of a graph, and the graph that it runs."""

    words: str
    count: int
    verdict: Callable[[Executable, View], Verdict]

    def __call__(self, run: Executable, view: View) -> Verdict:
        return self.verdict(run, view)


def agreement(source: Executable, batches: Sequence[Mapping[str, torch.Tensor]]) -> Judge:
    """How many prompts have the source's next token."""

    def next_tokens(run: Executable) -> list[int]:
        return [int(n) for batch in batches for n in run(**batch)["logits"][:, -1].argmax(-1)]

    expected = next_tokens(source)

    def agreeing(run: Executable, view: View) -> Verdict:
        tokens = next_tokens(run)
        right = sum(a == b for a, b in zip(tokens, expected, strict=True))
        return Verdict(right, len(expected))

    return Judge("prompts whose next token is the source's", len(expected), agreeing)


def right_answers(graph: View, samples: int | None) -> Judge:
    """How many questions of the task ``vqa`` are answered right; ``graph`` is the source."""
    folder = None if graph.source.folder is None else Path(graph.source.folder)
    count = samples or 500

    def answering(run: Executable, view: View) -> Verdict:
        subject = Subject(run, name=graph.source.name or "graph", kind=graph.source.task,
                          folder=folder, view=view, backend="onnxruntime")  # fmt: skip
        score = evaluate(subject, "vqa", samples=count)["vqa"]
        right = round(score.figures["accuracy"] * score.samples)
        types = {kind: figures["accuracy"] for kind, figures in score.detail.items()}
        return Verdict(right, score.samples, types)

    return Judge("questions answered right", count, answering)
