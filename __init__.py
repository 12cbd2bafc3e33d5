"""Graphwright: compiler-style graph rewriting for transformer models. See README.md."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from .ir.core.version import __version__ as __version__

if TYPE_CHECKING:
    from . import passes
    from .backends import compile, export
    from .backends.original import load
    from .ir.load.trace import trace
    from .passes.manager import Result, optimize, plan
    from .passes.recipe import Recipe
    from .tools.run.generating import generate

# ONNX Runtime reports to its maker unless this is set when it is imported: its own call comes too
# late. In a program that imported it before us, it does.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOMES = {
    "trace": ".ir.load.trace", "load": ".backends.original", "optimize": ".passes.manager",
    "plan": ".passes.manager", "Result": ".passes.manager", "Recipe": ".passes.recipe",
    "compile": ".backends", "export": ".backends", "generate": ".tools.run.generating",
}  # fmt: skip
__all__ = [
    "trace", "load", "optimize", "plan", "Result", "Recipe", "compile", "export", "generate",
    "passes",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(_HOMES.get(name, ".passes"), __name__)
    return getattr(home, name, home)
