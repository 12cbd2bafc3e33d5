"""What a backend gives, and how one is found."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from ..ir.core.errors import BadInput, near_misses
from ..ir.core.types import Type
from ..ir.core.view import View
from ..ir.structure.cache_slots import empty_past

_BACKENDS = {"eager": ".eager", "onnxruntime": ".onnxruntime", "triton": ".triton"}


class Executable(Protocol):
    """A compiled graph. Calling it runs it."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in the order in which positional arguments are taken."""

    @property
    def input_types(self) -> Mapping[str, Type]:
        """dtype and shape of each input by name, in that order."""

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs."""

    def __call__(self, *args: torch.Tensor, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Outputs by name. Raises ``BadInput`` where the inputs do not fit the graph."""


class ViewExecutable:
    """Base of executables that run a view: its names and types are theirs."""

    def __init__(self, view: View) -> None:
        self._view = view

    @property
    def input_names(self) -> tuple[str, ...]:
        return self._view.input_names()

    @property
    def input_types(self) -> dict[str, Type]:
        """dtype and shape of each input by name."""
        types = map(self._view.type, self._view.inputs())
        return dict(zip(self.input_names, types, strict=True))

    @property
    def output_names(self) -> tuple[str, ...]:
        return self._view.output_names()


def backend_names() -> list[str]:
    """The backends that ``compile`` knows."""
    return sorted(_BACKENDS)


def compile(
    graph: View | str | Path, *, backend: str = "onnxruntime", device: str = "cpu", **options: Any
) -> Executable:
    """An executable of a graph, or of an artifact's folder or ``model.onnx``.

    ``device`` is ``cpu`` or ``cuda``. Options of ``onnxruntime``: ``optimize`` (the runtime's graph
    optimisation, on by default), ``threads`` and ``lean`` (weights stay in their file); of
    ``triton``: ``strict``. Raises ``BadInput`` for an unknown backend, device or option and
    ``Missing`` where the device or a package is not there.
    """
    if backend not in _BACKENDS:
        raise BadInput(f"there is no backend {backend!r}; {near_misses(backend, _BACKENDS)}")
    if device not in ("cpu", "cuda"):
        raise BadInput(f"device {device!r} is unknown: cpu or cuda")
    module = importlib.import_module(_BACKENDS[backend], __package__)
    try:
        made: Executable = module.build(graph, device=device, **options)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise BadInput(f"{backend}: {str(error).partition(' got ')[2]}") from None
    return made


def bind(
    types: Mapping[str, Type], args: tuple[torch.Tensor, ...], inputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Positional and named inputs as one mapping; a key-value cache that is left out is empty.

    ``types`` are the inputs' types in order. Raises ``BadInput`` where names do not fit.
    """
    names = tuple(types)
    if len(args) > len(names):
        raise BadInput(
            f"{len(args)} inputs given, the graph takes {len(names)}: {', '.join(names)}"
        )
    bound = dict(zip(names, args, strict=False))
    twice = sorted(set(bound) & set(inputs))
    if twice:
        raise BadInput(f"given twice: {', '.join(twice)}")
    bound |= inputs
    bound |= empty_past(types, bound)
    missing, unknown = sorted(set(names) - set(bound)), sorted(set(bound) - set(names))
    if missing or unknown:
        parts = [f"missing {', '.join(missing)}"] if missing else []
        parts += [f"unknown {', '.join(unknown)}"] if unknown else []
        raise BadInput(f"inputs: {'; '.join(parts)} (the graph takes {', '.join(names)})")
    return bound
