"""Graphwright: compiler-style graph rewriting for transformer models. See README.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import passes
    from .backends import compile, export
    from .ir.load import load
    from .ir.trace import trace
    from .passes.manager import Result, optimize, plan
    from .passes.recipe import Recipe

_HOMES = {
    "trace": ".ir.trace",
    "load": ".ir.load",
    "optimize": ".passes.manager",
    "plan": ".passes.manager",
    "Result": ".passes.manager",
    "Recipe": ".passes.recipe",
    "compile": ".backends",
    "export": ".backends",
}
__all__ = ["trace", "load", "optimize", "plan", "Result", "Recipe", "compile", "export", "passes"]


def __getattr__(name: str) -> Any:
    import importlib

    if name == "passes":
        return importlib.import_module(".passes", __name__)
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
