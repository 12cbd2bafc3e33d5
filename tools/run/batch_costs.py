"""What calls of several tokens cost, kept beside the machine's name: measured once for a model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ...backends.generation.draft_costs import Costs
from ...backends.runtimes.runtime_packages import installed
from .machine import busy, cores, processor

Key = tuple[str, ...]
"""What costs are of: the graph's hash, who drafts, and the device."""


def place() -> Path:
    """The file, in the user's folder of what can be computed again."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "graphwright" / "batch-costs.json"


def known(key: Key) -> Costs | None:
    """What was measured on this machine; ``None`` where nothing was."""
    row = _read().get(_machine(), {}).get(" ".join(key))
    try:
        calls = {int(count): float(ms) / 1000 for count, ms in row["call_ms"].items()}
        return Costs(calls, float(row["draft_ms"]) / 1000) if 1 in calls else None
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def keep(key: Key, costs: Costs) -> bool:
    """Write down what was measured; not where other work ran beside it, or nothing can be written.

    Whether it was.
    """
    if busy():
        return False
    table = _read()
    row = {"call_ms": {str(count): 1000 * s for count, s in costs.calls.items()},
           "draft_ms": 1000 * costs.draft}  # fmt: skip
    table.setdefault(_machine(), {})[" ".join(key)] = row
    path = place()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(table, indent=1, sort_keys=True))
        fresh.replace(path)
    except OSError:
        return False
    return True


def _machine() -> str:
    runtime = installed("onnxruntime-gpu") or installed("onnxruntime") or "?"
    return f"{processor()}, {cores()} cores, onnxruntime {runtime}"


def _read() -> dict[str, Any]:
    """The table; empty where there is none that can be read."""
    try:
        table = json.loads(place().read_text())
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}
