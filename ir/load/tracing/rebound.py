"""A module's own forward with other functions in the place of some that its file defines."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import FunctionType, MethodType
from typing import Any

import torch


def globals_called(part: torch.nn.Module) -> tuple[str, ...]:
    """The names that the forward of a module's class asks of its file, among others."""
    forward = inspect.unwrap(type(part).forward)
    return forward.__code__.co_names if isinstance(forward, FunctionType) else ()


def rebind(part: torch.nn.Module, functions: Mapping[str, Callable[..., Any]]) -> None:
    """Let the forward of ``part`` alone call ``functions`` by those names; no other module, and no
    other thread, sees them."""
    ours = {name: functions[name] for name in globals_called(part) if name in functions}
    if not ours:
        return
    forward: Any = inspect.unwrap(type(part).forward)
    own = FunctionType(
        forward.__code__, {**forward.__globals__, **ours}, forward.__name__, forward.__defaults__,
        forward.__closure__,
    )  # fmt: skip
    own.__kwdefaults__ = forward.__kwdefaults__
    part.forward = MethodType(own, part)
