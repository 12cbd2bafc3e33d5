"""What one prompt costs a graph in ONNX Runtime, beside the source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import torch

from ...backends.base import Executable
from ..evaluate.turns import Setting, clock_by, timed_runs


@dataclass(frozen=True)
class Prefill:
    """The time of one prompt."""

    ms: float
    ratio: float
    """To the source's."""


@dataclass(frozen=True)
class Stopwatch:
    """Times sessions on a prompt in turns with the source's: one at a time, so that no more than
    two hold their weights in memory.

    With one thread these are processor's times (``timed_runs``), which other work hardly disturbs.
    On two cores with a load of 10, of ``zoo:tiny-llava``: eight other sessions of the source took
    .98 to 1.00 of it in 15 rounds, .98 to 1.05 in 7; by the clock on all cores .78 to 1.55.
    """

    source: Executable
    prompt: Mapping[str, torch.Tensor]
    threads: int | None
    """Of the sessions; all cores where ``None``."""
    rounds: int

    def __call__(self, run: Executable) -> Prefill:
        """Medians over the rounds; the ratio is taken within each."""
        setting = Setting(self.prompt, self.threads, 1)
        pairs = [timed_runs([self.source, run], setting) for _ in range(self.rounds)]
        return Prefill(median(own for _, own in pairs), median(own / its for its, own in pairs))


def clock_words(threads: int | None) -> str:
    """By what a prompt is timed."""
    name = clock_by(threads).name
    if threads == 1:
        return name
    return f"{name}, all cores" if threads is None else f"{name}, {threads} threads"
