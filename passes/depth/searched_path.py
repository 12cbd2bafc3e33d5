"""What searches for one path share: what they search on, what judges, and what is said of it."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.moves.block_path import Path
from ...ir.moves.bypass_blocks import refusals
from ...ir.structure.layers import Block
from ...ir.structure.recognize import last_tower
from ...ir.structure.units import whole
from ..base import Context, Needs, PassResult
from .path_pass import PathPass
from .path_runner import PathRunner, Places
from .path_search import Trials, by_greed

HELD_OUT = 4
"""One of so many batches is not searched on: it judges."""


@dataclass(frozen=True, kw_only=True)
class SearchedPath(PathPass):
    """Base of passes that search for a path of at most ``max_path`` blocks.

    A quarter of the calibration data is not searched on, and judges: the report says how far the
    path, and as many blocks chosen greedily one by one, move the outputs there.
    """

    keeps_to_greed: ClassVar[bool] = False
    """Whether the greedily chosen path is taken where it moves outputs less on what was searched
    on."""
    max_path: int
    """Most blocks to run."""
    seed: int = 0
    """Of what is drawn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_path < 1:
            raise BadInput(f"{self.name}: max_path={self.max_path} must be at least 1")

    def requires(self) -> Needs:
        return Needs(calibration=True, stats=self.heal_stats())

    @abstractmethod
    def searched(self, runner: PathRunner, blocks: int) -> Mapping[Places, float]:
        """The paths that were tried, and how far each moves the outputs: the least is taken."""

    def run(self, context: Context) -> PassResult:
        blocks, result = self._blocks(context), PassResult()
        data, unseen = self._split(context.calibration)

        def search() -> list[list[int]]:
            runner = PathRunner(context.view, context.structure, whole(blocks), data)
            tried = self.searched(runner, len(blocks))
            path = min(tried, key=lambda p: (tried[p], len(p), tuple(-i for i in p)))
            result.notes.append(runner.effort())
            other = by_greed(Trials(runner, sys.maxsize), len(blocks), len(path))
            if self.keeps_to_greed and runner.divergence(other) < runner.divergence(path):
                return [list(other), list(other)]
            return [list(path), list(other)]

        path, other = (tuple(places) for places in context.once("search", search))
        judge = PathRunner(context.view, context.structure, whole(blocks), unseen)
        figures = ", ".join(
            f"{what} {Path.of(places)} by {judge.divergence(places):.4g}"
            for what, places in (("the path", path), ("greedily chosen", other))
        )
        result.notes.append(f"on data that the search did not see, outputs move: {figures}")
        if path != tuple(range(len(blocks))):
            self.follow(context, Path.of(path), result)
        result.notes.append(f"path {Path.of(path)}, of {len(blocks)} blocks")
        return result

    def plan(self, context: Context) -> PassResult:
        blocks = self._blocks(context)
        path = Path.of(range(min(self.max_path, len(blocks))))
        return PassResult(
            sites=self.sites(context, path), notes=["which blocks go is decided by the data"]
        )

    def _blocks(self, context: Context) -> tuple[Block, ...]:
        blocks = tuple(last_tower(context.structure))
        reasons = refusals(context.view, whole(blocks))
        lasting = next((i for i, reason in enumerate(reasons) if reason), None)
        if lasting is not None:
            raise BadInput(
                f"{self.name}: block {lasting} can be neither skipped nor repeated: "
                f"{reasons[lasting]}"
            )
        return blocks

    def _split(
        self, batches: Sequence[Mapping[str, Tensor]]
    ) -> tuple[list[Mapping[str, Tensor]], list[Mapping[str, Tensor]]]:
        """What is searched on, and what judges."""
        if len(batches) < 2:
            raise BadInput(
                f"{self.name}: the calibration data is one batch, and a part of it must stay "
                "unseen: give more samples"
            )
        return (
            [batch for i, batch in enumerate(batches) if i % HELD_OUT != 1],
            [batch for i, batch in enumerate(batches) if i % HELD_OUT == 1],
        )
