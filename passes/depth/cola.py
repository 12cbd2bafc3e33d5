"""``cola``: the path through the blocks, some skipped and some run again, that a search finds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.moves.block_path import Path
from ...ir.moves.bypass_blocks import refusals
from ...ir.structure.layers import Block
from ...ir.structure.recognize import last_tower
from ...ir.structure.units import whole
from ..base import Context, Needs, PassResult
from .layer_tree import LayerTree
from .layer_tree import Path as Places
from .path_pass import PathPass
from .path_runner import PathRunner

HELD_OUT = 4
"""One of so many batches is not searched on: it judges."""


@dataclass(frozen=True, kw_only=True)
class CoLa(PathPass):
    """Freeze the best path of at most ``max_path`` blocks that a tree search over skips and repeats
    finds (CoLa, Li et al. 2025, arXiv 2507.07996; Learning Program-of-Layers, arXiv 2606.06574).

    A decision skips one to four blocks, or runs them again up to four times; ``simulations`` paths
    are tried, each prefix run once. The paper searches one path for each input, with its answer in
    sight; this is one path for all, and what it is rewarded for needs no answers: ``objective=kl``
    is ``exp(-KL)`` from the source's words that come next (``exp(-relative L2)`` without a head).
    A quarter of the calibration data is not searched on, and judges: the report says how far the
    path, and as many blocks chosen greedily one by one, move the outputs there. ``penalty`` is the
    paper's lambda, 5.0 there, where it alone makes paths short; here ``max_path`` does.
    """

    name: ClassVar[str] = "cola"
    max_path: int
    """Most blocks to run."""
    simulations: int = 200
    """Paths to try."""
    penalty: float = 0.0
    """Of length, in choosing what to try."""
    objective: Literal["kl"] = "kl"
    """What a path is rewarded for."""
    seed: int = 0
    """Of what is drawn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.simulations < 1:
            raise BadInput(
                f"cola: simulations={self.simulations}: a search without a budget tries no path"
            )
        if self.max_path < 1:
            raise BadInput(f"cola: max_path={self.max_path} must be at least 1")
        if self.heal != "none":
            raise BadInput("cola: its paths may repeat blocks, and heal= is for those that do not")

    def requires(self) -> Needs:
        return Needs(calibration=True)

    def run(self, context: Context) -> PassResult:
        blocks, result = self._blocks(context), PassResult()
        searched, unseen = _split(context.calibration)

        def search() -> list[list[int]]:
            runner = PathRunner(context.view, context.structure, whole(blocks), searched)
            tree = LayerTree(
                len(blocks), self.max_path, self.penalty,
                lambda path, shared: math.exp(-runner.divergence(path, shared)), self.seed,
            )  # fmt: skip
            tried = tree.search(self.simulations)
            path = max(tried, key=lambda p: (tried[p], -len(p), p))
            result.notes.append(runner.effort(len(tried)))
            return [list(path), list(_greedy(runner, len(blocks), len(path)))]

        path, greedy = (tuple(places) for places in context.once("search", search))
        judge = PathRunner(context.view, context.structure, whole(blocks), unseen)
        figures = ", ".join(
            f"{what} {Path.of(places)} by {judge.divergence(places):.4g}"
            for what, places in (("the path", path), ("greedily chosen", greedy))
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
            raise BadInput(f"cola: block {lasting} can be neither skipped nor repeated: "
                           f"{reasons[lasting]}")  # fmt: skip
        return blocks


def _split(
    batches: Sequence[Mapping[str, Tensor]],
) -> tuple[list[Mapping[str, Tensor]], list[Mapping[str, Tensor]]]:
    """What is searched on, and what judges. Raises ``BadInput`` where there is one batch alone."""
    if len(batches) < 2:
        raise BadInput(
            "cola: the calibration data is one batch, and a part of it must stay unseen: give more "
            "samples"
        )
    return (
        [batch for i, batch in enumerate(batches) if i % HELD_OUT != 1],
        [batch for i, batch in enumerate(batches) if i % HELD_OUT == 1],
    )


def _greedy(runner: PathRunner, blocks: int, length: int) -> Places:
    """Blocks left out one by one, each time the one without which outputs move least."""
    path = tuple(range(blocks))
    while len(path) > length:
        gone = min(range(len(path)), key=partial(runner.without, path))
        path = path[:gone] + path[gone + 1 :]
    return path
