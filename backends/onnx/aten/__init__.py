"""ATen ops outside the vocabulary as ONNX: a table, and what its entries build with.

An entry gets an FX node's arguments in the order of the op's schema, tensors and sizes as ONNX
values, and returns what stands for its result (a tuple for several). It raises ``Refusal`` where it
does not cover a use; that node goes through ``torch.onnx`` then.
"""

from __future__ import annotations

from typing import Any

from . import elementwise, places, reductions, sizes
from .emit import Emit, Form

FORMS: dict[Any, Form] = {
    **sizes.FORMS, **elementwise.FORMS, **reductions.FORMS, **places.FORMS,
}  # fmt: skip
"""Native target to its form."""

__all__ = ["FORMS", "Emit"]
