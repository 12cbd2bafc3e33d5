"""Graphwright: compiler-style graph rewriting for transformer models. See README.md."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from .ir.core.errors import BadInput, BoundExceeded, GraphwrightError, InvalidGraph, Missing
from .ir.core.version import __version__ as __version__

if TYPE_CHECKING:
    from . import passes
    from .backends import compile, export
    from .backends.runtimes.original import load
    from .ir.core.view import View
    from .ir.load.tracing.trace import trace
    from .passes.checked_run import Result
    from .passes.recipe import Recipe
    from .tools.run.generating import generate
    from .tools.run.named_model import optimize, plan, search

# ONNX Runtime reports to its maker if this is not set when it is imported, by us or before us.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOMES = {
    "trace": ".ir.load.tracing.trace", "load": ".backends.runtimes.original", "passes": ".passes",
    "View": ".ir.core.view", "Result": ".passes.manager", "Recipe": ".passes.recipe",
    "compile": ".backends", "export": ".backends", "generate": ".tools.run.generating",
    **dict.fromkeys(("optimize", "plan", "search"), ".tools.run.named_model"),
}  # fmt: skip
__all__ = [
    "trace", "load", "optimize", "plan", "search", "compile", "export", "generate", "passes",
    "View", "Result", "Recipe", "GraphwrightError", "BadInput", "Missing", "BoundExceeded",
    "InvalidGraph",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name], __name__)
    return getattr(home, name, home)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
