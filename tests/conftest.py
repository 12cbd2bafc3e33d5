"""Workers of one test run share the cores; commands for developers are tested from the checkout."""

from __future__ import annotations

import atexit
import copy
import gc
import json
import logging
import os
from collections.abc import Callable, Iterator
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


LAST = 24
"""So many models that were loaded are remembered."""


@pytest.fixture(scope="session", autouse=True)
def _loaded_once() -> Iterator[None]:
    """Models that are there to be used are traced once a process: the zoo's own, and folders of
    which no file has changed since. Each use has a copy of the graph and of what is said of its
    source. Tests of loading itself load each time."""
    from graphwright.ir.load import sources

    of_zoo, of_folder = sources.load_zoo, sources._folder
    loaded: dict[Any, Any] = {}

    def once(key: Any, load: Callable[[], Any]) -> Any:
        if os.environ.get("PYTEST_CURRENT_TEST", "").startswith("tests/ir/load/"):
            return load()
        loaded[key] = loaded.pop(key) if key in loaded else load()
        if len(loaded) > LAST:
            del loaded[next(iter(loaded))]
        view = loaded[key].copy()
        view.source = copy.copy(view.source)
        return view

    def zoo(name: str, **options: Any) -> Any:
        return once((name, *sorted(options.items(), key=str)), lambda: of_zoo(name, **options))

    def folder(path: Path, *options: Any) -> Any:
        files = sorted((str(f), f.stat().st_mtime_ns, f.stat().st_size)
                       for f in path.rglob("*") if f.is_file())  # fmt: skip
        return once((*files, *options), lambda: of_folder(path, *options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "load_zoo", zoo)
        patch.setattr(sources, "_folder", folder)
        yield


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
