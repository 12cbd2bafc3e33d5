"""Which blocks the residual stream runs through, as text and as numbers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

from ..core.errors import BadInput, Refusal
from ..structure.layers import Block
from ..structure.units import Part, Unit, in_halves, whole

_PART = re.compile(r"(\d+)(?:-(\d+))?(?:\.(attn|mlp))?")


@dataclass(frozen=True)
class Path:
    """Blocks, or halves of them, in order: ``str`` prints what ``parse`` takes."""

    steps: tuple[tuple[int, Part], ...]
    """The block's number, and which part of it."""

    @classmethod
    def of(cls, blocks: Iterable[int]) -> Path:
        """Through whole blocks."""
        return cls(tuple((block, "") for block in blocks))

    @classmethod
    def through(cls, units: Iterable[Unit]) -> Path:
        """Through these; a block whose halves follow each other is named as a whole."""
        steps: list[tuple[int, Part]] = []
        for unit in units:
            if unit.part == "mlp" and steps and steps[-1] == (unit.block, "attn"):
                steps[-1] = (unit.block, "")
            else:
                steps.append((unit.block, unit.part))
        return cls(tuple(steps))

    @classmethod
    def parse(cls, text: str) -> Path:
        """``0-3,3,5.attn,7-11``: blocks, runs of them, and halves (``attn``, ``mlp``) of either.

        Raises ``BadInput`` where it is none.
        """
        steps: list[tuple[int, Part]] = []
        for word in text.split(","):
            match = _PART.fullmatch(word.strip())
            if match is None:
                raise BadInput(
                    f"path {text!r}: {word!r} is not a block, as 3, no run, as 0-3, and no half of "
                    "one, as 3.attn or 3.mlp"
                )
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first:
                raise BadInput(f"path {text!r}: the run {word} goes backwards")
            part = cast(Part, match[3] or "")
            steps += [(block, part) for block in range(first, last + 1)]
        return cls(tuple(steps))

    def __str__(self) -> str:
        runs: list[list[int]] = []
        parts: list[Part] = []
        for block, part in self.steps:
            if runs and block == runs[-1][-1] + 1 and part == parts[-1]:
                runs[-1].append(block)
            else:
                runs.append([block])
                parts.append(part)
        words = (str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
        return ",".join(f"{w}.{p}" if p else w for w, p in zip(words, parts, strict=True))

    def units(self, blocks: Sequence[Block]) -> tuple[list[Unit], list[int]]:
        """What the tower is cut into for this path, and the path as places in it.

        Whole blocks where it names no half. Raises ``BadInput`` for a block or half that is not
        there, ``Refusal`` where one comes first in another order than the graph's.
        """
        if not self.steps:
            raise BadInput("the path is empty: name at least one block")
        units = in_halves(blocks) if any(part for _, part in self.steps) else whole(blocks)
        at = {(unit.block, unit.part): i for i, unit in enumerate(units)}
        places: list[int] = []
        for step in self.steps:
            places += self._places(step, at, len(blocks))
        firsts = list(dict.fromkeys(places))
        if firsts != sorted(firsts):
            late = next(b for a, b in itertools.pairwise(firsts) if b < a)
            raise Refusal(
                f"path {self}: {units[late].name} comes first after a later one; blocks may be "
                "left out and repeated, but not moved forward"
            )
        return units, places

    def _places(
        self, step: tuple[int, Part], at: dict[tuple[int, Part], int], total: int
    ) -> list[int]:
        block, part = step
        if block >= total:
            raise BadInput(f"path {self}: there is no block {block}; there are 0 to {total - 1}")
        if step in at:
            return [at[step]]
        if part:
            raise BadInput(
                f"path {self}: block {block} has no halves: no sum lies between its attention and "
                "its feed-forward layers"
            )
        return [at[block, "attn"], at[block, "mlp"]]
