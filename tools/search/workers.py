"""Where a search measures: in this process, or in several, each forked for one recipe.

A forked process has the graph, the data and the judge of this one without a copy, and gives back a
few numbers. It computes on one thread, whatever this process does: so their number changes no bit
of what is measured, and the threads that a fork leaves behind are not waited for.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections import Counter, deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import torch

from ...ir.core.errors import BadInput, GraphwrightError, Missing

Measure = Callable[[Any], Any]
"""From a task, a recipe, to what is measured of it, which can be pickled."""
TRIES = 2
"""Of a task whose process dies: the second time it is the task, and not its neighbours."""


class Workers(Protocol):
    """Measures tasks that do not depend on each other."""

    def run(
        self, tasks: Sequence[Any], begin: Callable[[int], None], done: Callable[[int, Any], None]
    ) -> None:
        """Measure all: ``begin`` is told each place that starts, ``done`` what came of it."""

    def close(self) -> None:
        """Give back what was taken for several runs."""


class Here:
    """One after the other, in this process."""

    def __init__(self, measure: Measure) -> None:
        self._measure = measure

    def run(
        self, tasks: Sequence[Any], begin: Callable[[int], None], done: Callable[[int, Any], None]
    ) -> None:
        for place, task in enumerate(tasks):
            begin(place)
            done(place, self._measure(task))

    def close(self) -> None:
        pass


class Forked:
    """``count`` at a time, each in a process of its own.

    What a task raises is raised here. A process that dies, as one for which memory was too short,
    takes its own task along and no other: that is tried once more. Raises ``BadInput`` where it
    dies again, and ``Missing`` on a system that does not fork.
    """

    def __init__(self, count: int, measure: Measure) -> None:
        if count < 1:
            raise BadInput(f"workers={count}: a search takes 1 or more")
        if "fork" not in multiprocessing.get_all_start_methods():
            raise Missing("workers are forked, which this system cannot do: search without them")
        self._context = multiprocessing.get_context("fork")
        self._count, self._measure = count, measure

    def close(self) -> None:
        pass

    def run(
        self, tasks: Sequence[Any], begin: Callable[[int], None], done: Callable[[int, Any], None]
    ) -> None:
        waiting, deaths = deque(range(len(tasks))), Counter[int]()
        running: dict[Connection, tuple[BaseProcess, int]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self._count:
                    place = waiting.popleft()
                    begin(place)
                    reader, process = self._start(tasks[place])
                    running[reader] = process, place
                ready = wait(list(running))
                for reader in [reader for reader in running if reader in ready]:
                    process, place = running.pop(reader)
                    answer = _answer(reader, process)
                    if answer is not None:
                        done(place, answer[0])
                        continue
                    deaths[place] += 1
                    if deaths[place] == TRIES:
                        raise BadInput(_died(process))
                    waiting.appendleft(place)
        finally:
            for process, _ in running.values():
                process.kill()
                process.join()

    def _start(self, task: Any) -> tuple[Connection, BaseProcess]:
        reader, writer = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_serve, args=(self._measure, task, writer), daemon=True
        )
        process.start()
        writer.close()  # so that the end of the process is the end of what can be read
        return reader, process


def _serve(measure: Measure, task: Any, writer: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the search, which ends us
    torch.set_num_threads(1)
    try:
        answer: tuple[Any, Exception | None] = (measure(task), None)
    except GraphwrightError as error:
        answer = (None, error)
    except Exception:
        answer = (None, RuntimeError(traceback.format_exc()))
    writer.send(answer)
    writer.close()


def _answer(reader: Connection, process: BaseProcess) -> tuple[Any] | None:
    """What a process sent; ``None`` where it died before it had sent anything whole."""
    try:
        result, error = reader.recv()
    except (EOFError, OSError):
        return None
    finally:
        reader.close()
        process.join()
    if error is not None:
        raise error
    return (result,)


def _died(process: BaseProcess) -> str:
    number = -(process.exitcode or 0)
    name = signal.Signals(number).name if number > 0 else f"exit code {-number}"
    return (
        f"a worker ended {TRIES} times at the same recipe ({name}): memory may be too short for so "
        "many; give fewer --workers, and --resume to go on with what was measured"
    )
