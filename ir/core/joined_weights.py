"""Weights that lie one behind another in one: the whole of several, and some rows of one."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import torch

from .weights import Weight


class JoinedWeight(Weight):
    """The rows of several weights of one dtype, alike but for how many they have."""

    def __init__(self, parts: Sequence[Weight]) -> None:
        first = parts[0]
        if any((p.shape[1:], p.dtype) != (first.shape[1:], first.dtype) for p in parts):
            raise ValueError(f"the rows of these weights are not alike: {list(parts)}")
        self.parts = tuple(parts)
        self.shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
        self.dtype = first.dtype

    def read(self) -> torch.Tensor:
        return torch.cat([part.read() for part in self.parts])

    def pieces(self) -> Iterator[torch.Tensor]:
        for part in self.parts:
            yield from part.pieces()

    @property
    def key(self) -> Hashable:
        return ("joined", tuple(part.key for part in self.parts))


class StackedWeight(JoinedWeight):
    """Weights ``[1, ...]`` of one shape and dtype, one behind the other along the first dimension.

    ``names`` are what the parts are called where they are stored one by one.
    """

    def __init__(self, parts: Sequence[Weight], names: Sequence[str]) -> None:
        if any(part.shape != parts[0].shape for part in parts):
            raise ValueError(f"these weights are not alike: {list(parts)}")
        super().__init__(parts)
        self.names = tuple(names)


class RowsWeight(Weight):
    """The rows ``start`` to ``end`` of a weight."""

    def __init__(self, whole: Weight, start: int, end: int) -> None:
        self.whole, self.start, self.end = whole, start, end
        self.shape, self.dtype = (end - start, *whole.shape[1:]), whole.dtype

    def read(self) -> torch.Tensor:
        return self.whole.read()[self.start : self.end]

    @property
    def key(self) -> Hashable:
        return ("rows", self.whole.key, self.start, self.end)


def joined(parts: Sequence[Weight]) -> Weight:
    """All rows of the parts, in order; the weight itself that they are all rows of."""
    whole = parts[0].whole if isinstance(parts[0], RowsWeight) else None
    end = 0
    for part in parts:
        if whole is None or not isinstance(part, RowsWeight):
            return JoinedWeight(parts)
        if part.whole is not whole or part.start != end:
            return JoinedWeight(parts)
        end = part.end
    return whole if whole is not None and end == whole.shape[0] else JoinedWeight(parts)
