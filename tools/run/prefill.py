"""What one prompt costs several graphs in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from ...ir.core.view import View
from ..evaluate.turns import Setting, compiled, timed_runs


@dataclass(frozen=True)
class Prefill:
    """Times of one prompt by graph, the source's first."""

    ms: Sequence[float]
    ratios: Sequence[float]
    """To the source's."""
    again: float
    """The ratio of the source itself, in another session: what the others can be off by."""


def prefill(
    views: Sequence[View], prompt: Mapping[str, torch.Tensor], *, threads: int | None, rounds: int,
    progress: Callable[[str, int, int], None],
) -> Prefill:  # fmt: skip
    """Medians over ``rounds``, in each of which all graphs run in turns, the source at both ends;
    ratios are taken within a round. ``threads`` are those of a session: all cores where ``None``.

    With one thread these are processor's times (``timed_runs``), which other work hardly disturbs.
    On two cores with a load of 9, of ``zoo:tiny-llava`` in 15 rounds, the source was off itself by
    .5 % at most so; by the clock by 17 %, and by 22 % with the least times in place of medians.
    """
    runs = compiled([*views, views[0]], threads)
    table = []
    for number in range(rounds):
        progress("timing", number, rounds)
        table.append(timed_runs(runs, Setting(prompt, threads, 1)))
    columns = list(zip(*table, strict=True))
    *ratios, again = (
        median(own / source for own, source in zip(column, columns[0], strict=True))
        for column in columns
    )
    return Prefill([median(column) for column in columns[:-1]], ratios, again)


def clock_words(threads: int | None) -> str:
    """By what a prompt is timed, in words."""
    if threads == 1:
        return "processor time of one thread"
    return "by the clock, " + ("all cores" if threads is None else f"{threads} threads")
