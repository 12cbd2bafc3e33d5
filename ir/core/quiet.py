"""Keep the chatter of the libraries below off a person's terminal."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO


class _Muted:
    """Standard error without what the calling thread writes; a progress bar still shows."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        if threading.get_ident() == self._thread:
            return len(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the warnings, log records and prints of the libraries below off the terminal."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(_Muted(sys.stderr)):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Without what native code prints past Python on the process's own standard output, where a
    manifest may be printed: HiGHS 1.12 does, of its heuristics."""
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
