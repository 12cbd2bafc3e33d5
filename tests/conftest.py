"""Workers of one test run share the cores; commands for developers are tested from the checkout."""

from __future__ import annotations

import atexit
import copy
import gc
import hashlib
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


_WIDE = Path(__file__).with_name("wide.txt")
"""Cases of which others run every statement too; ``tools.bench.wide_cases`` finds them."""
_FOR_DEVELOPERS = ("tests/tools/bench/", "tests/tools/zoo/")
"""Tests of what the wheel leaves out: slow."""
_LEFT_OUT = "not wide and not slow"
"""As ``pyproject.toml`` has it."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """What is for developers is not even imported where a run of all leaves it out."""
    of_all = set(config.args) <= set(config.getini("testpaths"))
    again = config.getoption("lf", default=False)
    if again or not of_all or config.getoption("markexpr") != _LEFT_OUT:
        return None
    inside = f"{Path(os.path.relpath(collection_path, config.rootpath)).as_posix()}/"
    return True if inside.startswith(_FOR_DEVELOPERS) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the wide cases, and what is for developers as slow. Where a person names a file or a
    test, all of it runs, and all that failed before where that is asked for."""
    named = any(argument.partition("::")[0].endswith(".py") for argument in config.args)
    again = config.getoption("lf", default=False)
    if (named or again) and config.getoption("markexpr") == _LEFT_OUT:
        config.option.markexpr = ""
    wide = set(_WIDE.read_text().splitlines())
    for item in items:
        if item.nodeid in wide:
            item.add_marker("wide")
        if item.nodeid.startswith(_FOR_DEVELOPERS):
            item.add_marker("slow")


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


LAST = 48
"""So many models that were loaded are remembered."""


@pytest.fixture(scope="session", autouse=True)
def _loaded_once() -> Iterator[None]:
    """Models that are there to be used are traced once a process: the zoo's own, folders of which
    no file has changed since, and what differs from these in its weights alone. Each use has a copy
    of the graph and of what is said of its source. Tests of loading load each time, and those of
    reading a library's model trace each time."""
    from graphwright.ir.load import sources
    from graphwright.ir.load.tracing import trace

    of_zoo, of_folder, exported = sources.load_zoo, sources._folder, trace._export
    loaded: dict[Any, Any] = {}

    def remembered(key: Any, load: Callable[[], Any]) -> Any:
        loaded[key] = loaded.pop(key) if key in loaded else load()
        if len(loaded) > LAST:
            del loaded[next(iter(loaded))]
        return loaded[key]

    def once(key: Any, load: Callable[[], Any]) -> Any:
        if _tests("tests/ir/load/"):
            return load()
        view = remembered(key, load).copy()
        view.source = copy.copy(view.source)
        return view

    def zoo(name: str, **options: Any) -> Any:
        return once((name, *sorted(options.items(), key=str)), lambda: of_zoo(name, **options))

    def folder(path: Path, *options: Any) -> Any:
        files = sorted((str(f), f.stat().st_mtime_ns, f.stat().st_size)
                       for f in path.rglob("*") if f.is_file())  # fmt: skip
        return once((*files, *options), lambda: of_folder(path, *options))

    def export(module: Any, inputs: Any, shapes: Any, narrower: Any, limits: Any = None) -> Any:
        apart = limits is None or _tests("tests/ir/load/hf/", "tests/ir/load/tracing/")
        form = None if apart else _form(module, inputs, shapes)
        if form is None:
            return exported(module, inputs, shapes, narrower, limits)

        def make() -> Any:
            return exported(module, inputs, shapes, narrower, limits), copy.deepcopy(limits)

        program, found = remembered(form, make)
        vars(limits).update(vars(copy.deepcopy(found)))
        return program

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "load_zoo", zoo)
        patch.setattr(sources, "_folder", folder)
        patch.setattr(trace, "_export", export)
        yield


def _tests(*folders: str) -> bool:
    """Whether the test that runs is of one of these folders."""
    return os.environ.get("PYTEST_CURRENT_TEST", "").startswith(folders)


_PLACE = "name_or_path"


def _form(module: Any, inputs: Any, shapes: Any) -> str | None:
    """A digest of all that the trace of a model of transformers depends on: code, settings, what it
    holds, shapes of its inputs. None where its weights are in memory: a trace would hold them."""
    from torch._subclasses import FakeTensor
    from torch.utils import _pytree as pytree

    config = getattr(module, "config", None)
    parameters = list(module.parameters())
    if not hasattr(config, "to_dict") or not all(isinstance(p, FakeTensor) for p in parameters):
        return None

    def told(value: Any) -> Any:
        if callable(value):  # a forward that a reader has given it, or a test
            return getattr(value, "__module__", ""), getattr(value, "__qualname__", "")
        if not hasattr(value, "untyped_storage"):
            return repr(value)
        numbers = () if isinstance(value, FakeTensor) else value.flatten().tolist()
        return str(value.dtype), list(value.shape), numbers

    settings = [
        (name, type(m).__qualname__, type(m).__module__,
         [(key, told(value)) for key, value in sorted(vars(m).items())
          if key != _PLACE
          and (isinstance(value, bool | int | float | str | tuple | list) or callable(value))],
         [(key, told(value)) for key, value in (*m._parameters.items(), *m._buffers.items())])
        for name, m in module.named_modules()
    ]  # fmt: skip
    leaves, spec = pytree.tree_flatten(inputs)
    given = [(str(leaf.dtype), list(leaf.shape)) for leaf in leaves], str(spec), repr(shapes)
    of_config = {key: value for key, value in config.to_dict().items() if key != f"_{_PLACE}"}
    spoken = getattr(config, "_attn_implementation", None)  # which is not in its dictionary
    whole = repr((settings, sorted(of_config.items()), spoken, given))
    return hashlib.sha256(whole.encode()).hexdigest()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: Any, log: Any) -> Any:
    if config.getvalue("dist") != "loadfile":
        return None
    from .by_folder import ByFolder

    return ByFolder(config, log)


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
