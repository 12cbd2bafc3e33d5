"""What ``torch.export`` does for debuggers and for gradients is left out: a third of its time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.fx.config
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental import proxy_tensor


@contextlib.contextmanager
def lean_export() -> Iterator[None]:
    """Within it, an export records and compiles nothing that the graph's readers do not read.

    No node keeps the lines of Python that made it, or its tensor's strides and memory format beside
    the tensor (``tensor_meta``); a graph that is rewritten compiles its code when it is called,
    which no graph of an export is; and ``torch.no_grad`` in a model's code leaves no mark where
    gradients are off already, so that the exporter does not split the graph at each.
    """
    with (
        # torch 2.11 has no such setting, and always records them.
        replaced(torch.fx.config, "do_not_emit_stack_traces", lambda _: True),
        replaced(proxy_tensor, "_extract_tensor_metadata", lambda _: lambda tensor: None),
        _use_lazy_graph_module(True),
        _unmarked_no_grad(),
    ):
        yield


@contextlib.contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Within it, what torch has by a name is what is made of it; nothing where it has no such."""
    before = getattr(owner, name, None)
    if before is None:
        yield
        return
    setattr(owner, name, make(before))
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def _unmarked_no_grad() -> Iterator[None]:
    enter, leave = torch.no_grad.__enter__, torch.no_grad.__exit__

    def entered(self: Any) -> None:
        self.changes_nothing = not torch.is_grad_enabled()
        if not self.changes_nothing:
            enter(self)

    def left(self: Any, *error: Any) -> None:
        if not getattr(self, "changes_nothing", False):  # what another thread entered before
            leave(self, *error)

    torch.no_grad.__enter__, torch.no_grad.__exit__ = entered, left  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.no_grad.__enter__, torch.no_grad.__exit__ = enter, leave  # type: ignore[method-assign]
