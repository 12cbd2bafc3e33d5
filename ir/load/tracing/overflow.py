"""Clamps of fp16 that a library applies where any number is infinite, which no graph can ask.

BART's and Marian's encoders, and others of their line, clamp a stream of fp16 to what is just
within its range, but only if ``isfinite`` is false, or ``isinf`` true, somewhere. A graph clamps
always, as the library's mBART does: that changes finite numbers above 64504 alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_INFINITE: Mapping[Any, bool] = {torch.isfinite: False, torch.isinf: True}
"""What is asked, and the answer where a number is infinite."""
_GATHERED = (torch.Tensor.all, torch.Tensor.any)


class AlwaysClamped(TorchFunctionMode):
    """Within it transformers' code, which does nothing else then, hears that fp16 overflowed."""

    def __init__(self) -> None:
        super().__init__()
        self._answers: list[tuple[torch.Tensor, bool]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        given = args[0] if args else None
        known = next((answer for tensor, answer in self._answers if tensor is given), None)
        if func is torch.Tensor.__bool__ and known is not None:
            return known
        result = func(*args, **(kwargs or {}))
        asks = func in _INFINITE and given is not None and given.dtype == torch.float16
        if asks and _by_library():
            self._answers.append((result, _INFINITE[func]))
        if func in _GATHERED and known is not None:
            self._answers.append((result, known))
        return result


def _by_library() -> bool:
    """Whether it is transformers' code that asks, by way of the exporter's own modes."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__", "").startswith("torch."):
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__", "").startswith("transformers.")
