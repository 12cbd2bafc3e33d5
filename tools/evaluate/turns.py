"""Graphs timed in turns: what falls on one of them, such as other work, falls on all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...backends.base import Executable
from ...backends.registry import compile
from ...ir.core.view import View
from ...ir.structure.cache_slots import empty_past, past_slot

Inputs = Mapping[str, torch.Tensor]
Runner = Callable[[Inputs], Any]


@dataclass(frozen=True)
class Setting:
    """How graphs are run."""

    inputs: Inputs
    threads: int | None
    """Within one op; ``None``: all cores."""
    rounds: int


@dataclass(frozen=True)
class Clock:
    """What seconds are of."""

    name: str
    read: Callable[[], float]


THREAD = Clock("processor time of the one thread", time.thread_time)
WALL = Clock("wall time", time.perf_counter)


def clock_by(threads: int | None) -> Clock:
    """A session of one thread runs on the one that calls it: what else runs on the machine then
    takes no time of its own, and weighs by what it throws out of caches alone."""
    return THREAD if threads == 1 else WALL


def timed(views: Sequence[View], setting: Setting) -> list[float]:
    """The least time of each graph in ms, all of them run in turns: see ``timed_runs``."""
    return timed_runs(compiled(views, setting.threads), setting)


def compiled(views: Sequence[View], threads: int | None) -> list[Executable]:
    """Each graph in ONNX Runtime."""
    return [compile(view, backend="onnxruntime", threads=threads) for view in views]


def timed_runs(runs: Sequence[Executable], setting: Setting) -> list[float]:
    """The least time of each run in ms, all of them in turns, by the clock that ``clock_by`` says.

    In its turn a graph runs twice and the second run counts: the first one finds its weights thrown
    out of the processor's caches by the others', and that by how many they are. Of the inputs
    it gets those that it takes: without its attention, a block has no cache, and in a cache of few
    bits an empty one is of codes.
    """
    clock = clock_by(setting.threads).read
    taken = [_taken(run, setting.inputs) for run in runs]
    least = [math.inf] * len(runs)
    for _ in range(setting.rounds):
        for i, (run, inputs) in enumerate(zip(runs, taken, strict=True)):
            run(**inputs)
            started = clock()
            run(**inputs)
            least[i] = min(least[i], 1e3 * (clock() - started))
    return least


def _taken(run: Executable, inputs: Inputs) -> dict[str, torch.Tensor]:
    types = run.input_types
    taken = {
        name: x for name, x in inputs.items()
        if name in types and (past_slot(name) is None or types[name].dtype == x.dtype)
    }  # fmt: skip
    return taken | empty_past(types, taken)


def in_turns(
    runners: Mapping[str, Runner], inputs: Inputs, repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds of each run of each; the runners take turns, so that noise falls on all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(2):
        for run in runners.values():
            run(inputs)
    for _ in range(repeats):
        for name, run in runners.items():
            started = clock()
            run(inputs)
            seconds[name].append(clock() - started)
    return seconds
