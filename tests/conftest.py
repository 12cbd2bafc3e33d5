"""Workers of one test run share the cores; commands for developers are tested from the checkout."""

from __future__ import annotations

import atexit
import gc
import logging
import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import graphwright.tools

# The wheel leaves `tools/bench` and `tools/zoo` out.
_CHECKOUT = str(Path(__file__).resolve().parents[1] / "tools")
if _CHECKOUT not in graphwright.tools.__path__:
    graphwright.tools.__path__.append(_CHECKOUT)


def pytest_collection_finish() -> None:
    """What costs all tests and shows in none.

    Torch writes down each step of an export where its trace logger has a handler; pytest gives one
    to every logger that does not propagate. Python looks for cycles through all that torch and
    transformers hold, again and again: an eighth of the processor's time.
    """
    logging.getLogger("torch.__trace").propagate = True
    gc.freeze()
    gc.set_threshold(2000, 20, 100)


def pytest_sessionfinish() -> None:
    """Pytest looks for cycles five times before it ends, through all that torch and transformers
    hold; once, at the end of the process, is enough."""
    gc.freeze()
    atexit.register(gc.unfreeze)
