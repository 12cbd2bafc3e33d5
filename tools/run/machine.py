"""What a machine is called where times are kept beside its name."""

from __future__ import annotations

import os
from pathlib import Path


def processor(path: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name and what it can do with vectors, where the system tells."""
    lines = path.read_text().splitlines() if path.is_file() else []
    facts: dict[str, str] = {}
    for line in lines:
        name, _, text = line.partition(":")
        facts[name.strip()] = text.strip()
    able = facts.get("flags", "").split()
    units = [name for name in ("avx2", "avx512f", "avx512_vnni", "amx_int8") if name in able]
    return " ".join([facts.get("model name", "unknown processor"), *units])


def cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy() -> bool:
    """Whether other work has more than three quarters of the cores: times are worth nothing."""
    return os.getloadavg()[0] > 0.75 * cores()
