"""What this machine can still hold: what a file asks for is compared with it first."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from .errors import BadInput


def available_bytes() -> int:
    """Memory that could be taken now without swapping: the system's, or what a limit leaves."""
    free = _of_the_system()
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return free if limit == resource.RLIM_INFINITY else min(free, limit - _taken())


def _of_the_system() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kilobytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        return int(kilobytes) * 1024
    except (OSError, StopIteration, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _taken() -> int:
    """Address space that a limit counts already."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (OSError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def refuse_beyond_memory(needed: int, what: str) -> None:
    """Raise ``BadInput`` where ``what``, which takes ``needed`` bytes, cannot be held here."""
    available = available_bytes()
    if needed > available:
        raise BadInput(
            f"{what} would take {needed / 1e9:.1f} GB of memory, and this machine has "
            f"{available / 1e9:.1f} GB to give"
        )
