"""``drop-blocks``: leave out the blocks that do least."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar, Literal

from ...ir.core.errors import BadInput
from ...ir.moves.block_path import Path
from ...ir.moves.bypass_blocks import refusals
from ...ir.run.statistics import AngularDistance, BlockInfluence, Stat, Statistics
from ...ir.structure.recognize import last_tower
from ...ir.structure.units import Unit, in_halves, whole
from ..base import Context, Needs, PassResult
from .path_pass import PathPass
from .path_runner import PathRunner


@dataclass(frozen=True, kw_only=True)
class DropBlocks(PathPass):
    """Bypass ``count`` blocks of the (language) model, or as many halves of blocks.

    ``score=influence`` drops those that turn the residual stream least, one by one (ShortGPT, Men
    et al. 2024, arXiv 2403.03853); ``score=angular`` the run of ``count`` blocks over which the
    last token turns least, never the last block (Gromov et al. 2024, arXiv 2403.17887);
    ``score=kl`` those without which, one at a time, the outputs on the calibration data move least
    (mean KL divergence of the words that come next; relative L2 of a model without a head);
    ``score=greedy`` takes the least of these, and measures again without it, ``count`` times.
    ``score=random`` is the baseline, with ``seed``; all others need calibration data. All scores
    are in the report.

    ``of=attn`` leaves out attention and keeps the feed-forward layers of its block, ``of=mlp`` the
    other way round, ``of=half`` takes the least of both (He et al. 2024, arXiv 2406.15786, find
    attention the cheaper half).
    """

    name: ClassVar[str] = "drop-blocks"
    count: int = 1
    """Blocks to leave out."""
    score: Literal["influence", "angular", "kl", "greedy", "random"] = "influence"
    """Or angular, kl, greedy: by data; random."""
    of: Literal["block", "attn", "mlp", "half"] = "block"
    """What is left out."""
    seed: int = 0
    """Of score=random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < 1:
            raise BadInput(f"drop-blocks: count={self.count} must be at least 1")
        if self.score == "angular" and self.of != "block":
            raise BadInput(
                f"drop-blocks: score=angular is of runs of whole blocks, not of={self.of}; use "
                "score=influence"
            )

    def requires(self) -> Needs:
        outputs = self.score in ("kl", "greedy")
        return Needs(calibration=outputs, stats=(*self._scored, *self.heal_stats()))

    @property
    def _scored(self) -> tuple[Stat, ...]:
        if self.score == "influence":
            return (Stat("block_influence", at="block"),)
        if self.score == "angular":
            return (Stat("angular_distance", at="block", span=self.count),)
        return ()

    def run(self, context: Context) -> PassResult:
        units, free = self._units(context)
        result = PassResult()
        reasons = refusals(context.view, [units[i] for i in free])
        result.refused += [
            (units[i].name, reason) for i, reason in zip(free, reasons, strict=True) if reason
        ]
        free = [i for i, reason in zip(free, reasons, strict=True) if not reason]
        if self.count > len(free):
            raise BadInput(
                f"drop-blocks: count={self.count}, but of {len(reasons)} {self._what} only "
                f"{len(free)} can be left out ({result.refused[0][1]})"
            )
        dropped = self._choose(context, units, free, result)
        path = Path.through(unit for i, unit in enumerate(units) if i not in dropped)
        self.follow(context, path, result)
        result.notes.append(f"path of the blocks that stay: {path}")
        return result

    def plan(self, context: Context) -> PassResult:
        """Which blocks go is decided by data: the forecast takes the last but one and those before
        it."""
        units, free = self._units(context)
        result = PassResult()
        if self.score == "random":
            chosen = self._random(free)
        else:
            chosen = free[-1 - self.count : -1]
            result.notes.append(f"which {self._what} go is decided by the calibration data")
        path = Path.through(unit for i, unit in enumerate(units) if i not in chosen)
        result.sites += self.sites(context, path)
        return result

    @property
    def _what(self) -> str:
        return "blocks" if self.of == "block" else "halves of blocks"

    def _units(self, context: Context) -> tuple[list[Unit], list[int]]:
        """What the tower is cut into, and the places of what may go."""
        blocks = last_tower(context.structure)
        units = whole(blocks) if self.of == "block" else in_halves(blocks)
        parts = {"block": ("",), "attn": ("attn",), "mlp": ("mlp",), "half": ("attn", "mlp")}
        free = [i for i, unit in enumerate(units) if unit.part in parts[self.of]]
        if not free:
            raise BadInput(
                f"drop-blocks: of={self.of}, but no block here has halves: no sum lies between "
                "attention and feed-forward layers"
            )
        if self.count >= len(free):
            raise BadInput(
                f"drop-blocks: count={self.count} of {len(free)} {self._what}; at least one must "
                "stay"
            )
        return units, free

    def _choose(
        self, context: Context, units: list[Unit], free: list[int], result: PassResult
    ) -> list[int]:
        """Which go, of those in ``free``."""
        if self.score == "random":
            return self._random(free)
        if self.score == "angular":
            return self._run_of_blocks(context, units, free, result)
        if self.score in ("kl", "greedy"):
            return self._by_outputs(context, units, free, result)
        influence = context.once(
            "influence",
            lambda: [s[BlockInfluence].influence for s in self._statistics(context, units)],
        )
        result.notes.append("block influence: " + _listed(units, influence))
        return sorted(sorted(free, key=lambda i: (influence[i], i))[: self.count])

    def _run_of_blocks(
        self, context: Context, units: list[Unit], free: list[int], result: PassResult
    ) -> list[int]:
        # The run that holds the last block is left out.
        turned = context.once(
            "angles",
            lambda: [s[AngularDistance].distance for s in self._statistics(context, units)][:-1],
        )
        result.notes.append("angular distance by first block: " + _listed(units, turned))
        starts = [i for i in range(len(turned)) if set(range(i, i + self.count)).issubset(free)]
        if not starts:
            raise BadInput(
                f"drop-blocks: no run of {self.count} blocks can be left out as a whole; use "
                "score=influence"
            )
        start = min(starts, key=lambda i: (turned[i], i))
        return list(range(start, start + self.count))

    def _by_outputs(
        self, context: Context, units: list[Unit], free: list[int], result: PassResult
    ) -> list[int]:
        def search() -> list[list[list[float]]]:
            runner = PathRunner(context.view, context.structure, units, context.calibration)
            path, rounds = list(range(len(units))), []
            for _ in range(self.count if self.score == "greedy" else 1):
                places = [i for i in path if i in free]
                moved = [runner.without(path, path.index(i)) for i in places]
                rounds.append([[float(i) for i in places], moved])
                path.remove(places[moved.index(min(moved))])
            result.notes.append(runner.effort())
            return rounds

        dropped: list[int] = []
        for places, moved in context.once("search", search):
            ranked = sorted(zip(moved, map(int, places), strict=True))
            names = [units[int(i)] for i in places]
            result.notes.append("outputs move without each: " + _listed(names, moved))
            dropped += [i for _, i in ranked[: 1 if self.score == "greedy" else self.count]]
        return sorted(dropped)

    def _statistics(self, context: Context, units: list[Unit]) -> list[Statistics]:
        """Of each run of ``span`` units, by its first one."""
        assert context.learning is not None
        (statistics,) = context.learning.at_units(context, self._scored, units).values()
        return statistics

    def _random(self, free: list[int]) -> list[int]:
        return sorted(random.Random(self.seed).sample(free, self.count))


def _listed(units: list[Unit], scores: list[float]) -> str:
    names = (unit.name.removeprefix("block ") for unit in units)
    return " ".join(f"{name}:{score:.4g}" for name, score in zip(names, scores, strict=False))
