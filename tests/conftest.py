"""Workers of one test run share the cores; commands for developers are tested from the checkout."""

from __future__ import annotations

import atexit
import gc
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import graphwright.tools

# The wheel leaves `tools/bench` and `tools/zoo` out.
_CHECKOUT = str(Path(__file__).resolve().parents[1] / "tools")
if _CHECKOUT not in graphwright.tools.__path__:
    graphwright.tools.__path__.append(_CHECKOUT)


@pytest.fixture(scope="session")
def once_a_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[], Any]], Any]:
    """``once_a_run(name, make)``: what ``make`` returns, of which JSON can be made. The worker that
    asks first makes it, the others wait and read it."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def once(name: str, make: Callable[[], Any]) -> Any:
        made = shared / f"{name}.json"
        with FileLock(f"{made}.lock"):
            if not made.exists():
                made.write_text(json.dumps(make()))
        return json.loads(made.read_text())

    return once


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
