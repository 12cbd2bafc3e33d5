"""Memory that ONNX Runtime may take for what a file from elsewhere computes."""

from __future__ import annotations

import functools
import re
from typing import Any

from ..core.memory import available_bytes

_SHORT = re.compile(
    r".*running (?P<op>\w+) node\. Name:'(?P<name>.*?)'"
    r".*(?:smaller than requested bytes of|requested buffer of size) (?P<bytes>\d+)", re.DOTALL,
)  # fmt: skip
"""The runtime's words; of nodes within each other the innermost is named last."""
_SAME_AS_REQUESTED = 1


def bound_memory(options: Any) -> None:
    """Let a session with these options take no more memory than this machine has.

    Sizes that a file computes are known only as it runs. Without a bound the system promises any
    memory, and ends the process when it is written to. Sessions that ask for it share one
    allocator.
    """
    _make_allocator()
    options.add_session_config_entry("session.use_env_allocators", "1")
    # It keeps what is given back until the end of a run: weights go back with their session.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")


@functools.cache
def _make_allocator() -> None:
    import onnxruntime as ort

    kind, place = ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, ort.OrtMemType.DEFAULT
    ort.create_and_register_allocator(
        ort.OrtMemoryInfo("Cpu", kind, 0, place),
        ort.OrtArenaCfg(available_bytes(), _SAME_AS_REQUESTED, -1, -1),
    )


def run_options() -> Any:
    """Of a bounded session's run: its memory goes back to the system afterwards."""
    import onnxruntime as ort

    options = ort.RunOptions()
    options.log_severity_level = 4
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def why_short(message: str) -> str:
    """What a node would have taken, of the runtime's message; empty where it says another thing."""
    short = _SHORT.search(message)
    if short is None:
        return ""
    node = f"{short['name']} ({short['op']})" if short["name"] else short["op"]
    return (
        f"{node}: its result would take {int(short['bytes']) / 1e9:.1f} "
        "GB of memory, more than this machine had left to give"
    )
