"""How many threads compute, and what they do while they wait: set before torch is imported."""

from __future__ import annotations

import math
import os
from pathlib import Path

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
"""OpenMP's threads spin until their next task comes. Beside other work, or in a container with a
share of a core, that takes the time from the thread that they wait for: a run of a 0.1B model on
two busy cores took 86 s of processor time, 36 s with threads that sleep, 34 s on one thread."""

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
CFS = Path("/sys/fs/cgroup/cpu")


def share_the_cores() -> None:
    """Let waiting threads sleep, and start no more of them than this process may run at once.

    Does nothing about a variable that is set, nor once torch has been imported: OpenMP reads them
    when it is loaded.
    """
    for name, value in WAITING.items():
        os.environ.setdefault(name, value)
    share = core_share()
    if share is not None and share < _cores():
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, math.floor(share))))


def core_share(cpu_max: Path = CPU_MAX, cfs: Path = CFS) -> float | None:
    """Cores that the control group grants, such as 0.5; ``None`` where it grants all."""
    try:
        if cpu_max.is_file():
            quota, period = cpu_max.read_text().split()
        else:
            quota = (cfs / "cpu.cfs_quota_us").read_text()
            period = (cfs / "cpu.cfs_period_us").read_text()
        share = float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None  # no such file, or "max"
    return share if share > 0 else None


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
