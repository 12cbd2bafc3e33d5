"""What a run remembers of itself, so that one that was killed need not compute it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

from ..ir.core.heap import give_back

T = TypeVar("T")


class CheckpointStore(Protocol):
    """Results by key, kept where they outlive the process.

    A result is made of tensors, numbers, text, ``None``, and lists and dicts of these.
    """

    def recall(self, key: str) -> Any:
        """What was kept under a key. Raises ``KeyError`` where nothing was."""

    def keep(self, key: str, result: Any) -> None:
        """Keep a result; it is there whole or not at all."""


class Under:
    """A part of a store, for one of several runs that each number what they keep from the start."""

    def __init__(self, checkpoints: CheckpointStore, name: str) -> None:
        self.checkpoints, self.name = checkpoints, name

    def recall(self, key: str) -> Any:
        return self.checkpoints.recall(f"{self.name}: {key}")

    def keep(self, key: str, result: Any) -> None:
        self.checkpoints.keep(f"{self.name}: {key}", result)


def remembered(checkpoints: CheckpointStore | None, key: str, make: Callable[[], T]) -> T:
    """What ``make`` gives, or gave in a run before.

    Tensors come back with memory of their own in either case: how one lies in memory may change the
    last bits of what is computed from it, and a resumed run must end with the same bytes.
    """
    if checkpoints is not None:
        try:
            earlier: T = checkpoints.recall(key)
        except KeyError:
            pass
        else:
            return earlier
    value: T = settled(make())
    give_back()
    if checkpoints is None:
        return value
    checkpoints.keep(key, value)
    copy: T = checkpoints.recall(key)
    return copy


def is_remembered(checkpoints: CheckpointStore | None, key: str) -> bool:
    """Whether ``remembered`` would not have to make the result."""
    if checkpoints is None:
        return False
    try:
        checkpoints.recall(key)
    except KeyError:
        return False
    return True


def settled(result: Any) -> Any:
    """The same with each tensor contiguous and in a storage of its own."""
    if isinstance(result, torch.Tensor):
        whole = result.untyped_storage().nbytes() == result.numel() * result.element_size()
        return result if result.is_contiguous() and whole else result.contiguous().clone()
    if isinstance(result, dict):
        return {key: settled(value) for key, value in result.items()}
    if isinstance(result, list | tuple):
        return [settled(value) for value in result]
    return result
