"""Modules of libraries without a single parameter in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ...core.errors import BadInput
from ...core.memory import refuse_beyond_memory
from ...core.quiet import quiet
from ...core.weights import AbsentWeight, Weight

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


def constructed(folder: Path, cls: Any, make: Callable[[], Any]) -> Any:
    """The module that ``make`` builds by a folder's config, of class ``cls``, without parameters.

    Raises ``BadInput``, with the error of the model's code as its cause, where it cannot.
    """
    try:
        with quiet(), torch.no_grad(), EmptyOnMeta():
            return make()
    except BadInput as error:
        raise BadInput(f"{folder}/config.json: {error}") from None
    except Exception as error:
        # A model's code meets the config's values unchecked, and raises errors of any kind.
        raise BadInput(
            f"{folder}: {cls.__name__} cannot be built from its config.json: "
            f"{type(error).__name__}: {reason(error)}"
        ) from error


def reason(error: Exception) -> str:
    """What an error says, in a line: the field, and in strict dataclasses why it is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return text or type(error).__name__


def absent_weights(folder: Path, model: torch.nn.Module) -> dict[str, Weight]:
    """A handle without numbers for each parameter: ``folder`` holds none."""
    return {
        name: AbsentWeight(name, tuple(p.shape), p.dtype, f"{folder} holds no weights")
        for name, p in model.named_parameters(remove_duplicate=False)
    }
