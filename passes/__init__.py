"""Decisions: what to rewrite and by how much. One file per method, a frozen dataclass per pass."""

from __future__ import annotations

from typing import Any

from .base import Context, Needs, Pass, PassResult, Site
from .recipe import Recipe
from .registry import class_name, pass_class, pass_names

__all__ = [
    "Context", "Needs", "Pass", "PassResult", "Recipe", "Site", "pass_class", "pass_names",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """``passes.Quantize`` is the class of the pass ``quantize``, imported when it is asked for."""
    for pass_name in pass_names():
        if class_name(pass_name) == name:
            return pass_class(pass_name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *map(class_name, pass_names())})
