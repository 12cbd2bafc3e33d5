"""What a sweep would take at its widest place, from the shapes of its inputs, before it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..core.memory import refuse_beyond_memory
from ..core.types import UNKNOWN, Type
from ..core.view import Node, Operand, Value, View, is_value
from ..vocab import spec

_ALWAYS = 1 << 28
"""Bytes that a value may take whatever the machine has."""


def refuse_unbounded(
    view: View, batches: Sequence[Sequence[Any]], order: Sequence[Node]
) -> None:
    """Raise ``BadInput`` where a value, of all batches together, does not fit into memory.

    Followed by shapes alone, through the ops of the vocabulary: a file of a kilobyte may double
    what it holds forty times.
    """
    known: dict[Value, Type] = {}
    for i, value in enumerate(view.inputs()):
        rows = [row[i] for row in batches if isinstance(row[i], torch.Tensor)]
        widest = max(rows, key=torch.Tensor.numel, default=None)
        if widest is not None:
            known[value] = Type(widest.dtype, tuple(widest.shape))
    for node in order:
        for value, type_ in zip(view.results(node), _inferred(view, node, known), strict=False):
            known[value] = type_
            count = (type_.numel or 0) * (type_.dtype or torch.float32).itemsize * len(batches)
            if count > _ALWAYS:
                refuse_beyond_memory(count, f"{view.name(node)}: its result {type_}")


def _inferred(view: View, node: Node, known: Mapping[Value, Type]) -> Sequence[Type]:
    reading = view.read(node)
    if reading is None:
        return [view.type(value) for value in view.results(node)]
    op, operands, attrs = reading
    try:
        return spec(op).infer([_type(view, o, known) for o in operands], attrs)
    except (ValueError, IndexError, TypeError, ZeroDivisionError):
        return [UNKNOWN]  # running the node tells what is wrong


def _type(view: View, operand: Operand, known: Mapping[Value, Type]) -> Any:
    if not is_value(operand):
        return operand
    return known[operand] if operand in known else view.type(operand)
