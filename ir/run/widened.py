"""A graph's numbers without the rounding of half types: the same nodes, computed in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..core.view import Node, View
from .sweep import Results, executed, sweep_together

HALVES = (torch.float16, torch.bfloat16)


def sweep_widened(
    view: View, batches: Sequence[Mapping[str, torch.Tensor]]
) -> list[dict[str, torch.Tensor]]:
    """``sweep_together`` with float32 in the place of float16 and bfloat16: in operands, weights,
    results, and the dtypes that nodes name. Every half number is one of float32, so inputs and
    weights keep their values, and outputs are float32 where they were half. Raises ``NodeFailed``
    for a native node that takes its half type alone."""
    return sweep_together(view, batches, execute=_execute)


def _execute(view: View, node: Node, arguments: list[list[Any]]) -> list[Results]:
    with _Widening():  # type: ignore[no-untyped-call]
        return executed(view, node, [[*map(_wide, row)] for row in arguments])


class _Widening(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.view.dtype:  # the same bytes, which are those of a half number
            return func(*args, **(kwargs or {}))
        wide_args, wide_kwargs = pytree.tree_map(_wide, (args, kwargs or {}))
        return func(*wide_args, **wide_kwargs)


def _wide(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor) and leaf.dtype in HALVES:
        return leaf.to(torch.float32)
    return torch.float32 if isinstance(leaf, torch.dtype) and leaf in HALVES else leaf
