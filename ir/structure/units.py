"""Stretches of the residual stream that it can run around, or through again: blocks, their halves.

A block's halves are its attention, with the sum that joins it to the stream, and what lies behind
that sum. Where one sum joins both (GPT-J, Falcon), a block has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..core.view import Value
from .layers import Block

Part = Literal["", "attn", "mlp"]
"""Of a block: all of it, its attention, its feed-forward layers."""


@dataclass(frozen=True)
class Unit:
    """A block, or a half of one: the stream before and behind it."""

    block: int
    """The number of its block in the tower."""
    part: Part
    entry: Value
    exit: Value

    @property
    def name(self) -> str:
        return f"block {self.block}.{self.part}" if self.part else f"block {self.block}"


def whole(blocks: Sequence[Block]) -> list[Unit]:
    """The blocks of a tower, numbered from 0."""
    return [Unit(i, "", block.entry, block.exit) for i, block in enumerate(blocks)]


def in_halves(blocks: Sequence[Block]) -> list[Unit]:
    """All halves in order; a block that has none as a whole."""
    units: list[Unit] = []
    for i, block in enumerate(blocks):
        first, last = block.sub_blocks[0], block.sub_blocks[-1]
        if first is last or not first.attends:
            units.append(Unit(i, "", block.entry, block.exit))
        else:
            units.append(Unit(i, "attn", first.entry, first.exit))
            units.append(Unit(i, "mlp", first.exit, last.exit))
    return units
