"""A command as a process of its own: its seconds, and the peak of its memory.

Linux alone: memory is read from ``/proc``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from ...ir.core.errors import GraphwrightError

INTERVAL = 0.02
"""Seconds between two looks at the memory: what is anonymous for less time may be missed."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_CLI = f"{__package__.rpartition('.')[0]}.cli.main"
OPTIMIZE_MODEL = (sys.executable, "-c", f"from {_CLI} import main; main()")
"""The command that the package installs, by the interpreter that runs the bench."""
TAIL = 4000
"""Characters of a command's messages that its failure shows."""


class CommandFailed(GraphwrightError):
    """A measured command ended with another status than 0."""


@dataclass(frozen=True)
class Usage:
    """What a process and its descendants took."""

    seconds: float
    """Of processors, user and system: those of a descendant count once it was waited for."""
    wall: float
    peak_rss: int
    """Bytes of the largest single process, mapped files included. Not ``ru_maxrss``, which begins
    with the memory of the process that started it."""
    peak_anonymous: int
    """Bytes that no file backs, of all processes together."""
    status: int
    """The exit status, negative where a signal ended it."""
    output: str
    """What it wrote to stdout."""


def environment(threads: int | None, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment with a number of threads; ``None``: as libraries choose."""
    chosen = {k: v for k, v in os.environ.items() if k not in THREADS}
    if threads is not None:
        chosen |= dict.fromkeys(THREADS, str(threads))
    return {**chosen, **(extra or {})}


def measure(
    command: Sequence[str],
    env: Mapping[str, str],
    stop: Callable[[], bool] | None = None,
    *,
    check: bool = True,
) -> Usage:
    """Run a command to its end, or kill it as soon as ``stop`` says so (asked ``INTERVAL`` apart).

    Raises ``CommandFailed`` where ``check`` and it ends with another status than 0.
    """
    began = time.monotonic()
    with tempfile.TemporaryFile() as written, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, env=dict(env), stdout=written, stderr=errors)
        watch = _Watch(process.pid, stop)
        watch.start()
        _, wait_status, used = os.wait4(process.pid, 0)
        watch.ended.set()
        watch.join()
        process.returncode = os.waitstatus_to_exitcode(wait_status)
        output, messages = _text(written), _text(errors)
    if check and process.returncode != 0:
        raise CommandFailed(
            f"{' '.join(command)} ended with {process.returncode}:\n{(output + messages)[-TAIL:]}"
        )
    return Usage(
        used.ru_utime + used.ru_stime, time.monotonic() - began, watch.peak_rss,
        watch.peak_anonymous, process.returncode, output,
    )  # fmt: skip


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


class _Watch(threading.Thread):
    """Looks at a process and its descendants until it is told that they ended."""

    def __init__(self, pid: int, stop: Callable[[], bool] | None) -> None:
        super().__init__(daemon=True)
        self.pid, self.stop, self.ended = pid, stop, threading.Event()
        self.peak_rss = self.peak_anonymous = 0

    def run(self) -> None:
        while not self.ended.wait(INTERVAL):
            family = _family(self.pid)
            # A child that is yet to become another program has its parent's memory, not its own:
            # the same numbers count once.
            taken = {_memory(pid) for pid in family}
            self.peak_rss = max(self.peak_rss, *(each.most for each in taken))
            self.peak_anonymous = max(self.peak_anonymous, sum(each.anonymous for each in taken))
            if self.stop is not None and self.stop():
                self.stop = None
                for pid in reversed(family):
                    _kill(pid)


def _family(pid: int) -> list[int]:
    """A process and all below it."""
    pids = [pid]
    for each in pids:  # grows while it is read
        for listing in Path(f"/proc/{each}/task").glob("*/children"):
            pids += map(int, _read(listing).split())
    return pids


class _Memory(NamedTuple):
    """In bytes: addresses taken, most that was ever resident, and resident now without a file."""

    addresses: int = 0
    most: int = 0
    anonymous: int = 0


def _memory(pid: int) -> _Memory:
    """Nothing for a process that has ended."""
    lines = _read(Path(f"/proc/{pid}/status")).splitlines()
    known = dict(line.split(":", 1) for line in lines)
    if "RssAnon" not in known:
        return _Memory()
    return _Memory(*(int(known[key].split()[0]) * 1024 for key in ("VmSize", "VmHWM", "RssAnon")))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it ended meanwhile
        return ""


def _kill(pid: int) -> None:
    try:
        os.kill(pid, 9)
    except ProcessLookupError:
        return
