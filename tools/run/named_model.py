"""``gw.optimize``, ``gw.plan`` and ``gw.search``: of a graph, and of a model that is named too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import torch

from ...backends.runtimes.original import load
from ...ir.core.view import View
from ...ir.load.names import form_of
from ...passes import forecast, manager
from ..data.calibration import read
from ..search import search as searching

_Options = ParamSpec("_Options")
_Done = TypeVar("_Done")


def _of_names(
    work: Callable[Concatenate[View, _Options], _Done],
) -> Callable[Concatenate[View | str | Path, _Options], _Done]:
    """The same function for a graph and for whatever ``load`` takes."""

    @functools.wraps(work)
    def named(
        graph: View | str | Path, /, *args: _Options.args, **options: _Options.kwargs
    ) -> _Done:
        original = options.get("original")
        if isinstance(original, str | Path):
            options["original"] = load_original(original)
        view = graph if isinstance(graph, View) else load(graph)
        if isinstance(options.get("calibration"), str | Path) and work is not searching.search:
            options["calibration"] = read(str(options["calibration"]), view).batches
        return work(view, *args, **options)

    return named


def load_original(
    name: str | Path, *, trust_remote_code: bool = False, allow_missing_weights: bool = False
) -> View:
    """The model that a source was compressed from: in float32, so that its weights can take the
    source's units, and without a cache, since it writes no text."""
    dtype = None if form_of(name) in ("artifact", "onnx", "pt2", "factory") else torch.float32
    return load(
        name, dtype=dtype, cache=False if dtype is not None else None,
        trust_remote_code=trust_remote_code, allow_missing_weights=allow_missing_weights,
    )  # fmt: skip


optimize = _of_names(manager.optimize)
plan = _of_names(forecast.plan)
search = _of_names(searching.search)
