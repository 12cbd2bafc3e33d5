"""Where an artifact's bytes are: its tensors by role, and why one is wider than it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import onnx_ir

from ...ir.core.types import DTYPE_NAMES
from ...ir.core.weights import Weight
from ...ir.onnx.view import OnnxView
from .manifest import TensorsEntry
from .summary import group_name

LEAST = 0.01
"""Share of all tensors' bytes below which a role is not listed."""
_DERIVED = (".written", ".columns", ".rows")
"""Ends of the names of tensors that a form makes of others when it is written: ``ops.emit``."""


class _Tensor(NamedTuple):
    name: str
    dtype: str
    nbytes: int
    numel: int


def tensors(onnx: OnnxView, *known: Mapping[str, Weight]) -> list[TensorsEntry]:
    """Each role that holds at least ``LEAST`` of the bytes, largest first.

    ``known`` are weights by name as they were before: those of the rewritten graph and those of the
    source, where a tensor is looked for in this order. No tensor is read.
    """
    groups: dict[tuple[str, str], list[_Tensor]] = {}
    for tensor in _stored(onnx):
        groups.setdefault((group_name(_made_of(tensor.name)), tensor.dtype), []).append(tensor)
    total = sum(tensor.nbytes for group in groups.values() for tensor in group)
    entries = [
        TensorsEntry(
            name=name, dtype=dtype, count=len(group), bytes=sum(t.nbytes for t in group),
            wider=_why_wider(group[0], known),
        )
        for (name, dtype), group in groups.items()
    ]  # fmt: skip
    listed = [entry for entry in entries if entry.bytes >= LEAST * total]
    return sorted(listed, key=lambda entry: (-entry.bytes, entry.name))


def _stored(onnx: OnnxView) -> Iterable[_Tensor]:
    for name, value in onnx.model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None:
            yield _Tensor(name, _text(tensor.dtype), tensor.nbytes, tensor.size)


def _text(dtype: onnx_ir.DataType) -> str:
    """As types are printed elsewhere, ``f32``, ``u8``, ``i4``."""
    return str(dtype.short_name())


def _made_of(name: str) -> str:
    """The name by which a person knows a tensor: without what a form put behind it."""
    return next((name.removesuffix(end) for end in _DERIVED if name.endswith(end)), name)


def _why_wider(tensor: _Tensor, known: Iterable[Mapping[str, Weight]]) -> str:
    """Empty where a tensor takes no more bytes than that which it was made of."""
    names = dict.fromkeys((tensor.name, _made_of(tensor.name)))
    before = [w for held in known for n in names if (w := held.get(n)) is not None]
    least = min(before, key=lambda weight: weight.nbytes, default=None)
    if least is None or tensor.nbytes <= least.nbytes:
        return ""
    if tensor.numel > least.numel:
        return "repeated for each block of a row, as the runtime reads it"
    held = DTYPE_NAMES.get(least.dtype, str(least.dtype))
    return f"{tensor.dtype}, which the runtime computes in, {held} before"
