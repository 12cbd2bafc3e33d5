"""Backends by name: the built-in ones, and those that other packages add by entry point."""

from __future__ import annotations

import importlib
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from ..ir.core.errors import BadInput, near_misses
from ..ir.core.given import check_graph
from ..ir.core.view import View
from .base import Backend, Executable

GROUP = "graphwright.backends"
"""The entry point group of third-party backends: ``mine = "package.module:BACKEND"``."""
DEFAULT = "onnxruntime"
"""What artifacts are made for, and checked in."""

_BUILT_IN = ("eager", "onnxruntime", "triton")


def backend_names() -> list[str]:
    """Every backend that ``compile`` knows."""
    return sorted({*_BUILT_IN, *_third_party()})


def _third_party() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def find_backend(name: str) -> Backend:
    """A backend by its name. Raises ``BadInput`` with near misses where there is none."""
    if name in _BUILT_IN:
        backend = importlib.import_module(f"{__package__}.runtimes.{name}").BACKEND
    elif name in _third_party():
        backend = _third_party()[name].load()
    else:
        raise BadInput(f"there is no backend {name!r}; {near_misses(name, backend_names())}")
    if not isinstance(backend, Backend):
        raise BadInput(f"the entry point {name!r} is not a graphwright backend: {backend!r}")
    return backend


def compile(
    graph: View | str | Path, *, backend: str = DEFAULT, device: str = "cpu", **options: Any
) -> Executable:
    """An executable of a graph, or of an artifact's folder or ``model.onnx``.

    ``device`` is ``cpu`` or ``cuda``. Options of ``onnxruntime``: ``optimize`` (the runtime's graph
    optimisation, on by default), ``threads``, ``lean`` (weights stay in their file), ``sparing``
    (of memory and processor time, not of the clock's) and ``path`` (another entry graph of an
    artifact, by its name); of ``triton``: ``strict``. Raises ``BadInput`` for an unknown
    backend, device or option and ``Missing`` where the device or a package is not there.
    """
    if not isinstance(graph, str | Path):
        check_graph(graph)
    build = find_backend(backend).build
    if device not in ("cpu", "cuda"):
        raise BadInput(f"device {device!r} is unknown: cpu or cuda")
    try:
        return build(graph, device=device, **options)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise BadInput(f"{backend}: {str(error).partition(' got ')[2]}") from None
