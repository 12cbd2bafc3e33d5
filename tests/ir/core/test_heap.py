"""Freed memory goes back to the system, and the peak is this process's own."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
from graphwright.ir.core import heap
held = [bytearray(100_000) for _ in range(3000)]
kept = held[-1]
del held
before = heap._own_bytes()
heap.give_back(1 << 40)
assert heap._own_bytes() > before - 50_000_000, "it is below the bound"
heap.give_back(0)
print(before - heap._own_bytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_goes_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    assert int(done.stdout or 0) > 200_000_000, done.stderr


def test_the_peak_is_not_that_of_the_process_that_started_this_one() -> None:
    held = b"." * 600_000_000
    script = "from graphwright.ir.core import heap; print(heap.peak_rss_bytes())"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert 5_000_000 < int(done.stdout or 0) < len(held), done.stderr
