"""A command in a forked process, under limits of time and memory: no import is paid twice."""

from __future__ import annotations

import gc
import math
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...ir.core.scratch import sweep

SECONDS = 60.0
"""Of the processor, that a command may take: on a busy machine the clock says nothing of it."""
PATIENCE = 5
"""The clock may go on for so many times as long: what waits for ever takes no time of the
processor."""
MEMORY = 2 << 30
"""Bytes of address space that a command may add to what its imports took."""
PAUSE = 0.005
OUTPUT = "output.txt"


@dataclass(frozen=True)
class Ended:
    """How a process ended. ``status`` is negative where a signal ended it."""

    status: int
    output: str
    seconds: float
    """Of the processor."""
    peak_rss: int
    """Bytes, those of the imports among them."""
    late: bool = False
    """Whether it was ended for its time."""


def command(
    folder: Path, arguments: Sequence[str], before: Callable[[], None] | None = None
) -> Ended:
    """``optimize-model`` with these arguments in the subfolder ``work``; its temporary folder is
    ``tmp`` beside that. ``before`` is called in the new process."""

    def run() -> int:
        from ..cli.main import main

        if before is not None:
            before()
        try:
            main(arguments)
        except SystemExit as leave:
            return int(leave.code or 0)
        finally:
            gc.collect()
        return 0

    return forked(folder, run)


def forked(folder: Path, work: Callable[[], int]) -> Ended:
    """Call ``work`` in a child; its result is the status. What it prints is in ``output``."""
    began, late = time.monotonic(), False
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _settle(folder)
            status = work()
        except BaseException:
            traceback.print_exc()  # beside what the command wrote: nobody else tells
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    while True:
        pid, wait_status, used = os.wait4(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() - began > PATIENCE * SECONDS:
            late = True
            os.kill(child, signal.SIGKILL)
        time.sleep(PAUSE)
    status = os.waitstatus_to_exitcode(wait_status)
    output = (folder / OUTPUT).read_text(errors="replace")
    seconds = used.ru_utime + used.ru_stime
    late = late or status == -signal.SIGXCPU
    return Ended(status, output, seconds, 1024 * used.ru_maxrss, late)


def _settle(folder: Path) -> None:
    """In the child: its folders, its output, its limits.

    What the parent held is not collected here: a runtime's session waits, when it is destroyed, for
    threads that no child has.
    """
    gc.freeze()
    output = os.open(folder / OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for number in (1, 2):
        os.dup2(output, number)
    # A test runner has put its own in their place.
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    for name in ("work", "tmp"):
        (folder / name).mkdir(exist_ok=True)
    os.chdir(folder / "work")
    tempfile.tempdir = str(folder / "tmp")
    sweep.cache_clear()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    most = math.ceil(SECONDS)
    resource.setrlimit(resource.RLIMIT_CPU, (most, most + 1))
