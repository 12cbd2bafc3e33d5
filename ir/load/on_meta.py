"""Modules of libraries without a single parameter in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..core.memory import refuse_beyond_memory

_MAKERS = (torch.ones, torch.zeros, torch.full, torch.arange, torch.linspace, torch.eye)
_SMALL_BYTES = 1 << 28


class EmptyOnMeta(TorchFunctionMode):
    """``torch.empty`` on the meta device, everything else where it is.

    Layers make their parameters with ``torch.empty``; what a model computes for itself (rotary
    frequencies, position ids, masks) never starts from uninitialised memory, and stays real: as far
    as there is memory for it.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        if func in _MAKERS:
            size = func(*args, **kwargs | {"device": "meta"}).nbytes
            if size > _SMALL_BYTES:
                refuse_beyond_memory(size, "a tensor that the model makes by its config")
        return func(*args, **kwargs)


def drop_parameters(model: torch.nn.Module) -> None:
    """Put those parameters on the meta device that are not there, as those made of zeros."""
    for owner in model.modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None and parameter.device.type != "meta":
                owner._parameters[key] = torch.nn.Parameter(
                    parameter.to("meta"), requires_grad=False
                )
