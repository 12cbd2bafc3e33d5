"""What ``torch.export`` does for debuggers and for gradients is left out: a third of its time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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
    which no graph of an export is; and ``torch.no_grad`` in a model's code leaves no
    mark where gradients are off already, so that the exporter does not split the graph at each.
    """
    with (
        _no_stack_traces(), _no_tensor_meta(), _use_lazy_graph_module(True), _unmarked_no_grad(),
    ):  # fmt: skip
        yield


@contextlib.contextmanager
def _no_stack_traces() -> Iterator[None]:
    config: Any = torch.fx.config
    before = getattr(config, "do_not_emit_stack_traces", None)
    if before is None:  # torch 2.11 always records them
        yield
        return
    config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        config.do_not_emit_stack_traces = before


@contextlib.contextmanager
def _no_tensor_meta() -> Iterator[None]:
    module: Any = proxy_tensor
    name = "_extract_tensor_metadata"
    before = getattr(module, name, None)
    if before is None:
        yield
        return
    setattr(module, name, lambda tensor: None)
    try:
        yield
    finally:
        setattr(module, name, before)


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
