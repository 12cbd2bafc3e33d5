"""``python -m graphwright.tools.bench.phases run DIR -p PASSES -o OUT``: where the seconds go.

Runs ``optimize-model`` with these arguments in this process while a thread looks at what it does,
100 times a second: the processor time since the last look, all threads together, goes to the
functions of this package that were running. Nothing is traced, so Python's calls cost what they
always do, and what a library does counts for the function of ours that called it.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType

from rich.console import Console
from rich.table import Table

INTERVAL = 0.01
LEAST = 0.02
"""Part of all seconds that a function must take, with what it calls, to get a row."""
DEPTH = 7
"""Functions of ours inside one another that get rows."""
PACKAGE = __package__.split(".")[0]
IMPORTS = "imports, wherever they happen"
START = "the interpreter's start, and this bench"

Stack = tuple[str, ...]


class Sampler(threading.Thread):
    """Processor seconds by what one thread was doing: functions of this package, outermost first.

    A call that keeps Python's lock delays the look at it, not its being counted.
    """

    def __init__(self, thread: int) -> None:
        super().__init__(daemon=True)
        self.thread, self.ended = thread, threading.Event()
        self.seconds: dict[Stack, float] = defaultdict(float)

    def run(self) -> None:
        before = time.process_time()
        while not self.ended.wait(INTERVAL):
            # A frame that stays in a variable here keeps alive what the code under it has let go.
            stack = _ours(sys._current_frames().get(self.thread))
            now = time.process_time()
            self.seconds[stack] += now - before
            before = now

    def stop(self) -> None:
        self.ended.set()
        self.join()


def _ours(frame: FrameType | None) -> Stack:
    names: list[str] = []
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module in ("importlib._bootstrap", "_frozen_importlib"):
            return (IMPORTS,)
        if module.startswith(f"{PACKAGE}.") and module != __name__:
            name = f"{module.removeprefix(f'{PACKAGE}.')}:{frame.f_code.co_qualname}"
            if not names or names[-1] != name:  # a function that calls itself gets one row
                names.append(name)
        frame = frame.f_back
    return tuple(reversed(names))


def rows(
    seconds: Mapping[Stack, float], least: float = LEAST, depth: int = DEPTH
) -> Iterator[tuple[int, str, float, float]]:
    """Depth, function, seconds with and without what it calls; the costliest first.

    A function whose time is that of its only callee makes way for it.
    """
    whole: dict[Stack, float] = defaultdict(float)
    for stack, taken in seconds.items():
        for end in range(1, len(stack) + 1):
            whole[stack[:end]] += taken
    floor = least * sum(seconds.values())

    def below(parent: Stack, level: int) -> Iterator[tuple[int, str, float, float]]:
        children = [s for s in whole if s[:-1] == parent and whole[s] >= floor]
        for stack in sorted(children, key=lambda s: -whole[s]):
            inner = [s for s in whole if s[:-1] == stack and whole[s] >= 0.98 * whole[stack]]
            if inner:
                yield from below(stack, level)
                continue
            own = seconds.get(stack, 0.0)
            yield level, stack[-1], whole[stack], own
            if level < depth:
                yield from below(stack, level + 1)

    yield from below((), 1)


def table(seconds: Mapping[Stack, float], start: float) -> Table:
    """The rows, the start of the process first and the total last."""
    total = start + sum(seconds.values())
    result = Table(title="processor seconds, all threads", title_justify="left")
    for name in ("with what it calls", "alone", "%"):
        result.add_column(name, justify="right")
    result.add_column("function", no_wrap=True)
    result.add_row(f"{start:.1f}", f"{start:.1f}", f"{100 * start / total:.0f}", START)
    for level, name, whole, own in rows(seconds):
        shown = f"{'  ' * (level - 1)}{name}"
        result.add_row(f"{whole:.1f}", f"{own:.1f}", f"{100 * whole / total:.0f}", shown)
    result.add_row(f"{total:.1f}", "", "100", "all")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, then print the table; the status is the command's."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    start = time.process_time()
    sampler = Sampler(threading.get_ident())
    sampler.start()
    from ..cli.main import main as optimize_model

    status = 0
    try:
        optimize_model(argv)
    except SystemExit as leave:
        status = int(leave.code or 0)
    sampler.stop()
    Console(width=None if sys.stdout.isatty() else 160).print(table(sampler.seconds, start))
    return status


if __name__ == "__main__":
    raise SystemExit(main())
