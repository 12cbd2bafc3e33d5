"""Decisions: what to rewrite and by how much. One file per method, a frozen dataclass per pass."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .registry import class_name, pass_class, pass_names

if TYPE_CHECKING:
    from .base import Context, Needs, Pass, PassResult, Site
    from .recipe import Recipe

_HOMES = {
    **dict.fromkeys(("Context", "Needs", "Pass", "PassResult", "Site"), ".base"),
    "Recipe": ".recipe",
}
"""What is imported when it is asked for: it needs torch, which names of passes do not."""
__all__ = [
    "Context", "Needs", "Pass", "PassResult", "Recipe", "Site", "pass_class", "pass_names",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """``passes.Quantize`` is the class of the pass ``quantize``, imported when it is asked for."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    for pass_name in pass_names():
        if class_name(pass_name) == name:
            return pass_class(pass_name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *map(class_name, pass_names())})
