"""``gw.optimize`` and ``gw.plan``: as the manager has them, and for a model that is named too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from ...backends.original import load
from ...ir.core.view import View
from ...passes import manager

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
        return work(graph if isinstance(graph, View) else load(graph), *args, **options)

    return named


optimize = _of_names(manager.optimize)
plan = _of_names(manager.plan)
