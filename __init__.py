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
    from .tools.generating import generate

_HOMES = {
    "trace": ".ir.trace", "load": ".ir.load", "optimize": ".passes.manager",
    "plan": ".passes.manager",
    "Result": ".passes.manager",
    "Recipe": ".passes.recipe",
    "compile": ".backends",
    "export": ".backends",
    "generate": ".tools.generating",
}  # fmt: skip
__all__ = [
    "trace", "load", "optimize", "plan", "Result", "Recipe", "compile", "export", "generate",
    "passes",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    import importlib

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(_HOMES.get(name, ".passes"), __name__)
    return getattr(home, name, home)
