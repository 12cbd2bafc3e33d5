"""``latency``: milliseconds of one run, the subjects side by side."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch

from ...ir.core.errors import BadInput
from .pictures import example_batch
from .stats import bootstrap_median
from .subject import IMAGE_TEXT, Subject
from .task import EvalResult, Setting, Task

WARMUPS = 2
DEFAULT_LENGTH = 128
FEWEST = 5
"""Rounds of which a median says something."""
BUSY = 0.75
"""Share of the cores that other work may have had before the first round."""
SPREAD = 0.25
"""Distance of the quartiles, by the median, from which on it says more of the machine."""


class Latency(Task):
    """Wall time of one run on a batch of a given size and length, in ms.

    All subjects run in turns in one process, every other round in reverse, so that noise falls on
    all alike; a note says where load, spread or too few rounds make the figure void.
    ``median_ms`` is the median over the rounds (15; two more warm up), ``spread_ms`` the distance
    of its quartiles. A sample is a round. Interval of the median: bootstrap over rounds. Models
    that take images and text run on real questions, whose length is their own.
    """

    name = "latency"
    headlines: ClassVar = {"median_ms": "lower"}
    quality = False

    def check(self, subject: Subject, setting: Setting) -> None:
        super().check(subject, setting)
        inputs_of(subject, setting)

    def run(
        self, subjects: Sequence[Subject], reference: Subject | None, setting: Setting
    ) -> list[EvalResult]:
        inputs = [inputs_of(s, setting) for s in subjects]
        load = os.getloadavg()[0]
        times: list[list[float]] = [[] for _ in subjects]
        for number in range(-WARMUPS, setting.rounds):
            setting.progress("timing", max(0, number), setting.rounds)
            turn = list(zip(subjects, inputs, times, strict=True))
            for subject, batch, taken in turn if number % 2 else reversed(turn):
                started = time.perf_counter()
                subject.run(batch)
                if number >= 0:
                    taken.append(1e3 * (time.perf_counter() - started))
        return [self._result(s, g, t, load, setting)
                for s, g, t in zip(subjects, inputs, times, strict=True)]  # fmt: skip

    def _result(
        self, subject: Subject, inputs: dict[str, torch.Tensor], taken: list[float],
        load: float, setting: Setting,
    ) -> EvalResult:  # fmt: skip
        quarters = statistics.quantiles(taken, n=4) if len(taken) > 1 else [0.0, 0.0, 0.0]
        figures = {"median_ms": statistics.median(taken), "spread_ms": quarters[2] - quarters[0]}
        ends = bootstrap_median(taken, setting.seed)
        return EvalResult(
            self.name, figures, {} if ends is None else {"median_ms": ends}, len(taken), "rounds",
            detail={"shapes": {n: list(t.shape) for n, t in inputs.items()},
                    "backend": subject.backend, "threads": torch.get_num_threads(),
                    "load": round(load, 2)},
            notes=tuple(_void(subject, figures, len(taken), load)),
        )  # fmt: skip


def _void(
    subject: Subject, figures: Mapping[str, float], rounds: int, load: float
) -> Iterator[str]:
    """What makes a median worth nothing, one sentence each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if load > cores * BUSY:
        yield (
            f"latency is void: before it began, work for {load:.1f} cores ran on a machine of "
            f"{cores}: repeat it where nothing else runs"
        )
    if rounds < FEWEST:
        yield f"latency is void: {rounds} rounds tell nothing; give {FEWEST} or more"
    elif figures["spread_ms"] > SPREAD * figures["median_ms"]:
        share = figures["spread_ms"] / figures["median_ms"]
        yield (
            f"latency of {subject.name} is void: half of its rounds lie {share:.0%} of the median "
            "apart: other work ran beside it"
        )


def inputs_of(subject: Subject, setting: Setting) -> dict[str, torch.Tensor]:
    """Inputs of the asked batch size and length. ``BadInput`` where the model takes less."""
    if subject.kind == IMAGE_TEXT:
        return example_batch(subject, setting.batch)
    length = setting.length or min(DEFAULT_LENGTH, subject.max_tokens)
    if "input_ids" in subject.input_names and length > subject.max_tokens:
        raise BadInput(
            f"--length {length} is more than the {subject.max_tokens} tokens that {subject.name} "
            "takes"
        )
    return subject.example(setting.batch, length)
