"""The machine: what times are kept beside, and what a manifest says of it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from ..report.manifest import MachineEntry

CPUINFO = Path("/proc/cpuinfo")


def processor(path: Path = CPUINFO) -> str:
    """The processor's name and what it can do with vectors, where the system tells."""
    facts = _facts(path)
    able = facts.get("flags", "").split()
    units = [name for name in ("avx2", "avx512f", "avx512_vnni", "amx_int8") if name in able]
    return " ".join([facts.get("model name", "unknown processor"), *units])


def _facts(path: Path) -> dict[str, str]:
    """What Linux tells of the first processor."""
    facts: dict[str, str] = {}
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        name, _, text = line.partition(":")
        facts.setdefault(name.strip(), text.strip())
    return facts


def cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy() -> bool:
    """Whether other work has more than three quarters of the cores: times are worth nothing."""
    return os.getloadavg()[0] > 0.75 * cores()


def machine_entry(device: str) -> MachineEntry:
    """What a manifest says of the machine on which an artifact was made, and run on ``device``."""
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    named = _facts(CPUINFO).get("model name", "") if CPUINFO.is_file() else platform.processor()
    return MachineEntry(
        platform=platform.platform(),
        cpu=named,
        cores=cores(),
        threads=torch.get_num_threads(),
        memory_bytes=pages * size,
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
    )
