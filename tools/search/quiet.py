"""Running a native library without what it prints."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what HiGHS 1.12 prints of its heuristics, past Python, on the process's own standard
    output, where a manifest may be printed."""
    library = ctypes.CDLL(None)
    sys.stdout.flush()
    library.fflush(None)
    output = os.dup(1)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            yield
            library.fflush(None)
    finally:
        os.dup2(output, 1)
        os.close(output)
