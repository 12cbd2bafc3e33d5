"""``drop-blocks``: leave out the blocks that do least."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar, Literal

from ...ir.core.errors import BadInput, Refusal
from ...ir.moves.bypass_blocks import Path, follow, refusals
from ...ir.run.statistics import AngularDistance, BlockInfluence, Stat, Statistics
from ...ir.structure.recognize import Block, last_tower
from ..base import BLOCKS, Context, Needs, Pass, PassResult
from .blocks import block_sites


@dataclass(frozen=True, kw_only=True)
class DropBlocks(Pass):
    """Bypass ``count`` blocks of the (language) model.

    ``score=influence`` drops those that turn the residual stream least, one by one (ShortGPT, Men
    et al. 2024, arXiv 2403.03853); ``score=angular`` the run of ``count`` blocks over which the
    last token turns least, never the last block (Gromov et al. 2024, arXiv 2403.17887);
    ``score=random`` is the baseline, with ``seed``. The first two need calibration data. All scores
    are in the report.
    """

    name: ClassVar[str] = "drop-blocks"
    exact: ClassVar[bool] = False
    provides: ClassVar[tuple[str, ...]] = (BLOCKS,)
    count: int = 1
    """Blocks to leave out."""
    score: Literal["influence", "angular", "random"] = "influence"
    """How blocks are chosen; the first two take data."""
    seed: int = 0
    """Of score=random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < 1:
            raise BadInput(f"drop-blocks: count={self.count} must be at least 1")

    def requires(self) -> Needs:
        stats = {
            "influence": (Stat("block_influence", at="block"),),
            "angular": (Stat("angular_distance", at="block", span=self.count),),
            "random": (),
        }
        return Needs(stats=stats[self.score])

    def run(self, context: Context) -> PassResult:
        blocks = self._blocks(context)
        result = PassResult()
        reasons = refusals(context.view, blocks)
        fixed = {i for i, reason in enumerate(reasons) if reason}
        result.refused += [(f"block {i}", reasons[i]) for i in sorted(fixed)]
        if self.count > len(blocks) - len(fixed):
            raise BadInput(
                f"drop-blocks: count={self.count}, but of {len(blocks)} blocks only "
                f"{len(blocks) - len(fixed)} can be left out ({result.refused[0][1]})"
            )
        dropped = self._choose(context, blocks, fixed, result)
        result.sites += block_sites(context.view, blocks, dict.fromkeys(dropped, 0))
        kept = Path(tuple(i for i in range(len(blocks)) if i not in dropped))
        try:
            follow(context.view, blocks, kept, rule=self.name, step=context.step)
        except Refusal as refusal:
            raise BadInput(f"drop-blocks: {refusal}") from None
        result.notes.append(f"path of the blocks that stay: {kept}")
        context.edited()
        return result

    def plan(self, context: Context) -> PassResult:
        """Which blocks go is decided by data: the forecast takes the last but one and those before
        it."""
        blocks = self._blocks(context)
        result = PassResult()
        if self.score == "random":
            chosen = self._random(list(range(len(blocks))))
        else:
            chosen = list(range(len(blocks)))[-1 - self.count : -1]
            result.notes.append("which blocks go is decided by the calibration data")
        result.sites += block_sites(context.view, blocks, dict.fromkeys(chosen, 0))
        return result

    def _blocks(self, context: Context) -> list[Block]:
        blocks = last_tower(context.structure)
        if self.count >= len(blocks):
            raise BadInput(
                f"drop-blocks: count={self.count} of {len(blocks)} blocks; at least one must stay"
            )
        return blocks

    def _choose(
        self, context: Context, blocks: list[Block], fixed: set[int], result: PassResult
    ) -> list[int]:
        """Which blocks go; those in ``fixed`` stay."""
        if self.score == "random":
            return self._random([i for i in range(len(blocks)) if i not in fixed])
        if self.score == "angular":
            return self._run_of_blocks(context, blocks, fixed, result)
        influence = context.once(
            "influence", lambda: [s[BlockInfluence].influence for s in self._statistics(context)]
        )
        result.notes.append("block influence: " + _listed(influence))
        free = [i for i in range(len(blocks)) if i not in fixed]
        return sorted(sorted(free, key=lambda i: (influence[i], i))[: self.count])

    def _run_of_blocks(
        self, context: Context, blocks: list[Block], fixed: set[int], result: PassResult
    ) -> list[int]:
        # The run that holds the last block is left out.
        turned = context.once(
            "angles", lambda: [s[AngularDistance].distance for s in self._statistics(context)][:-1]
        )
        result.notes.append("angular distance by first block: " + _listed(turned))
        runs = [range(i, i + self.count) for i in range(len(turned))]
        free = [run for run in runs if not fixed.intersection(run)]
        if not free:
            raise BadInput(
                f"drop-blocks: no run of {self.count} blocks can be left out as a whole; use "
                "score=influence"
            )
        best = min(free, key=lambda run: (turned[run.start], run.start))
        return list(best)

    def _statistics(self, context: Context) -> list[Statistics]:
        """Of each run of blocks, by its first one."""
        assert context.learning is not None
        (found,) = context.learning.at_blocks(context, self.requires()).values()
        return found

    def _random(self, free: list[int]) -> list[int]:
        return sorted(random.Random(self.seed).sample(free, self.count))


def _listed(scores: list[float]) -> str:
    return " ".join(f"{i}:{score:.4g}" for i, score in enumerate(scores))
