"""What a backend is, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from ..ir.core.errors import BadInput
from ..ir.core.types import Type
from ..ir.core.view import View
from ..ir.structure.cache_slots import ROWS_KEY, left_out, reread_at, slot_layers
from ..ir.structure.words import head_tokens


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


class Steps(Protocol):
    """A text in the making: the cache is kept between calls."""

    def __call__(self, feeds: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Logits ``[rows, 1, words]`` behind each row's next token, which is then in the cache too.
        They may lie in memory that the next call writes to.

        ``feeds`` are the inputs without the cache, each of the graph's own dtype. Raises
        ``BadInput`` where they do not fit the graph.
        """


@runtime_checkable
class Stepping(Executable, Protocol):
    """An executable that has a way of its own to keep a cache."""

    def steps(self, outputs: Mapping[str, torch.Tensor]) -> Steps:
        """What goes on behind a prompt that gave these outputs."""


class ViewExecutable:
    """Base of executables that run a view: its names and types are theirs."""

    def __init__(self, view: View) -> None:
        self._view = view

    @property
    def input_names(self) -> tuple[str, ...]:
        return self._view.input_names()

    @property
    def rows_begin(self) -> bool:
        """Whether padding must be at the end of a row: see ``ROWS_KEY``."""
        return ROWS_KEY in self._view.metadata()

    @property
    def reread_at(self) -> int:
        """See ``cache_slots.reread_at``."""
        return reread_at(self._view.metadata())

    @property
    def kv_layers(self) -> tuple[int, ...]:
        """See ``cache_slots.slot_layers``."""
        return slot_layers(self._view.metadata())

    @property
    def head_tokens(self) -> tuple[int, ...]:
        """See ``words.head_tokens``."""
        return head_tokens(self._view.metadata())

    @property
    def input_types(self) -> dict[str, Type]:
        """dtype and shape of each input by name."""
        types = map(self._view.type, self._view.inputs())
        return dict(zip(self.input_names, types, strict=True))

    @property
    def output_names(self) -> tuple[str, ...]:
        return self._view.output_names()


@dataclass(frozen=True)
class Backend:
    """A way to run graphs, as its module declares it."""

    build: Callable[..., Executable]
    """``build(graph, *, device, **options)``: see ``registry.compile``."""
    check_device: Callable[[str], None]
    """Raises ``Missing`` where a device or a package is not there, ``BadInput`` for a device that
    it does not run on."""
    runs_artifacts: bool = False
    """Whether it runs the artifact's own file; others load it as a graph first."""
    is_reference: bool = False
    """Whether it is what the others are held against."""
    library: str = ""
    """The package that it imports when it is used first."""


def bind(
    types: Mapping[str, Type], args: tuple[torch.Tensor, ...], inputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Positional and named inputs as one mapping; a key-value cache that is left out is empty, and
    arrays of numpy become tensors.

    ``types`` are the inputs' types in order. Raises ``BadInput`` where names do not fit.
    """
    names = tuple(types)
    if len(args) > len(names):
        raise BadInput(
            f"{len(args)} inputs given, the graph takes {len(names)}: {', '.join(names)}"
        )
    bound: dict[str, Any] = dict(zip(names, args, strict=False))
    twice = sorted(set(bound) & set(inputs))
    if twice:
        raise BadInput(f"given twice: {', '.join(twice)}")
    bound |= inputs
    bound = {n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in bound.items()}
    bound |= left_out(types, bound)
    missing, unknown = sorted(set(names) - set(bound)), sorted(set(bound) - set(names))
    if missing or unknown:
        parts = [f"missing {', '.join(missing)}"] if missing else []
        parts += [f"unknown {', '.join(unknown)}"] if unknown else []
        raise BadInput(f"inputs: {'; '.join(parts)} (the graph takes {', '.join(names)})")
    return bound
