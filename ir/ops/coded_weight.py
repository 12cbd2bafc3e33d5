"""A matrix in the form of a stored linear: numbers for whoever reads it, codes for whoever writes.

Passes see a plain linear and give it other numbers, or another form, as they give any. What they
leave alone is written as it was stored (``backends.onnx.forms.coded_form``).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch

from ..core.weights import CastWeight, Weight
from ..vocab import REQUIRED, spec
from ..vocab.spec import Attrs


class CodedWeight(Weight):
    """The matrix ``[N, K]`` that an op of ours multiplies by, computed in float32 by its ``dense``
    each time that it is read."""

    shape: tuple[int, int]

    def __init__(self, op: str, parts: Mapping[str, Weight], attrs: Attrs) -> None:
        defaults = {name: value for name, value in spec(op).attrs.items() if value is not REQUIRED}
        self.op, self.parts, self.attrs = op, parts, {**defaults, **attrs}
        self.shape = (attrs["out_features"], attrs["in_features"])
        self.dtype = torch.float32

    def read(self) -> torch.Tensor:
        declared = spec(self.op)
        assert declared.dense is not None
        parts = [self.parts.get(name.removesuffix("?")) for name in declared.operands[1:]]
        read = [None if part is None else part.read() for part in parts]
        return declared.dense(self.shape[1], read, self.attrs)

    @property
    def stored_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    @property
    def form(self) -> str:
        """How it is stored, in a few words."""
        stored_linear = spec(self.op).stored_linear
        assert stored_linear is not None
        return stored_linear(self.attrs)

    @property
    def key(self) -> Hashable:
        parts = tuple(part.key for part in self.parts.values())
        return (self.op, tuple(self.attrs.items()), parts)


def coded(handle: Weight | None) -> CodedWeight | None:
    """The coded matrix behind a handle, through casts of its numbers."""
    while isinstance(handle, CastWeight):
        handle = handle.base
    return handle if isinstance(handle, CodedWeight) else None
